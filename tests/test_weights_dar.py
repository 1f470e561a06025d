"""Saving over an earlier save, and weights that are not those of their configuration."""

import errno
import json
import os

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from dar_hf import DARForCausalLM, DARModel, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.hub import export_remote_code
from dar_hf.weights_dar import replacing_earlier_save, stale_weights

TOKENIZER_FORMS = {
    "whole": {},
    "four shards": {"max_shard_size": "300KB"},
    "two shards": {"max_shard_size": "700KB"},
    "bin": {"safe_serialization": False},
    "bin in shards": {"safe_serialization": False, "max_shard_size": "300KB"},
}
TRANSFORMER_FORMS = {"whole": {}, "shards": {"max_shard_size": "100KB"}, "more shards": {"max_shard_size": "40KB"}}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def pairs(forms):
    return [(first, second) for first in forms for second in forms if first != second]


def changed(model):
    """The same model with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Saving over an earlier save


@pytest.mark.parametrize("first, second", pairs(TOKENIZER_FORMS))
def test_a_tokenizer_saved_over_another_form_is_the_one_that_loads(make_tokenizer, tmp_path, first, second):
    make_tokenizer().save_pretrained(tmp_path / "again", **TOKENIZER_FORMS[first])
    model = changed(make_tokenizer())
    for folder in ("again", "fresh"):
        model.save_pretrained(tmp_path / folder, **TOKENIZER_FORMS[second])
    assert names(tmp_path / "again") == names(tmp_path / "fresh")
    # diffusers finds shards of torch's format only where it is told to
    options = {"use_safetensors": False} if second == "bin in shards" else {}
    assert equal(DARTokenizer.from_pretrained(tmp_path / "again", **options), model)


@pytest.mark.parametrize("first, second", pairs(TRANSFORMER_FORMS))
def test_a_language_model_saved_over_another_form_is_the_one_that_loads(make_transformer, tmp_path, first, second):
    make_transformer().save_pretrained(tmp_path / "again", **TRANSFORMER_FORMS[first])
    model = changed(make_transformer())
    for folder in ("again", "fresh"):
        model.save_pretrained(tmp_path / folder, **TRANSFORMER_FORMS[second])
    assert names(tmp_path / "again") == names(tmp_path / "fresh")
    for loader in (DARForCausalLM, AutoModelForCausalLM):
        assert equal(loader.from_pretrained(tmp_path / "again"), model)


def test_a_body_saved_over_another_form_is_the_one_that_loads(make_transformer, tmp_path):
    make_transformer().model.save_pretrained(tmp_path, max_shard_size="40KB")
    torch.save(make_transformer().model.state_dict(), tmp_path / "pytorch_model.bin")
    body = changed(make_transformer()).model
    body.save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors"]
    assert equal(DARModel.from_pretrained(tmp_path), body)


def test_a_self_contained_language_model_replaces_earlier_weights_too(tiny_transformer, tmp_path):
    tiny_transformer.save_pretrained(tmp_path, max_shard_size="40KB")
    export_remote_code(tmp_path)
    remote = get_class_from_dynamic_module("modeling_dar.DARForCausalLM", str(tmp_path)).from_pretrained(tmp_path)
    remote.save_pretrained(tmp_path)
    assert "model.safetensors" in names(tmp_path) and "model.safetensors.index.json" not in names(tmp_path)


def test_a_language_model_saved_over_torchs_own_format(make_transformer, tmp_path):
    torch.save(make_transformer().state_dict(), tmp_path / "pytorch_model.bin")
    changed(make_transformer()).save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_pipeline_saved_over_another_form_is_the_one_that_loads(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, max_shard_size="100KB")
    changed(tiny_pipeline.tokenizer), changed(tiny_pipeline.transformer)
    tiny_pipeline.save_pretrained(tmp_path, safe_serialization=False)
    loaded = DARPipeline.from_pretrained(tmp_path)
    assert equal(loaded.tokenizer, tiny_pipeline.tokenizer) and equal(loaded.transformer, tiny_pipeline.transformer)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}], ids=["whole", "shards"])
def test_other_variants_and_other_files_stay(tiny_pipeline, tmp_path, options):
    tiny_pipeline.save_pretrained(tmp_path, variant="fp16", **options)
    (tmp_path / "tokenizer" / "notes.txt").write_text("mine")
    fp16 = {path: path.read_bytes() for path in tmp_path.rglob("*fp16*")}
    assert fp16
    changed(tiny_pipeline.tokenizer)
    tiny_pipeline.save_pretrained(tmp_path)
    tiny_pipeline.save_pretrained(tmp_path, variant="bf16")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*fp16*")} == fp16
    assert (tmp_path / "tokenizer" / "notes.txt").read_text() == "mine"
    for variant in (None, "bf16"):
        assert equal(DARPipeline.from_pretrained(tmp_path, variant=variant).tokenizer, tiny_pipeline.tokenizer)
    assert not equal(DARPipeline.from_pretrained(tmp_path, variant="fp16").tokenizer, tiny_pipeline.tokenizer)


def test_a_variant_saved_over_another_form_is_the_one_that_loads(make_tokenizer, tmp_path):
    make_tokenizer().save_pretrained(tmp_path, variant="fp16", max_shard_size="300KB")
    model = changed(make_tokenizer())
    model.save_pretrained(tmp_path, variant="fp16", safe_serialization=False)
    assert equal(DARTokenizer.from_pretrained(tmp_path, variant="fp16"), model)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "300KB"}], ids=["whole", "shards"])
def test_a_save_that_fails_leaves_the_earlier_one(make_tokenizer, tmp_path, monkeypatch, options):
    earlier = make_tokenizer()
    earlier.save_pretrained(tmp_path, max_shard_size="300KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, filename, metadata=None):
        with open(filename, "wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        changed(make_tokenizer()).save_pretrained(tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert equal(DARTokenizer.from_pretrained(tmp_path), earlier)


def test_a_pipeline_that_cannot_be_saved_leaves_the_earlier_one(tiny_pipeline, tmp_path, monkeypatch):
    """Its tokenizer comes first, and must not stand next to the earlier language model."""
    tiny_pipeline.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    changed(tiny_pipeline.tokenizer)
    scheduler = FlowMatchAdamsBashforthScheduler(shift=7.0)
    other = DARPipeline(tiny_pipeline.tokenizer, tiny_pipeline.transformer, scheduler)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    other.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = DARPipeline.from_pretrained(tmp_path)
    assert equal(loaded.tokenizer, other.tokenizer) and loaded.scheduler.config.shift == 7.0
    assert "model.safetensors" not in names(tmp_path / "transformer")


@pytest.mark.parametrize("name", ["tokenizer", "transformer", None])
def test_a_file_in_the_place_of_the_folder_is_refused(tiny_pipeline, tmp_path, name):
    """The libraries log a line, and save nothing."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path / "file")):
        (tiny_pipeline.components[name] if name else tiny_pipeline).save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_component_may_be_a_link_to_another_disk(tiny_pipeline, tmp_path, monkeypatch):
    replace = os.replace

    def of_one_disk(source, target):
        if "transformer" in str(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr("os.replace", of_one_disk)
    (tmp_path / "disk").mkdir()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "transformer").symlink_to(tmp_path / "disk")
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "transformer").is_symlink() and "model.safetensors" in names(tmp_path / "disk")
    assert equal(DARPipeline.from_pretrained(tmp_path / "pipeline").transformer, tiny_pipeline.transformer)


