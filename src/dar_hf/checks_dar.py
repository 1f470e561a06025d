"""Checks of arguments that the model files share. An error names the argument, what it must be and what was given."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def described(value: Any) -> str:
    """A few words on one line for a value that was refused."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else type(value).__name__


def check_integer(name: str, value: Any, least: int | None = 1) -> int:
    """The value as an int, of any integer type; booleans are none.

    Raises:
        ValueError: for anything else, and for a value below ``least``, where there is one.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        kinds = {None: "an integer", 1: "a positive integer"}
        raise ValueError(f"{name} must be {kinds.get(least, f'an integer >= {least}')}, got {described(value)}.")
    return int(value)


def check_tensor(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError for anything but a floating-point tensor of this shape; words in it stand for any size."""
    form = str(shape).replace("'", "")
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor of shape {form}, got {described(value)}.")
    fits = value.ndim == len(shape) and all(
        isinstance(size, str) or size == own for size, own in zip(shape, value.shape, strict=True)
    )
    if not fits or not value.is_floating_point():
        raise ValueError(f"{name} must be floating point of shape {form}, got {described(value)}.")


def check_generators(generator: Generators, batch_size: int | None, device: torch.device | None = None) -> None:
    """Raises ValueError for anything but a generator or one for each of the batch; on the CPU or on ``device``.

    Without a batch size only a single one is taken.
    """
    several = isinstance(generator, (list, tuple)) and batch_size is not None
    generators = [] if generator is None else list(generator) if several else [generator]  # type: ignore[arg-type]
    for given in generators:
        if not isinstance(given, torch.Generator):
            kinds = "a torch.Generator" if batch_size is None else "a torch.Generator or a list of them"
            raise ValueError(f"generator must be {kinds}, got {type(given).__name__}.")
        if device is not None and given.device.type not in ("cpu", device.type):
            raise ValueError(f"a generator on {given.device} cannot draw for a model on {device}: use one on the CPU.")
    if several and len(generators) != batch_size:
        raise ValueError(f"got {len(generators)} generators for a batch of {batch_size}.")
