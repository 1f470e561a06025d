"""The output folder of a run: what another run or person left there, and how the finished model gets into it.

A run removes only what a run of this package wrote, and only when it is told to start over. What it does not know and
would write over is rejected before training.
"""

import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from ..data.sources import DIGITS
from ..evaluation import read_report
from ..evaluation.report import REPORT_FILE
from ..hub.run_cards import EVALUATIONS, PICTURES
from ..utils.files import flush, read_object, saved_class
from ..utils.pictures import read_history
from .arguments import LoopArguments
from .checkpoints import CHECKPOINT_PREFIX, RANDOM_FILE, STATE_FILE, has_checkpoints
from .folder_lock import lock_folder, unlock_folder
from .pushing import PUSHING

logger = logging.getLogger(__name__)

MODEL_INDICES = ("model_index.json", "config.json")  # say what a finished folder holds
CHECKPOINTS = "checkpoints"
HISTORY = "history.jsonl"
RECORD = "training.json"
SAVING = ".saving"  # the finished model, on its way
CARD = "README.md"
COMPONENTS = ("tokenizer", "transformer", "scheduler")  # folders of a pipeline
OWN_PICTURES = ("loss.png", "reconstructions.png", "samples.png")
# what a run writes before it takes its name
ASIDE = (
    SAVING,
    PUSHING,
    *(f"{name}.tmp" for name in (HISTORY, RECORD, CARD)),
    *(f".{name}.tmp" for name in OWN_PICTURES),
)
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)[-.\w]*\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
)


def claim_output_dir(args: LoopArguments, expected_class: str) -> Path:
    """The output folder, if this run may write there; locked for this process. Of several the main one calls this.

    Raises:
        FolderInUseError: if another run is writing there.
        ValueError: if it holds another kind of model, an earlier run that is neither resumed nor overwritten, or files
            that no run wrote and this one would write over; if it holds, or lies in, what the run reads; or if it
            cannot be written.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file.")
    _check_sources(args, folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written: {error.strerror or error}.") from error
    try:
        _check_model(folder, expected_class)
        _check_earlier_run(args, folder)
        _check_in_the_way(folder, expected_class, args)
        if args.overwrite_output_dir and not _continues(args, folder):
            remove_run(folder)
    except BaseException:
        unlock_folder(folder)
        if is_new:
            folder.rmdir()
        raise
    return folder


def _check_sources(args: LoopArguments, folder: Path) -> None:
    """Reject an output folder in which the run would write over what it reads, or among the images that it reads."""
    target = folder.resolve()
    written = [target / name for name in (*COMPONENTS, CHECKPOINTS, EVALUATIONS, SAVING)]
    for option in ("tokenizer", "init_from", "dataset_name", "codes"):
        value = getattr(args, option, None)
        if not value or value == DIGITS or not Path(value).expanduser().exists():
            continue
        source = Path(value).expanduser().resolve()
        is_data = option in ("dataset_name", "codes")
        if source == target or (is_data and target.is_relative_to(source)):
            raise ValueError(
                f"output_dir {folder} is, or lies in, what --{option} reads ({value}): choose another one."
            )
        if any(source.is_relative_to(path) for path in written):
            raise ValueError(
                f"--{option} {value} lies where this run writes its own {source.relative_to(target).parts[0]}/: "
                f"choose another output_dir than {folder}."
            )


def _check_model(folder: Path, expected_class: str) -> None:
    for name in MODEL_INDICES:
        if (folder / name).is_file():
            found = saved_class(_read_index(folder / name))
            if found != expected_class:
                raise ValueError(
                    f"output_dir {folder} holds a {found}, not a {expected_class}: choose another folder."
                )
            return


def _read_index(path: Path) -> dict:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _continues(args: LoopArguments, folder: Path) -> bool:
    """Whether the run goes on from what is in the folder, or may: ``latest`` also serves a first start."""
    name = args.resume_from_checkpoint
    if not name:
        return False
    if name == "latest":
        return not args.overwrite_output_dir or has_checkpoints(folder / CHECKPOINTS) or is_finished(folder)
    path = next((path for path in (Path(name), folder / CHECKPOINTS / name) if path.is_dir()), None)
    return path is None or path.resolve().parent == (folder / CHECKPOINTS).resolve()


def _check_earlier_run(args: LoopArguments, folder: Path) -> None:
    has_model = any((folder / name).is_file() for name in MODEL_INDICES)
    has_run = holds_run(folder)
    if args.overwrite_output_dir or not (has_model or has_run or _reports(folder)):
        return
    if _continues(args, folder):
        if has_run:
            return
        raise ValueError(
            f"output_dir {folder} holds a model, but no run to resume: pass --overwrite_output_dir to replace it, or "
            "choose another folder."
        )
    raise ValueError(
        f"output_dir {folder} holds an earlier run or model: pass --resume_from_checkpoint latest to continue it, "
        "--overwrite_output_dir to start over, or choose another folder."
    )


def _check_in_the_way(folder: Path, expected_class: str, args: LoopArguments) -> None:
    """Reject what no run of this package wrote and this one would write over."""
    found = [folder / name for name in _foreign_parts(folder, expected_class)]
    if not holds_run(folder):
        of_a_run = (HISTORY, RECORD, *OWN_PICTURES, SAVING, PUSHING)
        found += [path for name in of_a_run if os.path.lexists(path := folder / name)]
    # a run makes no links: a stranger's would lead what it writes out of the folder
    found += [path for name in ASIDE if (path := folder / name).is_symlink()]
    for name in (CHECKPOINTS, EVALUATIONS, HISTORY, RECORD, CARD, *OWN_PICTURES, *MODEL_INDICES):
        path = folder / name
        if os.path.lexists(path) and path.is_dir() != (name in (CHECKPOINTS, EVALUATIONS)):
            found.append(path)
    found += _foreign_checkpoints(folder, _continues(args, folder))
    if found:
        names = ", ".join(str(path.relative_to(folder)) for path in dict.fromkeys(found))
        raise ValueError(
            f"output_dir {folder} holds what no run of this package wrote, and this one would write over it: {names}. "
            "Move it away, or choose another folder."
        )


def _foreign_parts(folder: Path, expected_class: str) -> list[str]:
    """Where parts of the model would go, and something else is: no part of a model that a run saved here as a whole.

    A save that was cut off has left the new index in a hidden folder.
    """
    indices = [
        path for place in (folder, folder / SAVING) for name in MODEL_INDICES if (path := place / name).is_file()
    ]
    if expected_class != "DARPipeline":
        return [] if indices else [path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name)]
    known: set[str] = set().union(*(_read_index(path) for path in indices))
    return [name for name in COMPONENTS if os.path.lexists(folder / name) and not _is_part(folder / name, known)]


def _is_part(path: Path, known: set[str]) -> bool:
    own_run = any((path / name).exists() for name in (CHECKPOINTS, HISTORY, RECORD))
    return path.name in known and path.is_dir() and not path.is_symlink() and not own_run


def holds_run(folder: Path) -> bool:
    """Whether a run of this package left its record, history or checkpoints here."""
    if "arguments" in read_record(folder):
        return True
    history = folder / HISTORY
    try:
        if history.is_file() and all("step" in line for line in read_history(history)):
            return True
    except (OSError, ValueError, TypeError, RecursionError):
        logger.debug("%s is no history of a run", history)
    return bool(_own_checkpoints(folder))


def _own_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that a run of this package wrote, damaged or not."""
    return [path for path in _numbered(folder) if _is_own(path)]


