"""Images that the pipeline starts from: layout, image-to-image, reconstruction."""

import numpy as np
import PIL.Image
import pytest
import torch
from pipeline_helpers import OUTPUT_TYPES, generated_codes, picture, pixels, recorded, same, seeded, tensor_of

from dar_hf import (
    DARPipeline,
    DARPipelineOutput,
    FlowMatchAdamsBashforthScheduler,
)

# Prefix, layout, image-to-image


def test_prefix_codes_are_kept(tiny_pipeline):
    prefix = torch.randint(0, 32, (2, 6), generator=seeded(5))
    codes = generated_codes(tiny_pipeline, [0, 3], prefix_codes=prefix, generator=seeded())
    assert codes.shape == (2, 16) and torch.equal(codes[:, :6], prefix)
    assert not torch.equal(codes[:, 6:], generated_codes(tiny_pipeline, [0, 3], generator=seeded())[:, 6:])
    result = tiny_pipeline([0, 3], prefix_codes=prefix, generator=seeded(), output_type="pt")
    assert torch.equal(result.images, pixels(tiny_pipeline.tokenizer.decode(codes, generator=seeded()).sample))
    for_all = generated_codes(tiny_pipeline, [0, 3], prefix_codes=prefix[:1], generator=seeded())
    assert torch.equal(for_all[:, :6], prefix[:1].expand(2, -1))
    stored = generated_codes(tiny_pipeline, [0, 3], prefix_codes=prefix.numpy().astype("uint16"), generator=seeded())
    assert torch.equal(stored, codes)


@pytest.mark.parametrize("count", [0, 5, 16])
def test_layout_keeps_the_first_codes_of_an_image(tiny_pipeline, count):
    options = {"layout_image": picture(), "layout_tokens": count}
    reference = tiny_pipeline.tokenizer.encode(tensor_of(picture())).codes
    codes = generated_codes(tiny_pipeline, [0, 3], generator=seeded(), **options)
    assert torch.equal(codes[:, :count], reference[:, :count].expand(2, -1))
    by_hand = generated_codes(tiny_pipeline, [0, 3], generator=seeded(), prefix_codes=reference[:, :count])
    assert torch.equal(codes, by_hand)
    images = tiny_pipeline([0, 3], generator=seeded(), output_type="pt", **options).images
    if count == 0:
        assert torch.equal(images, tiny_pipeline([0, 3], generator=seeded(), output_type="pt").images)
    if count == 16:
        decoded = tiny_pipeline.tokenizer.decode(reference.expand(2, -1), generator=seeded()).sample
        assert torch.equal(images, pixels(decoded))


def test_images_in_every_form(tiny_pipeline):
    image = picture()
    reference = tiny_pipeline.tokenizer.encode(tensor_of(image)).codes
    array = np.asarray(image) / np.float32(255)
    for given in (
        image,
        [image],
        array,
        array[None],
        array.astype(">f4"),
        array.astype(np.longdouble),
        tensor_of(image) / 2 + 0.5,
        tensor_of(image),
    ):
        codes = generated_codes(tiny_pipeline, 0, layout_image=given, layout_tokens=16)
        assert torch.equal(codes, reference)
    two = generated_codes(tiny_pipeline, [0, 3], layout_image=[picture(1), picture(2)], layout_tokens=16)
    each = [tiny_pipeline.tokenizer.encode(tensor_of(picture(i))).codes for i in (1, 2)]
    assert torch.equal(two, torch.cat(each))


def test_a_wide_picture_is_cropped_to_its_middle(tiny_pipeline):
    wide = PIL.Image.new("RGB", (24, 8), (255, 0, 0))
    wide.paste(picture(), (8, 0))  # the picture in the middle, red on both sides
    codes = generated_codes(tiny_pipeline, 0, layout_image=wide, layout_tokens=16)
    assert torch.equal(codes, tiny_pipeline.tokenizer.encode(tensor_of(picture())).codes)


@pytest.mark.parametrize(
    "options", [{"layout_image": picture(), "layout_tokens": 5}, {"image": picture(), "strength": 0.5}]
)
def test_one_image_for_many_labels_is_encoded_once(tiny_pipeline, monkeypatch, options):
    sizes = []
    encode = tiny_pipeline.tokenizer.encode
    monkeypatch.setattr(tiny_pipeline.tokenizer, "encode", lambda images: sizes.append(len(images)) or encode(images))
    assert len(tiny_pipeline([0, 1, 2], num_images_per_prompt=2, **options).images) == 6
    assert sizes == [1]


def test_strength_one_is_plain_generation(tiny_pipeline):
    plain = tiny_pipeline([0, 3], generator=seeded(), output_type="pt").images
    again = tiny_pipeline([0, 3], generator=seeded(), output_type="pt", image=picture(), strength=1.0).images
    assert torch.equal(plain, again)


def test_strength_zero_is_reconstruction(tiny_pipeline):
    codes = tiny_pipeline.tokenizer.encode(tensor_of(picture())).codes
    decoded = tiny_pipeline.tokenizer.decode(codes, generator=seeded()).sample
    result = tiny_pipeline(0, generator=seeded(), output_type="pt", image=picture(), strength=0.0)
    assert torch.equal(result.images, pixels(decoded))
    assert torch.equal(generated_codes(tiny_pipeline, 0, image=picture(), strength=0.0), codes)


