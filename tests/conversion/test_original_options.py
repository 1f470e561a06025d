"""Every key of the original's configuration changes what a converted tokenizer computes as it does there, and back."""

import copy

import pytest
import torch

from dar_hf import DARTokenizer
from dar_hf.conversion import CheckpointError, convert_tokenizer, convert_transformer, original_config, to_original

from . import originals
from .formulas import OriginalTokenizer
from .test_parity import difference, unpack, values

TOLERANCE = 1e-5  # relative, float32 against float64; seen: 2e-6. The smallest change of a key is 1e-3

# One value other than the default of each key, with what it brings along. Keys of the decoder are found by name; those
# that the encoder's options hide are written with a dot
CHANGES = {
    "encoder_patch_size": {"encoder_patch_size": 8},
    "encoder_dim": {"encoder_dim": 64},
    "decoder_dim": {"decoder_dim": 128, "cond_dim": 128},
    "num_encoder_layers": {"num_encoder_layers": 1},
    "num_decoder_layers": {"num_decoder_layers": 2},
    "query_low_rank": {"query_low_rank": False},
    "vq_dim": {"vq_dim": 5},
    "vq_codebook_size": {"vq_codebook_size": 20},
    "num_denoising_steps": {"num_denoising_steps": 7},
    "num_query_groups": {"num_query_groups": 8, "queries_per_step": 2},
    "num_all_queries": {"num_all_queries": 8, "queries_per_step": 2},
    "queries_per_step": {"queries_per_step": 6},
    "queries_per_step, left out": {"num_query_groups": 2, "queries_per_step": None},
    "sampling_resolution": {"sampling_resolution": 32},
    "rope_base_len": {"rope_base_len": 10},
    "diff_decoder.rope_base_len": {"diff_decoder.rope_base_len": 10},
    "both rotary bases": {"rope_base_len": 100, "diff_decoder.rope_base_len": 10},
    "in_dim and out_dim": {"in_dim": 1, "out_dim": 1},
    "dim": {"dim": 64},
    "patch_size": {"patch_size": 4},
    "depth": {"depth": 3},
    "data_std": {"data_std": 0.4},
    "time_shift": {"time_shift": 5.5},
    "share_time_encoding": {"share_time_encoding": True},
    "mlp_head": {"mlp_head": True, "share_time_encoding": True},
    "repa_layer": {"repa_layer": 0},
}
# what a key leaves alone, where its weights have the shapes of the default's
UNCHANGED = {
    "num_denoising_steps": {"codes", "velocity", "estimate"},
    "rope_base_len": {"velocity", "image"},
    "diff_decoder.rope_base_len": {"codes"},
    "data_std": {"codes", "velocity"},
    "time_shift": {"codes", "velocity"},
    "repa_layer": {"codes", "velocity", "image", "estimate"},
}


def changed(changes):
    """The test's configuration with changes."""
    config = originals.tokenizer_config(
        **{name: value for name, value in changes.items() if "." not in name}, mlp_ratio=None
    )
    del config["mlp_ratio"]
    for name, value in changes.items():
        if "." in name:
            config["diff_decoder"][name.partition(".")[2]] = value
    return config


def small(config, repa=False):
    """Weights at which every part takes part in the result, and none saturates."""
    weights = originals.tokenizer_weights(config, repa)
    for name, tensor in weights.items():
        tensor *= 0.1 if tensor.ndim > 1 else 0.3
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gate1", "gate2")):
            tensor += 1
    return weights


def saved(tmp_path, weights, config):
    return originals.save(originals.tokenizer_checkpoint(weights, config), tmp_path / "tokenizer.pt")


def inputs(config):
    """The same images, noise and times whatever the configuration, and the same codes where they fit."""
    generator = torch.Generator().manual_seed(0)
    size = config["sampling_resolution"]
    images = torch.rand(3, 3, 32, 32, generator=generator)[:, : config["diff_decoder"]["in_dim"], :size, :size]
    noise = torch.randn(3, 3, 32, 32, generator=generator)[:, : config["diff_decoder"]["in_dim"], :size, :size]
    codes = torch.randint(config["vq_codebook_size"], (3, config["num_all_queries"]), generator=generator)
    return images * 2 - 1, noise, torch.tensor([0.0, 0.4, 0.95]), codes


