"""Any data: folders, parquet and tars train alike, mapped or streamed; streams resume; broken images are left out."""

import io

import datasets
import pytest
import torch
from PIL import Image

from dar_hf.data import DataError
from dar_hf.training import make_accelerator, train
from dar_hf.training.resuming import ResumeError
from dar_hf.training.run_folder import claim_output_dir
from dar_hf.utils.pictures import read_history

from .helpers import ar_args, ar_stage, fresh_process, tokenizer_stage

KINDS = ["imagefolder", "parquet", "webdataset"]
OPTIONS = {"max_train_samples": None, "max_train_steps": 6, "train_batch_size": 8}


def history(folder):
    lines = read_history(folder / "history.jsonl")
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def run(stage_name, folder, tokenizer, model=None, **options):
    with fresh_process():
        torch.manual_seed(11)
        if stage_name == "tokenizer":
            stage, args = tokenizer_stage(folder, model, **options)
        else:
            stage, args = ar_stage(folder, tokenizer, model, **{"cache_codes": False} | options)
        claim_output_dir(args, stage.saved_class)
        train(stage, args, make_accelerator(args))
    return stage, history(folder)


@pytest.mark.parametrize("name", ["tokenizer", "ar"])
def test_the_same_images_train_alike_wherever_they_lie(tmp_path, tokenizer, image_sets, name):
    options = OPTIONS | {"flip": True, "crop": "center"}
    sets = {kind: str(image_sets[kind]) for kind in KINDS}
    runs = {kind: run(name, tmp_path / kind, tokenizer, dataset_name=sets[kind], **options) for kind in KINDS}
    first = runs["imagefolder"][1]
    assert len(first) > 5 and any("validation" in key for line in first for key in line)
    for kind in KINDS[1:]:
        assert runs[kind][1] == first
    weights = [torch.cat([p.detach().flatten() for p in stage.model.parameters()]) for stage, _ in runs.values()]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    if name == "ar":
        assert {len(stage.id2label) for stage, _ in runs.values()} == {10}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer", "ar"])
def test_a_stream_resumes_exactly(tmp_path, tokenizer, image_sets, name, kind):
    options = OPTIONS | {"dataset_name": str(image_sets[kind]), "streaming": True, "stream_block_size": 16}
    options |= {
        "max_train_steps": 32,
        "checkpointing_steps": 7,
        "checkpoints_total_limit": None,
        "validation_steps": 9,
    }
    model = {"num_classes": 10} if name == "ar" else {}
    stage, whole = run(name, tmp_path / "run", tokenizer, model, **options)  # 256 images: more than an epoch
    for checkpoint in ("checkpoint-14", "checkpoint-28"):
        again, resumed = run(name, tmp_path / "run", tokenizer, model, **options, resume_from_checkpoint=checkpoint)
        assert resumed == whole
        assert all(torch.equal(a, b) for a, b in zip(stage.model.parameters(), again.model.parameters(), strict=True))


def test_a_stream_of_another_layout_is_not_continued(tmp_path, image_sets):
    options = OPTIONS | {"dataset_name": str(image_sets["webdataset"]), "streaming": True, "checkpointing_steps": 3}
    run("tokenizer", tmp_path, None, **options)
    with pytest.raises(ResumeError, match="the stream was read with .*'num_workers': 0.* and is now with"):
        run("tokenizer", tmp_path, None, **options, dataloader_num_workers=2, resume_from_checkpoint="checkpoint-3")
    (tmp_path / "checkpoints" / "checkpoint-3" / "position-0.json").unlink()
    with pytest.raises(ResumeError, match="position-0.json is missing"):
        run("tokenizer", tmp_path, None, **options, resume_from_checkpoint="checkpoint-3")


def test_a_stream_and_the_classes_of_the_model(tmp_path, tokenizer, image_sets):
    options = OPTIONS | {"dataset_name": str(image_sets["webdataset"]), "streaming": True, "cache_codes": False}
    with pytest.raises(ValueError, match="give --model_overrides num_classes=N"):
        ar_stage(tmp_path, tokenizer, **options)
    with pytest.raises(DataError, match="has the label [3-9]; the model has 3 classes"):
        run("ar", tmp_path, tokenizer, {"num_classes": 3}, **options)
    stage, _ = ar_stage(tmp_path, tokenizer, **options | {"dataset_name": str(image_sets["parquet"])})
    assert stage.model.config.num_classes == 10
    for contradiction in ({"cache_codes": True}, {"codes": "folder"}):
        with pytest.raises(ValueError, match="--streaming reads images"):
            ar_args(tmp_path, tokenizer, **options | contradiction)


