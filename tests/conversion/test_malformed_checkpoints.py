"""Damaged checkpoints, senseless options and broken folders: clear errors, nothing taken, nothing else raised.

What `test_reading` has (pickles, archives, bytes) is not repeated here.
"""

import gzip
import io
import json
import runpy
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dar_hf.conversion import convert_tokenizer, convert_transformer, save_llama
from dar_hf.hub import export_remote_code, push_folder
from dar_hf.hub.run_cards import take_report, write_run_card

from . import originals

CLEAR, OTHER, ACCEPTED = "clear error", "other exception", "silently accepted"


def outcome(call: Callable[[], Any], mention: str) -> tuple[str, str]:
    """What comes of a call that should be refused: a documented error whose message names what is wrong, or not."""
    try:
        result = call()
    except (ValueError, OSError) as error:
        message = " ".join([str(error), *getattr(error, "__notes__", [])])
        return (CLEAR if mention.lower() in message.lower() else OTHER), f"{type(error).__name__}: {message}"
    except Exception as error:
        return OTHER, f"{type(error).__name__}: {error}"
    return ACCEPTED, repr(result)[:200]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


# Weights of the tokenizer

LAYER = "encoder_layers.1."


def put(name, value):
    return lambda weights: weights.__setitem__(name, value)


def take(*names):
    return lambda weights: [weights.pop(name) for name in names]


def shaped(name, *shape):
    return put(name, torch.ones(shape))


def rename(old, new):
    def change(weights):
        for name in [name for name in weights if name.startswith(old)]:
            weights[new + name.removeprefix(old)] = weights.pop(name)

    return change


def as_type(name, dtype):
    return lambda weights: weights.__setitem__(name, weights[name].to(dtype))