def test_a_folder_in_the_place_of_a_file_is_refused(tiny_tokenizer, tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError):
        tiny_tokenizer.save_pretrained(tmp_path)
    assert not list((tmp_path / "config.json").iterdir())


def test_earlier_weights_go_only_when_the_new_ones_are_there(tmp_path, monkeypatch):
    """Killed between the two, a folder holds both, complete."""

    def save(self, save_directory):
        for name in ("config.json", WEIGHTS):
            with open(f"{save_directory}/{name}", "w") as file:
                file.write("new")

    (tmp_path / "diffusion_pytorch_model.bin").write_text("old")
    monkeypatch.setattr("dar_hf.weights_dar.stale_weights", lambda *args: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        replacing_earlier_save(save)(None, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "config.json": "new",
        WEIGHTS: "new",
        "diffusion_pytorch_model.bin": "old",
    }


def test_a_model_may_be_saved_where_it_was_loaded_from(make_tokenizer, tmp_path):
    """Its weights may still be read from the file (memory-mapped)."""
    make_tokenizer().save_pretrained(tmp_path)
    loaded = DARTokenizer.from_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path, max_shard_size="300KB")
    again = DARTokenizer.from_pretrained(tmp_path).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(loaded.state_dict()[name], tensor) and torch.equal(again[name], tensor)


