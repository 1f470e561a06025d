"""Checkpoints that are complete or absent: written under a temporary name, flushed to disk, then renamed.

``trainer_state.json`` is written last. Besides the run's own record it holds size and SHA-256 of all other files, so
that damage is noticed before anything is loaded. Nothing in a checkpoint can run code: pickled files are read by
torch's restricted unpickler alone (DeepSpeed's are not, see `load_checkpoint`).
"""

import hashlib
import logging
import os
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, load
from safetensors import SafetensorError, safe_open

from ..utils.files import flush, read_object, write_json

logger = logging.getLogger(__name__)

CHECKPOINT_PREFIX = "checkpoint-"
STATE_FILE = "trainer_state.json"
POSITION_FILE = "position-{}.json"  # of each process in its stream of images
RANDOM_FILE = "random_states_{}.pkl"  # accelerate's name; of each process
SAVED = "saved"  # entry of the state file: how the checkpoint was saved
# what every run reads of a checkpoint; next to it are an fp16 run's scaler and other layouts' shards
READ_BY_ALL = (
    "*.safetensors",
    "pytorch_model.bin",
    "optimizer*.bin",
    "random_states_*.pkl",
    "custom_checkpoint_*.pkl",
)

# in the errors of torch.save
TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|write\(\): fd|Parent directory")

# what torch's sharded checkpoints name in their table of contents
_METADATA = "torch.distributed.checkpoint.metadata"
SHARDED_CLASSES = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "PureWindowsPath"),
    # since Python 3.13
    ("pathlib._local", "Path"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


class SaveError(RuntimeError):
    """Something could not be written, on a full disk for example; what was complete before is still there."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or holds more than data; the message says which and what."""


@contextmanager
def saving(what: str, folder: Path) -> Iterator[None]:
    """Inside, errors of writing end as a `SaveError` that names ``what``; each library has its own for a full disk.

    ``folder`` is that of the checkpoints.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's writer knows no other type; a RuntimeError of anything else is a fault, not a full disk
        if isinstance(error, RuntimeError) and not TORCH_WRITER.search(str(error)):
            raise
        raise SaveError(f"{what} could not be saved: {str(error).rstrip('.')}. {resume_hint(folder)}") from error


def resume_hint(folder: Path) -> str:
    """What a run that ended early can go on from, for its message."""
    for checkpoint in reversed(list_checkpoints(folder)):
        if find_damage(checkpoint, thorough=False) is None:
            return f"{checkpoint.name} is complete: continue with --resume_from_checkpoint latest."
    return "There is no checkpoint yet: --checkpointing_steps says how often one is saved."


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a record that can be read, oldest first; whether each is complete says `find_damage`."""
    return [path for path in _all_checkpoints(folder) if _has_record(path)]


def _has_record(checkpoint: Path) -> bool:
    try:
        _read_record(checkpoint)
    except CheckpointError:
        return False
    return True


def has_checkpoints(folder: Path) -> bool:
    """Whether there is any, complete or not."""
    return bool(_all_checkpoints(folder))


def _all_checkpoints(folder: Path) -> list[Path]:
    found = {}
    for path in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        step = path.name.removeprefix(CHECKPOINT_PREFIX)
        if step.isdecimal() and path.is_dir():
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
    files = _seal(accelerator, temporary)
    if accelerator.is_main_process:
        saved = {"num_processes": accelerator.num_processes, "files": files}
        write_json(temporary / STATE_FILE, state | {SAVED: saved})
        for path in (temporary / STATE_FILE, *(path for path in temporary.rglob("*") if path.is_dir()), temporary):
            flush(path)
        if target.exists():
            _set_aside(target)
        os.replace(temporary, target)
        flush(folder)
        others = [path for path in list_checkpoints(folder) if path != target]
        for old in others[: max(0, len(others) + 1 - keep)] if keep else []:
            _set_aside(old)
        for left in folder.glob(f".{CHECKPOINT_PREFIX}*.old.tmp"):
            shutil.rmtree(left, ignore_errors=True)
    accelerator.wait_for_everyone()


def _set_aside(checkpoint: Path) -> None:
    """Take a checkpoint's name from it, so that a kill while it is deleted leaves no half of one."""
    os.replace(checkpoint, checkpoint.with_name(f".{checkpoint.name}.old.tmp"))


def _file_names(checkpoint: Path) -> list[str]:
    """All files of a checkpoint but its record."""
    files = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in files if name != STATE_FILE)


