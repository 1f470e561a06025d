"""What may be read and what may not: a checkpoint is plain data, whole, or refused."""

import argparse
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dar_hf.conversion import CheckpointError, convert_tokenizer, convert_transformer
from dar_hf.conversion.reading import read_checkpoint

from . import originals


@pytest.fixture
def weights():
    return originals.random_weights({"norm.weight": (4,), "output.weight": (3, 4)})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def same(found, expected):
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


# Forms of a file


WRAPPERS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "optimizer": {}, "steps": 3},
    "ema": lambda weights: {"model": {"norm.weight": torch.zeros(4)}, "ema": weights},
    "empty ema": lambda weights: {"model": weights, "ema": {}},
    "no ema": lambda weights: {"model": weights, "ema": None},
    "module": lambda weights: {"module": weights},
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "nested": lambda weights: {"state_dict": {"module": weights}},
    "ordered": lambda weights: OrderedDict(model=OrderedDict(weights)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes(path, weights, wrap, prefix):
    torch.save(wrap({prefix + name: tensor for name, tensor in weights.items()}), path)
    assert same(read_checkpoint(path).weights, weights)


def test_a_compiled_part_inside(path):
    torch.save({"net._orig_mod.blocks.0.weight": torch.ones(2)}, path)
    assert list(read_checkpoint(path).weights) == ["net.blocks.0.weight"]


def test_legacy_format(path, weights):
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(path).weights, weights)


def test_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    assert same(read_checkpoint(tmp_path / "model.safetensors").weights, weights)
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_checkpoint(tmp_path / "bad.safetensors")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
def test_weights_stay_in_the_file(path, weights):
    torch.save({"model": weights}, path)
    checkpoint = read_checkpoint(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    del checkpoint
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_what_is_dropped_is_named(path, weights):
    originals.save(originals.tokenizer_checkpoint(weights, {"vq_dim": 8}), path)
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.weights, weights)
    assert set(checkpoint.dropped) == {
        "model",
        "optimizer",
        "discriminator",
        "optimizer_disc",
        "steps",
        "quantize.codebook_used",
        "diff_decoder._arange",
        "diff_decoder.net.wavelets",
    }
    assert checkpoint.config == {"vq_dim": 8}
    assert checkpoint.args == {"image_size": 16, "lr": 2e-4}


@pytest.mark.parametrize("config", [{"vq_dim": 8}, {"model": {"vq_dim": 8}}, {"_data": {"model": {"vq_dim": 8}}}])
@pytest.mark.parametrize("args", [{"n_head": 2}, argparse.Namespace(n_head=2)])
def test_configuration_as_plain_dictionaries(path, weights, config, args):
    torch.save({"model": weights, "config": config, "args": args}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == {"vq_dim": 8} and checkpoint.args == {"n_head": 2}


# Files that are refused


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.ones(2)], "holds a list, not a checkpoint"),
        (torch.ones(2), "holds a Tensor, not a checkpoint"),
        ({"model": {}, "steps": 3}, "holds no weights; its entries: model, steps"),
        ({"a": 1}, "holds no weights"),
        ({"weight": torch.ones(2), "module.weight": torch.ones(2)}, "two tensors for weight"),
        ({"weight": torch.ones(2, dtype=torch.long)}, "weight is not a dense floating-point tensor"),
        ({"weight": torch.eye(2).to_sparse()}, "weight is not a dense floating-point tensor"),
        ({"weight": torch.ones(2, device="meta")}, "weight is not a dense floating-point tensor"),
        ({"model": {"weight": torch.ones(2)}, "config": {"model": 3}}, "configuration is a int"),
    ],
)
def test_contents_that_are_no_checkpoint(path, content, message):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_a_dictionary_that_holds_itself(path):
    content = {}
    content["model"] = content
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(path)


def test_no_file(path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02}q\x00.", os.urandom(5000), b"(" * 100_000]
)
def test_files_of_another_kind(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="checkpoint.pt"):
        read_checkpoint(path)