def _foreign_checkpoints(folder: Path, continues: bool) -> list[Path]:
    """What is in the place of checkpoints; a run that ``continues`` passes over those that have lost their record."""
    found = [path for path in _numbered(folder) if not _is_own(path) and not _is_empty(path)]
    return [path for path in found if not (continues and _has_random_states(path))]


def _numbered(folder: Path) -> list[Path]:
    paths = sorted((folder / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*"))
    return [path for path in paths if path.name.removeprefix(CHECKPOINT_PREFIX).isdecimal()]


def _is_own(checkpoint: Path) -> bool:
    record = checkpoint / STATE_FILE
    try:
        return "stage" in read_object(record)
    except (OSError, ValueError):  # other libraries have a file of this name, and not next to random states
        return record.is_file() and _has_random_states(checkpoint)


def _has_random_states(checkpoint: Path) -> bool:
    return any(checkpoint.glob(RANDOM_FILE.format("*")))


def read_record(folder: Path) -> dict:
    """What a finished run wrote about itself; empty where there is none."""
    try:
        return read_object(folder / RECORD)
    except (OSError, ValueError):
        return {}


def read_kept_history(path: Path, last_step: int) -> list[dict]:
    """Lines of a history up to a step; what a crash left unreadable is left out, with a warning."""
    kept = []
    unreadable = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            if line["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            unreadable += 1
    if unreadable:
        logger.warning("%d lines of %s cannot be read and are left out", unreadable, path)
    return kept


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end here, and its model is there."""
    steps = read_record(folder).get("max_train_steps")
    has_model = any((folder / name).is_file() for name in MODEL_INDICES)
    return has_model and steps is not None and read_record(folder).get("trained_steps", steps) == steps


def _reports(folder: Path) -> list[Path]:
    """Folders of evaluations that this package wrote."""
    found = []
    for path in folder.glob(f"{EVALUATIONS}/*/{REPORT_FILE}"):
        try:
            read_report(path)
            found.append(path.parent)
        except ValueError:
            logger.debug("%s is no report of this package", path)
    return found


def remove_run(folder: Path) -> None:
    """Remove an earlier run's checkpoints, history, record and evaluations.

    The model stays until the new one is there.
    """
    for checkpoint in _own_checkpoints(folder):
        if checkpoint.is_symlink():
            checkpoint.unlink()
        else:
            shutil.rmtree(checkpoint)
    for left in (folder / CHECKPOINTS).glob(f".{CHECKPOINT_PREFIX}*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for report in _reports(folder):
        for name in (REPORT_FILE, *PICTURES):
            (report / name).unlink(missing_ok=True)
        _remove_empty(report)
    for path in (folder / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*"):
        _remove_empty(path)
    for name in (CHECKPOINTS, EVALUATIONS):
        _remove_empty(folder / name)
    for name in (HISTORY, RECORD):
        (folder / name).unlink(missing_ok=True)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # of a link or a mounted volume, which stay
        folder.rmdir()


def install_model(saved: Path, folder: Path) -> None:
    """Move a finished model into the output folder, its index last: there never is an index over mixed parts.

    Files of an earlier model go as the new ones come; other files in its folders stay.
    """
    for path in saved.rglob("*"):
        flush(path)
    for name in MODEL_INDICES:
        if (saved / name).is_file():
            (folder / name).unlink(missing_ok=True)
    _replace_files(saved, folder)
    saved.rmdir()
    flush(folder)


def _replace_files(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    if any(WEIGHTS.fullmatch(path.name) for path in source.iterdir()):
        for path in target.iterdir():  # shards and files of other forms, which might be read instead of the new ones
            if WEIGHTS.fullmatch(path.name) and path.is_file():
                path.unlink()
    for path in sorted(source.iterdir(), key=lambda path: path.name in MODEL_INDICES):
        if path.is_dir():
            _replace_files(path, target / path.name)
            path.rmdir()
        else:
            os.replace(path, target / path.name)
