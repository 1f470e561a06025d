"""Language models of the original code: names, heads, sequence length, sampling, and back."""

import argparse

import pytest
import torch

from dar_hf import DARConfig, DARForCausalLM
from dar_hf.conversion import CheckpointError, convert_transformer, to_original
from dar_hf.conversion.reading import Checkpoint
from dar_hf.conversion.transformer import _options
from dar_hf.presets import PRESETS, get_preset

from . import originals
from .originals import TRANSFORMER, transformer_checkpoint, transformer_weights


@pytest.fixture
def path(tmp_path):
    return tmp_path / "transformer.pt"


@pytest.fixture
def weights():
    return transformer_weights(**TRANSFORMER)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float()), name


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(path, weights, key, prefix, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    content = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save(content if key is None else {key: content}, path)
    model = convert_transformer(path, num_image_tokens=16)
    assert_same(to_original(model), weights)
    assert model.dtype == torch.float32 and not model.training


def test_grouped_keys_and_values(path):
    weights = transformer_weights(dim=256, n_layer=1)
    weights["layers.0.attention.wqkv.weight"] = torch.randn(256 + 2 * 128, 256)  # 4 heads on 2 of keys and values
    torch.save(transformer_checkpoint(weights, n_head=4, block_size=16), path)
    model = convert_transformer(path)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert_same(to_original(model), weights)


def test_configuration(path, weights):
    torch.save(transformer_checkpoint(weights, **TRANSFORMER), path)
    config = convert_transformer(path).config
    expected = dict(codebook_size=32, num_classes=5, num_image_tokens=16, tokens_per_group=2, hidden_size=128)
    expected |= dict(intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    expected |= dict(rms_norm_eps=1e-5, vocab_size=38, max_position_embeddings=17)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.rope_parameters["rope_theta"] == 10000
    config = convert_transformer(path, tokens_per_group=4, class_dropout=0.2).config
    assert (config.tokens_per_group, config.class_dropout) == (4, 0.2)


def test_heads_change_the_result(path, weights):
    torch.save(transformer_checkpoint(weights, **TRANSFORMER | {"n_head": 4}), path)
    four = convert_transformer(path)
    assert four.config.num_attention_heads == 4
    assert_same(to_original(four), weights)
    torch.save(transformer_checkpoint(weights, **TRANSFORMER), path)
    ids = torch.tensor([[32, 1, 2, 3]])
    with torch.no_grad():
        assert not torch.allclose(four(ids).logits, convert_transformer(path)(ids).logits, atol=1e-3)


def meta_checkpoint(name, **args):
    """Shapes of a size of the paper; nothing in them."""
    with torch.device("meta"):
        model = DARForCausalLM(DARConfig(**get_preset(name).transformer))
    return Checkpoint("file.pt", to_original(model), {}, args, [])


@pytest.mark.parametrize("name", ["B", "L", "XL", "XXL", "3B"])
@pytest.mark.parametrize("gpt_model", [None, "own", "GPT-7B"])
def test_sizes_of_the_paper(name, gpt_model, caplog):
    gpt_model = f"GPT-{name}" if gpt_model == "own" else gpt_model
    args = {} if gpt_model is None else {"gpt_model": gpt_model}
    options = _options(meta_checkpoint(name, block_size=256, **args), {})
    assert options["num_attention_heads"] == get_preset(name).transformer["num_attention_heads"]
    assert ("does not say how many heads" in caplog.text) == (gpt_model != f"GPT-{name}")


def test_a_named_size_with_other_shapes_is_no_name(path, weights, caplog):
    torch.save(transformer_checkpoint(weights, gpt_model="GPT-L", block_size=16), path)
    assert convert_transformer(path).config.num_attention_heads == 2
    assert "taking 2, hidden_size / 64" in caplog.text


def test_sequence_length(path, weights, caplog):
    torch.save(transformer_checkpoint(weights, n_head=2), path)
    with pytest.raises(CheckpointError, match="does not say how many codes an image has: pass num_image_tokens"):
        convert_transformer(path)
    assert convert_transformer(path, num_image_tokens=24).config.num_image_tokens == 24
    assert _options(meta_checkpoint("L"), {})["num_image_tokens"] == 256
    assert "taking the paper's 256" in caplog.text


@pytest.mark.parametrize("name, scale", [("L", [1.1, 8.0]), ("XL", [1.1, 10.0])])
def test_sampling_by_name(path, weights, tmp_path, name, scale):
    torch.save(transformer_checkpoint(weights, **TRANSFORMER), path)
    plain = convert_transformer(path).generation_config
    assert plain.guidance_scale is None  # of no size of the paper
    convert_transformer(path, sampling=name).save_pretrained(tmp_path / "model")
    saved = DARForCausalLM.from_pretrained(tmp_path / "model").generation_config
    assert (saved.guidance_scale, saved.do_sample, saved.temperature) == (scale, True, 1.0)
    assert (saved.top_k, saved.top_p) == (0, 1.0)


def test_sampling_of_the_own_size(monkeypatch, path, weights):
    """A model of a size of the paper is sampled as there, whatever its name."""
    sizes = dict(num_hidden_layers=2, hidden_size=128, intermediate_size=512, num_attention_heads=2)
    for name, value in sizes.items():
        monkeypatch.setitem(PRESETS["L"].transformer, name, value)
    torch.save(weights, path)
    assert convert_transformer(path, num_image_tokens=16).generation_config.guidance_scale == [1.1, 8.0]
    assert convert_transformer(path, num_image_tokens=16, sampling="XL").generation_config.guidance_scale == [
        1.1,
        10.0,
    ]


@pytest.mark.parametrize(
    "args, options, message",
    [
        ({}, {"hidden_width": 3}, "DARConfig has no option hidden_width"),
        ({}, {"path": "x"}, "DARConfig has no option path"),
        ({}, {"sampling": "M"}, "no sampling preset 'M'; there are B, L"),
        ({"n_head": 3}, {}, "num_attention_heads must divide hidden_size=128 into even parts, got 3"),
        ({"n_head": "2"}, {}, "num_attention_heads must divide hidden_size=128 into even parts, got '2'"),
        ({"n_head": 128}, {}, "into even parts, got 128"),
        ({"dim": 256}, {}, "arguments say dim=256, its weights have hidden_size=128"),
        ({"n_layer": 3}, {}, "n_layer=3, its weights have num_hidden_layers=2"),
        ({"vocab_size": 33}, {}, "vocab_size=33, its weights have codebook_size=32"),
        ({"num_classes": 6}, {}, "num_classes=6, its weights have num_classes=5"),
        ({"cls_token_num": 2}, {}, "cls_token_num must be 1, got 2"),
        ({"block_size": 0}, {}, "num_image_tokens must be a positive integer, got 0"),
        ({}, {"num_image_tokens": 17}, "is for 16 codes an image, num_image_tokens=17 was asked for"),
        ({}, {"hidden_size": 64}, "hidden_size=64 was asked for, its weights have 128"),
        ({}, {"num_attention_heads": 1}, "its arguments say n_head=2, num_attention_heads=1 was asked for"),
        ({"n_head": None}, {"num_attention_heads": 3}, "must divide hidden_size=128 into even parts, got 3"),
        ({"n_head": None}, {"num_attention_heads": 0}, "must divide hidden_size=128 into even parts, got 0"),
        ({}, {"vocab_size": 38}, "DARConfig has no option vocab_size"),
        ({}, {"max_position_embeddings": 9}, "DARConfig has no option max_position_embeddings"),
        ({}, {"intermediate_size": 256}, "intermediate_size=256 was asked for, its weights have 512"),
        ({}, {"num_key_value_heads": 1}, "num_key_value_heads=1 was asked for, its weights have 2"),
        ({}, {"head_dim": 32}, "2 heads cannot have head_dim=32"),
        ({}, {"attention_bias": True}, "the original code has attention_bias=False, not True"),
        ({}, {"mlp_bias": True}, "the original code has mlp_bias=False"),
        ({}, {"hidden_act": "gelu"}, "the original code has hidden_act=silu"),
        ({}, {"hidden_act": "sigh"}, "transformer.pt: .*sigh"),
        ({}, {"pad_token_id": 1000}, "transformer.pt: "),
        ({}, {"rope_parameters": {"rope_type": "far"}}, "transformer.pt: "),
        ({}, {"tokens_per_group": 0}, "tokens_per_group must be at least 1"),
        ({}, {"resid_dropout": "much"}, "resid_dropout"),
    ],
)
def test_what_does_not_fit_is_named(path, weights, args, options, message):
    torch.save({"model": weights, "args": argparse.Namespace(**TRANSFORMER | args)}, path)
    with pytest.raises(ValueError, match=message):
        convert_transformer(path, **options)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("norm.weight", None, "missing: norm.weight"),
        ("output.weight", None, "is no D-AR language model: it lacks output.weight"),
        ("layers.1.feed_forward.w2.weight", None, "missing: layers.1.feed_forward.w2.weight"),
        ("output.weight", torch.ones(33, 128), "differ in shape"),
        ("output.weight", torch.ones(32), "output.weight must have 2 axes"),
        ("layers.1.attention.wqkv.weight", torch.ones(3, 128), r"wqkv.weight has the shape \(3, 128\)"),
        (
            "layers.0.attention.wqkv.weight",
            torch.ones(385, 128),
            "has 385 rows, which 2 heads of width 64 cannot",
        ),
        ("norm.weight", torch.full((128,), torch.inf), "norm.weight holds values that are not finite"),
        ("rope", torch.ones(3), "unknown: rope"),
        ("layers.999999.norm", torch.ones(3), "num_hidden_layers=3|n_layer=2"),
        (
            "norm.weight",
            torch.full((128,), 1e300, dtype=torch.float64),
            "norm.weight holds values that are not finite",
        ),
        ("norm.weight", torch.ones(1).expand(128), r"norm.weight of shape \(128,\) repeats a smaller tensor"),
        ("tok_embeddings.weight", torch.ones(1).expand(2**40, 128), "repeats a smaller tensor"),
        ("norm.weight", torch.ones(128).to(torch.float8_e4m3fn), "not a dense floating-point tensor"),
        ("norm.weight", torch.nested.nested_tensor([torch.ones(128)], layout=torch.jagged), "norm.weight|nested"),
    ],
)
def test_weights_that_do_not_fit_are_named(path, weights, name, tensor, message):
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    torch.save(transformer_checkpoint(weights, **TRANSFORMER), path)
    with pytest.raises(CheckpointError, match=message):
        convert_transformer(path)


