"""Saved models by folder or Hub id, with one clear line for whatever is wrong with them."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from .hub import one_line
from .pipeline_dar import DARPipeline
from .weights_dar import is_pointer

Model = TypeVar("Model")

_PARTS = ("", "tokenizer", "transformer", "scheduler")  # folders of a pipeline that hold files
_CONFIGS = ("model_index.json", "config.json", "generation_config.json", "scheduler_config.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")


class LoadError(ValueError):
    """A saved model is not there, damaged or of another kind; the message says which file, and what to do."""


def load(model_class: type[Model], source: str | os.PathLike, what: str = "model", **options: Any) -> Model:
    """``model_class.from_pretrained``, with one clear error.

    Args:
        source: folder or Hub id.
        what: what is looked for, in words.
        options: those of ``from_pretrained``.

    Raises:
        LoadError: for whatever keeps it from being loaded.
    """
    if not str(source):
        raise LoadError(f"no {what} is named: give a folder or a Hub id.")
    folder = Path(source).expanduser()
    if not folder.exists() and _is_path(str(source)):
        raise LoadError(f"no {what} at {str(source)!r}: there is no such folder.")
    if folder.is_file():
        raise LoadError(f"no {what} at {str(source)!r}: it is a file, not the folder of a {what}.")
    place = str(folder) if folder.exists() else str(source)
    _check_configs(folder)
    try:
        return model_class.from_pretrained(place, **options)  # type: ignore[attr-defined]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # bytes from anywhere: the libraries raise all kinds
        text = one_line(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        if not folder.exists():
            text = f"no {what} at {str(source)!r}, neither as a folder nor on the Hub: {text}"
        raise LoadError(damage(folder) or f"cannot load the {what} at {source}: {text}") from error


def load_pipeline(
    source: str | os.PathLike, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DARPipeline:
    """A pipeline by folder or Hub id, on a device.

    Raises:
        LoadError: for whatever keeps it from being loaded.
    """
    return load(DARPipeline, source, "pipeline", dtype=dtype).to(device)


def _is_path(source: str) -> bool:
    """Whether this can only be a path: ids on the Hub are name or owner/name."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source or source.endswith("/")


def _check_configs(folder: Path) -> None:
    """Refuse configurations that are no JSON: of some the libraries would take the defaults, and say nothing."""
    for part in _PARTS:
        for path in (folder / part / name for name in _CONFIGS):
            if path.is_file():
                read_config(path)


def read_config(path: Path) -> dict[str, Any]:
    """A configuration in JSON, by option.

    Raises:
        LoadError: if the file holds none.
    """
    if is_pointer(path):
        raise LoadError(f"{path} {POINTER_ADVICE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is damaged: it holds no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} is damaged: it holds no options by name.")
    return content


POINTER_ADVICE = "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder."


def check_weights(path: str | os.PathLike) -> None:
    """Refuse a file of weights that is a git-lfs pointer or, in safetensors, cut off; other faults are its reader's.

    Raises:
        LoadError: that says which.
    """
    if (path := Path(path)).is_file() and (problem := _weights_problem(path)):
        raise LoadError(f"{path} {problem}")


def damage(folder: Path) -> str | None:
    """What is wrong with the files of weights in a model's folder, of the first that is damaged."""
    files: Iterator[Path] = (path for part in _PARTS for kind in _WEIGHTS for path in (folder / part).glob(kind))
    for path in files:
        if path.is_file() and (problem := _weights_problem(path)):
            return f"{path} {problem}"
    return None


def _weights_problem(path: Path) -> str | None:
    if is_pointer(path):
        return POINTER_ADVICE
    if path.suffix != ".safetensors":
        return None
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size:
            return f"is damaged or cut off: {size} bytes hold no complete header of safetensors."
        try:
            tensors = json.loads(file.read(length))
            stop = max(entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return "is damaged: its header is not that of safetensors."
    if 8 + length + stop != size:
        return f"is damaged or cut off: it should have {8 + length + stop} bytes, and has {size}."
    return None