NET = "diff_decoder.net."
TOKENIZER_WEIGHTS = {
    "no codes": (shaped("quantize.embedding.weight", 0, 8), "codebook_size"),
    "codes of no width": (shaped("quantize.embedding.weight", 32, 0), "codebook_dim"),
    "one code fewer": (shaped("quantize.embedding.weight", 31, 8), "codebook_size"),
    "a codebook of three axes": (shaped("quantize.embedding.weight", 32, 8, 1), "2 axes"),
    "infinite codes": (put("quantize.embedding.weight", torch.full((32, 8), torch.inf)), "not finite"),
    "one NaN in a gate": (put(f"{LAYER}gate1", torch.tensor([torch.nan] + [1.0] * 127)), "not finite"),
    "overflow to infinity": (put(f"{LAYER}gate1", torch.full((128,), -1e39, dtype=torch.float64)), "not finite"),
    "integers": (as_type(f"{LAYER}gate1", torch.int8), "gate1"),
    "booleans": (as_type(f"{LAYER}gate1", torch.bool), "gate1"),
    "complex numbers": (as_type(f"{LAYER}gate1", torch.complex64), "gate1"),
    "eight-bit floats": (as_type(f"{LAYER}gate1", torch.float8_e4m3fn), "gate1"),
    "a number for a tensor": (put(f"{LAYER}gate1", 1.0), "gate1"),
    "nothing for a tensor": (put(f"{LAYER}gate1", None), "gate1"),
    "a list for a tensor": (put(f"{LAYER}gate1", [1.0] * 128), "gate1"),
    "an array for a tensor": (put(f"{LAYER}gate1", np.ones(128)), "numpy"),
    "a scalar": (put(f"{LAYER}gate1", torch.tensor(1.0)), "gate1"),
    "an axis too many": (put(f"{LAYER}gate1", torch.ones(128, 1)), "gate1"),
    "a transposed matrix": (shaped(f"{LAYER}mlp.fc1.weight", 128, 512), "fc1"),
    "a layer that is missing": (rename("encoder_layers.0.", "gone."), "encoder_layers.0"),
    "layers that begin at 1": (rename("encoder_layers.0.", "encoder_layers.2."), "encoder_layers.0"),
    "a layer by a padded number": (rename("encoder_layers.1.", "encoder_layers.01."), "encoder_layers"),
    "a layer below zero": (rename("encoder_layers.1.", "encoder_layers.-1."), "num_encoder_layers"),
    "a layer twice": (put("encoder_layers.2.gate1", torch.ones(128)), "num_encoder_layers"),
    "a causal layer that is missing": (rename("decoder_layers.0.", "gone."), "num_decoder_layers"),
    "a decoder block that is missing": (rename(f"{NET}blocks.0.", "gone."), "diffusion_depth"),
    "queries without their projection": (take("query_linear.weight"), "low_rank_queries"),
    "a projection without bias": (take("query_linear.bias"), "query_linear.bias"),
    "fewer queries than tokens": (
        lambda w: w.update(
            {"query_embedding.weight": torch.ones(8, 8), "decoder_embedding.weight": torch.ones(8, 64)}
        ),
        "max_num_tokens",
    ),
    "positions for fewer tokens": (shaped("decoder_embedding.weight", 512, 64), "decoder_embedding"),
    "patches that are not square": (shaped("patchify.weight", 128, 3, 4, 2), "patchify"),
    "patches of no pixels": (shaped("patchify.weight", 128, 3, 0, 0), "encoder_patch_size"),
    "no channels": (shaped("patchify.weight", 128, 0, 4, 4), "in_channels"),
    "a quantizer of 3x3": (shaped("quant_in_conv.weight", 8, 128, 3, 3), "quant_in_conv"),
    "pixels that are no square patch": (shaped(f"{NET}conv_in.weight", 128, 14, 1, 1), "conv_in.weight"),
    "heads of another width": (shaped("encoder_layers.0.attention.q_norm.weight", 32), "32"),
    "both output layers": (shaped(f"{NET}linear_out.linear.weight", 12, 128), "adaptive_head"),
    "both kinds of time embedding": (shaped(f"{NET}time_embed.mlp.0.weight", 128, 128), "share_time_embedding"),
    "half a REPA head": (shaped(f"{NET}repa_out.0.weight", 2048, 128), "repa_out"),
    "a REPA head's end": (put(f"{NET}repa_out.4.bias", torch.ones(768)), "repa_out"),
    "weights of something else": (shaped("vgg.features.0.weight", 3, 3), "vgg.features"),
}


@pytest.mark.parametrize("change, mention", TOKENIZER_WEIGHTS.values(), ids=TOKENIZER_WEIGHTS)
def test_damaged_weights_of_a_tokenizer(path, change, mention):
    config = originals.tokenizer_config()
    weights = originals.tokenizer_weights(config, repa=False)
    change(weights)
    torch.save({"ema": weights, "config": {"model": config}}, path)
    found, said = outcome(lambda: convert_tokenizer(path), mention)
    assert found == CLEAR, said


# Options of the tokenizer, by the original's names in its configuration and by ours