def test_a_stream_is_validated_on_its_own_split(tmp_path, image_sets):
    options = OPTIONS | {"dataset_name": "digits", "streaming": True, "max_validation_samples": 5}
    stage, _ = tokenizer_stage(tmp_path, **options)
    assert len(stage.validation) == 5
    stage, _ = tokenizer_stage(tmp_path, **options | {"dataset_name": str(image_sets["parquet"])})
    assert stage.validation is None


# Broken images


def folder_with_broken_images(folder, good=12, broken=3):
    (folder / "0").mkdir(parents=True)
    for index in range(good):
        Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(folder / "0" / f"good{index}.png")
    whole = (folder / "0" / "good1.png").read_bytes()
    for index in range(broken):
        (folder / "0" / f"broken{index}.png").write_bytes([whole[:50], b"no image at all", b""][index % 3])
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_counted_and_left_out(tmp_path, streaming, caplog):
    name = folder_with_broken_images(tmp_path / "images")
    options = OPTIONS | {"dataset_name": name, "streaming": streaming}
    _, lines = run("tokenizer", tmp_path / "run", None, **options)
    assert lines[-2]["data/corrupt_images"] == 3 or lines[-1]["data/corrupt_images"] == 3
    assert "leaving out image" in caplog.text and "broken0.png" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_too_many_broken_images_stop_the_run(tmp_path, streaming):
    name = folder_with_broken_images(tmp_path / "images")
    options = OPTIONS | {"dataset_name": name, "streaming": streaming, "max_corrupt_images": 2}
    with pytest.raises(DataError, match="3 images could not be read, more than max_corrupt_images=2"):
        run("tokenizer", tmp_path / "run", None, **options)