def results(encode, decode, velocity, estimate, config):
    images, noise, u, codes = inputs(config)
    predicted, features = velocity(noise, u, codes)
    found = {
        "codes": encode(images),
        "image": decode(codes, noise),
        "velocity": predicted,
        "estimate": estimate(images, u, noise),
    }
    return found if features is None else found | {"features": features}


@torch.no_grad()
def of_the_original(weights, config):
    model = OriginalTokenizer(weights, config)
    count = model.window(0)[1]

    def velocity(noise, t, codes):
        return model.velocity(noise, t, model.condition(codes)[:, :count])

    return results(model.encode, model.decode, velocity, model.training, config)


@torch.no_grad()
def of_the_converted(model, config):
    def velocity(noise, t, codes):
        condition = model.condition(codes)[:, : model.config.tokens_per_group]
        return model._velocity(noise, t, condition, output_repa=model.config.repa_layer is not None)

    def decode(codes, noise):
        return model.decode(codes, noise=noise).sample

    def estimate(images, u, noise):
        return model(images, timesteps=u, noise=noise).pred_original_sample

    return results(lambda images: model.encode(images).codes, decode, velocity, estimate, config)


def assert_equal(found, expected):
    assert torch.equal(found["codes"], expected["codes"])
    assert set(found) == set(expected)
    for name in set(found) - {"codes"}:
        assert difference(found[name].double(), expected[name]) < TOLERANCE, name


def test_the_formulas_are_those_of_the_reference(tmp_path):
    """Values of the original implementation."""
    content = torch.load(unpack("tokenizer_official.pt", tmp_path), weights_only=False, pickle_module=_Plain)
    config = content["config"]._data["model"]
    model, io = OriginalTokenizer(content["ema"], config), values("tokenizer_io.safetensors")
    assert torch.equal(model.encode(io["images"]), io["codes"])
    assert difference(model.condition(io["codes"]), io["condition"]) < TOLERANCE
    velocity, features = model.velocity(io["velocity_xt"], io["velocity_t"], io["condition"][:, :4])
    assert difference(velocity, io["velocity"]) < TOLERANCE
    assert difference(features[:, ::16], io["repa_features"]) < TOLERANCE
    assert difference(model.decode(io["codes"], io["noise"]), io["decoded_full"]) < TOLERANCE
    estimate = model.training(io["images"], io["train_u"], io["train_noise"])
    assert difference(estimate, io["train_pred_x1"]) < TOLERANCE


class _Plain:
    """pickle, with the test's own class in the place of the original's."""

    import pickle as _pickle

    class Unpickler(_pickle.Unpickler):
        def find_class(self, module, name):
            return originals.Config if module == "config_util" else super().find_class(module, name)

    load, loads, dumps = _pickle.load, _pickle.loads, _pickle.dumps


# half a second each: these quickly, the others in the slow tests
SAMPLE = {"num_denoising_steps", "num_query_groups", "rope_base_len", "diff_decoder.rope_base_len", "mlp_head"}


@pytest.mark.parametrize(
    "key", [key if key in SAMPLE else pytest.param(key, marks=pytest.mark.slow) for key in CHANGES]
)
def test_a_key_means_here_what_it_means_there(tmp_path, key):
    config = changed(CHANGES[key])
    weights = small(config, repa=key == "repa_layer")
    model = convert_tokenizer(saved(tmp_path, weights, config))
    found, expected = of_the_converted(model, config), of_the_original(weights, config)
    assert_equal(found, expected)
    # the other direction: weights and configuration make the same model again
    assert_equal(of_the_original(to_original(model), original_config(model)), expected)
    assert_equal(
        of_the_converted(convert_tokenizer(saved(tmp_path, to_original(model), original_config(model))), config),
        expected,
    )
    # and the key says something: with the default instead, these weights compute something else, or do not fit
    plain = changed({})
    if key in UNCHANGED:
        default = of_the_original(weights, plain)
        unchanged = {name for name in expected if torch.equal(default[name], expected[name])}
        assert unchanged == UNCHANGED[key]


