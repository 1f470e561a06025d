"""What the language model refuses: other weights, values that are not finite, guidance where nothing knows it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from dar_hf import DARForCausalLM, DARModel

CLASSES = torch.tensor([[32], [35]])


@pytest.fixture
def saved(tiny_transformer, tmp_path):
    """A function that saves the tiny model with its tensors changed by a function, and returns the folder."""
    tiny_transformer.save_pretrained(tmp_path / "saved")

    def save(change):
        folder = tmp_path / "changed"
        shutil.copytree(tmp_path / "saved", folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return save


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("lm_head.weight"), r"they lack lm_head\.weight"),
        (lambda tensors: tensors.pop(LAYER), r"they lack model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda tensors: tensors.update({"model.layers.2.x": torch.ones(1)}), r"hold unknown model\.layers\.2\.x"),
        (lambda tensors: tensors.update({LAYER: torch.ones(95, 64)}), r"up_proj\.weight \(95, 64\) for \(96, 64\)"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.0." in name],
            r"they lack model\.layers\.0\..* and 5 more",
        ),
        (
            lambda tensors: [tensors.update({f"_orig_mod.{name}": tensors.pop(name)}) for name in list(tensors)],
            "they lack .*; they hold unknown _orig_mod",
        ),
    ],
    ids=["head", "part", "unknown", "shape", "layer", "prefix"],
)
@pytest.mark.parametrize("loader", [DARForCausalLM, AutoModelForCausalLM])
def test_weights_of_another_model(saved, change, message, loader):
    with pytest.raises(ValueError, match=message):
        loader.from_pretrained(saved(change))


def test_another_configuration_than_that_of_the_weights(saved):
    folder = saved(lambda tensors: None)
    with pytest.raises(ValueError, match="hold unknown model.layers.1"):
        DARForCausalLM.from_pretrained(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match="lack model.layers.2"):
        DARForCausalLM.from_pretrained(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"embed_tokens.weight \(38, 64\) for \(40, 64\)"):
        DARForCausalLM.from_pretrained(folder, num_classes=7)
    loaded = DARForCausalLM.from_pretrained(folder, num_classes=7, ignore_mismatched_sizes=True)
    assert loaded.model.embed_tokens.weight.shape == (40, 64)


def test_the_body_alone(saved, tmp_path):
    folder = saved(lambda tensors: None)
    body = AutoModel.from_pretrained(folder)  # the head is not missed
    assert type(body) is DARModel
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(DARModel.from_pretrained(tmp_path / "body").norm.weight, body.norm.weight)
    with pytest.raises(ValueError, match="lack lm_head"):
        DARForCausalLM.from_pretrained(tmp_path / "body")


def test_every_way_of_loading_whole_weights(tiny_transformer, saved):
    folder, ids = saved(lambda tensors: None), torch.tensor([[32, 1, 2]])
    expected = tiny_transformer(ids).logits
    model, info = DARForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(model(ids).logits, expected)
    for options in ({"device_map": "cpu"}, {"low_cpu_mem_usage": True}):
        assert torch.equal(DARForCausalLM.from_pretrained(folder, **options)(ids).logits, expected)
    state = tiny_transformer.state_dict()
    model = DARForCausalLM.from_pretrained(None, config=tiny_transformer.config, state_dict=state)
    assert torch.equal(model.eval()(ids).logits, expected)


def damage_head(model, value):
    model.lm_head.weight.data[3, 4] = value


def damage_layer(model, value):
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = value


def damage_embedding(model, value):
    model.model.embed_tokens.weight.data[32] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("damage", [damage_head, damage_layer, damage_embedding])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_values_that_are_not_finite(tiny_transformer, damage, value, guidance_scale):
    damage(tiny_transformer, value)
    for temperature in (0, 1.0):
        groups = tiny_transformer.stream_codes([0, 3], guidance_scale=guidance_scale, temperature=temperature)
        with pytest.raises(ValueError, match="logits are not finite"):
            next(groups)
    for options in ({}, {"do_sample": True}, {"do_sample": True, "generator": torch.Generator()}):
        with pytest.raises(ValueError, match="logits are not finite"):
            tiny_transformer.generate(CLASSES, guidance_scale=guidance_scale, **options)


def test_values_that_are_not_finite_late_in_a_sequence(tiny_transformer):
    """A later group is refused; those before it are whole. Beams are refused, too."""
    codes = torch.cat(list(tiny_transformer.stream_codes(0, temperature=0)), dim=1)[0]
    late = next(code for code in codes[4:].tolist() if code not in codes[:4])
    tiny_transformer.model.embed_tokens.weight.data[late] = float("nan")
    groups = tiny_transformer.stream_codes(0, temperature=0)
    assert torch.equal(next(groups)[0], codes[:4])
    with pytest.raises(ValueError, match="not finite"):
        list(groups)
    with pytest.raises(ValueError, match="not finite"):
        tiny_transformer.generate(CLASSES[:1], do_sample=False)
    damage_head(tiny_transformer, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        tiny_transformer.generate(CLASSES[:1], num_beams=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
)
def test_a_damaged_file_is_refused(saved, name, value):
    """In use it might not show: torch's attention makes zeros of NaN where there are few keys."""
    folder = saved(lambda tensors: tensors[name][0].fill_(value))
    for loader in (DARForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"{folder} are not finite .*: {name}"):
            loader.from_pretrained(folder)


