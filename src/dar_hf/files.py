"""Files and folders that are complete or absent: written under a temporary name, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def flush(path: Path) -> None:
    """Have a file, or a folder's table of names, written to the disk before anything else relies on it.

    Raises:
        OSError: if a file cannot be.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # some systems flush no folders
            raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``path`` when the block ends and vanishes when it fails.

    Raises:
        FileExistsError: if ``path`` is a file or a folder that is not empty, before the block and after it.
    """
    path = Path(path).resolve()  # a link stays, and becomes a link to the new folder

    def check() -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is not an empty folder: choose another one.")

    check()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        inside = temporary / "content"  # mkdtemp's folder is its owner's alone; this one gets the usual rights
        inside.mkdir()
        yield inside
        check()
        if path.is_dir():
            path.rmdir()
        os.replace(inside, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def saved_class(index: dict) -> str:
    """Class that a ``model_index.json`` or ``config.json`` names, whichever library wrote it.

    Self-contained folders name ``[file, class]``; transformers names architectures.
    """
    found = index.get("_class_name") or index.get("architectures") or "another model"
    return found[-1] if isinstance(found, list) else found
