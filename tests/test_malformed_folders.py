"""Saved folders with one damage each: whatever is wrong, loading or the first call says so, and names the place.

Each is classed: a clear error (an OSError or ValueError whose message names the folder or says which values are not
finite), another exception, or accepted. Of the last two there must be none.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dar_hf import DARConfig, DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler

TOKENIZER = {
    "sample_size": 8,
    "encoder_patch_size": 4,
    "encoder_dim": 16,
    "num_encoder_layers": 2,
    "decoder_dim": 16,
    "num_decoder_layers": 2,
    "codebook_size": 32,
    "num_tokens": 16,
    "num_groups": 4,
    "diffusion_dim": 16,
    "diffusion_patch_size": 4,
    "diffusion_depth": 2,
    "attention_head_dim": 8,
    "repa_layer": None,
    "max_num_tokens": 16,
}
TRANSFORMER = {
    "codebook_size": 32,
    "num_classes": 2,
    "num_image_tokens": 16,
    "tokens_per_group": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"
WEIGHTS = {
    "tokenizer": "diffusion_pytorch_model.safetensors",
    "transformer": "model.safetensors",
    "sharded": "diffusion_pytorch_model-00002-of-00003.safetensors",
}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def rewritten(change):
    """Damage of a file of weights, read and written as tensors by name."""

    def damage(path):
        state = load_file(path)
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    return damage


def bytes_of(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def json_of(change):
    def damage(path):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))

    return damage


def options(**changed):
    return json_of(lambda content: content | changed)


def without(*names):
    return json_of(lambda content: {name: value for name, value in content.items() if name not in names})


def first(state):
    return min(state, key=lambda name: (state[name].numel() < 16, name))


ON_WEIGHTS = {
    "missing": lambda path: path.unlink(),
    "empty": bytes_of(lambda old: b""),
    "cut in the header": bytes_of(lambda old: old[:40]),
    "cut in the middle": bytes_of(lambda old: old[: len(old) // 2]),
    "cut by one byte": bytes_of(lambda old: old[:-1]),
    "with more at the end": bytes_of(lambda old: old + b"0" * 8),
    "git-lfs pointer": bytes_of(lambda old: POINTER),
    "noise": bytes_of(lambda old: bytes(range(256)) * 64),
    "text": bytes_of(lambda old: b"<html>404</html>"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no tensors": rewritten(lambda state: state.clear()),
    "a tensor missing": rewritten(lambda state: state.pop(first(state))),
    "an unknown tensor": rewritten(lambda state: state.update({"other.weight": torch.ones(3)})),
    "a renamed tensor": rewritten(lambda state: state.update({"other.weight": state.pop(first(state))})),
    "another shape": rewritten(lambda state: state.update({(name := first(state)): state[name][:-1].clone()})),
    "integers": rewritten(lambda state: state.update({(name := first(state)): state[name].to(torch.int32)})),
    "bools": rewritten(lambda state: state.update({(name := first(state)): state[name] > 0})),
}
ON_ANY_WEIGHTS = (
    *("missing", "empty", "cut in the header", "cut in the middle", "cut by one byte", "with more at the end"),
    *("git-lfs pointer", "noise", "text", "a folder", "another shape"),
)
ON_JSON = {
    "missing": lambda path: path.unlink(),
    "empty": bytes_of(lambda old: b""),
    "cut": bytes_of(lambda old: old[: len(old) // 2]),
    "git-lfs pointer": bytes_of(lambda old: POINTER),
    "no text": bytes_of(lambda old: b"\xff\xfe\x00" * 20),
    "a list": json_of(lambda old: [old]),
    "a number": json_of(lambda old: 3),
    "null": json_of(lambda old: None),
    "no options": json_of(lambda old: {}),
    "another class": options(_class_name="UNet2DModel", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    "a class that is no name": options(_class_name=7, model_type=7, architectures=7),
}
ON_OPTIONAL_JSON = ("empty", "cut", "git-lfs pointer", "no text", "a list", "a number", "null")
ON_TOKENIZER_OPTIONS = {
    f"{name} {value!r}": options(**{name: value})
    for name, values in {
        "encoder_dim": (-64, 0, "64", 64.0, None, [64], True, 128, {}),
        "num_encoder_layers": (-1, 1, 3, "2"),
        "sample_size": (-8, "8", None, [8], [8, "8"], 8.0, 9),
        "codebook_size": (-32, 31, None, "32"),
        "codebook_dim": (0, 4),
        "num_tokens": (0, 15, 17, "16"),
        "num_groups": (0, 3, "4"),
        "tokens_per_group": (0, "4"),
        "num_inference_steps": (0, "4", -1),
        "attention_head_dim": (0, 3, "32"),
        "data_std": (-1.0, 0, "0.6", float("nan"), None),
        "time_shift": (-2.0, "2", float("inf")),
        "rope_theta": (0, "x", None),
        "repa_layer": (-1, 5, "0"),
        "adaptive_head": (True, "yes", 1),
        "share_time_embedding": (True, None),
        "low_rank_queries": (False, "no"),
        "strict_sample_size": ("no", 0),
        "max_num_tokens": (8, 32, -16),
        "in_channels": (1, 0, "3"),
    }.items()
    for value in values
}
ON_SCHEDULER_OPTIONS = {
    f"{name} {value!r}": options(**{name: value})
    for name, values in {
        "shift": (0, -1.0, "2", None, True, float("nan"), [2.0]),
        "solver_order": (0, 3, "2", None, True, 1.5),
        "variable_step": ("no", 1, None),
        "_class_name": ("DDIMScheduler", None, 3, ["a", "b"]),
    }.items()
    for value in values
}
ON_INDEX_OF_PIPELINE = {
    "no tokenizer": without("tokenizer"),
    "no transformer": without("transformer"),
    "no scheduler": without("scheduler"),
    "tokenizer null": options(tokenizer=None),
    "tokenizer of nulls": options(tokenizer=[None, None]),
    "tokenizer of another library": options(tokenizer=["os", "system"]),
    "tokenizer of another class": options(tokenizer=["diffusers", "AutoencoderKL"]),
    "tokenizer and transformer swapped": options(
        tokenizer=["dar_hf", "DARForCausalLM"], transformer=["dar_hf", "DARTokenizer"]
    ),
    "tokenizer a name": options(tokenizer="DARTokenizer"),
    "tokenizer a number": options(tokenizer=3),
    "tokenizer of lists": options(tokenizer=[["dar_hf"], ["DARTokenizer"]]),
    "transformer of transformers": options(transformer=["transformers", "LlamaForCausalLM"]),
    "scheduler of another class": options(scheduler=["diffusers", "DDIMScheduler"]),
    "names a list": options(id2label=["cat", "dog"]),
    "names of no classes": options(id2label={"cat": 0}),
    "names a number": options(id2label=3),
    "another pipeline": options(_class_name="StableDiffusionPipeline"),
    "code that is not there": options(_class_name=["pipeline_dar", "Other"]),
}
ON_INDEX_OF_SHARDS = {
    "no shards": json_of(lambda old: old | {"weight_map": {}}),
    "no map": without("weight_map"),
    "no metadata": without("metadata"),
    "a list": json_of(lambda old: [old]),
    "map a list": json_of(lambda old: old | {"weight_map": list(old["weight_map"])}),
    "a shard that is not there": json_of(
        lambda old: old | {"weight_map": old["weight_map"] | {"patch_embed.bias": "other.safetensors"}}
    ),
    "a shard elsewhere": json_of(
        lambda old: old | {"weight_map": old["weight_map"] | {"patch_embed.bias": "../other.safetensors"}}
    ),
    "empty": bytes_of(lambda old: b""),
    "cut": bytes_of(lambda old: old[: len(old) // 2]),
    "git-lfs pointer": bytes_of(lambda old: POINTER),
    "names a number": json_of(lambda old: old | {"weight_map": old["weight_map"] | {"patch_embed.bias": 3}}),
}


def not_finite(value, name):
    def change(state):
        state[name].view(-1)[0] = value

    return rewritten(change)


NOT_FINITE = {
    f"{name} {value}": (name, value)
    for name in (
        "patch_embed.weight",
        "encoder_blocks.0.gate1",
        "quant_proj.weight",
        "quantizer.codebook.weight",
        "post_quant_proj.weight",
        "causal_blocks.1.attn.to_v.bias",
        "denoiser.proj_in.weight",
        "denoiser.blocks.0.attn.to_v.bias",
        "denoiser.proj_out.bias",
    )
    for value in (float("nan"), float("inf"))
}


LOADERS = {
    "tokenizer": (DARTokenizer, "tokenizer"),
    "transformer": (DARForCausalLM, "transformer"),
    "sharded": (DARTokenizer, "sharded"),
}


def cases(part, file, damages, with_pipeline=True):
    """One case for each damage of a part's file and each way of loading it."""
    ways = ["alone", "in a pipeline"] if with_pipeline and part in ("tokenizer", "transformer") else ["alone"]
    for name, damage in damages.items():
        for way in ways if part else ["in a pipeline"]:
            yield pytest.param(part, file, damage, way, id=f"{part or 'pipeline'} {file}: {name}, {way}")


