"""Tokenizers of the original code in every variant: names, shapes, configuration, and back."""

import argparse

import pytest
import torch
import yaml

from dar_hf import DARTokenizer
from dar_hf.conversion import CheckpointError, convert_tokenizer, original_config, to_original
from dar_hf.conversion import tokenizer as tokenizer_conversion
from dar_hf.conversion.reading import Checkpoint

from . import originals
from .originals import TOKENIZER, tokenizer_config, tokenizer_weights

VARIANTS = {
    "as released": {},
    "no REPA head": {"repa": False},
    "full-rank queries": {"query_low_rank": False},
    "shared time embedding": {"share_time_encoding": True},
    "adaptive head": {"share_time_encoding": True, "mlp_head": True},
    "overlapping groups": {"queries_per_step": 8},
    "other sizes": {"encoder_dim": 64, "decoder_dim": 128, "cond_dim": 128, "dim": 64, "vq_dim": 4, "patch_size": 4},
    "grey": {"in_dim": 1, "out_dim": 1},
}


def variant(name):
    changes = dict(VARIANTS[name])
    repa = changes.pop("repa", True)
    config = tokenizer_config(**changes)
    return tokenizer_weights(config, repa), config


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.pt"


@pytest.fixture
def checkpoint(path):
    """A function that saves a checkpoint without REPA head, after a change of it."""

    def make(change=None, **changes):
        config = tokenizer_config(**changes)
        content = originals.tokenizer_checkpoint(tokenizer_weights(config, repa=False), config)
        if change is not None:
            change(content)
        return originals.save(content, path)

    return make


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float()), name


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(path, name):
    weights, config = variant(name)
    originals.save(originals.tokenizer_checkpoint(weights, config), path)
    model = convert_tokenizer(path)
    assert_same(to_original(model), weights)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters()) and not model.training
    # and once more, from what came back, bare: only the configuration must be given
    torch.save({f"module.{key}": tensor for key, tensor in to_original(model).items()}, path)
    assert_same(to_original(convert_tokenizer(path, config)), weights)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run(path, name):
    weights, config = variant(name)
    weights = {key: tensor * 0.05 for key, tensor in weights.items()}
    originals.save(originals.tokenizer_checkpoint(weights, config), path)
    model = convert_tokenizer(path)
    images = torch.rand(2, model.config.in_channels, 16, 16) * 2 - 1
    codes = model.encode(images).codes
    sample = model.decode(codes, generator=torch.Generator().manual_seed(0)).sample
    assert sample.shape == images.shape and torch.isfinite(sample).all()


def test_query_tables_of_any_size(path):
    weights = tokenizer_weights(TOKENIZER, repa=False)
    for name, shape in (
        ("query_embedding.weight", (20, 5)),
        ("query_linear.weight", (128, 5)),
        ("decoder_embedding.weight", (20, 64)),
    ):
        weights[name] = torch.rand(shape)
    torch.save(weights, path)
    model = convert_tokenizer(path, TOKENIZER)
    assert (model.config.query_rank, model.config.max_num_tokens) == (5, 20)
    assert_same(to_original(model), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in tokenizer_weights(TOKENIZER, repa=False).items()}
    torch.save({"model": weights, "config": {"model": TOKENIZER}}, path)
    model = convert_tokenizer(path)
    assert model.dtype == torch.float32
    assert_same(to_original(model), weights)


def test_configuration(checkpoint):
    config = convert_tokenizer(
        checkpoint(num_denoising_steps=3, data_std=0.5, time_shift=1.5, rope_base_len=100)
    ).config
    expected = {
        "sample_size": 16,
        "strict_sample_size": False,
        "in_channels": 3,
        "encoder_patch_size": 4,
        "encoder_dim": 128,
        "num_encoder_layers": 2,
        "decoder_dim": 64,
        "num_decoder_layers": 1,
        "codebook_size": 32,
        "codebook_dim": 8,
        "num_tokens": 16,
        "num_groups": 4,
        "tokens_per_group": 4,
        "num_inference_steps": 3,
        "diffusion_dim": 128,
        "diffusion_patch_size": 2,
        "diffusion_depth": 2,
        "condition_dim": 64,
        "attention_head_dim": 64,
        "rope_theta": 100,
        "diffusion_rope_theta": 10000,
        "low_rank_queries": True,
        "share_time_embedding": False,
        "adaptive_head": False,
        "data_std": 0.5,
        "time_shift": 1.5,
        "repa_layer": None,  # no weights for it
        "max_num_tokens": 1024,
        "query_rank": 8,
    }
    assert {name: config[name] for name in expected} == expected


def test_repa_layer_is_kept_with_its_head(path):
    weights, config = variant("as released")
    originals.save(originals.tokenizer_checkpoint(weights, config), path)
    model = convert_tokenizer(path)
    assert model.config.repa_layer == 1 and model.config.repa_dim == 768
    config["diff_decoder"]["repa_layer"] = None
    originals.save(originals.tokenizer_checkpoint(weights, config), path)
    with pytest.raises(CheckpointError, match=r"does not say repa_layer \(diff_decoder.repa_layer in the original\)"):
        convert_tokenizer(path)
    assert convert_tokenizer(path, repa_layer=0).config.repa_layer == 0