@pytest.mark.parametrize("strength, start", [(0.5, 2), (0.75, 1), (0.3, 3)])
def test_strength_enters_the_schedule_once(tiny_pipeline, strength, start):
    tokenizer, image = tiny_pipeline.tokenizer, tensor_of(picture())
    steps, result = recorded(tiny_pipeline, 0, generator=seeded(), image=picture(), strength=strength)
    kept = tokenizer.encode(image).codes[:, : 4 * start]
    codes = steps[-1]["codes"]
    assert torch.equal(codes[:, : 4 * start], kept) and codes.shape == (1, 16)
    assert [step["step"] for step in steps] == list(range(4 - start)) and result.num_steps == 4
    times = [i / 4 / (i / 4 + 2 * (1 - i / 4)) for i in range(5)]
    sample = times[start] * 0.6 * image + (1 - times[start]) * torch.randn(1, 3, 8, 8, generator=seeded())
    conditions, previous = tokenizer.condition(codes), None
    for i in range(start, 4):
        velocity = tokenizer.velocity(sample, times[i], conditions[:, 4 * i : 4 * i + 4])
        direction = velocity if previous is None else 1.5 * velocity - 0.5 * previous
        sample, previous = sample + (times[i + 1] - times[i]) * direction, velocity
    assert torch.allclose(steps[-1]["preview"], sample / 0.6, atol=1e-4)
    continued = tiny_pipeline.transformer.stream_codes(
        0, generator=advanced(seeded(), (1, 3, 8, 8)), prefix_codes=kept
    )
    assert torch.equal(codes, torch.cat(list(continued), dim=1))


def advanced(generator, shape):
    torch.randn(shape, generator=generator)
    return generator


# Reconstruction


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
@pytest.mark.parametrize("options", [{}, {"num_inference_steps": 6}, {"num_tokens": 9}], ids=str)
def test_reconstruction_is_the_decoded_codes(tiny_pipeline, options, output_type):
    forwards = []
    tiny_pipeline.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    images = [picture(1), picture(2)]
    result = tiny_pipeline.reconstruct(images, generator=seeded(), output_type=output_type, **options)
    count, num_steps = options.get("num_tokens", 16), options.get("num_inference_steps", 4)
    codes = tiny_pipeline.tokenizer.encode(torch.cat([tensor_of(image) for image in images])).codes[:, :count]
    decoded = tiny_pipeline.tokenizer.decode(codes, generator=seeded(), num_inference_steps=num_steps).sample
    if output_type == "codes":
        assert torch.equal(result.images, codes)
    elif output_type == "latent":
        last = list(tiny_pipeline.tokenizer.decode_stream([codes], generator=seeded(), num_inference_steps=num_steps))
        assert torch.equal(result.images, last[-1].latents)
    else:
        assert same(result.images, tiny_pipeline.image_processor.postprocess(decoded, output_type))
    assert isinstance(result, DARPipelineOutput) and result.previews is None and not forwards


def test_previews_of_a_reconstruction_as_codes(tiny_pipeline):
    result = tiny_pipeline.reconstruct(picture(), output_type="codes", previews=True)
    assert [codes.shape for codes in result.previews] == [(1, 4), (1, 8), (1, 12), (1, 16)]
    assert all(torch.equal(codes, result.images[:, : codes.shape[1]]) for codes in result.previews)


def test_previews_of_a_reconstruction(tiny_pipeline):
    result = tiny_pipeline.reconstruct(picture(), generator=seeded(), output_type="pt", previews=True)
    codes = tiny_pipeline.tokenizer.encode(tensor_of(picture())).codes
    steps = [step.sample for step in tiny_pipeline.tokenizer.decode_stream([codes], generator=seeded())]
    assert len(result.previews) == 4 and torch.equal(result.previews[-1], result.images)
    assert all(torch.equal(preview, pixels(step)) for preview, step in zip(result.previews, steps, strict=True))
    images, previews = tiny_pipeline.reconstruct(picture(), previews=True, return_dict=False)
    assert len(images) == 1 and len(previews) == 4
    assert len(tiny_pipeline.reconstruct(picture(), return_dict=False)) == 1


def test_a_whole_layout_and_no_strength_are_the_reconstruction(tiny_pipeline):
    options = {"generator": seeded(), "output_type": "pt"}
    expected = tiny_pipeline.reconstruct(picture(), **options).images
    for given in ({"layout_image": picture(), "layout_tokens": 16}, {"image": picture(), "strength": 0.0}):
        assert torch.equal(tiny_pipeline(2, **given, **options | {"generator": seeded()}).images, expected)
    latents = torch.randn(1, 3, 8, 8, generator=seeded())
    assert torch.equal(tiny_pipeline.reconstruct(picture(), latents=latents, output_type="pt").images, expected)


def test_reconstruction_in_other_sizes_where_allowed(make_tokenizer, tiny_transformer):
    tokenizer = make_tokenizer(strict_sample_size=False)
    pipeline = DARPipeline(tokenizer, tiny_transformer, FlowMatchAdamsBashforthScheduler())
    pipeline.set_progress_bar_config(disable=True)
    image = picture(size=(10, 14))
    codes = tokenizer.encode(tensor_of(image)).codes
    decoded = tokenizer.decode(codes, height=10, width=14, generator=seeded()).sample
    options = {"generator": seeded(), "output_type": "pt"}
    assert torch.equal(pipeline.reconstruct(image, height=10, width=14, **options).images, pixels(decoded))
    tensor = tensor_of(image) / 2 + 0.5  # of its own size
    images = pipeline.reconstruct(tensor, generator=seeded(), output_type="pt").images
    assert torch.allclose(images, pixels(decoded), atol=1e-5)
    assert pipeline.reconstruct(image).images[0].size == (8, 8)  # cropped to the model's size