def test_nothing_but_broken_images(tmp_path):
    name = tmp_path / "images" / "0"
    name.mkdir(parents=True)
    for index in range(3):
        (name / f"{index}.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        run("tokenizer", tmp_path / "run", None, **OPTIONS | {"dataset_name": str(tmp_path / "images")})


def parquet_with_rows_without_an_image(path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    rows = {"image": [image, None, image, None, image, image], "label": [0] * 6}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_an_image_are_counted_and_left_out(tmp_path, streaming):
    name = parquet_with_rows_without_an_image(tmp_path / "data.parquet")
    _, lines = run("tokenizer", tmp_path / "run", None, **OPTIONS | {"dataset_name": name, "streaming": streaming})
    assert max(line.get("data/corrupt_images", 0) for line in lines) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_leaves_out_rows_without_an_image(tmp_path, streaming, caplog):
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        parquet_with_rows_without_an_image(tmp_path / "set" / split / "a.parquet")
    options = {"dataset_name": str(tmp_path / "set"), "streaming": streaming, "max_validation_samples": 10}
    stage, _ = tokenizer_stage(tmp_path / "run", **OPTIONS | options)
    assert len(stage.validation) == 4  # of six
    assert "leaving out image 1, which cannot be read: the row holds no image" in caplog.text


def test_no_image_to_validate_on(tmp_path, caplog):
    for split in ("train", "test"):
        folder_with_broken_images(tmp_path / split, good=2, broken=0)
    for path in (tmp_path / "test" / "0").iterdir():
        path.write_bytes(b"junk")
    stage, _ = tokenizer_stage(tmp_path / "run", **OPTIONS | {"dataset_name": str(tmp_path)})
    assert stage.validation is None and "none of the 2 images to validate on can be read" in caplog.text


# Splits and classes


@pytest.mark.parametrize(
    "train, validated",
    [
        ("train", "validation"),
        ("validation", "test"),
        ("val", "test"),
        ("train+val[:50%]", "test"),
        ("test+val", None),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_no_run_validates_on_its_training_images(tmp_path, train, validated, streaming):
    names = {"train": 40, "val": 41, "test": 42}
    write_images(tmp_path / "images", *[f"{name}/{i}.png" for name, count in names.items() for i in range(count)])
    if streaming and ("[" in train or "+" in train):
        pytest.skip("a stream takes a whole split")
    options = {"dataset_name": str(tmp_path / "images"), "train_split": train, "streaming": streaming}
    stage, _ = tokenizer_stage(tmp_path / "run", **OPTIONS | options, max_validation_samples=100)
    expected = {"validation": 41, "test": 42, None: (41 + 42) // 20}[validated]
    assert len(stage.validation) == expected


def write_images(root, *names):
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    return str(root)


def test_a_single_file_is_not_validated_on_itself(tmp_path, image_sets):
    name = str(image_sets["parquet"] / "train.parquet")
    with pytest.raises(ValueError, match="is a single file, all of it the split train; it has no split 'test'"):
        tokenizer_stage(tmp_path, **OPTIONS | {"dataset_name": name, "validation_split": "test"})
    stage, _ = tokenizer_stage(tmp_path, **OPTIONS | {"dataset_name": name})
    assert len(stage.samples) == 196 and len(stage.validation) == 4
    parts = {"train_split": "train[:90%]", "validation_split": "train[90%:]", "max_validation_samples": 100}
    stage, _ = tokenizer_stage(tmp_path, **OPTIONS | {"dataset_name": name} | parts)
    assert len(stage.samples) == 180 and len(stage.validation) == 20
    with pytest.raises(ValueError, match="a stream takes a whole split"):
        tokenizer_stage(tmp_path, **OPTIONS | {"dataset_name": name, "streaming": True} | parts)


@pytest.mark.parametrize("streaming", [False, True])
def test_one_class_trains_the_language_model(tmp_path, tokenizer, streaming):
    name = write_images(tmp_path / "images", *[f"face/{index}.png" for index in range(8)])
    options = OPTIONS | {"dataset_name": name, "streaming": streaming, "max_train_steps": 2}
    stage, _ = run("ar", tmp_path / "run", tokenizer, **options)
    assert stage.id2label == {0: "face"} and stage.model.config.num_classes == 1


def test_classes_of_a_streamed_split_to_validate_on_are_those_of_training(tmp_path, tokenizer):
    files = [
        f"{split}/{name}/{i}.png" for split, name in (("train", "a"), ("train", "b"), ("val", "b")) for i in (0, 1)
    ]
    options = OPTIONS | {"dataset_name": write_images(tmp_path / "images", *files), "cache_codes": False}
    for streaming in (False, True):
        stage, _ = ar_stage(tmp_path / "run", tokenizer, **options | {"streaming": streaming})
        assert stage.validation.labels == [1, 1]
    write_images(tmp_path / "images", "val/c/0.png")
    stage, _ = ar_stage(tmp_path / "run", tokenizer, **options | {"streaming": True})
    assert stage.validation is None
    with pytest.raises(ValueError, match="which is none of the 2 classes of training"):
        ar_stage(tmp_path / "run", tokenizer, **options | {"streaming": True, "validation_split": "validation"})


# Every kind of image file


def every_mode(folder):
    """One red picture, saved in many ways; the files' expected colours at (0, 0)."""
    red, folder = Image.new("RGB", (8, 8), (200, 0, 0)), folder / "0"
    folder.mkdir(parents=True)
    red.save(folder / "a_rgb.png")
    Image.new("L", (8, 8), 90).save(folder / "b_grey.png")
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(folder / "c_clear.png")
    red.convert("CMYK").save(folder / "d_cmyk.tif")
    Image.new("I;16", (8, 8), 128 * 257).save(folder / "e_16bit.png")
    red.save(folder / "f_animated.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), (0, 0, 200))])
    half = Image.new("RGB", (8, 8), (0, 200, 0))
    half.paste((200, 0, 0), (0, 0, 8, 4))  # red above green
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half.save(folder / "g_rotated.png", exif=exif)
    red.quantize(4).save(folder / "h_palette.png")
    return [(200, 0, 0), (90,) * 3, (255,) * 3, (200, 0, 0), (128,) * 3, (200, 0, 0), (0, 200, 0), (200, 0, 0)]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_mode_is_converted(tmp_path, streaming):
    expected = every_mode(tmp_path / "images")
    options = OPTIONS | {"dataset_name": str(tmp_path / "images"), "streaming": streaming, "stream_block_size": 1}
    stage, args = tokenizer_stage(tmp_path / "run", **options)
    if streaming:
        samples = [stage.samples.sample(row, 0) for row in stage.samples.dataset]
    else:
        samples = [stage.samples[index, 0] for index in range(8)]
    for sample, colour in zip(samples, expected, strict=True):
        found = ((sample["pixel_values"][:, 0, 0] + 1) * 127.5).round().int().tolist()
        assert found == pytest.approx(list(colour), abs=1)
    train(stage, args, make_accelerator(args))