@pytest.mark.parametrize("key", CHANGES)
def test_the_configuration_comes_back(tmp_path, key):
    config = changed(CHANGES[key])
    found = original_config(convert_tokenizer(saved(tmp_path, small(config), config)))
    decoder = config.pop("diff_decoder")
    decoder = {"rope_base_len": 10000, **decoder, "repa_layer": None}  # there are no weights of its head
    assert found.pop("diff_decoder") == decoder
    config["queries_per_step"] = config["queries_per_step"] or 8
    assert found == {"rope_base_len": 10000, **config}


@pytest.mark.parametrize("key", sorted(set(CHANGES) - set(UNCHANGED) - {"both rotary bases"}))
def test_weights_of_another_key_are_refused_or_compute_something_else(tmp_path, key):
    """The changed configuration over the default's weights."""
    plain, config = changed({}), changed(CHANGES[key])
    weights = small(plain)
    try:
        model = convert_tokenizer(saved(tmp_path, weights, config))
    except CheckpointError as error:
        assert "was asked for" in str(error) or "does not fit" in str(error), error
        return
    assert key.startswith(("num_query_groups", "num_all_queries", "queries_per_step", "sampling_resolution"))
    expected, found = of_the_original(weights, plain), of_the_converted(model, config)
    assert found["image"].shape != expected["image"].shape or any(
        difference(found[name].double(), expected[name]) > 1e-3 for name in ("image", "estimate")
    )


