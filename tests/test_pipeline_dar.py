import inspect

import numpy as np
import pytest
import torch
from pipeline_helpers import OUTPUT_TYPES, generated_codes, picture, pixels, recorded, same, seeded

from dar_hf import (
    DARForCausalLM,
    DARPipeline,
    DARPipelineOutput,
    DARTokenizer,
    FlowMatchAdamsBashforthScheduler,
    acceleration_dar,
)

# The contract


def test_signatures():
    assert list(inspect.signature(DARPipeline.__init__).parameters)[1:] == [
        "tokenizer",
        "transformer",
        "scheduler",
        "id2label",
        "text_tokenizer",
    ]
    parameters = dict(inspect.signature(DARPipeline.__call__).parameters)
    parameters.pop("self")
    assert list(parameters)[0] == "class_labels"
    assert all(parameters.pop(name).default is None for name in ("class_labels", "prompt", "negative_prompt"))
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
    assert set(tiny_pipeline.components) == {"tokenizer", "transformer", "scheduler", "text_tokenizer"}
    assert tiny_pipeline.text_tokenizer is None
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
    pil, array, tensor, codes, latents = (results[t].images for t in OUTPUT_TYPES)
    assert [image.size for image in pil] == [(8, 8)] * 2 and pil[0].mode == "RGB"
    assert array.shape == (2, 8, 8, 3) and 0 <= array.min() < array.max() <= 1
    assert tensor.shape == (2, 3, 8, 8) and 0 <= tensor.min() < tensor.max() <= 1
    assert codes.shape == (2, 16) and codes.dtype == torch.long
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype("uint8"))
    assert torch.equal(pixels(latents / 0.6), tensor)  # after the last step the solver's state is the image


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
    for name, value in [("guidance_scale", 1.0), ("temperature", 2.0), ("top_k", 1), ("top_p", 0.3)]:
        other, _ = recorded(tiny_pipeline, [0, 3], generator=seeded(), latents=latents, **options | {name: value})
        assert not torch.equal(other[-1]["codes"], steps[-1]["codes"]), name


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


def test_nested_labels_are_flattened(tiny_pipeline):
    """diffusers' common tests make a batch of labels [1] as [[1], [1]], and its DiT takes them."""
    nested = generated_codes(tiny_pipeline, [[1], [2, "ray"]], generator=seeded())
    assert torch.equal(nested, generated_codes(tiny_pipeline, [1, 2, 3], generator=seeded()))


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


def test_a_name_belongs_to_the_class_whose_first_name_it_is(tiny_tokenizer, tiny_transformer):
    # as in ImageNet: two cranes, a crayfish that is a crawfish too and a lobster that is called both, two maillots
    names = {
        0: "crane",
        1: "crane",
        2: "lobster, langouste, crawfish, crayfish",
        3: "crayfish, crawfish, maillot",
        4: "maillot",
    }
    pipeline = DARPipeline(tiny_tokenizer, tiny_transformer, FlowMatchAdamsBashforthScheduler(), id2label=names)
    assert pipeline.get_label_ids(["crayfish", "maillot", "lobster", "langouste", names[2]]) == [3, 4, 2, 2, 2]
    with pytest.raises(ValueError, match="'crane' is shared by the classes 0, 1: give the id"):
        pipeline("crane")
    with pytest.raises(ValueError, match="'crawfish' is shared by the classes 2, 3"):
        pipeline(["lobster", "crawfish"])
    assert pipeline.labels == {names[2]: 2, names[3]: 3, "maillot": 4, "lobster": 2, "crayfish": 3, "langouste": 2}
    with pytest.raises(ValueError, match="unknown class name 'lobsters'; known names: .*; similar: lobster"):
        pipeline("lobsters")


def test_num_images_per_prompt(tiny_pipeline):
    generators = [seeded(i) for i in range(6)]
    result = tiny_pipeline([0, 3], num_images_per_prompt=3, output_type="pt", generator=generators)
    repeated = tiny_pipeline([0, 0, 0, 3, 3, 3], output_type="pt", generator=[seeded(i) for i in range(6)])
    assert result.images.shape == (6, 3, 8, 8)
    assert torch.equal(result.images, repeated.images)
    assert len(tiny_pipeline("ray", num_images_per_prompt=2).images) == 2


