"""Saved models that are not there, damaged or of another kind."""

import json
import shutil

import pytest
import torch

from dar_hf import DARForCausalLM, DARPipeline, DARTokenizer
from dar_hf.utils.loading import LoadError, check_weights, load, load_pipeline

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WEIGHTS = "transformer/model.safetensors"


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_whole_models_load(folder, tiny_pipeline, monkeypatch):
    loaded = load_pipeline(folder, torch.bfloat16)
    assert isinstance(loaded, DARPipeline) and loaded.transformer.dtype == torch.bfloat16
    assert isinstance(load(DARTokenizer, folder / "tokenizer"), DARTokenizer)
    model = load(DARForCausalLM, str(folder), subfolder="transformer", dtype=torch.float32)
    expected = tiny_pipeline.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    monkeypatch.setenv("HOME", str(folder.parent))
    assert isinstance(load(DARTokenizer, "~/pipeline/tokenizer"), DARTokenizer)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer/diffusion_pytorch_model.safetensors"])
def test_damaged_weights_are_named(folder, name):
    path = folder / name
    whole = path.read_bytes()
    cases = {
        POINTER: "is a git-lfs pointer, not the file itself: run `git lfs pull`",
        whole[:-100]: f"is damaged or cut off: it should have {len(whole)} bytes, and has {len(whole) - 100}",
        whole[:50]: "is damaged or cut off: 50 bytes hold no complete header",
        whole[:3]: "is damaged or cut off: 3 bytes",
        b"": "is damaged or cut off: 0 bytes",
        whole[:8] + b"x" * (len(whole) - 8): "its header is not that of safetensors",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(LoadError, match=message) as caught:
            load_pipeline(folder)
        assert str(path) in str(caught.value)
        with pytest.raises(LoadError, match=message):
            check_weights(path)
    path.write_bytes(whole)
    check_weights(path)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "tokenizer/config.json",
        "transformer/config.json",
        "transformer/generation_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_damaged_configurations_are_named(folder, name):
    for content in (b"{", b"", b"[1]", b"\xff\xfe{}", POINTER, b"[" * 100_000):
        (folder / name).write_bytes(content)
        with pytest.raises(LoadError, match="is damaged|git-lfs pointer") as caught:
            load_pipeline(folder)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("tokenizer/config.json", {"num_tokens": "many"}),
        ("tokenizer/config.json", {"encoder_dim": None}),
        ("tokenizer/config.json", {"encoder_dim": -64}),
        ("tokenizer/config.json", {"codebook_size": 31}),
        ("transformer/config.json", {"hidden_act": "magic"}),
        ("transformer/config.json", {"num_attention_heads": 0}),
        ("transformer/config.json", {"rope_parameters": 3}),
        ("transformer/config.json", {"num_classes": {}}),
        ("scheduler/scheduler_config.json", {"shift": "far"}),
        ("model_index.json", {"tokenizer": ["dar_hf"]}),
        ("model_index.json", {"tokenizer": 3}),
        ("model_index.json", {"id2label": {"a": "b"}}),
        ("model_index.json", {"id2label": 5}),
    ],
)
def test_configurations_that_make_no_model_are_one_error(folder, name, changes):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
    with pytest.raises(LoadError, match="cannot load the pipeline"):
        load_pipeline(folder)


def test_what_is_not_there(folder, tmp_path):
    for source in ("/nowhere", "./nowhere", "~/nowhere", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(LoadError, match="no pipeline at .*: there is no such folder"):
            load_pipeline(source)
    with pytest.raises(LoadError, match="it is a file, not the folder of a pipeline"):
        load_pipeline(folder / "model_index.json")
    with pytest.raises(LoadError, match="no pipeline is named"):
        load_pipeline("")
    with pytest.raises(LoadError, match="cannot load the pipeline"):
        load_pipeline(tmp_path)
    shutil.rmtree(folder / "transformer")
    with pytest.raises(LoadError, match="no config.json of a language model"):
        load_pipeline(folder)


def test_out_of_memory_is_no_damage(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DARTokenizer, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load(DARTokenizer, folder / "tokenizer")