def test_arguments_that_are_no_plain_values_do_not_count(path, weights):
    nested = []
    for _ in range(60):
        nested = [nested, nested]  # 2**60 brackets, written out
    args = {"n_head": torch.ones(3), "vocab_size": torch.ones(2), "gpt_model": nested, 7: 8, "block_size": 16}
    torch.save({"model": weights, "args": args}, path)
    assert convert_transformer(path).config.num_attention_heads == 2


def test_going_back_is_refused_where_the_original_has_no_such_part(make_transformer, caplog):
    for options in ({"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"head_dim": 16}):
        with pytest.raises(ValueError, match="the original code"):
            to_original(make_transformer(**options))
    for kind in ("linear", "dynamic"):
        rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
        with pytest.raises(ValueError, match=f"the original code has rope_type=default, not {kind}"):
            to_original(make_transformer(rope_parameters=rope))
    to_original(make_transformer())
    assert "built with" not in caplog.text
    to_original(make_transformer(rope_theta=500.0, rms_norm_eps=1e-3))
    assert "built with rope_base=500.0" in caplog.text and "built with norm_eps=0.001" in caplog.text


def test_a_tokenizer_is_no_language_model(path):
    torch.save(originals.tokenizer_weights(originals.TOKENIZER, repa=False), path)
    with pytest.raises(CheckpointError, match="is no D-AR language model: it lacks cls_embedding"):
        convert_transformer(path)