TOKENIZER_OPTIONS = {
    "no tokens": ({"num_tokens": 0}, "num_tokens"),
    "tokens below zero": ({"num_tokens": -16}, "num_tokens"),
    "tokens as text": ({"num_tokens": "16"}, "num_tokens"),
    "tokens as a fraction": ({"num_tokens": 16.5}, "num_tokens"),
    "more groups than tokens": ({"num_groups": 32}, "num_groups"),
    "no group": ({"num_groups": 0}, "num_groups"),
    "groups longer than all": ({"tokens_per_group": 17}, "tokens_per_group"),
    "groups of no token": ({"tokens_per_group": 0}, "tokens_per_group"),
    "no step": ({"num_inference_steps": 0}, "num_inference_steps"),
    "no size": ({"sample_size": 0}, "sample_size"),
    "a size of no side": ({"sample_size": []}, "sample_size"),
    "a size of three sides": ({"sample_size": [16, 16, 16]}, "sample_size"),
    "a size below zero": ({"sample_size": -16}, "sample_size"),
    "a size of text": ({"sample_size": "16x16"}, "sample_size"),
    "a size between patches": ({"sample_size": 18}, "sample_size"),
    "another codebook": ({"codebook_size": 64}, "codebook_size"),
    "heads of another width": ({"attention_head_dim": 32}, "attention_head_dim"),
    "no scale": ({"data_std": 0.0}, "data_std"),
    "an infinite scale": ({"data_std": float("inf")}, "data_std"),
    "a scale below zero": ({"data_std": -0.6}, "data_std"),
    "a shift that is no number": ({"time_shift": float("nan")}, "time_shift"),
    "a shift as text": ({"time_shift": "2"}, "time_shift"),
    "a rotary base of zero": ({"diffusion_rope_theta": 0}, "diffusion_rope_theta"),
    "a rotary base as text": ({"diffusion_rope_theta": "10000"}, "diffusion_rope_theta"),
    "conditions of another width": ({"condition_dim": 128}, "condition_dim"),
    "a switch as a number": ({"strict_sample_size": 1}, "strict_sample_size"),
    "a REPA layer as text": ({"repa_layer": "8"}, "repa_layer"),
    "a table of another size": ({"max_num_tokens": 16}, "max_num_tokens"),
    "an unknown name": ({"num_token": 16}, "num_token"),
    "a configuration of numbers": ({"config": {"model": [1, 2]}}, "configuration"),
    "a configuration that is missing": ({"config": "none.yaml"}, "none.yaml"),
    "a configuration that is a folder": ({"config": "."}, "directory"),
}


@pytest.fixture(scope="module")
def good_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "tokenizer.pt"
    config = originals.tokenizer_config()
    weights = originals.tokenizer_weights(config, repa=False)
    originals.save(originals.tokenizer_checkpoint(weights, config), path)
    convert_tokenizer(path)
    return path


@pytest.mark.parametrize("options, mention", TOKENIZER_OPTIONS.values(), ids=TOKENIZER_OPTIONS)
def test_senseless_options_of_a_tokenizer(good_tokenizer, options, mention):
    found, said = outcome(lambda: convert_tokenizer(good_tokenizer, **options), mention)
    assert found == CLEAR, said


YAML = {
    "a tag that builds objects": ("model: !!python/object/apply:os.mkdir [trace]", "no YAML file"),
    "an open bracket": ("model: {a: [", "no YAML file"),
    "tabs": ("model:\n\tvq_dim: 8", "no YAML file"),
    "bytes": (b"\xff\xfe\x00", "no YAML file"),
    "text": ("just text", "a configuration holds options by name"),
    "nothing": ("", "a configuration holds options by name"),
    "a decoder of text": ("model: {diff_decoder: large}", "diff_decoder"),
    "no codes": ("model: {vq_enable: no}", "vq_enable"),
    "an option of options": ("model: {vq_dim: {size: 8}}", "vq_dim"),
}


@pytest.mark.parametrize("content, mention", YAML.values(), ids=YAML)
def test_broken_configuration_files(good_tokenizer, tmp_path, monkeypatch, content, mention):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    found, said = outcome(lambda: convert_tokenizer(good_tokenizer, "config.yaml"), mention)
    assert found == CLEAR, said
    assert not Path("trace").exists()


# Files that are something else


def archive(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"content")
    return buffer.getvalue()


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        entry = tarfile.TarInfo("data.pkl")
        file.addfile(entry)
    return buffer.getvalue()


def arrays():
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.ones(3))
    return buffer.getvalue()


