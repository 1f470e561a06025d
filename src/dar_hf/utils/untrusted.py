"""Checks of what strangers send: whatever comes from a visitor is wrong until it is proved right."""

import os
import stat
from pathlib import Path
from typing import Any

MAX_PROMPT = 300  # characters
MAX_SEED = 2**32 - 1
MAX_GUIDANCE = 20.0
NO_UPLOAD = "This file was not uploaded here."


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number in [low, high]; a whole one if ``low`` is an int.

    Raises:
        ValueError: that says what is accepted.
    """
    whole = isinstance(low, int)
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not low <= value <= high or (whole and value != int(value)):
        accepted = f"whole number from {low} to {high}" if whole else f"number from {low:g} to {high:g}"
        given = "empty" if value is None else repr(value)[:40]
        raise ValueError(f"{name} must be a {accepted}, not {given}.")
    if whole:
        return int(value)
    return float(value)


def text(name: str, value: Any, longest: int) -> str:
    """A text of at most ``longest`` characters, as one line with single spaces.

    Raises:
        ValueError: that says what is accepted.
    """
    if not isinstance(value, str):
        given = "empty" if value is None else repr(value)[:40]
        raise ValueError(f"{name} must be a text, not {given}.")
    if len(value) > longest:
        raise ValueError(f"{name} must be a text of at most {longest} characters, not {len(value)}.")
    # half of a surrogate pair, which JSON can hold and no answer can, becomes a question mark
    return " ".join(value.encode("utf-8", "replace").decode("utf-8").split())


class UploadError(ValueError):
    """What is wrong with an upload, as its visitor is told."""


def uploaded(path: Any, folder: str | Path) -> str:
    """The path of an upload, links resolved. Nothing is opened.

    Raises:
        ValueError: for anything but a regular file below ``folder``, and without a word about what it is instead.
    """
    try:
        resolved = Path(os.path.realpath(path, strict=True))
        inside = resolved.is_relative_to(os.path.realpath(folder))
        if inside and stat.S_ISREG(resolved.lstat().st_mode):
            return str(resolved)
    except (OSError, ValueError, TypeError) as error:
        raise UploadError(NO_UPLOAD) from error
    raise UploadError(NO_UPLOAD)


def only_uploads(value: Any, folder: str | Path) -> Any:
    """A value of a request in which every file is an upload, and named as gradio names one; no file becomes None.

    Gradio looks only at files that carry a mark, which a request can leave out, and fetches addresses.

    Raises:
        ValueError: if it names another file.
    """
    if isinstance(value, list):
        return [only_uploads(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("path") is None:
        return None
    return {"path": uploaded(value["path"], folder), "meta": {"_type": "gradio.FileData"}}