CASES = [
    *cases("tokenizer", WEIGHTS["tokenizer"], ON_WEIGHTS),
    *cases("transformer", WEIGHTS["transformer"], {name: ON_WEIGHTS[name] for name in ON_ANY_WEIGHTS}),
    *cases("sharded", WEIGHTS["sharded"], ON_WEIGHTS),
    *cases("sharded", INDEX, ON_INDEX_OF_SHARDS),
    *cases("tokenizer", "config.json", ON_JSON),
    *cases("transformer", "config.json", ON_JSON),
    *cases("transformer", "generation_config.json", {name: ON_JSON[name] for name in ON_OPTIONAL_JSON}),
    *cases("", "scheduler/scheduler_config.json", ON_JSON),
    *cases("", "model_index.json", ON_JSON),
    *cases("", "model_index.json", ON_INDEX_OF_PIPELINE),
    *cases("", "scheduler/scheduler_config.json", ON_SCHEDULER_OPTIONS),
    *cases("tokenizer", "config.json", ON_TOKENIZER_OPTIONS, with_pipeline=False),
    *cases("", "tokenizer", {"a missing folder": shutil.rmtree}),
    *cases("", "transformer", {"a missing folder": shutil.rmtree}),
    *cases("", "scheduler", {"a missing folder": shutil.rmtree}),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline's folder, and in "sharded" a tokenizer of three shards."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    tokenizer = DARTokenizer(**TOKENIZER)
    transformer = DARForCausalLM(DARConfig(**TRANSFORMER))
    scheduler = FlowMatchAdamsBashforthScheduler()
    DARPipeline(tokenizer, transformer, scheduler, id2label={0: "cat", 1: "dog"}).save_pretrained(folder)
    tokenizer.save_pretrained(folder / "sharded", max_shard_size="50KB")
    assert (folder / "sharded" / WEIGHTS["sharded"]).is_file()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def outcome(folder, load):
    """A clear error, another exception, or accepted."""
    try:
        load()
    except (OSError, ValueError) as error:
        return "clear" if str(folder) in str(error) else f"does not name the folder: {type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_the_undamaged_folder_loads(folder):
    pipe = DARPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0, 1], output_type="pt").images.isfinite().all()
    sharded = DARTokenizer.from_pretrained(folder / "sharded").state_dict()
    whole = pipe.tokenizer.state_dict()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