def test_a_merged_model_saved_over_its_adapter_is_loaded_without_it(make_transformer, tmp_path):
    peft = pytest.importorskip("peft")
    make_transformer().save_pretrained(tmp_path / "base")
    model = DARForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "x")
    assert names(tmp_path / "x") == ["adapter_config.json", "adapter_model.safetensors", "generation_config.json"]
    whole = changed(make_transformer())
    whole.save_pretrained(tmp_path / "x")
    assert equal(DARForCausalLM.from_pretrained(tmp_path / "x"), whole)


def test_an_adapter_saved_next_to_its_model_leaves_it(make_transformer, tmp_path):
    peft = pytest.importorskip("peft")
    make_transformer().save_pretrained(tmp_path)
    model = DARForCausalLM.from_pretrained(tmp_path)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert {"adapter_model.safetensors", "model.safetensors"} <= set(names(tmp_path))


@pytest.mark.parametrize(
    "written, stale",
    [
        (["model.safetensors"], ["pytorch_model.bin", "model-00001-of-00002.safetensors", "adapter_config.json"]),
        (["model.safetensors"], ["model.safetensors.index.json", "pytorch_model.bin.index.json"]),
        (["pytorch_model.bin"], ["model.safetensors", "adapter_model.safetensors", "adapter_model.bin"]),
        (["model.fp16.safetensors"], ["model-00001-of-00002.fp16.safetensors", "model.safetensors.index.fp16.json"]),
        (["model.fp16-00001-of-00001.safetensors"], ["model.fp16.safetensors", "pytorch_model.fp16.bin"]),
        (["diffusion_pytorch_model.bin"], [WEIGHTS, "diffusion_pytorch_model-00001-of-00002.safetensors"]),
        (["adapter_model.bin"], ["adapter_model.safetensors"]),
        (["transformer/model.safetensors"], ["transformer/pytorch_model.bin"]),
        (["config.json"], []),
        ([], []),
    ],
)
def test_which_weights_are_stale(written, stale):
    others = ["README.md", "model.py", "other.safetensors", "model.bf16.safetensors", "tokenizer/model.safetensors"]
    assert sorted(stale_weights([*others, *stale, *written], written)) == sorted(stale)


# Weights that are not those of the configuration


@pytest.fixture
def edited(make_tokenizer, tmp_path):
    """A function that saves a tokenizer, whole or in shards, with its weights changed by a function."""

    def save(change, sharded=False, **options):
        make_tokenizer(**options).save_pretrained(tmp_path, max_shard_size="300KB" if sharded else "10GB")
        for path in tmp_path.glob("*.safetensors"):
            state = load_file(path)
            change(state)
            save_file(state, path, metadata={"format": "pt"})
        return tmp_path

    return save


def dropping(*dropped):
    def change(state):
        for name in dropped:
            state.pop(name, None)

    return change


