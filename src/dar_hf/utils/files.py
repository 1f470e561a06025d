"""Files and folders that are complete or absent, written under a temporary name, then renamed; and what is damaged."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..weights_dar import is_pointer


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: dict | list) -> None:
    """Write JSON under a temporary name, then rename."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_text(path: Path) -> str:
    """Read a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no text, with the file's name.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


def read_object(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds anything else, with the file's name.
    """
    if is_pointer(path):
        raise ValueError(f"{path} {POINTER_ADVICE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it holds no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not options by name.")
    return content


POINTER_ADVICE = "is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder."
_PARTS = ("", "tokenizer", "transformer")  # folders of a pipeline that hold weights
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")


def damaged_weights(folder: Path) -> str | None:
    """What is wrong with the files of weights in a model's folder, of the first that is damaged."""
    for path in (path for part in _PARTS for kind in _WEIGHTS for path in (folder / part).glob(kind)):
        if path.is_file() and (damage := weights_damage(path)):
            return f"{path} {damage}"
    return None


def weights_damage(path: Path) -> str | None:
    """What is wrong with a file of weights: it is a git-lfs pointer or, in safetensors, cut off."""
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


LEFTOVER = ".unfinished-"  # begins the name of the hidden folder that `new_folder` writes into
EMPTY_ENTRIES = ("lost+found",)  # mkfs leaves it at the root of a volume
INDICES = ("model_index.json", "config.json", "scheduler_config.json")  # say what a model's folder holds


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, whose content is at ``path`` when the block ends and vanishes when the block fails.

    A folder that is missing appears at once. One that is there and empty stays the folder it is (a mounted volume or
    the shell's own cannot be replaced), and the content moves into it.

    Raises:
        FileExistsError: if ``path`` is a file or a folder that is not empty, before the block and after it.
        OSError: if what the block wrote cannot be put there.

    Whatever is raised after the block, what it wrote is kept, and the message says where.
    """
    path = Path(path).expanduser().resolve()  # a link stays, and becomes a link to the new folder
    _check_empty(path)
    exists = path.is_dir()
    place = path if exists else path.parent  # in both cases the file system that the content is to be on
    place.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=LEFTOVER if exists else f".{path.name}.", dir=place))
    content = temporary / "content"  # mkdtemp's folder is its owner's alone; this one gets the usual rights
    try:
        content.mkdir()
        yield content
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        _check_empty(path)
        if path.is_dir():
            _move_entries(content, path)
        else:
            os.replace(content, path)
    except OSError as error:
        raise type(error)(
            f"{error} The finished files are not lost: those that are not in {path} yet are in {content}."
        ) from error
    shutil.rmtree(temporary, ignore_errors=True)


def _check_empty(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists and is not an empty folder: choose another one.")
    entries = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    held = [name for name in entries if name not in EMPTY_ENTRIES and not name.startswith(LEFTOVER)]
    if held:
        raise FileExistsError(f"{path} exists and is not an empty folder: choose another one.")


def _move_entries(source: Path, target: Path) -> None:
    """Move what a folder holds; what says that the target holds a model comes last, so that half of one is none."""
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name in INDICES):
        os.rename(entry, target / entry.name)


def resolve_inside(path: Path, folder: Path) -> Path:
    """The file or folder that ``path`` stands for, which must be in ``folder``, links and all, and not hidden there.

    Raises:
        ValueError: if a link leads out of the folder, to a hidden file (such as .git/config) or to nothing.
    """
    target = Path(os.path.realpath(path))  # Path.resolve raises for a link to itself
    root = folder.resolve()
    if not target.exists():
        where = "to nothing"
    elif not target.is_relative_to(root):
        where = f"out of the folder, to {target}"
    elif any(part.startswith(".") for part in target.relative_to(root).parts):
        where = f"to a hidden file, {target}"
    else:
        return target
    raise ValueError(
        f"{path} is a link that leads {where}, and is not followed. To publish what it stands for, copy the folder "
        f"with its links resolved (cp -rL {folder} COPY) and take the copy."
    )


def saved_class(index: dict) -> str:
    """Class that a ``model_index.json`` or ``config.json`` names, whichever library wrote it.

    Self-contained folders name ``[file, class]``; transformers names architectures.
    """
    found = index.get("_class_name") or index.get("architectures") or "another model"
    return str(found[-1] if isinstance(found, list) else found)