def _seal(accelerator: Accelerator, folder: Path) -> dict[str, dict]:
    """Flush all files to disk, and note their sizes and checksums. All processes call this together and share them."""
    (names,) = broadcast_object_list([_file_names(folder)])
    own = {}
    for name in names[accelerator.process_index :: accelerator.num_processes]:
        if (folder / name).is_file():  # another machine may not see it yet
            flush(folder / name)
            own[name] = _signature(folder / name)
    found = {name: signature for part in gather_object([own]) for name, signature in part.items()}
    if accelerator.is_main_process:
        found |= {name: _signature(folder / name) for name in names if name not in found}
    return found


def _signature(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def find_damage(checkpoint: Path, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words, or None if it is complete.

    Those of versions that noted no files are complete where they have a record and files that can be read.

    Args:
        thorough: read all files: compare checksums, or see whether they can be read.
    """
    try:
        files = _read_record(checkpoint).get(SAVED, {}).get("files")
        if files is None:
            return _find_unreadable(checkpoint) if thorough else None
        present = set(_file_names(checkpoint))
        for name, signature in files.items():
            if name not in present:
                return f"{name} is missing"
            size = (checkpoint / name).stat().st_size
            if size != signature["size"]:
                return f"{name} has {size:,} of {signature['size']:,} bytes"
        for name, signature in files.items():
            if thorough and _signature(checkpoint / name) != signature:
                return f"{name} is not what was saved"
    except CheckpointError as error:
        return str(error)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def find_checkpoint(folder: Path, name: str) -> Path:
    """The checkpoint that ``latest``, a name or a path stands for; ``latest`` is the newest that is complete.

    Raises:
        CheckpointError: if there is none, or the one that is named is damaged.
    """
    if name == "latest":
        return _newest_complete(folder)
    path = next((path for path in (Path(name), folder / name) if path.is_dir()), None)
    damage: str | None = "there is no such folder"
    if path is not None:
        damage = find_damage(path)
        if damage is None:
            return path
    others = _all_checkpoints(folder)
    complete = [other.name for other in others if other != path and find_damage(other, thorough=False) is None]
    advice = f" Complete in {folder}: {', '.join(complete)}." if complete else ""
    raise CheckpointError(f"{name} is no complete checkpoint ({damage}).{advice}")


def _newest_complete(folder: Path) -> Path:
    checkpoints = _all_checkpoints(folder)
    if not checkpoints:
        raise CheckpointError(f"no checkpoint to resume from in {folder}.")
    found: list[str] = []
    for checkpoint in reversed(checkpoints):
        damage = find_damage(checkpoint)
        if damage is None:
            if found:
                logger.warning("damaged and skipped: %s; resuming from %s", "; ".join(found), checkpoint.name)
            return checkpoint
        found.append(f"{checkpoint.name} ({damage})")
    raise CheckpointError(f"no checkpoint in {folder} is complete: {'; '.join(found)}.")


def read_state(checkpoint: Path) -> dict:
    """The run's own record in a checkpoint: step and settings.

    Raises:
        CheckpointError: if there is none that can be read.
    """
    record = _read_record(checkpoint)
    record.pop(SAVED, None)
    return record


def _read_record(checkpoint: Path) -> dict:
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"no {STATE_FILE} in it")
    try:
        record = read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error).rstrip(".")) from error
    step = record.get("step")
    if type(step) is not int or step < 0 or not isinstance(record.get(SAVED, {}), dict):
        raise CheckpointError(f"{STATE_FILE} is no record of a checkpoint")
    return record


def read_position(checkpoint: Path, process_index: int) -> dict:
    """A process's place in its stream of images.

    Raises:
        CheckpointError: if the checkpoint holds none for it.
    """
    path = checkpoint / POSITION_FILE.format(process_index)
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing: it was not saved by this many processes reading a stream")
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error).rstrip(".")) from error


# Loading


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Put a checkpoint's model, optimizer, scaler, registered objects and random states in place.

    No code in the files is run: torch reads tensors and plain values only, and the tables of FSDP's shards may name
    nothing but what describes tensors. DeepSpeed reads its files freely; those must be one's own.

    Raises:
        CheckpointError: for files that are missing, damaged or hold more than data.
    """
    reading: AbstractContextManager = plain_data_only()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        logger.warning("DeepSpeed runs code that its checkpoints may hold: resume only what you saved yourself.")
        reading = nullcontext()
    states = _read_random_states(accelerator, checkpoint)
    _check_shards(checkpoint)
    try:
        with reading:
            accelerator.load_state(str(checkpoint))
    except Exception as error:  # bytes from anywhere: all kinds are raised
        raise CheckpointError(reason(error)) from error
    accelerator.step = 0  # of accumulation: the checkpoint may have been saved with another number of micro-batches
    if states is not None:
        _set_random_states(accelerator, states)


@contextmanager
def plain_data_only() -> Iterator[None]:
    """Inside, torch.load reads tensors and plain values only, whoever calls it and whatever the call asks for."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _ShardTableUnpickler(pickle.Unpickler):
    """Reads the table of contents of FSDP's shards, or rejects it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SHARDED_CLASSES:
            raise CheckpointError(f"it wants to run or build {module}.{name}")
        return super().find_class(module, name)


def _check_shards(checkpoint: Path) -> None:
    """Reject tables that torch, which unpickles them freely, would run code from."""
    # where torch looks, also through links, which rglob does not follow
    for path in sorted([*checkpoint.glob(".metadata"), *checkpoint.glob("*/.metadata")]):
        try:
            with path.open("rb") as file:
                _ShardTableUnpickler(file).load()
        except Exception as error:
            name = path.relative_to(checkpoint).as_posix()
            raise CheckpointError(f"{name} is refused or damaged: {reason(error)}") from error


def _read_random_states(accelerator: Accelerator, checkpoint: Path) -> dict | None:
    """This process's random states; None, with a warning, where another number of processes saved them."""
    count = _read_record(checkpoint).get(SAVED, {}).get("num_processes")
    count = count or len(list(checkpoint.glob(RANDOM_FILE.format("*"))))
    path = checkpoint / RANDOM_FILE.format(accelerator.process_index)
    if count and count != accelerator.num_processes:
        logger.warning(
            "%s was saved by %d processes, these are %d: dropout draws other numbers from here on",
            checkpoint.name,
            count,
            accelerator.num_processes,
        )
        return None
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing: without it the run would not continue as it was")
    try:
        states = load(path, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path.name} is refused or damaged: {reason(error)}") from error
    if not isinstance(states, dict):
        raise CheckpointError(f"{path.name} holds no random states")
    return states


def _set_random_states(accelerator: Accelerator, states: dict) -> None:
    """What accelerate does, which passes over states that it cannot set."""
    try:
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])
        torch.set_rng_state(states["torch_manual_seed"])
        if accelerator.device.type == "cuda":
            of_devices = states.get("torch_cuda_manual_seed")
            if of_devices is None:
                logger.warning("the checkpoint was saved without a GPU: dropout draws other numbers from here on")
            else:
                index = accelerator.device.index or 0
                torch.cuda.set_rng_state(of_devices[index], accelerator.device)
    except Exception as error:
        raise CheckpointError(f"the random states are damaged: {reason(error)}") from error


def _find_unreadable(checkpoint: Path) -> str | None:
    """Which file that every run reads cannot be read, and why."""
    for path in sorted(path for pattern in READ_BY_ALL for path in checkpoint.glob(pattern)):
        if not path.is_file():
            return f"{path.name} is no regular file"
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            else:
                load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            return f"{path.name} is refused or damaged: {reason(error)}"
    return None


def reason(error: BaseException) -> str:
    """What a reader of files found wrong, on one line, without torch's advice to read them unsafely."""
    text = " ".join(str(error).split())
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"it wants to run or build {refused[1]}, and a checkpoint holds tensors and plain values alone"
    text = text.rpartition("WeightsUnpickler error: ")[2]
    text = re.split(" Check the documentation| Please (?:use|file) ", text)[0]
    return f"{type(error).__name__}: {text[:200]}".removeprefix("CheckpointError: ").rstrip(": .")
