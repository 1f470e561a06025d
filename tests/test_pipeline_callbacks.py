"""Callbacks of the pipeline: what they see, and what they may change."""

import pytest
import torch
from pipeline_helpers import generated_codes, picture, pixels, recorded, seeded

from dar_hf import (
    FlowMatchAdamsBashforthScheduler,
)

# Callbacks


def test_callback_sees_every_step(tiny_pipeline):
    steps, result = recorded(tiny_pipeline, [0, 3], generator=seeded())
    outputs = list(tiny_pipeline.stream([0, 3], generator=seeded(), output_type="pt"))
    scheduler = FlowMatchAdamsBashforthScheduler()
    scheduler.set_timesteps(4)
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert [step["timestep"] for step in steps] == pytest.approx(scheduler.timesteps.tolist())
    for k, (step, output) in enumerate(zip(steps, outputs, strict=True), start=1):
        assert set(step) == {"step", "timestep", "preview", "codes", "latents"}
        assert torch.equal(pixels(step["preview"]), output.images)
        assert step["codes"].shape == (2, 4 * k)
        assert step["latents"].shape == (2, 3, 8, 8)
    assert torch.equal(steps[-1]["latents"] / 0.6, steps[-1]["preview"])
    assert not torch.equal(steps[0]["latents"] / 0.6, steps[0]["preview"])
    assert torch.equal(result.images, outputs[-1].images)


def test_callback_gets_the_tensors_it_names(tiny_pipeline):
    steps, _ = recorded(tiny_pipeline, 0, callback_on_step_end_tensor_inputs=["codes"])
    assert all(set(step) == {"step", "timestep", "codes"} for step in steps)


@pytest.mark.parametrize("options", [{"num_tokens": 2}, {"num_tokens": 13, "image": picture(), "strength": 0.25}])
def test_callback_counts_from_zero_where_codes_complete_no_step(tiny_pipeline, options):
    steps = []
    tiny_pipeline(0, output_type="codes", callback_on_step_end=lambda _, step, *__: steps.append(step), **options)
    assert steps == [0]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
def test_codes_alone_are_reported_at_the_steps_of_the_image(tiny_pipeline, num_steps):
    def calls(output_type):
        steps, codes = [], []

        def callback(pipe, step, timestep, tensors):
            steps.append(step)
            codes.append(tensors["codes"])

        result = tiny_pipeline(
            0,
            generator=seeded(),
            num_inference_steps=num_steps,
            output_type=output_type,
            callback_on_step_end=callback,
        )
        return steps, codes, result

    steps, codes, result = calls("codes")
    assert steps == calls("pt")[0] == list(range(num_steps))
    assert (result.step, result.num_steps, result.num_tokens) == (num_steps, num_steps, 16)
    assert torch.equal(codes[-1], result.images) and result.images.shape == (1, 16)


def test_callback_can_replace_the_latents(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    codes = generated_codes(tiny_pipeline, 0, generator=seeded())
    new = torch.randn(1, 3, 8, 8, generator=seeded(8))

    def callback(pipe, step, timestep, tensors):
        return {"latents": new} if step == 2 else tensors

    images = tiny_pipeline(0, generator=seeded(), output_type="pt", callback_on_step_end=callback).images
    scheduler, conditions = FlowMatchAdamsBashforthScheduler(), tokenizer.condition(codes)
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 3, 8, 8, generator=seeded())
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.step(tokenizer.velocity(sample, t, conditions[:, 4 * i : 4 * i + 4]), t, sample)[0]
        sample = new if i == 2 else sample
    assert torch.allclose(images, pixels(sample / 0.6), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"image": picture(), "strength": 0.5}], ids=["plain", "image"])
def test_latents_replaced_after_the_last_step_are_the_image(tiny_pipeline, options):
    def replaced(pipe, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 0.3)} if step == pipe.num_timesteps - 1 else tensors

    def changed(pipe, step, timestep, tensors):
        if step == pipe.num_timesteps - 1:
            tensors["latents"].fill_(0.3)
        return tensors

    for callback in (replaced, changed):
        for output_type, value in (("pt", 0.75), ("latent", 0.3)):
            images = tiny_pipeline(0, output_type=output_type, callback_on_step_end=callback, **options).images
            assert torch.allclose(images, torch.full_like(images, value))


@pytest.mark.parametrize(
    "answer, message",
    [
        (True, "must return a dictionary or None, got bool"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"must have \(1, 3, 8, 8\)"),
        ({"latents": 0.0}, r"must have \(1, 3, 8, 8\)"),
    ],
)
def test_bad_answers_of_callbacks(tiny_pipeline, answer, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(0, callback_on_step_end=lambda *_: answer)


def test_guidance_scale_can_be_read_and_set_in_a_callback(tiny_pipeline):
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    tiny_pipeline(0, guidance_scale=2.0, callback_on_step_end=callback)
    assert tiny_pipeline.guidance_scale == 2.0 + tiny_pipeline.num_timesteps


def test_callback_stops_the_call(tiny_pipeline):
    outputs = list(tiny_pipeline.stream(0, generator=seeded(), output_type="pt"))

    def callback(pipe, step, timestep, tensors):
        return {"stop": step == 1}

    result = tiny_pipeline(0, generator=seeded(), output_type="pt", callback_on_step_end=callback)
    assert torch.equal(result.images, outputs[1].images)
    assert (result.step, result.num_steps, result.num_tokens) == (2, 4, 8)


def test_interrupt_ends_the_call(tiny_pipeline):
    outputs = list(tiny_pipeline.stream(0, generator=seeded(), output_type="pt"))

    def callback(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2

    result = tiny_pipeline(0, generator=seeded(), output_type="pt", callback_on_step_end=callback)
    assert result.step == 3 and torch.equal(result.images, outputs[2].images)
    stream = tiny_pipeline.stream(0, generator=seeded(), output_type="pt")
    next(stream)
    tiny_pipeline._interrupt = True
    assert tiny_pipeline.interrupt and list(stream) == []
    assert tiny_pipeline(0).step == 4  # the next call runs again
