"""Schedulers of diffusers in the place of ours: flow-matching Euler is taken, others are refused at once."""

import json

import diffusers
import numpy as np
import pytest
import torch
from pipeline_helpers import picture, recorded, seeded

from dar_hf import DARPipeline, FlowMatchAdamsBashforthScheduler
from dar_hf.scheduling_dar import to_adams_bashforth

EULER = diffusers.FlowMatchEulerDiscreteScheduler
OTHERS = [
    diffusers.DDIMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
]


class Own(EULER):
    """May do anything."""


@pytest.fixture
def runs(tiny_pipeline, monkeypatch):
    """Names of the models that ran."""
    names = []
    for model in (tiny_pipeline.transformer, tiny_pipeline.tokenizer.denoiser, tiny_pipeline.tokenizer.patch_embed):
        model.register_forward_pre_hook(lambda module, args: names.append(type(module).__name__))
    return names


def test_its_steps_are_those_of_diffusers(tiny_tokenizer):
    """By diffusers' own scheduler, over the grid that its pipelines lay: 1, ..., 1/S and 0 at the end."""
    theirs, codes, noise = EULER(shift=3.0), torch.arange(16)[None], torch.randn(1, 3, 8, 8, generator=seeded())
    previews = list(tiny_tokenizer.decode_stream([codes], noise=noise, scheduler=theirs))
    theirs.set_timesteps(4, sigmas=np.linspace(1, 1 / 4, 4))
    conditions, sample = tiny_tokenizer.condition(codes), noise
    for step, preview in enumerate(previews):
        sigma, (start, stop) = theirs.sigmas[step], tiny_tokenizer.step_windows(4)[step]
        with torch.no_grad():
            to_noise = -tiny_tokenizer.velocity(sample, 1 - sigma, conditions[:, start:stop])
        std = tiny_tokenizer.config.data_std
        torch.testing.assert_close(preview.sample, (sample - sigma * to_noise) / std, atol=1e-5, rtol=1e-5)
        assert preview.timestep == pytest.approx(1 - theirs.timesteps[step].item() / 1000, abs=1e-6)
        sample = theirs.step(to_noise, theirs.timesteps[step], sample).prev_sample
        torch.testing.assert_close(preview.latents, sample, atol=1e-5, rtol=1e-5)


