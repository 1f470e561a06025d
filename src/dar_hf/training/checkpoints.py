"""Checkpoints that are complete or absent: written under a temporary name, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from ..files import write_json

CHECKPOINT_PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"
POSITION_FILE = "position-{}.json"  # of each process in its stream of images


class SaveError(RuntimeError):
    """Something could not be written, on a full disk for example; what was complete before is still there."""


@contextmanager
def saving(what: str, folder: Path) -> Iterator[None]:
    """Inside, errors of writing end as a `SaveError` that names ``what``; each library has its own for a full disk.

    ``folder`` is that of the checkpoints.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SaveError(f"{what} could not be saved: {str(error).rstrip('.')}. {way_back(folder)}") from error


def way_back(folder: Path) -> str:
    """What a run that ended early can go on from, for its message."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return "There is no checkpoint yet: --checkpointing_steps says how often one is saved."
    return f"{checkpoints[-1].name} is complete: continue with --resume_from_checkpoint latest."


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = {}
    for path in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        step = path.name.removeprefix(CHECKPOINT_PREFIX)
        if step.isdecimal() and (path / STATE_FILE).is_file():
            found[int(step)] = path
    return [found[step] for step in sorted(found)]


def save_checkpoint(
    accelerator: Accelerator, folder: Path, state: dict, keep: int | None, position: dict | None = None
) -> None:
    """Save everything a run needs to continue as ``folder/checkpoint-<step>``, and drop the oldest beyond ``keep``.

    ``position`` is this process's place in a stream of images. All processes call this together; the folder appears
    under its name when all of them are done.
    """
    target = folder / f"{CHECKPOINT_PREFIX}{state['step']}"
    temporary = folder / f".{target.name}.tmp"
    if accelerator.is_main_process:
        for left in folder.glob(f".{CHECKPOINT_PREFIX}*.tmp"):  # by a save that failed or was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if position is not None:
        write_json(temporary / POSITION_FILE.format(accelerator.process_index), position)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / STATE_FILE, state)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in list_checkpoints(folder)[: -keep if keep else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint that ``latest``, a name or a path stands for.

    Raises:
        ValueError: if there is none.
    """
    if name == "latest":
        checkpoints = list_checkpoints(folder)
        if not checkpoints:
            raise ValueError(f"no checkpoint to resume from in {folder}.")
        return checkpoints[-1]
    for path in (Path(name), folder / name):
        if (path / STATE_FILE).is_file():
            return path
    raise ValueError(f"{name} is no complete checkpoint (no {STATE_FILE} in it).")


def read_state(checkpoint: Path) -> dict:
    """The run's own record in a checkpoint: step and settings."""
    return json.loads((checkpoint / STATE_FILE).read_text())


def read_position(checkpoint: Path, process_index: int) -> dict:
    """A process's place in its stream of images.

    Raises:
        ValueError: if the checkpoint holds none for it.
    """
    path = checkpoint / POSITION_FILE.format(process_index)
    if not path.is_file():
        raise ValueError(f"{path.name} is missing: it was not saved by so many processes reading a stream")
    return json.loads(path.read_text())
