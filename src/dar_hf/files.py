"""Small files that are complete or absent."""

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def saved_class(index: dict) -> str:
    """Class that a ``model_index.json`` or ``config.json`` names, whichever library wrote it.

    Self-contained folders name ``[file, class]``; transformers names architectures.
    """
    found = index.get("_class_name") or index.get("architectures") or "another model"
    return found[-1] if isinstance(found, list) else found