REFUSED = [
    ({"vq_enable": False}, "a tokenizer without codes is not supported"),
    ({"vq_enable": "yes"}, "vq_enable='yes': a tokenizer without codes is not supported"),
    ({"in_dim": 3, "out_dim": 6}, "in_dim and out_dim must agree, got 3 and 6"),
    ({"in_dim": None, "out_dim": 6}, "in_dim and out_dim must agree, got 3 and 6"),
    ({"out_dim": "3"}, "in_dim and out_dim must agree, got 3 and '3'"),
    ({"output_resolution": "512"}, "output_resolution must be a number of pixels, or 0 for none, got '512'"),
    ({"output_resolution": -1}, "output_resolution must be a number of pixels"),
    ({"cond_dim": 128}, "condition_dim=64, but 128 was asked for"),
    ({"diff_decoder.rope_base_len": 0}, "diffusion_rope_theta must be positive and finite, got 0.0"),
    ({"diff_decoder.rope_base_len": "10"}, "diffusion_rope_theta .*diff_decoder.rope_base_len.* cannot be '10'"),
    ({"repa_layer": 2}, "repa_layer=2 is not one of the 2 denoiser blocks"),
    ({"repa_layer": -1}, "repa_layer=-1 is not one of"),
    ({"num_denoising_steps": 0}, "num_inference_steps must be at least 1"),
    ({"num_denoising_steps": 2.5}, "num_denoising_steps in the original. cannot be 2.5"),
    ({"queries_per_step": 0}, "tokens_per_group=0 does not fit num_tokens=16"),
    ({"queries_per_step": 17}, "tokens_per_group=17 does not fit num_tokens=16"),
    ({"num_query_groups": 5}, "num_tokens=16 must be a multiple of num_groups=5"),
    ({"time_shift": 0}, "time_shift must be positive"),
    ({"data_std": True}, "data_std .* cannot be True"),
    ({"query_low_rank": 1}, "query_low_rank in the original. cannot be 1"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_a_value_that_means_nothing_here_is_refused(tmp_path, changes, message):
    weights = small(changed({}), repa="repa_layer" in changes)
    with pytest.raises(CheckpointError, match=message):
        convert_tokenizer(saved(tmp_path, weights, changed(changes)))


def test_a_decoder_that_is_no_set_of_options_is_refused(tmp_path):
    config = changed({})
    weights = small(config)
    config["diff_decoder"] = [3]
    options = {"data_std": 0.6, "time_shift": 2.0, "repa_layer": 1}
    with pytest.raises(CheckpointError, match=r"diff_decoder must hold options by name, got \[3\]"):
        convert_tokenizer(saved(tmp_path, weights, config), **options)


def test_the_encoders_base_is_no_longer_the_denoisers(tmp_path):
    """By our own names as by the original's; a base of the denoiser is given by its name."""
    config = changed({})
    path = saved(tmp_path, small(config), config)
    for options, bases in (
        ({}, (10000, 10000)),
        ({"rope_theta": 10.0}, (10, 10000)),
        ({"diffusion_rope_theta": 10.0}, (10000, 10)),
        ({"config": {"rope_base_len": 10, "diff_decoder": {"rope_base_len": 20}}}, (10, 20)),
    ):
        converted = convert_tokenizer(path, **options).config
        assert (converted.rope_theta, converted.diffusion_rope_theta) == bases


def test_a_word_that_is_no_option_of_a_given_configuration_is_a_warning(tmp_path, caplog):
    config = changed({})
    convert_tokenizer(saved(tmp_path, small(config), config), {"num_denoising_step": 7})
    assert "WARNING" in caplog.text and "options without a counterpart: num_denoising_step" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sample_size": (8, 16)}, "images are square, not 8x16"),
        ({"attention_head_dim": 32}, "has attention_head_dim=64, not 32"),
        ({"max_num_tokens": 512}, "has max_num_tokens=1024, not 512"),
        ({"query_rank": 4}, "has query_rank=8, not 4"),
        ({"repa_dim": 64}, "has repa_dim=768, not 64"),
    ],
)
def test_what_the_original_cannot_be_told(options, message):
    options = {"sample_size": 16, "encoder_patch_size": 8} | options
    with torch.device("meta"):
        model = DARTokenizer(**options)
    with pytest.raises(ValueError, match=message):
        original_config(model)


# The language model's arguments that no shape tells


def ar_file(tmp_path, **args):
    weights = originals.transformer_weights(**originals.TRANSFORMER)
    torch.save(originals.transformer_checkpoint(weights, n_head=2, block_size=16, **args), tmp_path / "ar.pt")
    return tmp_path / "ar.pt"


def test_arguments_that_change_the_function_are_taken(tmp_path, caplog):
    plain = convert_transformer(ar_file(tmp_path))
    config = convert_transformer(ar_file(tmp_path, rope_base=500, norm_eps=1e-3)).config
    assert "has to be built with" not in caplog.text  # as it was
    assert (plain.config.rope_parameters["rope_theta"], plain.config.rms_norm_eps) == (10000, 1e-5)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (500, 1e-3)


@pytest.mark.parametrize("argument", ["rope_base", "norm_eps"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "many", True])
def test_arguments_that_mean_nothing_are_refused(tmp_path, argument, value):
    with pytest.raises(CheckpointError, match=f"{argument} must be a positive number, got"):
        convert_transformer(ar_file(tmp_path, **{argument: value}))


def test_every_key_is_tried():
    """Each key of the original's configuration is changed above, or refused."""
    config = changed({})
    config["rope_base_len"] = config["diff_decoder"]["rope_base_len"] = 0
    keys = set(config) - {"diff_decoder"} | {f"diff_decoder.{name}" for name in config["diff_decoder"]}
    tried = {key for changes in CHANGES.values() for key in changes} | {
        key for changes, _ in REFUSED for key in changes
    }
    tried |= {
        f"diff_decoder.{key}" for key in copy.copy(tried) if key in config["diff_decoder"] and key != "rope_base_len"
    }
    assert keys <= tried
