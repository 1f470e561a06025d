import inspect

import numpy as np
import PIL.Image
import pytest
import torch

from dar_hf import DARForCausalLM, DARPipeline, DARPipelineOutput, DARTokenizer, FlowMatchAdamsBashforthScheduler

OUTPUT_TYPES = ["pil", "np", "pt", "codes"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(sample):
    """Images in [-1, 1] as the pipeline returns them."""
    return (sample / 2 + 0.5).clamp(0, 1)


def picture(seed=0, size=(8, 8)):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def tensor_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def same(one, two):
    """Equality of images of any output type."""
    if isinstance(one, list):
        return len(one) == len(two) and all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
    return np.array_equal(np.asarray(one), np.asarray(two))


def recorded(pipeline, *labels, **options):
    """Raw tensors of every step, as a callback sees them, and the result."""
    steps = []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline
        steps.append({"step": step, "timestep": timestep} | {k: v.clone() for k, v in tensors.items()})

    result = pipeline(*labels, output_type="pt", callback_on_step_end=callback, **options)
    return steps, result


def generated_codes(pipeline, labels, **options):
    return pipeline(labels, output_type="codes", **options).images


# The contract


def test_signatures():
    assert list(inspect.signature(DARPipeline.__init__).parameters)[1:] == [
        "tokenizer",
        "transformer",
        "scheduler",
        "id2label",
    ]
    parameters = dict(inspect.signature(DARPipeline.__call__).parameters)
    parameters.pop("self")
    assert parameters.pop("class_labels").default is inspect.Parameter.empty
    assert {name: p.default for name, p in parameters.items()} == {
        "guidance_scale": None,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "num_inference_steps": None,
        "num_tokens": None,
        "num_images_per_prompt": 1,
        "prefix_codes": None,
        "layout_image": None,
        "layout_tokens": None,
        "image": None,
        "strength": None,
        "generator": None,
        "latents": None,
        "output_type": "pil",
        "return_dict": True,
        "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": None,
    }
    assert all(callable(getattr(DARPipeline, name)) for name in ("from_pretrained", "save_pretrained", "push_to_hub"))


def test_components(tiny_pipeline):
    assert set(tiny_pipeline.components) == {"tokenizer", "transformer", "scheduler"}
    assert isinstance(tiny_pipeline.tokenizer, DARTokenizer)
    assert isinstance(tiny_pipeline.transformer, DARForCausalLM)
    assert isinstance(tiny_pipeline.scheduler, FlowMatchAdamsBashforthScheduler)
    assert DARPipeline.model_cpu_offload_seq == "transformer->tokenizer"


# Outputs


def test_output_types(tiny_pipeline):
    results = {t: tiny_pipeline([0, 1], output_type=t, generator=seeded()) for t in OUTPUT_TYPES}
    for result in results.values():
        assert isinstance(result, DARPipelineOutput)
        assert (result.step, result.num_steps, result.num_tokens) == (4, 4, 16)
    pil, array, tensor, codes = (results[t].images for t in OUTPUT_TYPES)
    assert [image.size for image in pil] == [(8, 8)] * 2 and pil[0].mode == "RGB"
    assert array.shape == (2, 8, 8, 3) and 0 <= array.min() < array.max() <= 1
    assert tensor.shape == (2, 3, 8, 8) and 0 <= tensor.min() < tensor.max() <= 1
    assert codes.shape == (2, 16) and codes.dtype == torch.long
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype("uint8"))


def test_image_is_the_decoded_codes(tiny_pipeline):
    codes = generated_codes(tiny_pipeline, [0, 3], generator=seeded())
    result = tiny_pipeline([0, 3], output_type="pt", generator=seeded())
    decoded = tiny_pipeline.tokenizer.decode(codes, generator=seeded()).sample  # the noise is drawn first
    assert torch.equal(result.images, pixels(decoded))


def test_codes_come_from_the_transformer(tiny_pipeline):
    latents = torch.randn(2, 3, 8, 8, generator=seeded(9))
    options = {"guidance_scale": (1.1, 8.0), "temperature": 0.7, "top_k": 9, "top_p": 0.9}
    steps, _ = recorded(tiny_pipeline, [0, 3], generator=seeded(), latents=latents, **options)
    stream = tiny_pipeline.transformer.stream_codes([0, 3], generator=seeded(), **options)
    assert torch.equal(steps[-1]["codes"], torch.cat(list(stream), dim=1))
    for name, value in [("guidance_scale", 1.0), ("temperature", 2.0), ("top_k", 2), ("top_p", 0.3)]:
        other, _ = recorded(tiny_pipeline, [0, 3], generator=seeded(), latents=latents, **options | {name: value})
        assert not torch.equal(other[-1]["codes"], steps[-1]["codes"])


