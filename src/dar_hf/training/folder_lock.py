"""One run at a time in a folder: a lock of the operating system's, which ends with the process however it ends."""

import atexit
import errno
import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]  # comes with accelerate

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
# the file is emptied: not what a link by its name leads to
OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)

_held: dict[tuple[int, Path], IO[str]] = {}  # by process, since a fork inherits the table and not the locks


class FolderInUseError(ValueError):
    """Another process is writing into a folder; the message says which."""


def lock_folder(folder: Path) -> None:
    """Claim a folder for this process, until `unlock_folder` or its end. What it holds already it may claim again.

    On file systems without locks, and on Windows, only a process of the same machine that still runs is noticed.

    Raises:
        FolderInUseError: if another process has claimed it.
        OSError: if the folder cannot be written.
    """
    key = (os.getpid(), folder.resolve())
    if key in _held:
        return
    path = folder / LOCK_FILE
    while True:
        file = os.fdopen(os.open(path, OPEN_FLAGS, 0o666), "a+", encoding="utf-8")
        try:
            _lock(file, folder)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:  # removed by the process that held it, between opening and locking
            pass
        except BaseException:
            file.close()
            raise
        file.close()
    file.truncate(0)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
    json.dump(holder, file)
    file.flush()
    _held[key] = file


def unlock_folder(folder: Path) -> None:
    """Give a folder back; nothing where this process does not hold it."""
    file = _held.pop((os.getpid(), folder.resolve()), None)
    if file is not None:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        file.close()


@atexit.register
def _unlock_all() -> None:
    for process, folder in list(_held):
        if process == os.getpid():
            unlock_folder(folder)


def _lock(file: IO[str], folder: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        # a lock of the process's: its data workers do not inherit it, and so cannot hold it longer than the process
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read_holder(file)
        refused = error.errno in (errno.EACCES, errno.EAGAIN)
        if refused or _is_alive(holder):
            raise FolderInUseError(
                f"another run is writing into {folder}: process {holder.get('pid', '?')} on "
                f"{holder.get('host', 'another machine')}, since {holder.get('since', '?')}. Wait for it, or choose "
                "another output_dir."
            ) from error
        logger.warning("%s is on a file system without locks: start no other run in it (%s)", folder, error)


def _read_holder(file: IO[str]) -> dict:
    file.seek(0)
    try:
        holder = json.loads(file.read() or "{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(holder: dict) -> bool:
    """Whether another process of this machine claimed the folder, and runs: not a later one of the same number."""
    pid = holder.get("pid")
    if type(pid) is not int or pid == os.getpid() or holder.get("host") != socket.gethostname():
        return False
    try:
        started = datetime.fromtimestamp(psutil.Process(pid).create_time())
        return started.isoformat(" ", "seconds") <= str(holder.get("since"))
    except (psutil.Error, ValueError):  # negative numbers
        return False
