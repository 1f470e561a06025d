"""Values that are not finite end encoding and decoding, however they are asked for."""

import pytest
import torch
from pipeline_helpers import picture, seeded

CODES = torch.arange(16)[None]
CAUSE = "images are not finite, since weights are not: denoiser.proj_out.bias. The model is damaged"


def damaged(model, name="denoiser.proj_out.bias", value=float("nan")):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_tokenizer_decodes_nothing(tiny_tokenizer, value):
    damaged(tiny_tokenizer, value=value)
    with pytest.raises(ValueError, match=CAUSE):
        tiny_tokenizer.decode(CODES)
    with pytest.raises(ValueError, match=CAUSE):
        tiny_tokenizer.decode(CODES[:, :4])  # the preview of a prefix
    with pytest.raises(ValueError, match=CAUSE):
        next(tiny_tokenizer.decode_stream([CODES[:, :4], CODES[:, 4:]]))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_the_pipeline_gives_no_image(tiny_pipeline, output_type):
    damaged(tiny_pipeline.tokenizer)
    with pytest.raises(ValueError, match=CAUSE):
        tiny_pipeline([0, 3], output_type=output_type)
    with pytest.raises(ValueError, match=CAUSE):
        next(tiny_pipeline.stream([0, 3], output_type=output_type))
    with pytest.raises(ValueError, match=CAUSE):
        tiny_pipeline.reconstruct(picture(), output_type=output_type)
    with pytest.raises(ValueError, match=CAUSE):
        tiny_pipeline(0, image=picture(), strength=0.5, output_type=output_type)


def test_guidance_that_overflows_is_refused(tiny_transformer):
    ids = torch.tensor([[tiny_transformer.config.class_token_id(3)]])
    with pytest.raises(ValueError, match="logits are not finite"):
        list(tiny_transformer.stream_codes(3, guidance_scale=1e40))
    with pytest.raises(ValueError, match="logits are not finite"):
        tiny_transformer.generate(ids, guidance_scale=1e40)


def test_codes_need_no_denoiser(tiny_pipeline):
    damaged(tiny_pipeline.tokenizer)
    assert tiny_pipeline([0, 3], output_type="codes").images.shape == (2, 16)


@pytest.mark.parametrize("name", ["patch_embed.weight", "quant_proj.weight", "quantizer.codebook.weight"])
def test_the_tokenizer_encodes_nothing(tiny_pipeline, name):
    tokenizer = damaged(tiny_pipeline.tokenizer, name)
    expected = f"latents of these images are not finite, since weights are not: {name}"
    with pytest.raises(ValueError, match=expected):
        tokenizer.encode(torch.zeros(2, 3, 8, 8))
    for options in ({"layout_image": picture(), "layout_tokens": 4}, {"image": picture(), "strength": 0.5}):
        with pytest.raises(ValueError, match=expected):
            tiny_pipeline(0, **options)


def test_overflow_in_half_precision_is_told_from_bad_weights(make_tokenizer):
    half = make_tokenizer().to(torch.float16)
    with torch.no_grad():
        half.denoiser.proj_in.weight.fill_(6e4)
        half.patch_embed.weight.fill_(6e4)
    expected = r"not finite \(NaN or infinity\), though all weights are \(float16, float32\).*dtype=torch.float32"
    with pytest.raises(ValueError, match=f"decoded images are {expected}"):
        half.decode(CODES)
    with pytest.raises(ValueError, match=f"latents of these images are {expected}"):
        half.encode(torch.ones(1, 3, 8, 8))


def test_what_a_callback_puts_in_place_is_looked_at(tiny_pipeline):
    def callback(pipe, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], float("nan"))} if step == 3 else None

    with pytest.raises(ValueError, match="decoded images are not finite"):
        tiny_pipeline([0, 3], output_type="pt", callback_on_step_end=callback)


def test_the_range_of_pixels_comes_first(tiny_tokenizer):
    for value in (float("nan"), float("inf"), 2.0):
        with pytest.raises(ValueError, match=r"pixel_values must lie in \[-1, 1\]"):
            tiny_tokenizer.encode(torch.full((1, 3, 8, 8), value))
    assert tiny_tokenizer.encode(torch.zeros(0, 3, 8, 8)).codes.shape == (0, 16)


def test_finite_values_pass_unchanged(tiny_tokenizer, tiny_pipeline):
    """The check looks at what is there; it computes nothing anew."""
    images = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1
    output = tiny_tokenizer.encode(images)
    assert torch.equal(output.codes, tiny_tokenizer.quantizer.nearest(output.latents))
    previews = list(tiny_tokenizer.decode_stream([output.codes], generator=seeded()))
    assert torch.equal(previews[-1].sample, tiny_tokenizer.decode(output.codes, generator=seeded()).sample)
