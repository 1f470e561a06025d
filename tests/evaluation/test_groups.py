"""One image decoded with groups of its codes replaced by another image's."""

import pytest
import torch
from PIL import Image
from pipeline_helpers import picture, seeded, tensor_of

from dar_hf import DARPipeline, FlowMatchAdamsBashforthScheduler
from dar_hf.evaluation import draw_swaps, swap_groups

A, B = picture(), Image.new("RGB", (8, 8), "white")  # whose codes differ in every group


@pytest.fixture(params=["group", "prefix"])
def pipe(request, make_tokenizer, tiny_transformer):
    tokenizer = make_tokenizer(condition_scope=request.param)
    return DARPipeline(tokenizer, tiny_transformer, FlowMatchAdamsBashforthScheduler(shift=2.0))


def last(pipe, first, second, **options):
    *_, swaps = swap_groups(pipe, first, second, generator=seeded(3), **options)
    return swaps


def close(one, two):
    return torch.allclose(one, two.clamp(-1, 1), atol=1e-5)


def test_images_are_those_of_the_exchanged_codes(pipe):
    swaps = last(pipe, A, B)
    codes = pipe.tokenizer.encode(torch.cat([tensor_of(A), tensor_of(B)])).codes
    noise = torch.randn(1, 3, 8, 8, generator=seeded(3))

    def decode(mixed):
        return pipe.tokenizer.decode(mixed[None], noise=noise, scheduler=pipe.scheduler).sample[0]

    assert swaps.groups == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert close(swaps.decoded, decode(codes[0])) and close(swaps.leading[-1], decode(codes[1]))
    for index, (start, stop) in enumerate(swaps.groups):
        single, leading = codes[0].clone(), codes[0].clone()
        single[start:stop] = codes[1, start:stop]
        leading[:stop] = codes[1, :stop]
        assert close(swaps.single[index], decode(single)) and close(swaps.leading[index], decode(leading))
    assert close(swaps.inputs, torch.cat([tensor_of(A), tensor_of(B)]))
    assert close(swaps.noise, noise[0] / pipe.tokenizer.config.data_std)


def test_states_and_previews_are_those_of_every_step(pipe):
    steps = list(swap_groups(pipe, A, B, generator=seeded(3)))
    codes = pipe.tokenizer.encode(tensor_of(A)).codes
    noise = torch.randn(1, 3, 8, 8, generator=seeded(3))
    expected = list(pipe.tokenizer.decode_stream([codes], noise=noise, scheduler=pipe.scheduler))
    for index, (swaps, preview) in enumerate(zip(steps, expected, strict=True)):
        assert (swaps.step, swaps.num_steps, len(swaps.previews)) == (index + 1, 4, index + 1)
        assert close(swaps.previews[index], preview.sample[0])
        assert close(swaps.states[index], preview.latents[0] / pipe.tokenizer.config.data_std)


def test_a_group_changes_nothing_before_its_step(pipe):
    for index, swaps in enumerate(swap_groups(pipe, A, B, generator=seeded(3))):
        effects = torch.tensor(swaps.effects())
        assert (effects[: index + 1] > 1e-3).all() and (effects[index + 1 :] < 1e-5).all()
        assert swaps.leading_effects()[0] == pytest.approx(float(effects[0]), abs=1e-6)


def test_effects_are_root_mean_squared_changes_in_units_of_the_range(pipe):
    swaps = last(pipe, A, B)
    change = (swaps.single[2] - swaps.decoded) / 2
    assert swaps.effects()[2] == pytest.approx(float(change.square().mean().sqrt()))
    assert swaps.leading_effects()[-1] == pytest.approx(
        float((swaps.leading[-1] - swaps.decoded).div(2).square().mean().sqrt())
    )


def test_equal_codes_have_no_effect(pipe):
    swaps = last(pipe, A, A)
    assert max(swaps.effects() + swaps.leading_effects()) < 1e-6


def test_the_picture(pipe, monkeypatch):
    size = draw_swaps(last(pipe, A, B)).size
    monkeypatch.setattr("dar_hf.evaluation.groups.labelled_grid", lambda rows: rows)
    swaps = last(pipe, A, B, num_inference_steps=2)
    states, previews, single, change, leading = draw_swaps(swaps)
    assert [image is None for image in states.images] == [False, False, True, False, True]  # groups without a step
    assert torch.equal(previews.images[0], swaps.inputs[0]) and torch.equal(leading.images[-1], swaps.inputs[1])
    assert torch.equal(single.images[1], swaps.single[0]) and torch.equal(leading.images[-2], swaps.leading[-1])
    assert change.captions[1:] == [f"{effect:.1%}" for effect in swaps.effects()]
    assert max(float(image.max()) for image in change.images[1:]) == 1.0  # the largest change is white
    dark = draw_swaps(last(pipe, A, A))[3].images[1:]
    assert max(float(image.max()) for image in dark) < -0.99  # and rounding is not
    assert size[0] > 6 * 48 and size[1] > 5 * 48


@pytest.mark.parametrize("steps, groups", [(2, [0, 2]), (9, [0, 1, 2, 3])])
def test_other_numbers_of_steps(pipe, steps, groups):
    swaps = last(pipe, A, B, num_inference_steps=steps)
    assert swaps.num_steps == steps and sorted(swaps.previews) == sorted(swaps.states) == groups
    # a group without a step of its own acts on later ones' conditions
    assert [effect > 1e-3 for effect in swaps.effects()] == [index <= max(groups) for index in range(4)]
