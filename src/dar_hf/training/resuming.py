"""Whether what a run is resumed from is of the same run."""

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LATER = ("data", "layout")  # parts of a run's description that earlier versions did not note


class ResumeError(ValueError):
    """There is no checkpoint to resume from, it is damaged, or it belongs to another run."""


def check_same_run(place: Path, found: dict, description: dict) -> None:
    """Refuse what another run left. A longer run is the same; a warning says what its length changes.

    Args:
        place: where ``found`` was read, for messages.
        found: the description of the run that left it.
        description: that of this run.

    Raises:
        ResumeError: naming what differs.
    """
    for name, value in description.items():
        if name in LATER and name not in found:
            if name == "data":
                logger.warning("%s does not say what data it was trained on: make sure that they are these", place)
            continue
        value = json.loads(json.dumps(value))  # tuples come back as lists
        if name != "max_train_steps" and value != found.get(name):
            raise ResumeError(f"cannot resume {place}: {_difference(name, found.get(name), value)}.")
    before, now = found.get("max_train_steps"), description["max_train_steps"]
    if type(before) is not int or now < max(before, found.get("step", 0)):
        difference = _difference("max_train_steps", before, now)
        raise ResumeError(f"cannot resume {place}: {difference}. A run can be made longer, not shorter.")
    if now > before:
        logger.warning(
            "max_train_steps was %d and is now %d: what follows the length of the run (the learning rate's decay, "
            "the revival of codes) follows the new one from here on",
            before,
            now,
        )


def _difference(name: str, old: Any, new: Any) -> str:
    """What changed, by name; of dictionaries only the entries that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{name} was {old} and is now {new}"
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{name} {key} was {old.get(key)} and is now {new.get(key)}" for key in changed)