@pytest.mark.parametrize("part, file, damage, way", CASES)
def test_a_damaged_folder_is_refused(folder, part, file, damage, way):
    damage(folder / part / file)
    if way == "alone":
        model_class, place = LOADERS[part]
        assert outcome(folder, lambda: model_class.from_pretrained(folder / place)) == "clear"
    else:
        assert outcome(folder, lambda: DARPipeline.from_pretrained(folder)) == "clear"


@pytest.mark.parametrize("name, value", NOT_FINITE.values(), ids=list(NOT_FINITE))
def test_weights_that_are_not_finite_are_refused(folder, name, value):
    for part in ("tokenizer", "sharded"):
        file = next(path for path in (folder / part).glob("*.safetensors") if name in load_file(path))
        not_finite(value, name)(file)
        with pytest.raises(ValueError, match=f"{folder / part} are not finite .*: {name}"):
            DARTokenizer.from_pretrained(folder / part)
    with pytest.raises(ValueError, match=f"{folder / 'tokenizer'} are not finite .*: {name}"):
        DARPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name, value", NOT_FINITE.values(), ids=list(NOT_FINITE))
def test_images_that_are_not_finite_are_refused(folder, name, value):
    pipe = DARPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.tokenizer.get_parameter(name).view(-1)[0] = value
    with pytest.raises(ValueError, match=f"not finite, since weights are not: {name}"):
        pipe.reconstruct(torch.zeros(1, 3, 8, 8), output_type="pt")
    if name.startswith(("post_quant", "causal", "denoiser")):
        with pytest.raises(ValueError, match=f"not finite, since weights are not: {name}"):
            pipe([0, 1])