@pytest.mark.parametrize(
    "option, values, others",
    [
        ("prefix_codes", torch.tensor([[3, 1], [4, 1]]), {}),
        ("layout_image", [picture(1), picture(2)], {"layout_tokens": 5}),
        ("image", [picture(1), picture(2)], {"strength": 0.5}),
    ],
)
def test_an_image_or_prefix_of_each_label_serves_all_images_of_the_label(tiny_pipeline, option, values, others):
    once, options = {option: values}, {"generator": seeded(), "output_type": "pt"} | others
    repeated = {option: [value for value in values for _ in range(3)]}
    if option == "prefix_codes":
        repeated = {option: torch.stack(repeated[option])}
    images = tiny_pipeline([0, 3], num_images_per_prompt=3, **once, **options).images
    options["generator"] = seeded()
    expected = tiny_pipeline([0, 3], num_images_per_prompt=3, **repeated, **options).images
    assert len(images) == 6 and torch.equal(images, expected)
    options["generator"] = seeded()
    assert torch.equal(tiny_pipeline([0, 0, 0, 3, 3, 3], **repeated, **options).images, expected)


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


def test_no_call_with_a_generator_touches_the_global_one(tiny_pipeline):
    calls = [{**options, "generator": seeded()} for options in CALLS.values()]
    calls.append({"generator": [seeded(0), seeded(1)]})
    calls.append({"generator": (seeded(0), seeded(1)), "image": picture(), "strength": 0.0})
    for options in calls:
        torch.manual_seed(3)
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        tiny_pipeline([1, 3], **options)
        list(tiny_pipeline.stream([1, 3], **options))
        tiny_pipeline.reconstruct([picture(), picture(1)], generator=options["generator"])
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)


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
        assert (
            len(outputs) == len({output.num_tokens for output in outputs}) or options.get("num_inference_steps") == 6
        )
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


@pytest.mark.parametrize("output_type", ["np", "pt", "codes", "latent"])
def test_what_a_consumer_does_to_the_pictures_does_not_reach_the_stream(tiny_pipeline, output_type):
    expected = tiny_pipeline(0, generator=seeded(), output_type=output_type).images
    for output in tiny_pipeline.stream(0, generator=seeded(), output_type=output_type):
        images = np.array(output.images)
        output.images[...] = 0
    assert same(images, expected)


@pytest.mark.skipif(acceleration_dar._LINEAR is None, reason="this torch has no oneDNN")
@pytest.mark.parametrize("failing", ["callback", "denoiser"])
def test_an_error_leaves_nothing_packed(tiny_pipeline, monkeypatch, failing):
    monkeypatch.setattr(acceleration_dar, "PACK_FROM", 0)
    seen = []

    def fail(*_):
        seen.append(len(acceleration_dar._PACKED) > 0)
        raise RuntimeError("out of patience")

    if failing == "denoiser":
        tiny_pipeline.tokenizer.denoiser.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of patience") as caught:
        tiny_pipeline(0, callback_on_step_end=fail if failing == "callback" else None)
    # also while somebody still holds the error, as notebooks do
    assert caught.value.__traceback__ and seen == [True]
    assert not acceleration_dar._PACKED


@pytest.mark.parametrize(
    "options", [{"tokens_per_group": 2}, {"tokens_per_group": 6}, {"condition_scope": "prefix"}, {"num_groups": 8}]
)
def test_other_groups(make_tokenizer, tiny_transformer, options):
    tokenizer = make_tokenizer(**options)
    pipeline = DARPipeline(tokenizer, tiny_transformer, FlowMatchAdamsBashforthScheduler())
    pipeline.set_progress_bar_config(disable=True)
    forwards = []
    tiny_transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    codes = generated_codes(pipeline, [0, 1, 2], generator=seeded())
    forwards.clear()
    windows = tokenizer.step_windows(tokenizer.config.num_inference_steps)
    for i, output in enumerate(pipeline.stream([0, 1, 2], generator=seeded(), output_type="pt")):
        assert output.num_tokens == len(forwards) == windows[i][1]
    decoded = tokenizer.decode(codes, generator=seeded()).sample
    assert torch.equal(output.images, pixels(decoded))


