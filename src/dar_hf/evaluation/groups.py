"""What each group of codes holds: one image decoded with groups of its codes replaced by another image's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..metrics import mean_squared_error
from ..pipeline_dar import DARPipeline
from ..utils.pictures import Row, heat, labelled_grid

LEAST_PEAK = 0.05  # of the image range; where all changes are smaller, the heat pictures stay dark


@dataclass(frozen=True)
class GroupSwaps:
    """Images A and B with groups of their codes exchanged, after a denoising step. All from the same start noise.

    Images are on the host, in [-1, 1].

    Attributes:
        step, num_steps: counted from 1.
        groups: tokens [start, stop) of each of the K groups.
        inputs: ``(2, C, H, W)``, A and B.
        noise: ``(C, H, W)``, the start noise in the units of images.
        states, previews: by group, the solver's noisy state and the preview of A after the group's last step,
            ``(C, H, W)``. Groups that no step has seen are missing.
        decoded: ``(C, H, W)``, A from its own codes.
        single: ``(K, C, H, W)``, A with the codes of one group from B.
        leading: ``(K, C, H, W)``, A with the codes of all groups up to this one from B; the last is B, decoded.
    """

    step: int
    num_steps: int
    groups: list[tuple[int, int]]
    inputs: torch.Tensor
    noise: torch.Tensor
    states: dict[int, torch.Tensor]
    previews: dict[int, torch.Tensor]
    decoded: torch.Tensor
    single: torch.Tensor
    leading: torch.Tensor

    def effects(self) -> list[float]:
        """How much one group's codes change A: root mean squared change of its pixels, as a share of their range."""
        return self._changes(self.single)

    def leading_effects(self) -> list[float]:
        """The same for all groups up to each."""
        return self._changes(self.leading)

    def _changes(self, images: torch.Tensor) -> list[float]:
        return mean_squared_error(images, self.decoded.expand_as(images)).sqrt().tolist()


@torch.no_grad()
def swap_groups(
    pipe: DARPipeline,
    first: Any,
    second: Any,
    *,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[GroupSwaps]:
    """Decode image A with groups of its codes replaced by those of B. The transformer is not used.

    Args:
        first, second: A and B, in the forms that calling the pipeline takes.
        num_inference_steps, height, width, generator: as in `DARPipeline.reconstruct`.

    Yields:
        What there is after every denoising step; the last one is the result.

    Raises:
        ValueError: for arguments out of range, at the first step.
    """
    tokenizer = pipe.tokenizer
    inputs = pipe.prepare_images("images", [first, second], height, width)
    noise = pipe.prepare_latents((1, *inputs.shape[1:]), generator)
    groups = [(stop - tokenizer.config.tokens_per_group, stop) for stop in tokenizer.window_ends()]
    codes = _mixed_codes(tokenizer.encode(inputs).codes, groups)
    stream = tokenizer.decode_stream(
        [codes],
        noise=noise.expand(len(codes), -1, -1, -1),
        num_inference_steps=num_inference_steps,
        scheduler=pipe.scheduler,
    )
    scale = tokenizer.config.data_std
    group_of = {stop: index for index, (_, stop) in enumerate(groups)}
    states: dict[int, torch.Tensor] = {}
    previews: dict[int, torch.Tensor] = {}
    try:
        for preview in stream:
            images = _shown(preview.sample)
            group = group_of[preview.num_tokens]
            states[group] = _shown(preview.latents[0] / scale)
            previews[group] = images[0]
            yield GroupSwaps(
                step=preview.step,
                num_steps=preview.num_steps,
                groups=groups,
                inputs=_shown(inputs),
                noise=_shown(noise[0] / scale),
                states=dict(states),
                previews=dict(previews),
                decoded=images[0],
                single=images[1 : 1 + len(groups)],
                leading=images[1 + len(groups) :],
            )
    finally:
        pipe.maybe_free_model_hooks()


def _mixed_codes(pair: torch.Tensor, groups: list[tuple[int, int]]) -> torch.Tensor:
    """``(1 + 2 K, N)``: A's codes, those with one group from B, and those with all groups up to one from B."""
    first, second = pair
    windows = [(0, 0), *groups, *((0, stop) for _, stop in groups)]
    codes = first.repeat(len(windows), 1)
    for row, (start, stop) in zip(codes, windows, strict=True):
        row[start:stop] = second[start:stop]
    return codes


def _shown(images: torch.Tensor) -> torch.Tensor:
    return images.float().clamp(-1, 1).cpu()


def draw_swaps(swaps: GroupSwaps) -> Image.Image:
    """One column per group; the noisy state of A above its previews, and below them A with groups from B."""
    number = len(swaps.groups)
    names = [f"group {index + 1}" for index in range(number)]
    changes = (swaps.single - swaps.decoded).abs().mean(dim=1) / 2
    peak = max(float(changes.max()), LEAST_PEAK)
    first, second = swaps.inputs
    states = [swaps.states.get(index) for index in range(number)]
    previews = [swaps.previews.get(index) for index in range(number)]
    effects = [f"{effect:.1%}" for effect in swaps.effects()]
    leading_names = ["group 1", *(f"groups 1-{index}" for index in range(2, number + 1))]
    rows = [
        Row("noisy state\nof A", [swaps.noise, *states], ["start noise", *names]),
        Row("preview\nof A", [first, *previews], ["A"]),
        Row("one group\nfrom B", [swaps.decoded, *swaps.single], ["A decoded", *names]),
        Row("change\n(RMS)", [None, *heat(changes / peak)], ["", *effects]),
        Row("first groups\nfrom B", [swaps.decoded, *swaps.leading, second], ["A decoded", *leading_names, "B"]),
    ]
    return labelled_grid(rows)
