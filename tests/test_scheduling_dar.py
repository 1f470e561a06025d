import inspect

import pytest
import torch

from dar_hf import FlowMatchAdamsBashforthScheduler

SAMPLE = torch.linspace(-2, 2, 24).reshape(2, 3, 2, 2)


def velocity_at(time, slope=3.0):
    """A velocity field linear in time and different at every place."""
    return SAMPLE.cos() + slope * float(time) * SAMPLE.sin()


def integral(start, end, slope=3.0):
    return (end - start) * SAMPLE.cos() + slope * (end**2 - start**2) / 2 * SAMPLE.sin()


def prepared(num_steps, **options):
    scheduler = FlowMatchAdamsBashforthScheduler(**options)
    scheduler.set_timesteps(num_steps)
    return scheduler


def edges(scheduler):
    return [*scheduler.timesteps.tolist(), 1.0]


def test_signature():
    parameters = inspect.signature(FlowMatchAdamsBashforthScheduler.__init__).parameters
    assert {name: p.default for name, p in parameters.items() if name != "self"} == {
        "shift": 2.0,
        "solver_order": 2,
        "variable_step": False,
    }
    assert FlowMatchAdamsBashforthScheduler.order == 1  # one evaluation of the model a step


def test_grid_of_eight_steps_is_that_of_the_paper():
    scheduler = prepared(8)
    expected = torch.tensor([0, 0.0667, 0.1429, 0.2308, 0.3333, 0.4545, 0.6, 0.7778])
    assert torch.allclose(scheduler.timesteps, expected, atol=5e-5)
    assert scheduler.timesteps.dtype == torch.float32
    assert len(scheduler) == scheduler.num_inference_steps == 8


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 5, 12])
def test_grid_follows_the_shift_formula(shift, num_steps):
    expected = [i / num_steps / (i / num_steps + shift * (1 - i / num_steps)) for i in range(num_steps)]
    assert torch.allclose(prepared(num_steps, shift=shift).timesteps, torch.tensor(expected), atol=1e-6)


def test_adams_bashforth_has_fixed_weights_after_an_euler_step():
    scheduler = prepared(4)
    times = edges(scheduler)
    torch.manual_seed(0)
    velocities, sample = torch.randn(4, *SAMPLE.shape), SAMPLE
    for i, velocity in enumerate(velocities):
        direction = velocity if i == 0 else 1.5 * velocity - 0.5 * velocities[i - 1]
        expected = sample + (times[i + 1] - times[i]) * direction
        sample = scheduler.step(velocity, scheduler.timesteps[i], sample).prev_sample
        assert torch.allclose(sample, expected, atol=1e-5)


def test_order_one_is_euler():
    scheduler = prepared(4, solver_order=1)
    times, sample = edges(scheduler), SAMPLE
    for i in range(4):
        velocity = velocity_at(times[i])
        expected = sample + (times[i + 1] - times[i]) * velocity
        sample = scheduler.step(velocity, times[i], sample).prev_sample
        assert torch.allclose(sample, expected, atol=1e-6)


@pytest.mark.parametrize(
    "options, exact",
    [({"variable_step": True}, True), ({}, False), ({"solver_order": 1}, False)],
)
def test_variable_step_integrates_a_linear_velocity_exactly(options, exact):
    scheduler = prepared(6, **options)
    times = edges(scheduler)
    scheduler.step(velocity_at(times[0]), times[0], SAMPLE)  # the first step is Euler's and is not exact
    for i in range(1, 6):
        moved = scheduler.step(velocity_at(times[i]), times[i], SAMPLE).prev_sample - SAMPLE
        error = (moved - integral(times[i], times[i + 1])).abs().max()
        assert (error < 1e-5) == exact


@pytest.mark.parametrize("options", [{}, {"variable_step": True}, {"solver_order": 1}])
def test_preview_is_the_step_taken_to_the_end(options):
    scheduler = prepared(4, **options)
    times = edges(scheduler)
    for i in range(3):
        previous, velocity = velocity_at(times[i - 1]), velocity_at(times[i])
        step = 1.0 - times[i]
        if i == 0 or options.get("solver_order") == 1:
            weight = 0.0
        else:
            weight = step / (2 * (times[i] - times[i - 1])) if options.get("variable_step") else 0.5
        expected = SAMPLE + step * (velocity + weight * (velocity - previous))
        assert torch.allclose(scheduler.preview(velocity, times[i], SAMPLE), expected, atol=1e-5)
        scheduler.step(velocity, times[i], SAMPLE)


@pytest.mark.parametrize("variable_step", [False, True])
def test_preview_changes_no_state(variable_step):
    with_previews, without = (prepared(4, variable_step=variable_step) for _ in range(2))
    first = second = SAMPLE
    for time in with_previews.timesteps:
        velocity = velocity_at(time)
        for _ in range(2):
            with_previews.preview(-7 * velocity, time, first)
        first = with_previews.step(velocity, time, first).prev_sample
        second = without.step(velocity, time, second).prev_sample
        assert torch.equal(first, second)


@pytest.mark.parametrize("options", [{}, {"variable_step": True}, {"solver_order": 1}])
def test_last_preview_is_the_last_sample(options):
    scheduler, sample = prepared(5, **options), SAMPLE
    for time in scheduler.timesteps:
        preview = scheduler.preview(velocity_at(time), time, sample)
        before, sample = sample, scheduler.step(velocity_at(time), time, sample).prev_sample
        assert torch.equal(preview, sample) == (time == scheduler.timesteps[-1])
    assert not torch.equal(before, sample)