FILES = {
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1200000000\n",
    "a page of the web": b"<!DOCTYPE html><html><body>404</body></html>",
    "a compressed file": gzip.compress(b"content"),
    "an archive of nothing": archive(),
    "an archive of something else": archive("word/document.xml"),
    "an archive with an empty pickle": archive("archive/data.pkl", "archive/version"),
    "a tar": tar(),
    "arrays of numpy": arrays(),
    "JSON": b'{"model": {}}',
    "zeros": bytes(1 << 16),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_files_that_are_something_else(tmp_path, content, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    path.write_bytes(content)
    for convert in (convert_tokenizer, convert_transformer):
        found, said = outcome(partial(convert, path), "checkpoint")
        assert found == CLEAR, said


def test_a_folder_for_a_file(tmp_path):
    for convert in (convert_tokenizer, convert_transformer):
        assert outcome(partial(convert, tmp_path), "no checkpoint at")[0] == CLEAR


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_cut_off_safetensors(tmp_path, share):
    path = tmp_path / "model.safetensors"
    save_file(originals.transformer_weights(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert outcome(lambda: convert_transformer(path), "model.safetensors")[0] == CLEAR


# The language model

WQKV = "layers.0.attention.wqkv.weight"
TRANSFORMER_WEIGHTS = {
    "no class": (shaped("cls_embedding.embedding_table.weight", 1, 128), "num_classes"),
    "no null class": (shaped("cls_embedding.embedding_table.weight", 0, 128), "num_classes"),
    "classes of another width": (shaped("cls_embedding.embedding_table.weight", 6, 64), "cls_embedding"),
    "no codes": (
        lambda w: w.update({"tok_embeddings.weight": torch.ones(0, 128), "output.weight": torch.ones(0, 128)}),
        "codebook_size",
    ),
    "an output for other codes": (shaped("output.weight", 31, 128), "output"),
    "rows that no heads have": (shaped(WQKV, 383, 128), "rows"),
    "queries without keys": (shaped(WQKV, 128, 128), "rows"),
    "a key of another width": (shaped(WQKV, 384, 64), "wqkv"),
    "a gate of another width": (shaped("layers.0.feed_forward.w3.weight", 256, 128), "w3"),
    "a layer that is missing": (rename("layers.0.", "gone."), "layers.0"),
    "layers with a gap": (rename("layers.1.", "layers.2."), "layers.1"),
    "no last norm": (take("norm.weight"), "norm.weight"),
    "no output": (take("output.weight"), "output.weight"),
    "a bias": (shaped("layers.0.attention.wo.bias", 128), "wo.bias"),
    "NaN": (put("norm.weight", torch.full((128,), torch.nan)), "not finite"),
    "integers": (as_type("norm.weight", torch.int32), "norm.weight"),
    "a tokenizer": (
        lambda w: (w.clear(), w.update(originals.tokenizer_weights(originals.TOKENIZER, False))),
        "it lacks",
    ),
}
TRANSFORMER_ARGS = {
    "heads as text": ({"n_head": "2"}, "num_attention_heads"),
    "no head": ({"n_head": 0}, "num_attention_heads"),
    "heads below zero": ({"n_head": -2}, "num_attention_heads"),
    "a fraction of heads": ({"n_head": 2.5}, "num_attention_heads"),
    "heads that do not divide": ({"n_head": 3}, "num_attention_heads"),
    "heads as a switch": ({"n_head": True}, "num_attention_heads"),
    "no codes an image": ({"block_size": 0}, "num_image_tokens"),
    "codes as text": ({"block_size": "16"}, "num_image_tokens"),
    "a fraction of codes": ({"block_size": 16.5}, "num_image_tokens"),
    "another width": ({"dim": 256}, "dim"),
    "other layers": ({"n_layer": 3}, "n_layer"),
    "another vocabulary": ({"vocab_size": 16384}, "vocab_size"),
    "other classes": ({"num_classes": 1000}, "num_classes"),
    "captions": ({"cls_token_num": 120}, "cls_token_num"),
    "a rotary base of zero": ({"rope_base": 0}, "rope_base"),
    "no epsilon": ({"norm_eps": -1e-5}, "norm_eps"),
}
TRANSFORMER_OPTIONS = {
    "tokens below zero": ({"num_image_tokens": -1}, "num_image_tokens"),
    "other tokens": ({"num_image_tokens": 32}, "num_image_tokens"),
    "no token a group": ({"tokens_per_group": 0}, "tokens_per_group"),
    "tokens as text": ({"tokens_per_group": "four"}, "tokens_per_group"),
    "dropout of all": ({"resid_dropout": 1.0}, "resid_dropout"),
    "dropout below zero": ({"class_dropout": -0.1}, "class_dropout"),
    "other heads": ({"num_attention_heads": 4}, "num_attention_heads"),
    "other layers": ({"num_hidden_layers": 1}, "num_hidden_layers"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "an unknown activation": ({"hidden_act": "none"}, "none"),
    "one table for both": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "heads of their own width": ({"head_dim": 32}, "head_dim"),
    "a vocabulary": ({"vocab_size": 38}, "vocab_size"),
    "an unknown name": ({"classes": 5}, "classes"),
    "an unknown sampling": ({"sampling": "S"}, "sampling"),
}


def save_transformer(path, change=None, **args):
    weights = originals.transformer_weights(**originals.TRANSFORMER)
    if change is not None:
        change(weights)
    content = originals.transformer_checkpoint(weights, n_head=2, block_size=16)
    vars(content["args"]).update(args)
    torch.save(content, path)


@pytest.mark.parametrize("change, mention", TRANSFORMER_WEIGHTS.values(), ids=TRANSFORMER_WEIGHTS)
def test_damaged_weights_of_a_language_model(path, change, mention):
    save_transformer(path, change)
    found, said = outcome(lambda: convert_transformer(path), mention)
    assert found == CLEAR, said


@pytest.mark.parametrize("args, mention", TRANSFORMER_ARGS.values(), ids=TRANSFORMER_ARGS)
def test_senseless_arguments_of_a_language_model(path, args, mention):
    save_transformer(path, **args)
    found, said = outcome(lambda: convert_transformer(path), mention)
    assert found == CLEAR, said


@pytest.mark.parametrize("options, mention", TRANSFORMER_OPTIONS.values(), ids=TRANSFORMER_OPTIONS)
def test_senseless_options_of_a_language_model(path, options, mention):
    save_transformer(path)
    found, said = outcome(lambda: convert_transformer(path, **options), mention)
    assert found == CLEAR, said


LABELS = {
    "a class too many": {5: "ray"},
    "a class below zero": {-1: "ray"},
    "a class by a word": {"ray": "ray"},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_class_names_that_an_exported_llama_cannot_have(tiny_transformer, tmp_path, labels):
    found, said = outcome(lambda: save_llama(tiny_transformer, tmp_path / "llama", labels), "")
    assert found == CLEAR, said
    assert not (tmp_path / "llama").exists()


# Folders that are to be pushed


def write(name, content):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def edited(name, **entries):
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))

    return change


TOKENIZER_CONFIG = "tokenizer/config.json"
FOLDERS = {
    "gone": (shutil.rmtree, "no folder at"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "no folder at"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "holds no model"),
    "without an index": (remove("model_index.json"), "holds no model"),
    "an index that is no JSON": (write("model_index.json", "{"), "model_index.json"),
    "an index of bytes": (write("model_index.json", b"\xff\xfe"), "model_index.json"),
    "an index that is a list": (write("model_index.json", "[]"), "model_index.json"),
    "an index of another class": (
        edited("model_index.json", _class_name="StableDiffusionPipeline"),
        "StableDiffusion",
    ),
    "an index of no class": (write("model_index.json", "{}"), "another model"),
    "without a tokenizer": (remove("tokenizer"), "tokenizer"),
    "without a language model": (remove("transformer"), "transformer"),
    "without a scheduler": (remove("scheduler"), "scheduler"),
    "a tokenizer of another class": (edited(TOKENIZER_CONFIG, _class_name="AutoencoderKL"), "AutoencoderKL"),
    "a configuration that is no JSON": (write(TOKENIZER_CONFIG, "{"), "config.json"),
    "sizes that do not fit": (edited(TOKENIZER_CONFIG, num_tokens=15), "num_tokens=15"),
    "components that do not fit": (edited("transformer/config.json", num_image_tokens=8), "disagree"),
    "another language model": (edited("transformer/config.json", model_type="llama"), "llama"),
    "a card of bytes": (write("README.md", b"\xff\xfe\x00"), "README.md"),
}


@pytest.fixture
def saved(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("change, mention", FOLDERS.values(), ids=FOLDERS)
def test_broken_folders_are_not_pushed(saved, monkeypatch, change, mention):
    monkeypatch.setattr("dar_hf.hub.push.HfApi", None)  # nothing is to reach a Hub
    change(saved)
    found, said = outcome(lambda: push_folder(saved, "user/x"), mention)
    assert found == CLEAR, said


RECORDS = {
    "a record that is no JSON": (write("training.json", "{"), "training.json"),
    "a record of nothing": (write("training.json", "{}"), "training.json"),
    "a record that is a list": (write("training.json", "[]"), "training.json"),
    "a report that is no JSON": (write("evaluation/generation/report.json", "{"), "report.json"),
    "a report of nothing": (write("evaluation/generation/report.json", "{}"), "report.json"),
    "a report that is a list": (write("evaluation/generation/report.json", "[]"), "report.json"),
    "a card of bytes": (write("README.md", b"\xff\xfe\x00"), "README.md"),
    "a card whose metadata are no YAML": (write("README.md", "---\na: [\n---\n"), ""),
}


@pytest.mark.parametrize("change, mention", RECORDS.values(), ids=RECORDS)
def test_cards_of_broken_records(saved, change, mention):
    change(saved)
    found, said = outcome(lambda: write_run_card(saved, "user/x"), mention)
    assert found == CLEAR, said


def test_reports_that_are_none(saved, tmp_path):
    for name, content in (("none.json", None), ("text.json", "text"), ("empty.json", "{}"), ("list.json", "[1]")):
        if content is not None:
            (tmp_path / name).write_text(content)
        found, said = outcome(partial(take_report, tmp_path / name, saved), name)
        assert found == CLEAR, said


@pytest.mark.parametrize("change, mention", list(FOLDERS.values())[2:13], ids=list(FOLDERS)[2:13])
def test_broken_folders_get_no_code(saved, change, mention):
    change(saved)
    before = {path for path in saved.rglob("*")}
    found, said = outcome(lambda: export_remote_code(saved), "")
    assert found == CLEAR, said
    assert {path for path in saved.rglob("*")} == before


# Options of the commands: one line on stderr and exit code 1 or 2, and nothing is left behind

EXAMPLES = Path(__file__).parents[2] / "examples"
CONVERT = ["convert_checkpoint.py", "--output_dir", "OUT"]
BOTH = [*CONVERT, "--tokenizer", "TOKENIZER", "--transformer", "AR"]
EXPORT = ["export_llama.py", "--output_dir", "OUT", "--model"]
PUSH = ["push_to_hub.py"]
COMMANDS = {
    "nothing to convert": (CONVERT, "give --tokenizer, --transformer or both"),
    "no output folder": (["convert_checkpoint.py", "--tokenizer", "TOKENIZER"], "--output_dir"),
    "an unknown option": ([*BOTH, "--sharded"], "--sharded"),
    "files in each other's place": (
        [*CONVERT, "--tokenizer", "AR", "--transformer", "TOKENIZER"],
        "is no D-AR tokenizer",
    ),
    "the output is a file": ([*BOTH[:2], "TOKENIZER", *BOTH[3:]], "is not a folder"),
    "the output holds something": ([*BOTH[:2], "FULL", *BOTH[3:]], "not an empty folder"),
    "the output is below a file": ([*BOTH[:2], "TOKENIZER/out", *BOTH[3:]], "TOKENIZER"),
    "names that are missing": ([*BOTH, "--id2label", "NONE"], "NONE"),
    "names that are a folder": ([*BOTH, "--id2label", "FULL"], "FULL"),
    "names that are weights": ([*BOTH, "--id2label", "TOKENIZER"], "codec"),
    "too few names": ([*BOTH, "--id2label", "NAMES"], "must name the classes 0 to 4"),
    "names of one model": ([*CONVERT, "--tokenizer", "TOKENIZER", "--id2label", "NAMES"], "--id2label needs"),
    "no sampling of that name": ([*BOTH, "--sampling", "M"], "no sampling preset 'M'"),
    "an option without a value": ([*BOTH, "--tokenizer_options", "num_tokens"], "name=value"),
    "an option of another type": ([*BOTH, "--tokenizer_options", "num_tokens=many"], "num_tokens"),
    "an option of neither": ([*BOTH, "--transformer_options", "depth=2"], "no option depth"),
    "a configuration that is missing": ([*BOTH, "--config", "NONE"], "NONE"),
    "a model that is missing": ([*EXPORT, "NONE"], "NONE"),
    "a model in an empty folder": ([*EXPORT, "EMPTY"], "EMPTY"),
    "a file for a model": ([*EXPORT, "AR"], "AR"),
    "a tokenizer for a language model": ([*EXPORT, "SAVED/tokenizer"], "not a 'dar' language model"),
    "a part that is missing": ([*EXPORT, "SAVED", "--subfolder", "llama"], "SAVED"),
    "a pipeline for its part": ([*EXPORT, "SAVED"], "SAVED"),
    "a push of nothing": ([*PUSH, "NONE", "user/x"], "no folder at"),
    "a push of an empty folder": ([*PUSH, "EMPTY", "user/x"], "holds no model"),
    "a push with a report that is missing": ([*PUSH, "SAVED", "user/x", "--report", "NONE"], "NONE"),
    "a push to no repository": ([*PUSH, "SAVED"], "repo_id"),
    "a push to a name that is none": ([*PUSH, "SAVED", "a/b/c"], "namespace/repo_name"),
}


@pytest.fixture
def places(tmp_path, good_tokenizer, saved):
    """The files and folders that the commands' words stand for."""
    names = {name: tmp_path / name.lower() for name in ("OUT", "AR", "NONE", "EMPTY", "FULL", "NAMES")}
    save_transformer(names["AR"])
    names["EMPTY"].mkdir()
    names["FULL"].mkdir()
    (names["FULL"] / "mine").write_text("x")
    names["NAMES"].write_text("a\nb\n")
    return names | {"TOKENIZER": good_tokenizer, "SAVED": saved}


@pytest.mark.parametrize("words, mention", COMMANDS.values(), ids=COMMANDS)
def test_senseless_commands(places, monkeypatch, capsys, tmp_path, words, mention):
    def place(word):
        name, slash, rest = word.partition("/")
        return f"{places[name]}{slash}{rest}" if name in places else word

    monkeypatch.setattr(sys, "argv", [place(word) for word in words])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(EXAMPLES / words[0]), run_name="__main__")
    code, said = caught.value.code, capsys.readouterr().err
    if isinstance(code, str):  # as the interpreter does
        code, said = 1, said + code
    assert code in (1, 2) and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(words[0]) and str(places.get(mention, mention)) in said, said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_there_are_enough():
    groups = (TOKENIZER_WEIGHTS, TOKENIZER_OPTIONS, YAML, FILES, TRANSFORMER_WEIGHTS, TRANSFORMER_ARGS)
    groups += (TRANSFORMER_OPTIONS, LABELS, FOLDERS, RECORDS, COMMANDS)
    assert sum(map(len, groups)) >= 150
