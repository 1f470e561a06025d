"""Guidance and sampling of codes: functions of logits, and the same as logits processors for `generate`."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .checks_dar import Generators, check_generators
from .weights_dar import not_finite

GuidanceScale: TypeAlias = float | tuple[float, float] | list[float] | None

GREEDY_BELOW = 1e-30  # temperature: logits divided by less overflow in float32; the limit is the most probable code


def guidance_schedule(scale: GuidanceScale, num_image_tokens: int) -> list[float] | None:
    """One guidance scale for each image token: constant, or linear from start to end, both included.

    Args:
        scale: a number, a pair (start, end), or None for no guidance.
        num_image_tokens: N; the schedule always spans the whole sequence, however many codes are generated.

    Returns:
        N scales, or None where every scale is 1, so that one unguided pass does.

    Raises:
        ValueError: for anything but a finite number >= 0 or a pair of them.
    """
    if scale is None:
        return None
    ends = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
    if len(ends) != 2:
        raise ValueError(f"guidance_scale must be a number or a pair (start, end), got {len(ends)} values: {scale!r}.")
    if not all(_is_scale(end) for end in ends):
        raise ValueError(f"guidance scales must be finite numbers >= 0, got {scale!r}.")
    start, end = (float(x) for x in ends)
    if start == end == 1.0:
        return None
    return [start + (end - start) * i / max(num_image_tokens - 1, 1) for i in range(num_image_tokens)]


def _is_scale(value: Any) -> bool:
    """Whether this is a number >= 0, finite as a float, and not a bool."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf
    except OverflowError:
        return False


def apply_guidance(logits: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """``uncond + scale * (cond - uncond)``, ``(B, V)``, of logits ``(2B, V)``: class rows, then null-class rows.

    ``scale`` is a number, or one for each row, ``(B, 1)``.
    """
    conditional, unconditional = logits.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def sample_index(scores: torch.Tensor, generator: Generators = None) -> torch.Tensor:
    """Sample one index per row of unnormalised log-probabilities ``(B, V)``; ``(B,)`` long.

    An exponential race, as in ``torch.multinomial``; but with a list of generators row i uses only the i-th, so that
    an image does not depend on its neighbours in the batch. Draws of generators on the CPU are copied to the device,
    which waits for it.
    """
    shape = scores.shape
    if generator is None or isinstance(generator, torch.Generator):
        device = scores.device if generator is None else generator.device
        race = torch.empty(shape, device=device).exponential_(generator=generator)
    else:
        race = torch.stack([torch.empty(shape[1:], device=g.device).exponential_(generator=g) for g in generator])
    return (scores.float().softmax(dim=-1) / race.to(scores.device)).argmax(dim=-1)


def sampling_warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList | None:
    """transformers' own warpers for these options; None stands for greedy decoding (temperature 0).

    Raises:
        ValueError: for a negative temperature or top_k, or top_p outside (0, 1].
    """
    if not _is_scale(temperature):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}.")
    if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 0:
        raise ValueError(f"top_k must be an integer >= 0 (0 keeps every code), got {top_k!r}.")
    if isinstance(top_p, bool) or not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise ValueError(f"top_p must lie in (0, 1], got {top_p!r}.")
    if temperature < GREEDY_BELOW:
        return None
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers


def check_finite(tensors: Iterable[torch.Tensor], model: nn.Module) -> None:
    """Raises ValueError, which names the cause, if a model's logits, or their extremes, hold NaN or infinity."""
    tensors = list(tensors)
    if tensors and not torch.stack(tensors).isfinite().all():
        raise not_finite("the language model's logits", model)


class ClassifierFreeGuidance(LogitsProcessor):
    """Merges the doubled rows of a guided step; the first of `generate`'s processors."""

    def __init__(self, schedule: list[float], codebook_size: int):
        self.scales = torch.tensor(schedule)
        self.codebook_size = codebook_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.scales = self.scales.to(scores.device)
        is_prompt = (input_ids >= self.codebook_size).int()
        codes = is_prompt.flip(-1).argmax(dim=-1)  # since the class token or the text
        position = codes.clamp(max=len(self.scales) - 1)
        return apply_guidance(scores, self.scales[position][:, None])


class FiniteLogits(LogitsProcessor):
    """Refuses logits that are not finite, of which `generate` would make code 0; only guidance stands before it."""

    supports_continuous_batching = True

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        capturing = scores.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing:  # CUDA graphs of continuous batching cannot wait
            check_finite(scores.aminmax(), self.model)
        return scores


class GeneratorSampling(LogitsProcessor):
    """Samples with the caller's generator; stands last, and `generate` then picks the only finite score."""

    def __init__(self, generator: Generators):
        self.generator = generator

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        check_generators(self.generator, len(scores))
        chosen = sample_index(scores, self.generator)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
