"""What the pipeline refuses: one ValueError for each wrong argument, before any model runs."""

import numpy as np
import PIL.Image
import pytest
import torch
from pipeline_helpers import picture, seeded

from dar_hf import DARPipeline, FlowMatchAdamsBashforthScheduler

PREFIX = torch.zeros(1, 4, dtype=torch.long)


class Elsewhere(torch.Generator):
    device = torch.device("cuda")


@pytest.fixture
def forwards(tiny_pipeline):
    """Names of the modules of either model that ran."""
    ran = []
    for model in (tiny_pipeline.transformer, tiny_pipeline.tokenizer):
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (5, {}, r"class label must be an integer in \[0, 5\)"),
        (-1, {}, "class label must be an integer"),
        (True, {}, "class label must be an integer"),
        (None, {}, "class label must be an integer"),
        (torch.tensor([0.0]), {}, "class label must be an integer"),
        ([1.0], {}, "class label must be an integer"),
        (torch.tensor([True]), {}, "class label must be an integer"),
        (b"\x01", {}, "class label must be an integer"),
        ("whale", {}, "unknown class name 'whale'; known names: goldfish, shark"),
        (["shark", "whale"], {}, "unknown class name 'whale'"),
        ([], {}, "class_labels is empty"),
        (0, {"guidance_scale": (1.0, 2.0, 3.0)}, "a number or a pair"),
        (0, {"guidance_scale": float("nan")}, "finite numbers >= 0"),
        (0, {"guidance_scale": "high"}, "finite numbers >= 0"),
        (0, {"guidance_scale": -1.0}, "finite numbers >= 0"),
        (0, {"temperature": -1.0}, "temperature must be a finite number >= 0"),
        (0, {"temperature": float("inf")}, "temperature must be a finite number >= 0"),
        (0, {"temperature": "hot"}, "temperature must be a finite number >= 0"),
        (0, {"temperature": False}, "temperature must be a finite number >= 0"),
        (0, {"temperature": 10**400}, "temperature must be a finite number >= 0"),
        (0, {"guidance_scale": True}, "finite numbers >= 0"),
        (0, {"guidance_scale": (1.0, 10**400)}, "finite numbers >= 0"),
        (0, {"top_p": True}, r"top_p must lie in \(0, 1\]"),
        (0, {"top_k": -1}, "top_k must be an integer >= 0"),
        (0, {"top_k": 2.0}, "top_k must be an integer >= 0"),
        (0, {"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        (0, {"top_p": 1.5}, r"top_p must lie in \(0, 1\]"),
        (0, {"top_p": None}, r"top_p must lie in \(0, 1\]"),
        (0, {"num_inference_steps": 0}, "num_inference_steps must be a positive integer"),
        (0, {"num_inference_steps": -1}, "num_inference_steps must be a positive integer"),
        (0, {"num_inference_steps": 2.5}, "num_inference_steps must be a positive integer"),
        (0, {"num_inference_steps": True}, "num_inference_steps must be a positive integer"),
        (0, {"num_inference_steps": 10**30}, "num_inference_steps must be a positive integer, at most 10000"),
        (0, {"num_tokens": "all"}, "num_tokens must be a positive integer"),
        (0, {"num_tokens": 0}, "num_tokens must be a positive integer"),
        (0, {"num_tokens": 17}, r"num_tokens must lie in \[1, 16\]"),
        (0, {"num_tokens": 3}, "num_tokens=3 completes no step: the first one needs 4"),
        (0, {"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive integer"),
        (0, {"prefix_codes": PREFIX.float()}, "prefix_codes must be integers of shape"),
        (0, {"num_images_per_prompt": None}, "num_images_per_prompt must be a positive integer"),
        (0, {"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a positive integer"),
        (0, {"prefix_codes": "abc"}, "prefix_codes must be a tensor of integers, got str"),
        (0, {"prefix_codes": [[1, None]]}, "prefix_codes must be a tensor of integers, got list"),
        (0, {"prefix_codes": PREFIX.bool()}, "prefix_codes must be integers of shape"),
        (0, {"prefix_codes": PREFIX, "num_tokens": 3, "output_type": "codes"}, "a prefix of 4 codes is longer than"),
        (0, {"prefix_codes": PREFIX[0]}, "prefix_codes must be integers of shape"),
        ([0] * 3, {"prefix_codes": PREFIX.expand(2, -1)}, "prefix_codes must be integers of shape"),
        ([0] * 3, {"prefix_codes": PREFIX.expand(2, -1), "num_images_per_prompt": 2}, "prefix_codes must be integers"),
        (0, {"prefix_codes": (PREFIX + 32).numpy().astype("uint16")}, r"prefix_codes must lie in \[0, 32\)"),
        (0, {"prefix_codes": np.full((1, 4), 2**64 - 1, "uint64")}, r"prefix_codes must lie in \[0, 32\)"),
        (0, {"prefix_codes": PREFIX + 32}, r"prefix_codes must lie in \[0, 32\)"),
        (0, {"prefix_codes": PREFIX - 1}, r"prefix_codes must lie in \[0, 32\)"),
        (0, {"prefix_codes": PREFIX.repeat(1, 5)}, "a prefix of 20 codes is longer than the 16"),
        (0, {"prefix_codes": PREFIX, "image": picture(), "strength": 0.5}, "prefix_codes and image exclude"),
        (0, {"prefix_codes": PREFIX, "layout_image": picture(), "layout_tokens": 2}, "exclude each other"),
        (0, {"layout_image": picture()}, "layout_image and layout_tokens go together"),
        (0, {"layout_tokens": 4}, "layout_image and layout_tokens go together"),
        (0, {"layout_image": picture(), "layout_tokens": -1}, "layout_tokens must be an integer >= 0"),
        (0, {"layout_image": picture(), "layout_tokens": 2.0}, "layout_tokens must be an integer >= 0"),
        (0, {"layout_image": picture(), "layout_tokens": 17}, "layout_tokens=17 is more than num_tokens=16"),
        (0, {"layout_image": [picture()] * 2, "layout_tokens": 4}, "got 2 images for 1 labels"),
        (0, {"layout_image": torch.full((1, 3, 8, 8), float("nan")), "layout_tokens": 4}, "must lie in"),
        (0, {"layout_image": torch.full((1, 3, 8, 8), -3.0), "layout_tokens": 4}, "must lie in"),
        (0, {"layout_image": np.asarray(picture()), "layout_tokens": 4}, "must be floating point"),
        (0, {"layout_image": torch.zeros(3, 8, 8, dtype=torch.uint8), "layout_tokens": 4}, "must be floating point"),
        (0, {"layout_image": torch.zeros(1, 1, 8, 8), "layout_tokens": 4}, r"of shape \(3, height, width\)"),
        (0, {"layout_image": np.zeros((8, 8)), "layout_tokens": 4}, r"of shape \(height, width, 3\)"),
        (0, {"layout_image": torch.zeros(3, 8, 16), "layout_tokens": 4}, "must have 8x8 pixels, got"),
        (0, {"layout_image": torch.zeros(0, 3, 8, 8), "layout_tokens": 4}, "must lie in"),
        (0, {"layout_image": [torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], "layout_tokens": 4}, "each of shape"),
        (
            0,
            {"layout_image": [picture(), torch.zeros(3, 8, 8)], "layout_tokens": 4},
            "or arrays, or tensors, got Image",
        ),
        (0, {"layout_image": [picture(), None], "layout_tokens": 4}, "got Image, NoneType"),
        (0, {"layout_image": [], "layout_tokens": 4}, "got an empty list"),
        (0, {"layout_image": PIL.Image.new("RGB", (0, 8)), "layout_tokens": 4}, "must have pixels, of 8 bits"),
        (
            0,
            {"layout_image": PIL.Image.new("I", (8, 8), 255), "layout_tokens": 4},
            "of 8 bits a channel, got mode 'I'",
        ),
        (0, {"layout_image": PIL.Image.new("F", (8, 8)), "layout_tokens": 4}, "of 8 bits a channel, got mode 'F'"),
        (
            0,
            {"layout_image": picture(), "layout_tokens": 5, "num_tokens": 4},
            "layout_tokens=5 is more than num_tokens",
        ),
        (0, {"layout_image": picture(), "layout_tokens": True}, "layout_tokens must be an integer >= 0"),
        (
            0,
            {"layout_image": picture(), "layout_tokens": 4, "image": picture(), "strength": 0.5},
            "exclude each other",
        ),
        (0, {"layout_image": "cat.png", "layout_tokens": 4}, "must be PIL images, or arrays, or tensors, got str"),
        (0, {"image": picture()}, "image and strength go together"),
        (0, {"strength": 0.5}, "image and strength go together"),
        (0, {"image": torch.full((3, 8, 8), float("inf")), "strength": 0.5}, "image must lie in"),
        (0, {"image": 3, "strength": 0.5}, "image must be PIL images, or arrays, or tensors, got int"),
        ([0, 1], {"image": [picture()] * 3, "strength": 0.5}, "got 3 images for 2 labels"),
        ([0, 1], {"image": [picture()] * 3, "strength": 0.5, "num_images_per_prompt": 2}, "got 3 images for 2 labels"),
        (
            0,
            {"image": picture(), "strength": 0.25, "num_tokens": 11, "output_type": "codes"},
            "num_tokens=11 is less than the 12 tokens of the image",
        ),
        (0, {"image": picture(), "strength": 0.5, "num_tokens": 8}, "completes no step: the first one needs 12"),
        (0, {"image": picture(), "strength": True}, r"strength must lie in \[0, 1\]"),
        (0, {"image": picture(), "strength": "0.5"}, r"strength must lie in \[0, 1\]"),
        (0, {"image": picture(), "strength": -0.1}, r"strength must lie in \[0, 1\]"),
        (0, {"image": picture(), "strength": 1.1}, r"strength must lie in \[0, 1\]"),
        (0, {"image": picture(), "strength": float("nan")}, r"strength must lie in \[0, 1\]"),
        (0, {"image": picture(), "strength": 0.5, "latents": torch.zeros(1, 3, 8, 8)}, "image and latents exclude"),
        (0, {"latents": torch.zeros(1, 3, 4, 4)}, r"latents must be finite and of shape \(1, 3, 8, 8\)"),
        (0, {"latents": torch.full((1, 3, 8, 8), float("nan"))}, "latents must be finite"),
        (0, {"latents": torch.full((1, 3, 8, 8), float("inf"))}, "latents must be finite"),
        (0, {"latents": torch.full((1, 3, 8, 8), 1e300, dtype=torch.float64)}, "latents must be finite"),
        ([0, 1], {"latents": torch.zeros(1, 3, 8, 8)}, r"of shape \(2, 3, 8, 8\)"),
        (0, {"latents": np.zeros((1, 3, 8, 8))}, "latents must be a floating-point tensor, got ndarray"),
        (0, {"latents": torch.zeros(1, 3, 8, 8, dtype=torch.long)}, "latents must be a floating-point tensor"),
        ([0, 1], {"generator": [seeded()]}, "got 1 generators for a batch of 2"),
        (0, {"generator": []}, "got 0 generators for a batch of 1"),
        (0, {"generator": 42}, "generator must be a torch.Generator or a list of them, got int"),
        (0, {"generator": [42]}, "generator must be a torch.Generator or a list of them, got int"),
        (0, {"generator": Elsewhere()}, "a generator on cuda cannot draw for a model on cpu"),
        (0, {"generator": [Elsewhere()]}, "a generator on cuda cannot draw for a model on cpu"),
        (0, {"output_type": "jpeg"}, "output_type must be one of pil, np, pt, codes, latent"),
        (0, {"output_type": None}, "output_type must be one of pil"),
        (0, {"callback_on_step_end": "print"}, "callback_on_step_end must be callable, got str"),
        (0, {"callback_on_step_end_tensor_inputs": "codes"}, "must be among"),
        (0, {"callback_on_step_end_tensor_inputs": ["noise"]}, "must be among"),
    ],
)
@pytest.mark.parametrize("way", ["call", "stream"])
def test_bad_input(tiny_pipeline, forwards, labels, options, message, way):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        # refused at once, not at the first picture
        (tiny_pipeline if way == "call" else tiny_pipeline.stream)(labels, **options)
    assert not forwards
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "images, options, message",
    [
        ("cat.png", {}, "images must be PIL images, or arrays, or tensors, got str"),
        ([], {}, "got an empty list"),
        (torch.full((3, 8, 8), float("nan")), {}, "images must lie in"),
        (torch.zeros(3, 16, 16), {}, "image size 16x16 is not the 8x8 this tokenizer was made for"),
        (picture(), {"height": 16, "width": 16}, "image size 16x16 is not the 8x8 this tokenizer was made for"),
        (picture(), {"height": 9}, "image size 9x8 is not a multiple of the patch size 2"),
        (picture(), {"width": -8}, "width must be a positive integer"),
        (torch.zeros(3, 8, 8), {"height": 8.0}, "height must be a positive integer"),
        (picture(), {"num_tokens": 17}, r"num_tokens must lie in \[1, 16\]"),
        (picture(), {"num_tokens": 3}, "completes no step"),
        (picture(), {"num_inference_steps": 0}, "num_inference_steps must be a positive integer"),
        ([picture()] * 2, {"generator": [seeded()]}, "got 1 generators for a batch of 2"),
        ([picture()] * 2, {"latents": torch.zeros(1, 3, 8, 8)}, r"of shape \(2, 3, 8, 8\)"),
        (picture(), {"output_type": "jpeg"}, "output_type must be one of"),
    ],
)
def test_bad_reconstruction(tiny_pipeline, forwards, images, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.reconstruct(images, **options)
    assert not forwards


def test_stream_refuses_unknown_arguments(tiny_pipeline):
    for options in ({"colour": 1}, {"return_dict": False}):
        with pytest.raises(TypeError, match="unexpected"):
            tiny_pipeline.stream(0, **options)


@pytest.mark.parametrize(
    "tokenizer_options, message",
    [
        ({"codebook_size": 16}, "disagree: codebook_size 16 and 32"),
        ({"num_tokens": 8}, "disagree: number of tokens 8 and 16"),
    ],
)
def test_components_must_fit_together(make_tokenizer, tiny_transformer, tokenizer_options, message):
    with pytest.raises(ValueError, match=message):
        DARPipeline(make_tokenizer(**tokenizer_options), tiny_transformer, FlowMatchAdamsBashforthScheduler())