def test_sizes_come_from_shapes_where_the_configuration_is_silent(checkpoint):
    told = {"num_all_queries": 16, "num_query_groups": 4, "sampling_resolution": 16}
    told["diff_decoder"] = {"data_std": 0.6, "time_shift": 2}

    def change(content):
        content["config"] = {"model": told}

    model = convert_tokenizer(checkpoint(change))
    assert model.config.tokens_per_group == 4 and model.config.num_inference_steps == 4
    assert model.config.rope_theta == 10000


def test_what_cannot_be_inferred_is_asked_for(path, tmp_path):
    torch.save(tokenizer_weights(TOKENIZER, repa=False), path)
    names = "num_tokens .num_all_queries in the original., num_groups .*sample_size .*data_std .*time_shift"
    with pytest.raises(CheckpointError, match=names):
        convert_tokenizer(path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": TOKENIZER, "optimizer": {"lr": 1e-4}}))
    by_file = convert_tokenizer(path, tmp_path / "config.yaml")
    by_dictionary = convert_tokenizer(path, TOKENIZER)
    by_name = convert_tokenizer(path, num_tokens=16, num_groups=4, sample_size=16, data_std=0.6, time_shift=2)
    own_names = {"num_tokens": 16, "num_groups": 4, "sample_size": 16, "data_std": 0.6, "time_shift": 2}
    assert by_file.config == by_dictionary.config
    assert by_name.config == convert_tokenizer(path, own_names).config
    assert dict(by_name.config) | {"_use_default_values": []} == dict(by_file.config) | {"_use_default_values": []}


def test_given_options_win(checkpoint):
    path = checkpoint()
    assert convert_tokenizer(path, {"num_denoising_steps": 7}).config.num_inference_steps == 7
    assert convert_tokenizer(path, {"num_denoising_steps": 7}, num_inference_steps=9).config.num_inference_steps == 9
    assert convert_tokenizer(path, strict_sample_size=True).config.strict_sample_size is True


@pytest.mark.slow
def test_the_released_shapes_without_configuration(path, caplog, monkeypatch):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in to_original(DARTokenizer()).items()}
    zeros = torch.zeros(1)  # one number under all shapes: 300 M parameters would be 1.2 GB
    weights = {name: zeros.expand(shape) for name, shape in shapes.items()}
    monkeypatch.setattr(tokenizer_conversion, "read_checkpoint", lambda path: Checkpoint(path, weights, {}, {}, []))
    model = convert_tokenizer(path)
    assert "shapes of the released tokenizer" in caplog.text
    assert {**model.config, "strict_sample_size": True, "_use_default_values": 0} == {
        **DARTokenizer().config,
        "_use_default_values": 0,
    }


def test_what_has_no_counterpart_is_said(checkpoint, caplog):
    caplog.set_level("INFO", logger="dar_hf")

    def change(content):
        content["config"]._data["model"] |= {"compile": True, "output_resolution": 512}

    convert_tokenizer(checkpoint(change))
    assert "options without a counterpart: compile" in caplog.text
    assert "resizes its pictures to 512 pixels; this package does not" in caplog.text
    assert "dropped model, optimizer, discriminator, optimizer_disc, steps, quantize.codebook_used" in caplog.text


def edit(**changes):
    """Replaces entries of the EMA weights; None removes one."""

    def change(content):
        for name, tensor in changes.items():
            content["ema"].pop(name.replace("__", "."))
            if tensor is not None:
                content["ema"][name.replace("__", ".")] = tensor

    return change


