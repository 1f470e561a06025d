"""Reads checkpoints of the original code as plain data: no code of the file is ever run.

torch's restricted unpickler (``weights_only=True``) takes tensors and plain containers; the two other classes that
the original's files hold, ``argparse.Namespace`` and ``config_util.Config``, are read as bags of attributes. Weights
stay in the file, mapped into memory, until each is converted.
"""

import argparse
import logging
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import nn

logger = logging.getLogger(__name__)

WEIGHT_KEYS = ("ema", "model", "module", "state_dict")  # where weights are, the best first
PREFIXES = ("module.", "_orig_mod.")  # left by DDP and torch.compile
UNUSED_BUFFERS = ("codebook_used", "wavelets", "_arange")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or converted; the message says what is wrong with which file."""


class _Config:
    """Stands for the original's ``config_util.Config``, whose one attribute ``_data`` is a dictionary."""


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: the file.
        weights: tensors by their original names, without prefixes; memory-mapped where the format allows.
        config: the tokenizer's configuration in the original's names, empty where the file has none.
        args: the training arguments, empty where the file has none.
        dropped: names of what is in the file and not used.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    args: dict[str, Any]
    dropped: list[str]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of the original code: ``.pt`` in all its variants, or bare weights in safetensors.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for a damaged file, a file that is no checkpoint, or one that holds anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    found, dropped = _find_weights(content)
    weights: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        name = _plain_name(str(key))
        if not isinstance(value, torch.Tensor) or name.rpartition(".")[2] in UNUSED_BUFFERS:
            dropped.append(name)
            continue
        if name in weights:
            raise CheckpointError(f"{path} has two tensors for {name}, with and without a prefix.")
        if value.layout != torch.strided or value.device.type != "cpu" or not value.is_floating_point():
            raise CheckpointError(f"{path}: {name} is not a dense floating-point tensor ({value.dtype}).")
        weights[name] = value
    if not weights:
        raise CheckpointError(f"{path} holds no weights; its entries: {_listing(content)}.")
    return Checkpoint(path, weights, _config(content, path), _attributes(content.get("args")), dropped)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or damaged: {error}") from error


def _unpickle(path: Path) -> Any:
    # a torch file is a zip archive; those from before torch 1.6 are not, and can neither be mapped nor checked
    archive = zipfile.is_zipfile(path)
    if archive:
        _check_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, (_Config, "config_util.Config")]):
            if archive and (foreign := torch.serialization.get_unsafe_globals_in_checkpoint(str(path))):
                raise CheckpointError(
                    f"{path} is refused: it wants to run or build {', '.join(foreign)}, and a checkpoint holds only "
                    "tensors, plain containers, argparse.Namespace and config_util.Config."
                )
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except CheckpointError:
        raise
    except Exception as error:  # bytes from anywhere: the unpickler and the archive reader raise all kinds
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to run or build {refused[1]}" if refused else f"{type(error).__name__} while reading it"
        raise CheckpointError(
            f"{path} is refused: not a torch checkpoint of plain data, or damaged ({reason})."
        ) from error


def _check_archive(path: Path) -> None:
    """Compare every entry with its checksum: torch does not, and a flipped bit in a weight would go unnoticed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(entry.CRC for entry in archive.infolist()):
                logger.warning("%s was written without checksums: whether it is intact cannot be known.", path)
                return
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises several kinds for a damaged directory
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} in it does not match its checksum.")


def _find_weights(content: dict) -> tuple[dict, list[str]]:
    """The dictionary of weights, wherever it is in the file, and the entries beside it."""
    beside: list[str] = []
    for _ in WEIGHT_KEYS:  # wrappers may be nested, each kind once
        inner = next((key for key in WEIGHT_KEYS if isinstance(content.get(key), dict) and content[key]), None)
        if inner is None:
            break
        beside += [str(name) for name in content if name not in (inner, "args", "config")]
        content = content[inner]
    return content, beside


def _plain_name(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")


def _attributes(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else dict(getattr(value, "__dict__", {}))


def _config(content: dict, path: Path) -> dict[str, Any]:
    config = _attributes(content.get("config"))
    config = config.get("_data", config)
    config = config.get("model", config) if isinstance(config, dict) else config
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: its configuration is a {type(config).__name__}, not a dictionary.")
    return config


def _listing(names: Iterable, limit: int = 8) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"


def layer_count(weights: Mapping[str, torch.Tensor], stem: str) -> int:
    """How many layers ``stem.0``, ``stem.1``, … have weights; gaps show as missing names later."""
    pattern = re.compile(re.escape(stem) + r"\.(\d{1,4})\.")
    return 1 + max((int(match[1]) for name in weights if (match := pattern.match(name))), default=-1)


def require(checkpoint: Checkpoint, kind: str, shapes: Mapping[str, int]) -> None:
    """Check that tensors from whose shapes the configuration is read are there, with that many axes.

    Raises:
        CheckpointError: that names those missing.
    """
    missing = [name for name in shapes if name not in checkpoint.weights]
    if missing:
        has = _listing(checkpoint.weights)
        raise CheckpointError(f"{checkpoint.path} is no {kind}: it lacks {_listing(missing)}. It has {has}.")
    for name, axes in shapes.items():
        if checkpoint.weights[name].ndim != axes:
            shape = tuple(checkpoint.weights[name].shape)
            raise CheckpointError(f"{checkpoint.path}: {name} must have {axes} axes, got shape {shape}.")


def check_weights(checkpoint: Checkpoint, expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes with those of a model in the original's form.

    Raises:
        CheckpointError: that names missing and unknown tensors, or shapes that disagree with the configuration.
    """
    missing = [name for name in expected if name not in checkpoint.weights]
    unknown = [name for name in checkpoint.weights if name not in expected]
    if missing or unknown:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its configuration; missing: {_listing(missing)}; "
            f"unknown: {_listing(unknown)}."
        )
    for name, tensor in expected.items():
        found = checkpoint.weights[name]
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has the shape {tuple(found.shape)}, "
                f"the configuration asks for {tuple(tensor.shape)}."
            )
        if not torch.isfinite(found).all():
            raise CheckpointError(f"{checkpoint.path}: {name} holds values that are not finite.")


def without_weights(model_class: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
    """A model whose parameters have shapes and no memory yet; its buffers are there."""
    with init_empty_weights(include_buffers=False):
        return model_class(*args, **options)


def fill(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give a model of `without_weights` its parameters, one at a time, in float32."""
    for name, tensor in tensors:
        value = tensor.to(torch.float32, copy=True).contiguous()
        set_module_tensor_to_device(model, name, "cpu", value=value, clear_cache=False)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise RuntimeError(f"no weights for {_listing(left)}")
    model.eval()