class Payload:
    """Unpickling it calls a function; one that leaves a trace."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["args", "config", "model", "optimizer"])
def test_code_in_a_file_does_not_run(path, tmp_path, weights, place, legacy):
    trace = tmp_path / "trace"
    content = {"model": weights} | {place: Payload(os.mkdir, str(trace))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for convert in (read_checkpoint, convert_tokenizer, convert_transformer):
        with pytest.raises(CheckpointError, match=r"refused.*posix\.mkdir"):
            convert(path)
    assert not trace.exists()


def test_code_behind_an_allowed_class_does_not_run(path, tmp_path, weights):
    trace = tmp_path / "trace"
    namespace = argparse.Namespace(n_head=2, hidden=Payload(eval, f"__import__('os').mkdir({str(trace)!r})"))
    torch.save({"model": weights, "args": namespace}, path)
    with pytest.raises(CheckpointError, match="eval"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_code_in_a_file_of_any_protocol_is_named(path, tmp_path, weights, form, protocol):
    trace = tmp_path / "trace"
    content = {"model": weights, "args": [Payload(os.mkdir, str(trace)), Payload(os.mkdir, str(trace))]}
    if form == "bare":
        path.write_bytes(pickle.dumps(content["args"], protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"wants to run or build posix\.mkdir"):
        convert_tokenizer(path)
    assert not trace.exists()


class Other:
    """Harmless, and still not plain data."""


def test_other_classes_are_named(path, weights):
    torch.save({"model": weights, "args": Other()}, path)
    with pytest.raises(CheckpointError, match=r"test_reading\.Other"):
        read_checkpoint(path)


# Damage


@pytest.fixture
def whole_file(path):
    weights = originals.tokenizer_weights(originals.TOKENIZER)
    weights = {name: tensor for name, tensor in weights.items() if "repa" not in name}
    originals.save(originals.tokenizer_checkpoint(weights, originals.TOKENIZER), path)
    convert_tokenizer(path)  # it is good
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bytes(path, whole_file, seed):
    # anywhere but in the archive's padding, which nobody reads
    entries = [entry for entry in zipfile.ZipFile(path).infolist() if entry.file_size > 100]
    entry = random.Random(seed).choice(entries)
    with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
        start = file._orig_compress_start
    damaged = bytearray(whole_file)
    damaged[start + random.Random(seed).randrange(entry.file_size)] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        convert_tokenizer(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999, 0.9999])
def test_truncated(path, whole_file, share):
    path.write_bytes(whole_file[: int(len(whole_file) * share)])
    with pytest.raises(CheckpointError, match="checkpoint.pt"):
        convert_tokenizer(path)


def test_data_that_is_shorter_than_its_tensor(path):
    torch.save({"model": {"a": torch.ones(40), "b": torch.ones(200)}}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:  # with checksums that are right
        for entry, content in entries:
            archive.writestr(entry.filename, content[:80] if entry.filename.endswith("data/0") else content)
    with pytest.raises(CheckpointError, match="damaged: the sizes"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name(path, weights):
    torch.save(weights, path)
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
        archive.writestr(name, bytes(archive.getinfo(name).file_size))
    with pytest.raises(CheckpointError, match="data/0 more than once"):
        read_checkpoint(path)


@pytest.mark.parametrize("protocol", [0, 4, 5])
def test_what_saving_again_would_help(path, weights, protocol):
    torch.save(weights, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="load it where it was made and save it with torch.save's defaults"):
        read_checkpoint(path)


def test_recompressed(path, weights):
    torch.save(weights, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    assert same(read_checkpoint(path).weights, weights)


def test_weights_named_by_something_else(path):
    key = ()
    for _ in range(16):
        key = (key, key)  # 2**16 brackets, written out
    torch.save({"model": {"a": torch.ones(1), 5: torch.ones(1), key: 3, "b" * 10_000: 4}}, path)
    checkpoint = read_checkpoint(path)
    assert set(checkpoint.weights) == {"a", "5"}
    assert len(checkpoint.dropped) == 2 and all(len(name) < 1000 for name in checkpoint.dropped)


def test_old_files_have_no_checksums(path, weights, caplog):
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(path).weights, weights)
    assert "without checksums" in caplog.text


def test_without_checksums(path, weights, caplog):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": weights}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read_checkpoint(path).weights, weights)
    assert "without checksums" in caplog.text
