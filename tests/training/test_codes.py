"""Stored codes: those computed online, stamped, in shards, continued, pushed, and refused where they do not fit."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator, PartialState
from scripts import load_script

from dar_hf.data import DataError, ImageTransform
from dar_hf.training import ARStage, make_accelerator, train
from dar_hf.training import codes as codes_module
from dar_hf.training.codes import load_codes, make_stamp
from dar_hf.training.extraction import ExtractArguments, extract_codes
from dar_hf.training.loop import TrainingLoop

from .helpers import ar_args, ar_stage, batch_of, fresh_process, tiny_tokenizer

SUBSET = {"max_train_samples": 20, "cache_codes": False}


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory):
    """40 digits as a data set of its own, with a test split."""
    from dar_hf.data.sources import load_digits

    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits("train")
    digits.select(range(40)).to_parquet(folder / "train.parquet")
    digits.select(range(40, 46)).to_parquet(folder / "test.parquet")
    return str(folder)


def arguments(folder, tokenizer, dataset, **changes):
    options = {"crop": "ten", "batch_size": 7, "shard_size": 16}
    return ExtractArguments(str(tokenizer), dataset, str(folder), **options | changes)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tokenizer, small_digits):
    folder = tmp_path_factory.mktemp("stored") / "codes"
    with fresh_process():
        extract_codes(arguments(folder, tokenizer, small_digits), Accelerator(cpu=True))
    return folder


def test_what_a_set_holds(stored, tokenizer):
    names = sorted(path.name for path in stored.iterdir())
    shards = [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert names == sorted(["README.md", "codes.json", *shards])
    loaded = datasets.load_dataset(str(stored), split="train")
    assert len(loaded) == 40 and loaded.features["codes"] == datasets.Array2D((10, 16), "uint16")
    assert loaded.features["label"].names == [str(i) for i in range(10)]
    stamp = json.loads((stored / "codes.json").read_text())
    assert (stamp["crop"], stamp["size"], stamp["num_images"], stamp["variants"]) == ("ten", [8, 8], 40, 10)


def test_stored_codes_are_those_computed_online(tmp_path, tokenizer, small_digits, stored):
    """The same rows, crops, labels and losses: of a subset, too, and through the loop."""
    common = {"dataset_name": small_digits, "crop": "ten"}
    lines, batches = [], []
    for codes in (None, str(stored)):
        with fresh_process():
            stage, args = ar_stage(tmp_path, tokenizer, **SUBSET | common, codes=codes)
            keys = [(index % 20, 77 * index) for index in range(40)]
            batch = batch_of(stage, keys)
            assert ("codes" in batch) == (codes is not None)
            stage.forward(stage.model, batch, 0)
            batches.append(batch)
            torch.manual_seed(0)
            loop = TrainingLoop(stage, args, make_accelerator(args))
            stage.model.train()
            stream = iter(loop.batches)
            lines.append([loop._step(step, [next(stream)]) for step in range(3)])
    online, cached = batches
    assert torch.equal(online["codes"], cached["codes"]) and torch.equal(online["label"], cached["label"])
    assert any(not torch.equal(online["codes"][i], online["codes"][i + 20]) for i in range(20))  # several crops
    for one, other in zip(*lines, strict=True):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-6)


def test_training_on_codes_alone(tmp_path, tokenizer, stored, caplog):
    stage, args = ar_stage(tmp_path, tokenizer, **SUBSET, crop="ten", codes=str(stored), dataset_name="")
    assert stage.validation is None and stage.id2label == {i: str(i) for i in range(10)}
    assert "no split to validate on: images of stored codes cannot be held out" in caplog.text
    train(stage, args, make_accelerator(args))
    assert (tmp_path / "model_index.json").is_file() and (tmp_path / "README.md").is_file()


def test_validation_comes_from_a_split_of_its_own(tmp_path, tokenizer, stored, small_digits):
    options = SUBSET | {"crop": "ten", "codes": str(stored), "max_validation_samples": 100}
    stage, _ = ar_stage(tmp_path, tokenizer, **options, dataset_name=small_digits)
    assert len(stage.samples) == 20 and len(stage.validation) == 6


# What does not fit is refused


def test_codes_of_another_tokenizer(tmp_path, stored):
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="do not fit this run: they are of tokenizer [0-9a-f]{64}, not .*Extract"):
        ar_stage(tmp_path / "run", tmp_path / "other", **SUBSET, crop="ten", codes=str(stored))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop": "center"}, "crop ten, not center"),
        ({"crop": "random"}, "can be counted"),
        ({"crop": "ten", "pixel_noise": 0.1}, "can be counted"),
        ({"crop": "ten", "cache_codes": True}, "exclude each other"),
    ],
)
def test_codes_of_other_crops(tmp_path, tokenizer, stored, options, message):
    with pytest.raises(ValueError, match=message):
        ar_stage(tmp_path, tokenizer, **SUBSET | {"codes": str(stored)} | options)


def test_sets_that_are_not_complete(tmp_path, tokenizer, stored):
    with pytest.raises(ValueError, match="no finished set of codes at"):
        ar_stage(tmp_path, tokenizer, **SUBSET, crop="ten", codes=str(tmp_path))
    shutil.copytree(stored, tmp_path / "copy")
    (tmp_path / "copy" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="holds 24 rows, its stamp says 40"):
        ar_stage(tmp_path / "run", tokenizer, **SUBSET, crop="ten", codes=str(tmp_path / "copy"))


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"num_', b"\xff\xfe"])
def test_damaged_stamps(tmp_path, tokenizer, small_digits, content):
    for name in ("codes.json", "extraction.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(content)
    with pytest.raises(ValueError, match="no finished set of codes at.*codes.json|they are of tokenizer None"):
        load_codes(str(tmp_path / "codes.json"), tiny_tokenizer(), ImageTransform((8, 8), 1, "ten"))
    if content != b"{}":
        with pytest.raises(ValueError, match="extraction.json"):
            extract_codes(arguments(tmp_path / "extraction.json", tokenizer, small_digits), Accelerator(cpu=True))


def test_damaged_shards(tmp_path, tokenizer, small_digits, stored):
    folder = tmp_path / "my [codes]"
    shutil.copytree(stored, folder)
    model, transform = tiny_tokenizer(), ImageTransform((8, 8), 1, "ten")
    assert len(load_codes(str(folder), model, transform)) == 40
    shard = folder / "train-00001-of-00003.parquet"
    whole = shard.read_bytes()
    for damaged in (b"", whole[:200], whole[:60] + b"\xff" * 40 + whole[100:]):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot load .*my .codes"):
            load_codes(str(folder), model, transform)
    shard.write_bytes(whole[:200])  # as a crash of the machine may leave it
    (folder / "codes.json").rename(folder / "extraction.json")
    extract_codes(arguments(folder, tokenizer, small_digits), Accelerator(cpu=True))
    again, before = (load_codes(str(path), model, transform) for path in (folder, stored))
    assert again.to_dict() == before.to_dict()


def test_more_classes_than_the_model_has(tmp_path, tokenizer, stored):
    with pytest.raises(ValueError, match="num_classes=5, but the data set has 10 classes"):
        ARStage.build(ar_args(tmp_path, tokenizer, {"num_classes": 5}, **SUBSET, crop="ten", codes=str(stored)))


# Interrupted, shared, repeated


def test_processes_share_the_encoding_in_memory(tmp_path, small_digits, tokenizer, monkeypatch):
    stage, _ = ar_stage(tmp_path / "run", tokenizer, dataset_name=small_digits, cache_codes=False)
    model = tiny_tokenizer()
    alone = codes_module.encode_all(stage.samples, model)
    parts = []
    monkeypatch.setattr(codes_module, "ENCODE_BATCH", 16)
    monkeypatch.setattr(codes_module, "gather_object", lambda own: parts.extend(own) or parts)
    for rank in range(3):  # one more than there are batches
        monkeypatch.setattr(PartialState(), "num_processes", 3)
        monkeypatch.setattr(PartialState(), "process_index", rank)
        codes_module.encode_all(stage.samples, model)
    assert sorted(len(labels) for _, labels in parts) == [0, 16, 16]
    assert torch.equal(torch.cat([codes for codes, _ in parts]), alone.codes)
    assert [label for _, labels in parts for label in labels] == alone.labels


class Interrupted(Exception):
    pass


def test_an_interrupted_extraction_goes_on(tmp_path, tokenizer, small_digits, stored, monkeypatch):
    args, calls = arguments(tmp_path / "codes", tokenizer, small_digits), []
    encode = codes_module.encode_variants

    def counting(samples, indices, tokenizer):
        calls.append(indices.start)
        if len(calls) == 6:
            raise Interrupted
        return encode(samples, indices, tokenizer)

    monkeypatch.setattr(codes_module, "encode_variants", counting)
    with pytest.raises(Interrupted):
        extract_codes(args, Accelerator(cpu=True))
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == [
        "extraction.json",
        "train-00000-of-00003.parquet",
    ]
    with pytest.raises(ValueError, match="no finished set"):
        load_codes(args.output_dir, tiny_tokenizer(), None)
    extract_codes(args, Accelerator(cpu=True))
    assert calls[6:] == [16, 23, 30, 32, 39]  # the second shard from its start, not the first
    assert same_set(tmp_path / "codes", stored)
    extract_codes(args, Accelerator(cpu=True))
    assert len(calls) == 11  # a finished set is left alone


def same_set(one, other):
    tables = [datasets.load_dataset(str(folder), split="train").to_dict() for folder in (one, other)]
    return tables[0] == tables[1]


def test_processes_share_the_shards(tmp_path, tokenizer, small_digits, stored, monkeypatch):
    args = arguments(tmp_path / "codes", tokenizer, small_digits)
    for index in (1, 0):
        accelerator = Accelerator(cpu=True)
        for name, value in {"process_index": index, "num_processes": 2, "is_main_process": index == 0}.items():
            monkeypatch.setattr(Accelerator, name, value)
        monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: None)
        extract_codes(args, accelerator)
        shards = sorted(path.name[6:11] for path in (tmp_path / "codes").glob("train-*"))
        assert shards == (["00001"] if index else ["00000", "00001", "00002"])
    assert same_set(tmp_path / "codes", stored)


def test_broken_images_are_left_out_with_their_labels(tmp_path, tokenizer):
    from PIL import Image

    for index in range(6):
        (tmp_path / "images" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * index).save(tmp_path / "images" / str(index % 2) / f"{index}.png")
    (tmp_path / "images" / "0" / "2.png").write_bytes(b"junk")  # the second of the class 0
    args = arguments(tmp_path / "codes", tokenizer, str(tmp_path / "images"), shard_size=3)
    assert extract_codes(args, Accelerator(cpu=True))["num_images"] == 6
    stored_set = datasets.load_dataset(str(tmp_path / "codes"), split="train")
    assert stored_set["label"][:] == [0, 0, 1, 1, 1]
    extract_codes(args, Accelerator(cpu=True))  # finished: left alone
    options = SUBSET | {"crop": "ten", "dataset_name": str(tmp_path / "images")}
    stage, _ = ar_stage(tmp_path / "run", tokenizer, **options | {"codes": args.output_dir, "dataset_name": ""})
    memory, _ = ar_stage(tmp_path / "run", tokenizer, **options | {"cache_codes": True})
    assert len(stage.samples) == len(memory.samples) == 5
    for index in range(5):
        one, other = (samples[index, 7] for samples in (stage.samples, memory.samples))
        assert torch.equal(one["codes"], other["codes"]) and one["label"] == other["label"]


def test_nothing_that_can_be_read_finishes_no_set(tmp_path, tokenizer):
    from PIL import Image

    files = [tmp_path / "images" / "0" / f"{index}.png" for index in range(5)]
    files[0].parent.mkdir(parents=True)
    for path in files:
        path.write_bytes(b"junk")
    args = arguments(tmp_path / "codes", tokenizer, str(tmp_path / "images"), shard_size=3)
    with pytest.raises(ValueError, match="none of the 5 images can be read: there are no codes"):
        extract_codes(args, Accelerator(cpu=True))
    assert not list((tmp_path / "codes").iterdir())  # the same command may be tried again
    options = SUBSET | {"crop": "ten", "dataset_name": str(tmp_path / "images"), "cache_codes": True}
    with pytest.raises(ValueError, match="none of the 5 images can be read"):
        ar_stage(tmp_path / "run", tokenizer, **options)
    for path in files:
        Image.new("L", (8, 8)).save(path)
    extract_codes(args, Accelerator(cpu=True))
    assert json.loads((tmp_path / "codes" / "codes.json").read_text())["num_rows"] == 5


def test_too_many_images_that_cannot_be_read_are_not_encoded_in_memory(tmp_path, tokenizer):
    from PIL import Image

    (tmp_path / "images" / "0").mkdir(parents=True)
    for index in range(3):
        Image.new("L", (8, 8)).save(tmp_path / "images" / "0" / f"{index}.png")
    for index in (3, 4):
        (tmp_path / "images" / "0" / f"{index}.png").write_bytes(b"junk")
    options = SUBSET | {"dataset_name": str(tmp_path / "images"), "cache_codes": True}
    stage, _ = ar_stage(tmp_path / "run", tokenizer, max_corrupt_images=2, **options)
    assert len(stage.samples) == 3
    with pytest.raises(DataError, match="2 images could not be read, more than max_corrupt_images=1"):
        ar_stage(tmp_path / "run", tokenizer, max_corrupt_images=1, **options)


def test_a_shard_without_any_image_that_can_be_read(tmp_path, tokenizer, caplog):
    from PIL import Image

    (tmp_path / "images" / "0").mkdir(parents=True)
    for index in range(3):
        Image.new("L", (8, 8)).save(tmp_path / "images" / "0" / f"{index}.png")
    (tmp_path / "images" / "0" / "3.png").write_bytes(b"junk")
    args = arguments(tmp_path / "codes", tokenizer, str(tmp_path / "images"), shard_size=3)
    extract_codes(args, Accelerator(cpu=True))
    assert len(datasets.load_dataset(str(tmp_path / "codes"), split="train")) == 3
    assert "1 of 4 images cannot be read, and have no codes" in caplog.text


def test_a_folder_of_other_codes_is_left_alone(tmp_path, tokenizer, small_digits, stored):
    shutil.copytree(stored, tmp_path / "codes")
    args = arguments(tmp_path / "codes", tokenizer, small_digits, crop="center")
    with pytest.raises(ValueError, match="holds codes of another tokenizer, data set or crop"):
        extract_codes(args, Accelerator(cpu=True))
    assert same_set(tmp_path / "codes", stored)
    rows = datasets.Dataset.from_parquet(str(Path(small_digits) / "train.parquet"))
    other = tmp_path / Path(small_digits).name  # of the same name and size
    other.mkdir()
    rows.select(reversed(range(40))).to_parquet(other / "train.parquet")
    with pytest.raises(ValueError, match="holds codes of another tokenizer, data set or crop"):
        extract_codes(arguments(tmp_path / "codes", tokenizer, str(other)), Accelerator(cpu=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty and holds no codes"):
        extract_codes(replace(args, output_dir=str(tmp_path / "mine")), Accelerator(cpu=True))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_stamp_names_what_codes_depend_on():
    model = tiny_tokenizer()
    stamp = make_stamp(model, ImageTransform((8, 8), 3, "ten"))
    assert make_stamp(model, ImageTransform((8, 8), 3, "ten", flip=True)) == stamp  # the ten crops are mirrored anyway
    assert make_stamp(model, ImageTransform((8, 8), 3, "center", flip=True))["variants"] == 2
    with torch.no_grad():
        model.quantizer.codebook.weight[0] += 1
    assert make_stamp(model, ImageTransform((8, 8), 3, "ten"))["tokenizer"] != stamp["tokenizer"]


# The command


@pytest.fixture
def command():
    return load_script("examples/extract_codes.py")


def test_mistakes_end_with_one_line(tmp_path, command, monkeypatch, capsys):
    for line, message in (
        ("", "--tokenizer is missing"),
        ("--tokenizer ./no --dataset_name digits", "no tokenizer at"),
    ):
        monkeypatch.setattr(sys, "argv", ["extract_codes.py", "--output_dir", str(tmp_path / "x"), *line.split()])
        with pytest.raises(SystemExit) as ended:
            command.main()
        said = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2 and said[-1].startswith("extract_codes.py: ") and message in said[-1]


def test_pushing(tmp_path, tokenizer, small_digits, command, monkeypatch, capsys):
    monkeypatch.setattr(command, "push_codes", lambda args: f"the Hub: {args.hub_private_repo}")
    line = ["x", "--tokenizer", str(tokenizer), "--dataset_name", small_digits, "--output_dir", str(tmp_path / "set")]
    monkeypatch.setattr(sys, "argv", [*line, "--push_to_hub", "--hub_private_repo", "True"])
    command.main()
    assert "pushed to the Hub: True" in capsys.readouterr().out