def test_pred_original_sample_is_the_jump_estimate():
    scheduler = prepared(4)
    for time in edges(scheduler)[:-1]:  # without the solver's weights, also after the first step
        result = scheduler.step(velocity_at(time), time, SAMPLE)
        assert torch.allclose(result.pred_original_sample, SAMPLE + (1 - time) * velocity_at(time), atol=1e-6)


def test_step_returns_previous_and_original_sample():
    first, second = prepared(3), prepared(3)
    output = first.step(SAMPLE.sin(), 0.0, SAMPLE)
    plain = second.step(SAMPLE.sin(), 0.0, SAMPLE, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 2
    assert torch.equal(plain[0], output.prev_sample)
    assert torch.equal(plain[1], output.pred_original_sample)
    assert not torch.equal(plain[0], plain[1])


def test_set_timesteps_forgets_the_history():
    scheduler = prepared(4)
    scheduler.step(SAMPLE.cos(), 0.0, SAMPLE)
    scheduler.set_timesteps(5)
    times = edges(scheduler)
    result = scheduler.step(SAMPLE.sin(), times[1], SAMPLE).prev_sample
    assert torch.allclose(result, SAMPLE + (times[2] - times[1]) * SAMPLE.sin(), atol=1e-6)


@pytest.mark.parametrize("before", [None, 0, 2, 3])
def test_a_step_that_does_not_follow_the_last_is_an_euler_step(before):
    scheduler = prepared(4)
    times = edges(scheduler)
    if before is not None:
        scheduler.step(SAMPLE.cos(), times[before], SAMPLE)
    result = scheduler.step(SAMPLE.sin(), times[2], SAMPLE).prev_sample
    assert torch.allclose(result, SAMPLE + (times[3] - times[2]) * SAMPLE.sin(), atol=1e-6)


def test_steps_are_computed_in_float32():
    scheduler, reference = prepared(4), prepared(4)
    for time in scheduler.timesteps[:2]:
        velocity, sample = velocity_at(time).bfloat16(), SAMPLE.bfloat16()
        low = scheduler.step(velocity, time, sample)
        high = reference.step(velocity.float(), time, sample.float())
        assert low.prev_sample.dtype == low.pred_original_sample.dtype == torch.float32
        assert torch.equal(low.prev_sample, high.prev_sample)


def test_add_noise_mixes_by_time():
    clean, noise = SAMPLE, SAMPLE.sin()
    scheduler = FlowMatchAdamsBashforthScheduler()
    mixed = scheduler.add_noise(clean, noise, torch.tensor([0.25, 1.0]))
    assert torch.allclose(mixed[0], 0.25 * clean[0] + 0.75 * noise[0])
    assert torch.equal(mixed[1], clean[1])
    assert torch.allclose(scheduler.add_noise(clean, noise, 0.4), 0.4 * clean + 0.6 * noise)
    assert torch.equal(scheduler.add_noise(clean, noise, 0.0), noise)


def test_code_for_any_scheduler_of_diffusers():
    scheduler = prepared(4, solver_order=1)
    sample = SAMPLE * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        assert torch.equal(scheduler.scale_model_input(sample, time), sample)
        output = scheduler.step(velocity_at(0), time, sample)
        assert all(a is b for a, b in zip(output.to_tuple(), output.values(), strict=True))
        sample = output.prev_sample
    assert torch.allclose(sample, SAMPLE + velocity_at(0), atol=1e-6)
    assert scheduler.compatibles == [FlowMatchAdamsBashforthScheduler]
    same = FlowMatchAdamsBashforthScheduler.from_config(scheduler.config)
    assert dict(same.config) == dict(scheduler.config)


def test_save_and_load(tmp_path):
    scheduler = FlowMatchAdamsBashforthScheduler(shift=3.0, solver_order=2, variable_step=True)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchAdamsBashforthScheduler.from_pretrained(tmp_path)
    assert (loaded.config.shift, loaded.config.solver_order, loaded.config.variable_step) == (3.0, 2, True)
    for each in (scheduler, loaded):
        each.set_timesteps(3)
    sample, other = SAMPLE, SAMPLE
    for time in scheduler.timesteps:
        sample = scheduler.step(velocity_at(time), time, sample).prev_sample
        other = loaded.step(velocity_at(time), time, other).prev_sample
    assert torch.equal(sample, other)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FlowMatchAdamsBashforthScheduler(shift=0.0), "shift must be positive"),
        (lambda: FlowMatchAdamsBashforthScheduler(shift=float("nan")), "shift must be positive"),
        (lambda: FlowMatchAdamsBashforthScheduler(solver_order=3), "solver_order must be 1"),
        (lambda: FlowMatchAdamsBashforthScheduler(shift=float("inf")), "shift must be positive and finite"),
        (lambda: FlowMatchAdamsBashforthScheduler(shift="2"), "shift must be positive and finite"),
        *(
            (
                lambda steps=steps: FlowMatchAdamsBashforthScheduler().set_timesteps(steps),
                "num_inference_steps must be",
            )
            for steps in (0, -1, 2.5, True, None, "5", 10**30)
        ),
        (lambda: FlowMatchAdamsBashforthScheduler().step(SAMPLE, 0.0, SAMPLE), "call set_timesteps"),
        (lambda: FlowMatchAdamsBashforthScheduler().preview(SAMPLE, 0.0, SAMPLE), "call set_timesteps"),
        (lambda: prepared(4).step(SAMPLE, 0.5, SAMPLE), "not on the grid of 4 steps"),
        (lambda: prepared(4).step(SAMPLE, float("nan"), SAMPLE), "not on the grid of 4 steps"),
        (lambda: prepared(4).preview(SAMPLE, 1.0, SAMPLE), "not on the grid of 4 steps"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
