"""Uploads of an unfinished run, beside its training."""

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.errors import one_line

logger = logging.getLogger(__name__)

PUSHING = ".pushing"  # in a run's folder: what is being uploaded


class BackgroundPush:
    """Uploads what a run has so far while it goes on. Nothing that goes wrong here ends the run: it is a warning.

    Args:
        folder: the run's folder; what is to be uploaded waits in a hidden one inside.
        upload: called with that hidden folder and a commit message, in a thread of its own.
    """

    def __init__(self, folder: Path, upload: Callable[[Path, str], Any]):
        self.folder, self.upload = folder / PUSHING, upload
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
