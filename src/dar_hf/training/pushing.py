"""Uploads of a run to the Hub: of the finished model, and of an unfinished one while training goes on."""

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub import model_files, prepare_repository, push_folder
from ..utils.errors import one_line
from .arguments import LoopArguments

logger = logging.getLogger(__name__)

PUSHING = ".pushing"  # in a run's folder: what is being uploaded


class PushError(RuntimeError):
    """The Hub took nothing, before training or after it; the message says why, and where the finished model is."""


def hub_repository(args: LoopArguments) -> str:
    """The repository that a run is pushed to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def claim_repository(args: LoopArguments, saved_class: str) -> None:
    """Create the run's repository, so that what would reject the finished model does so before training.

    Raises:
        PushError: if it cannot be written, or holds another kind of model, or a link in the output folder leads out
            of it.
    """
    try:
        if Path(args.output_dir).is_dir():
            model_files(args.output_dir)
        private = args.hub_private_repo or None
        args.hub_model_id = prepare_repository(hub_repository(args), saved_class, private=private)
    except Exception as error:  # also what the transport raises
        raise PushError(f"cannot push to {hub_repository(args)}: {one_line(error)}") from error


def push_finished(args: LoopArguments) -> None:
    """Upload the finished model.

    Raises:
        PushError: with the command that tries again.
    """
    try:
        url = push_folder(args.output_dir, hub_repository(args), f"Train {args.max_train_steps} steps")
    except Exception as error:
        raise PushError(
            f"the finished model is in {args.output_dir}, but not on the Hub: {one_line(error)} "
            f"To push it again: python examples/push_to_hub.py {args.output_dir} {hub_repository(args)}"
        ) from error
    print(f"pushed to {url.repo_url}")


class BackgroundPush:
    """Uploads what a run has so far while it goes on. Nothing that goes wrong here ends the run: it is a warning.

    Args:
        folder: the run's folder; what is to be uploaded waits in a hidden one inside.
        upload: called with that hidden folder and a commit message, in its own thread.
    """

    def __init__(self, folder: Path, upload: Callable[[Path, str], Any]):
        self.folder = folder / PUSHING
        self.upload = upload
        self._thread: threading.Thread | None = None

    def start(self, message: str, write: Callable[[Path], None]) -> None:
        """Have ``write`` fill the folder, and upload it unless the last upload is still under way."""
        if self._thread is not None and self._thread.is_alive():
            logger.warning("%s is not pushed to the Hub: the last upload is still under way", message)
            return
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            write(self.folder)
        except Exception as error:
            self._give_up(message, error)
            return
        self._thread = threading.Thread(target=self._run, args=(message,), daemon=True)
        self._thread.start()

    def _run(self, message: str) -> None:
        try:
            self.upload(self.folder, message)
            shutil.rmtree(self.folder, ignore_errors=True)
        except Exception as error:  # also what the transport raises
            self._give_up(message, error)

    def _give_up(self, message: str, error: Exception) -> None:
        logger.warning("%s is not pushed to the Hub: %s", message, one_line(error))
        shutil.rmtree(self.folder, ignore_errors=True)

    def join(self) -> None:
        """Wait for an upload that is under way."""
        if self._thread is not None:
            self._thread.join()


def push_in_background(args: LoopArguments) -> BackgroundPush:
    """Uploads of the unfinished run to its repository."""
    return BackgroundPush(
        Path(args.output_dir), lambda folder, message: push_folder(folder, hub_repository(args), message)
    )