LOADERS = {
    "from_pretrained": DARTokenizer.from_pretrained,
    "subfolder": lambda folder: DARTokenizer.from_pretrained(folder.parent, subfolder=folder.name),
    "half precision": lambda folder: DARTokenizer.from_pretrained(folder, dtype=torch.bfloat16),
    "device_map": lambda folder: DARTokenizer.from_pretrained(folder, device_map="cpu"),
    "without mmap": lambda folder: DARTokenizer.from_pretrained(folder, disable_mmap=True),
    "AutoModel": diffusers.AutoModel.from_pretrained,
}


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("load", LOADERS.values(), ids=list(LOADERS))
def test_every_loader_refuses_missing_tensors_and_names_them(edited, load, sharded):
    folder = edited(dropping("patch_embed.bias", "denoiser.proj_out.weight"), sharded)
    with pytest.raises(ValueError, match=f"{folder.name} .*lack patch_embed.bias, denoiser.proj_out.weight"):
        load(folder)


def test_torchs_own_format_is_looked_at_too(make_tokenizer, tmp_path):
    model = make_tokenizer()
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size="300KB")
    assert equal(DARTokenizer.from_pretrained(tmp_path, use_safetensors=False), model)
    for path in tmp_path.glob("*.bin"):
        state = torch.load(path, weights_only=True)
        state.pop("patch_embed.bias", None)
        torch.save(state, path)
    with pytest.raises(ValueError, match="lack patch_embed.bias"):
        DARTokenizer.from_pretrained(tmp_path, use_safetensors=False)


def test_many_missing_tensors_are_counted(edited):
    folder = edited(lambda state: [state.pop(name) for name in list(state) if name.startswith("causal_blocks")])
    with pytest.raises(ValueError, match=r"lack causal_blocks\.0.* and \d\d more\. They are incomplete"):
        DARTokenizer.from_pretrained(folder)


def test_shards_of_two_saves_are_refused(edited):
    folder = edited(lambda state: state.update({"patch_embed.bias": torch.ones(64)}), sharded=True)
    with pytest.raises(ValueError, match="another shard both hold patch_embed.bias"):
        DARTokenizer.from_pretrained(folder)


def test_a_self_contained_tokenizer_refuses_them_as_well(edited):
    folder = edited(lambda state: None)
    export_remote_code(folder)
    remote = diffusers.AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    assert type(remote).__module__.startswith("diffusers_modules.")
    remote.save_pretrained(folder, safe_serialization=False)
    assert WEIGHTS not in names(folder)
    state = torch.load(folder / "diffusion_pytorch_model.bin", weights_only=True)
    del state["query_proj.bias"]
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="lack query_proj.bias"):
        type(remote).from_pretrained(folder)


# The REPA head, which only training uses


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_missing_repa_head_is_made_anew(edited, make_tokenizer, dtype):
    def change(state):
        for name in [name for name in state if "repa_head" in name]:
            del state[name]

    folder = edited(change, repa_layer=1, repa_dim=24)
    before = torch.random.get_rng_state()
    loaded = DARTokenizer.from_pretrained(folder, dtype=dtype)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {parameter.dtype for parameter in loaded.denoiser.repa_head.parameters()} == {dtype or torch.float32}
    features = loaded(torch.zeros(1, 3, 8, 8), output_repa=True).repa_features
    assert features.isfinite().all() and features.float().std() > 0


def test_a_repa_head_that_the_configuration_has_not_is_left_out(edited, make_tokenizer):
    folder = edited(lambda state: None, repa_layer=1, repa_dim=24)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"repa_layer": None}))
    assert DARTokenizer.from_pretrained(folder).denoiser.repa_head is None


def test_half_a_repa_head_is_refused(edited):
    folder = edited(dropping("denoiser.repa_head.0.bias"), repa_layer=1, repa_dim=24)
    with pytest.raises(ValueError, match="lack denoiser.repa_head.0.bias"):
        DARTokenizer.from_pretrained(folder)