def declare(**options):
    def change(content):
        content["config"]._data["model"].update(options)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (edit(patchify__weight=None), "is no D-AR tokenizer: it lacks patchify.weight"),
        (edit(patchify__weight=torch.ones(3, 3)), r"patchify.weight must have 4 axes, got shape \(3, 3\)"),
        (edit(patchify__bias=None), "missing: patchify.bias; unknown: none"),
        (edit(encoder_layers__1__gate2=None), "missing: encoder_layers.1.gate2"),
        (edit(decoder_layers__0__mlp__fc1__bias=torch.ones(3)), r"decoder_layers.0.mlp.fc1.bias has the shape \(3,\)"),
        (edit(patchify__bias=torch.full((128,), torch.nan)), "patchify.bias holds values that are not finite"),
        (lambda content: content["ema"].update(extra=torch.ones(1)), "missing: none; unknown: extra"),
        (
            lambda content: content["ema"].update({"encoder_layers.5.gate1": torch.ones(1)}),
            "num_encoder_layers=3, but 2 was asked for",
        ),
        (declare(encoder_dim=64), "its weights have encoder_dim=128, but 64 was asked for"),
        (declare(vq_codebook_size=64), "codebook_size=32, but 64"),
        (declare(num_encoder_layers=3), "num_encoder_layers=2, but 3"),
        (declare(query_low_rank=False), "low_rank_queries=True, but False"),
        (declare(num_all_queries=18), "num_tokens=18 must be a multiple of num_groups=4"),
        (declare(num_all_queries=2048), "at most max_num_tokens=1024"),
        (declare(num_all_queries="many"), r"num_tokens \(num_all_queries in the original\) cannot be 'many'"),
        (declare(num_query_groups=0), "num_groups"),
        (declare(num_query_groups=True), "num_groups .* cannot be True"),
        (declare(sampling_resolution=17), "sample_size=17 is not a multiple"),
        (declare(sampling_resolution=[True, 16]), "sample_size .* cannot be"),
        (declare(rope_base_len=float("inf")), "rope_theta .* cannot be inf"),
        (declare(rope_base_len=-1), "rope_theta must be positive and finite, got -1.0"),
        (declare(diff_decoder={"data_std": float("nan"), "time_shift": 2}), "data_std .* cannot be nan"),
        (declare(diff_decoder={"data_std": 0.5, "time_shift": 10**400}), "time_shift .* cannot be 1000"),
        (declare(num_all_queries=torch.ones(3)), "num_tokens .* cannot be tensor"),
        (declare(vq_enable=False), "a tokenizer without codes is not supported"),
        (declare(diff_decoder={"in_dim": 3, "out_dim": 6}), "in_dim and out_dim must agree"),
        (declare(diff_decoder={"data_std": 0, "time_shift": 2}), "data_std must be positive and finite, got 0.0"),
    ],
)
def test_what_does_not_fit_is_named(checkpoint, change, message):
    path = checkpoint(change)
    with pytest.raises(CheckpointError, match=message):
        convert_tokenizer(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder_width": 3}, "DARTokenizer has no option encoder_width"),
        ({"self": 3}, "DARTokenizer has no option self"),
        ({"path": 3}, "DARTokenizer has no option path"),
        ({"encoder_dim": 64}, "encoder_dim=128, but 64 was asked for"),
        ({"config": [1]}, "a configuration holds options by name, got a list"),
        ({"config": {"model": 3}}, "a configuration holds options by name, got a int"),
    ],
)
def test_options_that_do_not_fit(checkpoint, tmp_path, options, message):
    if isinstance(options.get("config"), list):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options["config"]))
        options = {"config": tmp_path / "config.yaml"}
    path = checkpoint()
    with pytest.raises(CheckpointError, match=message):
        convert_tokenizer(path, **options)


def test_a_configuration_file_that_is_no_yaml(checkpoint, tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(CheckpointError, match="config.yaml is no YAML file"):
        convert_tokenizer(checkpoint(), tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError):
        convert_tokenizer(checkpoint(), tmp_path / "none.yaml")


@pytest.mark.parametrize("seed", range(10))
def test_renamed_keys(checkpoint, seed):
    def change(content):
        names = [name for name in content["ema"] if not name.endswith(("codebook_used", "_arange", "wavelets"))]
        name = names[int(torch.randint(len(names), (1,), generator=torch.Generator().manual_seed(seed)))]
        content["ema"][name.replace(".", ".x", 1)] = content["ema"].pop(name)

    path = checkpoint(change)
    with pytest.raises(CheckpointError, match="missing|lacks"):
        convert_tokenizer(path)


def test_a_language_model_is_no_tokenizer(path):
    weights = originals.transformer_weights()
    torch.save({"model": weights, "args": argparse.Namespace(n_head=2)}, path)
    with pytest.raises(CheckpointError, match="is no D-AR tokenizer: it lacks patchify.weight.*It has cls_embedding"):
        convert_tokenizer(path)


def test_keys_of_any_kind(checkpoint, caplog):
    """What is no option is left out, and named."""
    caplog.set_level("INFO", logger="dar_hf")

    def change(content):
        content["config"]._data["model"] |= {5: 6, ("a", 1): {2: 3}}

    assert convert_tokenizer(checkpoint(change)).config.num_tokens == 16
    assert "options without a counterpart: 5, ('a', 1).2" in caplog.text


def test_heads_of_another_width_have_no_original():
    with torch.device("meta"):
        model = DARTokenizer(attention_head_dim=32)
    with pytest.raises(ValueError, match="heads are 64 wide, not 32"):
        to_original(model)


def test_conditions_of_the_whole_prefix_have_no_original():
    with torch.device("meta"):
        model = DARTokenizer(condition_scope="prefix")
    with pytest.raises(ValueError, match="sees the conditions of its own group, not of the whole prefix"):
        to_original(model)
    with pytest.raises(ValueError, match="the original code has condition_scope=group, not prefix"):
        original_config(model)


def test_other_models_have_no_original():
    with pytest.raises(TypeError, match="got Linear"):
        to_original(torch.nn.Linear(1, 1))
