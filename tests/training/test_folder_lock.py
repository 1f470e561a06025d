"""One run at a time in a folder: the lock of another process, and of one that was killed."""

import errno
import json
import multiprocessing
import os
import socket
from datetime import datetime

import pytest

from dar_hf.training import folder_lock
from dar_hf.training.folder_lock import LOCK_FILE, FolderInUseError, lock_folder, unlock_folder


def hold(folder, ready, leave):
    lock_folder(folder)
    ready.set()
    leave.wait(60)


@pytest.fixture
def other(tmp_path):
    """Another process that has claimed the folder."""
    context = multiprocessing.get_context("fork")  # nothing to import
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, leave))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_another_process_is_named(tmp_path, other):
    with pytest.raises(FolderInUseError, match=f"process {other.pid} on {socket.gethostname()}, since 20"):
        lock_folder(tmp_path)
    with pytest.raises(FolderInUseError):  # looking changed nothing
        lock_folder(tmp_path)


def test_a_killed_process_leaves_no_lock(tmp_path, other):
    other.kill()
    other.join()
    assert (tmp_path / LOCK_FILE).exists()
    lock_folder(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    unlock_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_may_claim_again(tmp_path):
    lock_folder(tmp_path)
    lock_folder(tmp_path / ".." / tmp_path.name)
    unlock_folder(tmp_path)
    unlock_folder(tmp_path)
    lock_folder(tmp_path)
    unlock_folder(tmp_path)


def no_locks(file, flags):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_without_locks_a_running_process_of_this_machine_is_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folder_lock.fcntl, "lockf", no_locks)
    holder = {"pid": os.getppid(), "host": socket.gethostname(), "since": datetime.now().isoformat(" ", "seconds")}
    (tmp_path / LOCK_FILE).write_text(json.dumps(holder))
    with pytest.raises(FolderInUseError, match=f"process {os.getppid()}"):
        lock_folder(tmp_path)
    # there are not so many; one that has got the number of a killed run
    for gone in ({"pid": 1 << 30}, {"since": "2001-01-01 00:00:00"}):
        (tmp_path / LOCK_FILE).write_text(json.dumps(holder | gone))
        lock_folder(tmp_path)
        assert "file system without locks" in caplog.text
        unlock_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_file_that_says_nothing_is_no_claim(tmp_path, content, monkeypatch):
    (tmp_path / LOCK_FILE).write_text(content)
    monkeypatch.setattr(folder_lock, "fcntl", None)  # Windows
    lock_folder(tmp_path)
    unlock_folder(tmp_path)


def test_a_link_by_the_locks_name_is_not_followed(tmp_path):
    """What it leads to would be emptied."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / LOCK_FILE).symlink_to("victim")
    with pytest.raises(OSError, match="symbolic link"):
        lock_folder(tmp_path)
    assert (tmp_path / "victim").read_text() == "mine"