def pipelines(tiny_pipeline, way, tmp_path):
    """The pipeline with their scheduler, which came to it in one of all ways, and with ours that does the same."""
    parts = {name: part for name, part in tiny_pipeline.components.items() if name != "scheduler"}
    ours = DARPipeline(**parts, scheduler=FlowMatchAdamsBashforthScheduler(shift=3.0, solver_order=1))
    tiny_pipeline.save_pretrained(tmp_path)
    if way == "constructor":
        theirs = DARPipeline(**parts, scheduler=EULER(shift=3.0))
    elif way == "from_pretrained":
        theirs = DARPipeline.from_pretrained(tmp_path, scheduler=EULER(shift=3.0))
    elif way == "from_pipe":
        theirs = DARPipeline.from_pipe(tiny_pipeline, scheduler=EULER(shift=3.0))
    elif way == "assigned":
        theirs = DARPipeline.from_pretrained(tmp_path)
        theirs.scheduler = EULER.from_config(theirs.scheduler.config, shift=3.0)
    elif way == "registered":
        theirs = DARPipeline.from_pretrained(tmp_path)
        theirs.register_modules(scheduler=EULER(shift=3.0))
    elif way == "set_shift":
        theirs = DARPipeline(**parts, scheduler=FlowMatchAdamsBashforthScheduler())
        theirs.scheduler = EULER()
        theirs.scheduler.set_shift(3.0)
    else:
        EULER(shift=3.0).save_pretrained(tmp_path / "scheduler")
        index = json.loads((tmp_path / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    for pipeline in (theirs, ours):
        pipeline.set_progress_bar_config(disable=True)
    return theirs, ours


@pytest.mark.parametrize(
    "way", ["constructor", "from_pretrained", "from_pipe", "assigned", "registered", "set_shift", "folder"]
)
def test_it_is_our_euler_solver_however_it_came(tiny_pipeline, tmp_path, way):
    theirs, ours = pipelines(tiny_pipeline, way, tmp_path)
    for options in ({}, {"num_inference_steps": 6}, {"image": picture(), "strength": 0.5}, {"num_tokens": 8}):
        results = [recorded(pipe, [0, 3], generator=seeded(), **options) for pipe in (theirs, ours)]
        assert torch.equal(results[0][1].images, results[1][1].images)
        for one, two in zip(results[0][0], results[1][0], strict=True):
            assert one["timestep"] == two["timestep"] and torch.equal(one["preview"], two["preview"])
    whole = theirs([0, 3], generator=seeded(), output_type="pt").images
    *_, streamed = theirs.stream([0, 3], generator=seeded(), output_type="pt")
    assert torch.equal(streamed.images, whole)
    options = {"generator": seeded(), "output_type": "pt"}
    first = theirs.reconstruct(picture(), **options).images
    assert torch.equal(first, ours.reconstruct(picture(), **options | {"generator": seeded()}).images)
    theirs.save_pretrained(tmp_path / "saved")
    loaded = DARPipeline.from_pretrained(tmp_path / "saved").scheduler
    assert type(loaded) is FlowMatchAdamsBashforthScheduler
    assert (loaded.config.shift, loaded.config.solver_order) == (3.0, 1)


@pytest.mark.parametrize("scheduler_class", [*OTHERS, Own], ids=lambda scheduler: scheduler.__name__)
def test_others_are_refused_by_name_before_anything_runs(tiny_pipeline, tmp_path, runs, scheduler_class):
    scheduler = scheduler_class()
    expected = rf"a {scheduler_class.__name__} cannot .* take a FlowMatchAdamsBashforthScheduler, or"
    tokenizer, transformer = tiny_pipeline.tokenizer, tiny_pipeline.transformer
    with pytest.raises(ValueError, match=expected):
        DARPipeline(tokenizer, transformer, scheduler)
    with pytest.raises(ValueError, match=expected):
        tokenizer.decode(torch.arange(16)[None], scheduler=scheduler)
    tiny_pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=expected):
        DARPipeline.from_pretrained(tmp_path, scheduler=scheduler)
    tiny_pipeline.scheduler = scheduler
    for call in (tiny_pipeline, tiny_pipeline.stream):
        with pytest.raises(ValueError, match=expected):
            call(0)
        with pytest.raises(ValueError, match=expected):
            call(0, image=picture(), strength=0.5)
    with pytest.raises(ValueError, match=expected):
        tiny_pipeline.reconstruct(picture())
    assert not runs


@pytest.mark.parametrize(
    "options",
    [
        {"use_dynamic_shifting": True},
        {"invert_sigmas": True},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"stochastic_sampling": True},
    ],
    ids=str,
)
def test_options_that_lay_another_grid_are_refused(tiny_pipeline, options):
    (name, value) = next(iter(options.items()))
    tiny_pipeline.scheduler = EULER(**options)
    with pytest.raises(ValueError, match=f"with {name}={value} cannot be taken for"):
        tiny_pipeline(0)


def test_beta_sigmas_are_refused_too():
    scheduler = EULER()
    scheduler.register_to_config(use_beta_sigmas=True)  # the constructor wants scipy for it
    with pytest.raises(ValueError, match="with use_beta_sigmas=True cannot"):
        to_adams_bashforth(scheduler)


def test_ours_and_its_subclasses_stay_what_they_are():
    class Ours(FlowMatchAdamsBashforthScheduler):
        pass

    for scheduler in (Ours(), FlowMatchAdamsBashforthScheduler()):
        assert to_adams_bashforth(scheduler) is scheduler


@pytest.mark.parametrize("scheduler", [None, "euler", 3, EULER], ids=str)
def test_what_is_no_scheduler_is_refused(tiny_tokenizer, tiny_transformer, scheduler):
    with pytest.raises(ValueError, match=rf"a {type(scheduler).__name__} cannot"):
        DARPipeline(tiny_tokenizer, tiny_transformer, scheduler)


@pytest.mark.parametrize("name", ["tokenizer", "transformer"])
@pytest.mark.parametrize("make", [lambda: None, diffusers.DDIMScheduler], ids=["None", "another"])
def test_components_of_another_kind_are_refused(tiny_pipeline, name, make):
    component = make()
    with pytest.raises(ValueError, match=rf"{name} must be a DAR\w+, got {type(component).__name__}"):
        DARPipeline(**tiny_pipeline.components | {name: component})


@pytest.mark.parametrize("names", [["cat"], "cat", 3])
def test_names_must_be_given_by_class(tiny_pipeline, names):
    with pytest.raises(ValueError, match="id2label must be a dictionary of names by class id, got"):
        DARPipeline(**tiny_pipeline.components, id2label=names)


@pytest.mark.parametrize(
    "options",
    [{"shift": True}, {"solver_order": True}, {"solver_order": "2"}, {"variable_step": "no"}, {"variable_step": 1}],
    ids=str,
)
def test_options_of_the_wrong_type_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be"):
        FlowMatchAdamsBashforthScheduler(**options)
