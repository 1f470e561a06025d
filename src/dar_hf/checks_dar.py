"""Checks of arguments that the model files share. An error names the argument, what it must be and what was given."""

import sys
from collections.abc import Sequence
from numbers import Integral, Real
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
    """The value as an int, of any integer type; booleans are refused.

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


def check_times(name: str, times: torch.Tensor | float) -> None:
    """Raises ValueError for times outside [0, 1], but for rounding, where reading them costs no waiting."""
    if torch.compiler.is_compiling() or (isinstance(times, torch.Tensor) and times.device.type != "cpu"):
        return
    times = torch.as_tensor(times, dtype=torch.float32)
    if not ((times >= -1e-6) & (times <= 1 + 1e-6)).all():  # also catches NaN
        low, high = (float(value) for value in times.aminmax())
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}.")


# Options of `DARTokenizer`

CONDITION_SCOPES = ("group", "prefix")
_FLAGS = ("low_rank_queries", "share_time_embedding", "adaptive_head", "strict_sample_size")
_NUMBERS = ("data_std", "time_shift", "rope_theta", "diffusion_rope_theta")
_OPTIONAL = ("diffusion_rope_theta", "tokens_per_group", "num_inference_steps", "condition_dim", "repa_layer")
# what an option must be; sizes, all others, are integers
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(_FLAGS, (bool, "True or False")),
    **dict.fromkeys(_NUMBERS, (Real, "a number")),
    "condition_scope": (str, "text"),
}


def check_option_types(config: Any) -> None:
    """Refuse options of a tokenizer of the wrong type, as damaged files hold them, and sizes below 1."""
    for name, value in config.items():
        if name.startswith("_") or name == "sample_size" or (name in _OPTIONAL and value is None):
            continue
        kind, words = _KINDS.get(name, (Integral, "an integer"))
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} must be {words}, got {value!r}.")
        if kind is Integral and name not in ("repa_layer", "tokens_per_group") and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def check_sizes(config: Any) -> None:
    """Refuse sizes of a tokenizer that do not fit together."""
    size = config.sample_size
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(x, int) and x > 0 for x in pair):
        raise ValueError(f"sample_size must be a positive integer or (height, width), got {size!r}.")
    for name in ("encoder_dim", "decoder_dim", "diffusion_dim"):
        if config[name] % config.attention_head_dim:
            raise ValueError(f"{name}={config[name]} is not a multiple of {config.attention_head_dim=}.")
    if config.attention_head_dim % 4:
        raise ValueError(
            f"attention_head_dim must be a multiple of 4 (two rotary axes), got {config.attention_head_dim}."
        )
    if config.num_tokens % config.num_groups or config.num_tokens > config.max_num_tokens:
        raise ValueError(
            f"num_tokens={config.num_tokens} must be a multiple of num_groups={config.num_groups} "
            f"and at most max_num_tokens={config.max_num_tokens}."
        )
    if not 0 < config.tokens_per_group <= config.num_tokens:
        raise ValueError(f"tokens_per_group={config.tokens_per_group} does not fit num_tokens={config.num_tokens}.")
    if config.condition_dim != config.decoder_dim:
        raise ValueError(f"condition_dim={config.condition_dim} must equal decoder_dim={config.decoder_dim}.")
    for name in _NUMBERS:
        if not 0 < config[name] <= sys.float_info.max:
            raise ValueError(f"{name} must be positive and finite, got {config[name]}.")
    if config.condition_scope not in CONDITION_SCOPES:
        raise ValueError(
            f"condition_scope must be {' or '.join(map(repr, CONDITION_SCOPES))}, got {config.condition_scope!r}."
        )
    if config.adaptive_head and not config.share_time_embedding:
        raise ValueError("adaptive_head=True reads the shared time embedding: set share_time_embedding=True.")
    if config.repa_layer is not None and not 0 <= config.repa_layer < config.diffusion_depth:
        raise ValueError(f"repa_layer={config.repa_layer} is not one of the {config.diffusion_depth} denoiser blocks.")
    for patch in (config.encoder_patch_size, config.diffusion_patch_size):
        if any(side % patch for side in pair):
            raise ValueError(f"sample_size={config.sample_size} is not a multiple of the patch size {patch}.")