def test_return_dict(tiny_pipeline):
    result = tiny_pipeline(0, output_type="pt", generator=seeded(), return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1
    assert torch.equal(result[0], tiny_pipeline(0, output_type="pt", generator=seeded()).images)


def test_own_scheduler_is_used(tiny_tokenizer, tiny_transformer):
    results = []
    for order in (1, 2):
        scheduler = FlowMatchAdamsBashforthScheduler(solver_order=order)
        pipeline = DARPipeline(tiny_tokenizer, tiny_transformer, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        codes = generated_codes(pipeline, 0, generator=seeded())
        decoded = tiny_tokenizer.decode(codes, generator=seeded(), scheduler=scheduler).sample
        results.append(pipeline(0, output_type="pt", generator=seeded()).images)
        assert torch.equal(results[-1], pixels(decoded))
    assert not torch.equal(*results)


# Labels


def test_names_are_labels(tiny_pipeline):
    assert tiny_pipeline.get_label_ids("shark") == [2]
    assert tiny_pipeline.get_label_ids(["Tinca tinca", "tench", "cock"]) == [0, 0, 4]  # synonyms are one class
    by_id = generated_codes(tiny_pipeline, [0, 2, 1], generator=seeded())
    by_name = generated_codes(tiny_pipeline, ["Tinca tinca", "shark", "goldfish"], generator=seeded())
    mixed = generated_codes(tiny_pipeline, ["tench", 2, "goldfish"], generator=seeded())
    assert torch.equal(by_id, by_name) and torch.equal(by_id, mixed)
    one = generated_codes(tiny_pipeline, "shark", generator=seeded())
    assert torch.equal(one, generated_codes(tiny_pipeline, 2, generator=seeded()))
    assert not torch.equal(one, generated_codes(tiny_pipeline, 3, generator=seeded()))


def test_num_images_per_prompt(tiny_pipeline):
    generators = [seeded(i) for i in range(6)]
    result = tiny_pipeline([0, 3], num_images_per_prompt=3, output_type="pt", generator=generators)
    repeated = tiny_pipeline([0, 0, 0, 3, 3, 3], output_type="pt", generator=[seeded(i) for i in range(6)])
    assert result.images.shape == (6, 3, 8, 8)
    assert torch.equal(result.images, repeated.images)
    assert len(tiny_pipeline("ray", num_images_per_prompt=2).images) == 2


# Guidance


def test_guidance_defaults_to_that_of_the_transformer(tiny_pipeline):
    plain = generated_codes(tiny_pipeline, [0, 3], generator=seeded())
    tiny_pipeline.transformer.generation_config.guidance_scale = (1.1, 8.0)
    default = generated_codes(tiny_pipeline, [0, 3], generator=seeded())
    assert list(tiny_pipeline.guidance_scale) == [1.1, 8.0]
    assert torch.equal(default, generated_codes(tiny_pipeline, [0, 3], generator=seeded(), guidance_scale=(1.1, 8.0)))
    assert torch.equal(plain, generated_codes(tiny_pipeline, [0, 3], generator=seeded(), guidance_scale=1.0))
    assert not torch.equal(plain, default)


# Randomness


def test_same_generator_gives_the_same_image(tiny_pipeline):
    state = torch.get_rng_state()
    one, two, other = (tiny_pipeline([0, 1], output_type="pt", generator=seeded(s)).images for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_without_a_generator_images_differ(tiny_pipeline):
    one, two = (tiny_pipeline(0, output_type="pt").images for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("guidance", [None, (1.1, 8.0)])
def test_image_of_a_batch_equals_the_image_alone(tiny_pipeline, guidance):
    options = {"guidance_scale": guidance, "output_type": "pt"}
    batch, batch_result = recorded(
        tiny_pipeline, [0, 3, 3], generator=[seeded(i) for i in range(3)], guidance_scale=guidance
    )
    for i, label in enumerate([0, 3, 3]):
        alone, result = recorded(tiny_pipeline, label, generator=seeded(i), guidance_scale=guidance)
        assert torch.equal(batch[-1]["codes"][i : i + 1], alone[-1]["codes"])
        assert torch.allclose(batch_result.images[i : i + 1], result.images, atol=1e-5)
        listed = tiny_pipeline([label], generator=[seeded(i)], **options).images
        assert torch.equal(listed, result.images)
    assert not torch.equal(batch[-1]["codes"][1], batch[-1]["codes"][2])


def test_latents_are_the_start_noise(tiny_pipeline):
    latents = torch.randn(2, 3, 8, 8, generator=seeded(7))
    steps, result = recorded(tiny_pipeline, [0, 3], generator=seeded(), latents=latents)
    expected = tiny_pipeline.tokenizer.decode(steps[-1]["codes"], noise=latents).sample
    assert torch.equal(result.images, pixels(expected))
    assert not torch.equal(result.images, tiny_pipeline([0, 3], generator=seeded(), output_type="pt").images)
    assert torch.equal(latents, torch.randn(2, 3, 8, 8, generator=seeded(7)))


# Steps and tokens


@pytest.mark.parametrize("num_steps", [1, 2, 6, 8])
def test_num_inference_steps(tiny_pipeline, num_steps):
    codes = generated_codes(tiny_pipeline, 0, generator=seeded())
    result = tiny_pipeline(0, generator=seeded(), num_inference_steps=num_steps, output_type="pt")
    decoded = tiny_pipeline.tokenizer.decode(codes, generator=seeded(), num_inference_steps=num_steps).sample
    assert torch.equal(result.images, pixels(decoded))
    assert result.num_steps == result.step == tiny_pipeline.num_timesteps == num_steps


def test_num_tokens_gives_a_preview(tiny_pipeline):
    codes = generated_codes(tiny_pipeline, [0, 3], generator=seeded())
    for count in (4, 8, 11):
        few = generated_codes(tiny_pipeline, [0, 3], generator=seeded(), num_tokens=count)
        assert torch.equal(few, codes[:, :count])
        result = tiny_pipeline([0, 3], generator=seeded(), num_tokens=count, output_type="pt")
        decoded = tiny_pipeline.tokenizer.decode(codes[:, :count], generator=seeded()).sample
        assert torch.equal(result.images, pixels(decoded))
        assert (result.step, result.num_steps, result.num_tokens) == (count // 4, 4, count // 4 * 4)


# The stream

CALLS = {
    "plain": {},
    "guided": {"guidance_scale": (1.1, 8.0), "temperature": 0.8, "top_k": 8, "top_p": 0.9},
    "six steps": {"num_inference_steps": 6},
    "two steps": {"num_inference_steps": 2},
    "few tokens": {"num_tokens": 8},
    "several": {"num_images_per_prompt": 2},
    "prefix": {"prefix_codes": torch.arange(6)[None]},
    "layout": {"layout_image": picture(), "layout_tokens": 4},
    "image": {"image": picture(), "strength": 0.5},
    "latents": {"latents": torch.ones(2, 3, 8, 8)},
}


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS.keys())
def test_last_of_the_stream_is_the_call(tiny_pipeline, options, output_type):
    options = options | {"output_type": output_type}
    outputs = list(tiny_pipeline.stream([1, "ray"], generator=seeded(), **options))
    result = tiny_pipeline([1, "ray"], generator=seeded(), **options)
    assert all(isinstance(output, DARPipelineOutput) for output in outputs)
    assert same(outputs[-1].images, result.images)
    last = outputs[-1]
    assert (last.step, last.num_steps, last.num_tokens) == (result.step, result.num_steps, result.num_tokens)
    if output_type == "codes":
        assert all(torch.equal(output.images, last.images[:, : output.num_tokens]) for output in outputs)
        assert last.num_tokens == options.get("num_tokens", 16) == last.images.shape[1]
    else:
        steps = [output.step for output in outputs]
        assert steps == list(range(steps[0], result.step + 1)) and len(steps) == min(
            result.step, tiny_pipeline.num_timesteps
        )
        assert not same(outputs[0].images, last.images)


def test_stream_gives_the_previews_of_the_prefixes(tiny_pipeline):
    codes = generated_codes(tiny_pipeline, [0, 3], generator=seeded())
    for k, output in enumerate(tiny_pipeline.stream([0, 3], generator=seeded(), output_type="pt"), start=1):
        decoded = tiny_pipeline.tokenizer.decode(codes[:, : 4 * k], generator=seeded()).sample
        assert torch.equal(output.images, pixels(decoded))
        assert (output.step, output.num_steps, output.num_tokens) == (k, 4, 4 * k)


def test_stream_is_lazy(tiny_pipeline):
    forwards = []
    tiny_pipeline.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    outputs = tiny_pipeline.stream(0)
    for k in (1, 2, 3, 4):
        next(outputs)
        assert len(forwards) == 4 * k  # a picture as soon as the codes of its group are there
    with pytest.raises(StopIteration):
        next(outputs)


@pytest.mark.parametrize("tokens_per_group", [2, 6])
def test_other_group_sizes(make_tokenizer, tiny_transformer, tokens_per_group):
    tokenizer = make_tokenizer(tokens_per_group=tokens_per_group)
    pipeline = DARPipeline(tokenizer, tiny_transformer, FlowMatchAdamsBashforthScheduler())
    pipeline.set_progress_bar_config(disable=True)
    forwards = []
    tiny_transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    codes = generated_codes(pipeline, [0, 1, 2], generator=seeded())
    forwards.clear()
    windows = tokenizer.step_windows(4)
    for i, output in enumerate(pipeline.stream([0, 1, 2], generator=seeded(), output_type="pt")):
        assert output.num_tokens == len(forwards) == windows[i][1]
    decoded = tokenizer.decode(codes, generator=seeded()).sample
    assert torch.equal(output.images, pixels(decoded))


def test_two_streams_do_not_disturb_each_other(tiny_pipeline):
    calls = [
        {"class_labels": [0, 1], "generator": 1, "guidance_scale": 3.0, "num_inference_steps": 4},
        {"class_labels": [4], "generator": 2, "guidance_scale": 1.0, "num_inference_steps": 6},
    ]

    def streams():
        return [tiny_pipeline.stream(**c | {"generator": seeded(c["generator"])}, output_type="pt") for c in calls]

    alone = [[output.images for output in stream] for stream in streams()]
    interleaved, open_streams = [[], []], streams()
    for turn in (0, 1, 1, 0, 1, 0, 1, 1, 0, 1):
        interleaved[turn].append(next(open_streams[turn]).images)
    for one, two in zip(alone, interleaved, strict=True):
        assert len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


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
    for given in (image, [image], array, array[None], tensor_of(image) / 2 + 0.5, tensor_of(image)):
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
    assert [step["step"] for step in steps] == list(range(start, 4)) and result.num_steps == 4
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


# Files


def test_save_and_load(tiny_pipeline, tmp_path):
    tiny_pipeline.transformer.generation_config.guidance_scale = (1.1, 8.0)
    expected = tiny_pipeline([0, 3], generator=seeded(), output_type="pt").images
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DARPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert list(loaded.transformer.generation_config.guidance_scale) == [1.1, 8.0]
    assert torch.equal(loaded(["tench", "ray"], generator=seeded(), output_type="pt").images, expected)
    assert loaded.get_label_ids(["Tinca tinca", "cock"]) == [0, 4]
    assert type(loaded.scheduler) is FlowMatchAdamsBashforthScheduler


def test_scheduler_is_saved_with_the_pipeline(tiny_tokenizer, tiny_transformer, tmp_path):
    scheduler = FlowMatchAdamsBashforthScheduler(shift=3.0, variable_step=True)
    DARPipeline(tiny_tokenizer, tiny_transformer, scheduler).save_pretrained(tmp_path)
    loaded = DARPipeline.from_pretrained(tmp_path).scheduler.config
    assert (loaded.shift, loaded.variable_step) == (3.0, True)


def test_labels_are_optional(tiny_tokenizer, tiny_transformer, tmp_path):
    pipeline = DARPipeline(tiny_tokenizer, tiny_transformer, FlowMatchAdamsBashforthScheduler())
    pipeline.save_pretrained(tmp_path)
    loaded = DARPipeline.from_pretrained(tmp_path)
    assert len(loaded(1).images) == 1
    with pytest.raises(ValueError, match="the pipeline has no id2label"):
        loaded("cat")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_pipeline, dtype):
    pipeline = tiny_pipeline.to(dtype)
    images = pipeline([0, 3], generator=seeded(), output_type="pt", guidance_scale=2.0).images
    assert images.dtype == torch.float32 and images.isfinite().all()
    array = pipeline([0, 3], generator=seeded(), output_type="np", guidance_scale=2.0).images
    assert np.array_equal(array, images.permute(0, 2, 3, 1).numpy())
    codes = generated_codes(pipeline, 0, layout_image=picture(), layout_tokens=16)
    assert codes.shape == (1, 16)


def test_not_square(make_tokenizer, tiny_transformer):
    pipeline = DARPipeline(make_tokenizer(sample_size=(8, 12)), tiny_transformer, FlowMatchAdamsBashforthScheduler())
    assert pipeline(0).images[0].size == (12, 8)
    assert pipeline(0, image=picture(size=(8, 12)), strength=0.5, output_type="pt").images.shape == (1, 3, 8, 12)


def test_one_channel(make_tokenizer, tiny_transformer):
    pipeline = DARPipeline(make_tokenizer(in_channels=1), tiny_transformer, FlowMatchAdamsBashforthScheduler())
    assert pipeline(0).images[0].mode == "L"
    assert pipeline(0, layout_image=picture(), layout_tokens=4, output_type="pt").images.shape == (1, 1, 8, 8)


# Bad input

PREFIX = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (5, {}, r"class label must be an integer in \[0, 5\)"),
        (-1, {}, "class label must be an integer"),
        (True, {}, "class label must be an integer"),
        ([1.0], {}, "class label must be an integer"),
        ("whale", {}, "unknown class name 'whale'; known names: goldfish, shark"),
        (["shark", "whale"], {}, "unknown class name 'whale'"),
        ([], {}, "class_labels is empty"),
        (0, {"guidance_scale": (1.0, 2.0, 3.0)}, "a number or a pair"),
        (0, {"guidance_scale": float("nan")}, "finite numbers >= 0"),
        (0, {"guidance_scale": -1.0}, "finite numbers >= 0"),
        (0, {"temperature": -1.0}, "temperature must be a finite number >= 0"),
        (0, {"temperature": float("inf")}, "temperature must be a finite number >= 0"),
        (0, {"top_k": -1}, "top_k must be an integer >= 0"),
        (0, {"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        (0, {"num_inference_steps": 0}, "num_inference_steps must be a positive integer"),
        (0, {"num_inference_steps": -1}, "num_inference_steps must be a positive integer"),
        (0, {"num_inference_steps": 2.5}, "num_inference_steps must be a positive integer"),
        (0, {"num_tokens": 0}, "num_tokens must be a positive integer"),
        (0, {"num_tokens": 17}, r"num_tokens must lie in \[1, 16\]"),
        (0, {"num_tokens": 3}, "num_tokens=3 completes no step: the first one needs 4"),
        (0, {"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive integer"),
        (0, {"prefix_codes": PREFIX.float()}, "prefix_codes must be integers of shape"),
        (0, {"prefix_codes": PREFIX[0]}, "prefix_codes must be integers of shape"),
        ([0] * 3, {"prefix_codes": PREFIX.expand(2, -1)}, "prefix_codes must be integers of shape"),
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
        (0, {"layout_image": "cat.png", "layout_tokens": 4}, "must be PIL images, or arrays, or tensors, got str"),
        (0, {"image": picture()}, "image and strength go together"),
        (0, {"strength": 0.5}, "image and strength go together"),
        (0, {"image": picture(), "strength": 1.1}, r"strength must lie in \[0, 1\]"),
        (0, {"image": picture(), "strength": float("nan")}, r"strength must lie in \[0, 1\]"),
        (0, {"image": picture(), "strength": 0.5, "latents": torch.zeros(1, 3, 8, 8)}, "image and latents exclude"),
        (0, {"latents": torch.zeros(1, 3, 4, 4)}, r"latents must be finite and of shape \(1, 3, 8, 8\)"),
        (0, {"latents": torch.full((1, 3, 8, 8), float("nan"))}, "latents must be finite"),
        ([0, 1], {"generator": [seeded()]}, "got 1 generators for a batch of 2"),
        (0, {"output_type": "jpeg"}, "output_type must be one of pil, np, pt, codes"),
        (0, {"callback_on_step_end_tensor_inputs": ["noise"]}, "must be among"),
    ],
)
@pytest.mark.parametrize("way", ["call", "stream"])
def test_bad_input(tiny_pipeline, labels, options, message, way):
    forwards = []
    tiny_pipeline.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(ValueError, match=message):
        # refused at once, not at the first picture
        (tiny_pipeline if way == "call" else tiny_pipeline.stream)(labels, **options)
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