def test_logits_that_are_not_finite_are_told_apart(tiny_transformer):
    damage_layer(tiny_transformer, float("nan"))
    for call in (lambda: list(tiny_transformer.stream_codes(0)), lambda: tiny_transformer.generate(CLASSES)):
        with pytest.raises(ValueError, match="since weights are not: model.layers.0.mlp.up_proj.weight"):
            call()
    damage_layer(tiny_transformer, 3e38)
    tiny_transformer.model.layers[0].mlp.gate_proj.weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=r"though all weights are \(float32\): values overflowed"):
        list(tiny_transformer.stream_codes(0))


def test_large_values_are_finite(tiny_transformer):
    tiny_transformer.lm_head.weight.data *= 1e30
    assert len(list(tiny_transformer.stream_codes(0, temperature=0))) == 4
    assert tiny_transformer.generate(CLASSES, do_sample=False).shape == (2, 17)


@pytest.mark.parametrize(
    "method", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"]
)
def test_guidance_in_continuous_batching(tiny_transformer, method):
    arguments = ([[32], [35]],) if method == "generate_batch" else ()

    def call(**options):
        result = getattr(tiny_transformer, method)(*arguments, **options)
        if method == "continuous_batching_context_manager":
            result.__enter__()

    for scale in (4.0, (1.1, 8.0)):
        with pytest.raises(ValueError, match="does not support guidance"):
            call(generation_config=GenerationConfig(guidance_scale=scale))
    tiny_transformer.generation_config.guidance_scale = [1.1, 8.0]
    with pytest.raises(ValueError, match="does not support guidance"):
        call()


def test_continuous_batching_without_guidance(tiny_transformer):
    with pytest.raises(ValueError, match="does not support guidance"):
        tiny_transformer.generate_batch([[32]], guidance_scale=4.0)
    expected = tiny_transformer.generate(CLASSES, do_sample=False, max_new_tokens=5)[:, 1:]
    config = GenerationConfig(do_sample=False, max_new_tokens=5, guidance_scale=1.0)
    little = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # else it takes all memory that there is
    results = tiny_transformer.generate_batch(CLASSES.tolist(), config, little)
    assert [result.generated_tokens for result in results.values()] == expected.tolist()
    damage_head(tiny_transformer, float("nan"))
    for result in tiny_transformer.generate_batch(CLASSES.tolist(), config, little).values():
        assert "not finite" in result.error and not result.generated_tokens


def test_shifted_labels(tiny_transformer):
    """As sequence parallelism gives them: alone, or with labels that then say nothing."""
    ids = torch.cat([CLASSES, torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))], dim=1)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = tiny_transformer(ids, labels=ids).loss
    assert torch.equal(tiny_transformer(ids, shift_labels=shifted).loss, expected)
    assert torch.equal(tiny_transformer(ids, labels=shifted, shift_labels=shifted).loss, expected)
    assert not torch.equal(tiny_transformer(ids, shift_labels=shifted.flip(0)).loss, expected)
    sliced = tiny_transformer(ids[:, :-1], shift_labels=ids[:, 1:]).loss  # not contiguous
    torch.testing.assert_close(sliced, expected)
    summed = tiny_transformer(ids, shift_labels=shifted, num_items_in_batch=16).loss
    torch.testing.assert_close(summed, 2 * expected)


def test_guidance_with_an_early_exit(tiny_transformer):
    """transformers leaves the model without its last layers where this fails."""
    for options in ({"assistant_early_exit": 1}, {"generation_config": GenerationConfig(assistant_early_exit=1)}):
        with pytest.raises(ValueError, match="guidance_scale with assistant_early_exit is not supported"):
            tiny_transformer.generate(CLASSES[:1], guidance_scale=2.0, **options)
    assert tiny_transformer.config.num_hidden_layers == 2
