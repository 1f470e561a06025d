"""Loads saved models by folder or Hub id, with one clear error."""

import os
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..pipeline_dar import DARPipeline
from .errors import one_line
from .files import weights_damage

Model = TypeVar("Model")


class LoadError(ValueError):
    """A saved model is not there, damaged or of another kind; the message says which file, and what to do."""


def load(model_class: type[Model], source: str | os.PathLike, what: str = "model", **options: Any) -> Model:
    """``model_class.from_pretrained``, with one clear error.

    Args:
        source: folder or Hub id.
        what: what is looked for, in words.
        options: those of ``from_pretrained``.

    Raises:
        LoadError: if it cannot be loaded, for any reason.
    """
    if not str(source):
        raise LoadError(f"no {what} is named: give a folder or a Hub id.")
    folder = Path(source).expanduser()
    if not folder.exists() and _is_path(str(source)):
        raise LoadError(f"no {what} at {str(source)!r}: there is no such folder.")
    if folder.is_file():
        raise LoadError(f"no {what} at {str(source)!r}: it is a file, not the folder of a {what}.")
    place = str(folder) if folder.exists() else str(source)
    try:
        return model_class.from_pretrained(place, **options)  # type: ignore[attr-defined]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # bytes from anywhere: the libraries raise all kinds
        text = one_line(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        if not folder.exists():
            text = f"no {what} at {str(source)!r}, neither as a folder nor on the Hub: {text}"
        raise LoadError(f"cannot load the {what} at {source}: {text}") from error


def load_pipeline(
    source: str | os.PathLike, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DARPipeline:
    """A pipeline by folder or Hub id, on a device.

    Raises:
        LoadError: if it cannot be loaded, for any reason.
    """
    return load(DARPipeline, source, "pipeline", dtype=dtype).to(device)


def _is_path(source: str) -> bool:
    """Whether this can only be a path: ids on the Hub are name or owner/name."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source or source.endswith("/")


def check_weights(path: str | os.PathLike) -> None:
    """Refuse a file of weights that is a git-lfs pointer or, in safetensors, cut off; other faults are its reader's.

    Raises:
        LoadError: that says which.
    """
    if (path := Path(path)).is_file() and (damage := weights_damage(path)):
        raise LoadError(f"{path} {damage}")