@pytest.mark.parametrize("num_steps, first", [(1, 4), (3, 4), (6, 4), (16, 4)])
def test_any_number_of_steps_shows_the_first_picture_after_the_first_group(tiny_pipeline, num_steps, first):
    forwards = []
    tiny_pipeline.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    seen = []
    for output in tiny_pipeline.stream(0, num_inference_steps=num_steps):
        seen.append(len(forwards))
        assert len(forwards) == output.num_tokens
    windows = tiny_pipeline.tokenizer.step_windows(num_steps)
    assert seen == [stop for _, stop in windows] and seen[0] == first


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"layout_image": picture(), "layout_tokens": 16}, [0, 0, 0, 0]),
        ({"layout_image": picture(), "layout_tokens": 9}, [0, 0, 3, 7]),
        ({"prefix_codes": torch.zeros(1, 8, dtype=torch.long)}, [0, 0, 4, 8]),
        ({"image": picture(), "strength": 0.5}, [4, 8]),
        ({"image": picture(), "strength": 0.0}, [0, 0, 0, 0]),
    ],
)
def test_groups_within_the_prefix_are_decoded_without_generating(tiny_pipeline, options, expected):
    forwards = []
    tiny_pipeline.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert [len(forwards) for _ in tiny_pipeline.stream(0, **options)] == expected


@pytest.mark.parametrize(
    "options, generated", [({"num_tokens": 15}, 12), ({"num_inference_steps": 2}, 12), ({"num_inference_steps": 1}, 4)]
)
def test_codes_that_complete_no_step_are_not_generated(tiny_pipeline, options, generated):
    forwards = []
    tiny_pipeline.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    expected = list(tiny_pipeline.stream(0, generator=seeded(), output_type="pt", **options))
    assert len(forwards) == expected[-1].num_tokens == generated
    assert tiny_pipeline.num_timesteps == len(expected)
    forwards.clear()
    codes = tiny_pipeline(0, generator=seeded(), output_type="codes", **options).images
    assert len(forwards) == codes.shape[1] == options.get("num_tokens", 16)


def test_progress_bar_counts_the_steps(tiny_pipeline, monkeypatch):
    totals, updates = [], []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def update(self, n=1):
            updates.append(n)

    monkeypatch.setattr(tiny_pipeline, "progress_bar", lambda total: totals.append(total) or Bar())
    tiny_pipeline(0, num_inference_steps=6)
    tiny_pipeline(0, image=picture(), strength=0.5)
    tiny_pipeline.reconstruct(picture())
    assert totals == [6, 2, 4] and len(updates) == 12


def test_progress_bar_can_be_configured(tiny_pipeline, capsys):
    tiny_pipeline.set_progress_bar_config(disable=False, desc="digits")
    tiny_pipeline(0)
    assert "digits: 100%" in capsys.readouterr().err
    tiny_pipeline.set_progress_bar_config(disable=True)
    tiny_pipeline(0)
    assert capsys.readouterr().err == ""


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


# Sizes and channels


def test_not_square(make_tokenizer, tiny_transformer):
    pipeline = DARPipeline(make_tokenizer(sample_size=(8, 12)), tiny_transformer, FlowMatchAdamsBashforthScheduler())
    assert pipeline(0).images[0].size == (12, 8)
    assert pipeline(0, image=picture(size=(8, 12)), strength=0.5, output_type="pt").images.shape == (1, 3, 8, 12)


def test_one_channel(make_tokenizer, tiny_transformer):
    pipeline = DARPipeline(make_tokenizer(in_channels=1), tiny_transformer, FlowMatchAdamsBashforthScheduler())
    assert pipeline(0).images[0].mode == "L"
    assert pipeline(0, layout_image=picture(), layout_tokens=4, output_type="pt").images.shape == (1, 1, 8, 8)


def test_a_palette_is_looked_up_before_resizing(tiny_pipeline):
    image = picture(size=(16, 16)).quantize(8)
    plain = tiny_pipeline.reconstruct(image.convert("RGB"), generator=seeded())
    assert same(tiny_pipeline.reconstruct(image, generator=seeded()).images, plain.images)
