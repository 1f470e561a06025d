from dataclasses import fields

import pytest
import torch

from dar_hf import DARConfig, DARForCausalLM, DARTokenizer
from dar_hf.presets import PRESETS, get_preset, parse_options, sampling_preset
from dar_hf.training.ar_stage import ARArguments
from dar_hf.training.tokenizer_stage import TokenizerArguments


def count(module):
    return sum(p.numel() for p in module.parameters())


def millions(module):
    return count(module) / 1e6


def test_names():
    small = {"digits", "digits-distilled", "emoji", "mnist", "mnist-distilled", "photos32"}
    assert set(PRESETS) == small | {"v1", "B", "L", "XL", "XXL", "3B"}


def test_v1_is_the_tokenizer_of_the_paper():
    with torch.device("meta"):
        model = DARTokenizer(**get_preset("v1").tokenizer)
    repa = count(model.denoiser.repa_head)
    assert (count(model) - repa, repa) == (300_099_776, 7_344_896)  # 300.1 M + 7.3 M
    assert millions(model.denoiser) - repa / 1e6 == pytest.approx(185.1, abs=0.1)
    assert millions(model.encoder_blocks) == pytest.approx(56.7, abs=0.1)
    assert millions(model.causal_blocks) == pytest.approx(56.7, abs=0.1)
    config = model.config
    assert (config.num_tokens, config.num_groups, config.tokens_per_group, config.num_inference_steps) == (
        256,
        8,
        32,
        8,
    )
    assert (config.data_std, config.time_shift, config.sample_size, config.repa_layer) == (0.6, 2.0, 256, 8)


@pytest.mark.parametrize(
    "name, layers, heads, dim, parameters",
    [
        ("B", 12, 12, 768, 110_888_448),
        ("L", 24, 16, 1024, 342_910_976),
        ("XL", 36, 20, 1280, 774_699_520),
        ("XXL", 48, 24, 1536, 1_410_972_672),
        ("3B", 24, 32, 3200, 3_096_659_200),
    ],
)
def test_sizes_of_the_language_models(name, layers, heads, dim, parameters):
    config = DARConfig(**get_preset(name).transformer)
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (layers, heads, dim)
    assert config.intermediate_size % 256 == 0 and 0 <= config.intermediate_size - 8 * dim / 3 < 256
    with torch.device("meta"):
        assert count(DARForCausalLM(config)) == parameters


def test_guidance_of_the_paper():
    assert get_preset("L").ar_recipe["guidance_scale"] == [1.1, 8.0]
    assert get_preset("XL").ar_recipe["guidance_scale"] == [1.1, 10.0]


def test_digits_is_a_whole_system():
    preset = get_preset("digits")
    tokenizer = DARTokenizer(**preset.tokenizer)
    config = tokenizer.config
    model = DARForCausalLM(
        DARConfig(
            codebook_size=config.codebook_size,
            num_image_tokens=config.num_tokens,
            tokens_per_group=config.tokens_per_group,
            num_classes=10,
            **preset.transformer,
        )
    )
    codes = torch.cat(list(model.eval().stream_codes([0, 9])), dim=1)
    assert tokenizer.decode(codes).sample.shape == (2, 1, 8, 8)
    assert millions(tokenizer) + millions(model) < 5


@pytest.mark.parametrize("name", PRESETS)
def test_options_and_recipes_are_known_to_their_owners(name):
    preset = get_preset(name)
    assert preset.tokenizer_recipe or preset.ar_recipe
    assert bool(preset.transformer) == bool(preset.ar_recipe)
    assert set(preset.tokenizer_recipe) <= {field.name for field in fields(TokenizerArguments)}
    assert set(preset.ar_recipe) <= {field.name for field in fields(ARArguments)}
    # DARConfig takes unknown names without a word
    assert set(preset.transformer) <= {field.name for field in fields(DARConfig)}


def test_a_preset_is_a_copy():
    get_preset("L").ar_recipe["guidance_scale"][0] = 5.0
    get_preset("digits").tokenizer["sample_size"] = 99
    assert get_preset("L").ar_recipe["guidance_scale"] == [1.1, 8.0]
    assert get_preset("digits").tokenizer["sample_size"] == 8


@pytest.mark.parametrize("name", ["M", "digit", "", "l"])
def test_unknown_preset(name):
    with pytest.raises(ValueError, match=f"unknown preset '{name}'; there are .*digits"):
        get_preset(name)


def test_sampling_of_the_paper():
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert sampling_preset("L") == plain | {"guidance_scale": [1.1, 8.0]}
    assert sampling_preset("XL") == plain | {"guidance_scale": [1.1, 10.0]}
    assert sampling_preset("B") == sampling_preset("XXL") == sampling_preset("3B") == plain
    sampling_preset("L")["guidance_scale"][0] = 5.0
    assert sampling_preset("L")["guidance_scale"] == [1.1, 8.0]


@pytest.mark.parametrize("name", ["v1", "digits", "M"])
def test_no_sampling_preset(name):
    with pytest.raises(ValueError, match=f"no sampling preset '{name}'; there are B, L, XL, XXL, 3B"):
        sampling_preset(name)


def test_options():
    items = ["sample_size=64", "low_rank_queries=False", "data_std=0.5", "repa_layer=None", "rope_type=default"]
    assert parse_options(items) == {
        "sample_size": 64,
        "low_rank_queries": False,
        "data_std": 0.5,
        "repa_layer": None,
        "rope_type": "default",
    }
    assert parse_options(None) == {}


@pytest.mark.parametrize("item", ["sample_size", "=3", ""])
def test_options_without_name_or_value(item):
    with pytest.raises(ValueError, match="as name=value, got"):
        parse_options([item])
