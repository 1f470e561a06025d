"""What a run is resumed from, and whether that is of the same run."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from .arguments import LoopArguments
from .checkpoints import CheckpointError, find_checkpoint, has_checkpoints
from .run_folder import CHECKPOINTS, is_finished, read_record
from .stage import Stage

logger = logging.getLogger(__name__)

LATER = ("data", "layout")  # parts of a run's description that earlier versions did not note


class ResumeError(ValueError):
    """There is no checkpoint to resume from, it is damaged, or it belongs to another run."""


def describe_run(
    stage: Stage, args: LoopArguments, accelerator: Accelerator, is_sharded: bool, images_per_step: int
) -> dict:
    """What makes the run the one it is; a resumed run must agree in all of it."""
    return {
        "stage": stage.name,
        "model": stage.describe(),
        "layout": accelerator.distributed_type.value if is_sharded else "copies",
        "seed": args.seed,
        "num_samples": None if args.streaming else len(stage.samples),  # type: ignore[arg-type]
        "images_per_step": images_per_step,
        "data": stage.describe_data(),
        "max_train_steps": args.max_train_steps,
    }


def has_finished(folder: Path, description: dict) -> bool:
    """Whether an earlier run has done all steps of this one and left its model.

    Raises:
        ResumeError: if it was another run, or did fewer steps and left no checkpoint to go on from.
    """
    if not is_finished(folder):
        return False
    record = read_record(folder)
    if description["max_train_steps"] == record["max_train_steps"]:
        check_same_run(folder, record, description)
        return True
    if not has_checkpoints(folder / CHECKPOINTS):
        raise ResumeError(
            f"cannot resume {folder}: the run finished after {record['max_train_steps']} steps and left no "
            "checkpoint. To go on from its model, give it to another run by --init_from."
        )
    return False


def choose_checkpoint(folder: Path, name: str) -> Path:
    """The complete checkpoint in ``folder`` that ``name`` or "latest" stands for.

    Complete checkpoints are known by reading all of them, so only the main process looks; all call this together.

    Raises:
        ResumeError: if there is none.
    """
    found: list[Any] = [None, None]  # the checkpoint, or what is wrong
    if PartialState().is_main_process:
        try:
            found[0] = find_checkpoint(folder, name)
        except CheckpointError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    checkpoint, problem = found
    if checkpoint is None:
        raise ResumeError(problem)
    return checkpoint


@contextmanager
def resuming_from(checkpoint: Path) -> Iterator[None]:
    """Inside, what is wrong with the checkpoint ends as a `ResumeError` that names it."""
    try:
        yield
    except CheckpointError as error:
        raise ResumeError(f"cannot resume {checkpoint}: {str(error).rstrip('.')}.") from error


def check_same_run(place: Path, found: dict, description: dict) -> None:
    """Reject what another run left. A longer run is the same; a warning says what its length changes.

    Args:
        place: where ``found`` was read, for messages.
        found: the description of the run that left it.
        description: that of this run.

    Raises:
        ResumeError: naming what differs.
    """
    found = _without_version(found)
    for name, value in description.items():
        if name in LATER and name not in found:
            if name == "data":
                logger.warning("%s does not say what data it was trained on: make sure that they are these", place)
            continue
        value = json.loads(json.dumps(value))  # tuples come back as lists
        if name != "max_train_steps" and value != found.get(name):
            raise ResumeError(f"cannot resume {place}: {_difference(name, found.get(name), value)}.")
    before = found.get("max_train_steps")
    now = description["max_train_steps"]
    if type(before) is not int or now < max(before, found.get("step", 0)):
        difference = _difference("max_train_steps", before, now)
        raise ResumeError(f"cannot resume {place}: {difference}. A run can be made longer, not shorter.")
    if now > before:
        logger.warning(
            "max_train_steps was %d and is now %d: what follows the length of the run (the learning rate's decay, "
            "the moving of dead codes) follows the new one from here on",
            before,
            now,
        )


def _without_version(description: dict) -> dict:
    """What a run left, without the version of transformers, which earlier versions noted and which may change."""
    model = description.get("model")
    if not isinstance(model, dict):
        return description
    return description | {"model": {name: value for name, value in model.items() if name != "transformers_version"}}


def _difference(name: str, old: Any, new: Any) -> str:
    """What changed, by name; of dictionaries only the entries that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{name} was {old} and is now {new}"
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{name} {key} was {old.get(key)} and is now {new.get(key)}" for key in changed)
