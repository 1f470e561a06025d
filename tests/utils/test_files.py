"""Files and folders are complete or absent, whatever happens while they are written."""

import errno
import json
import os
from pathlib import Path

import pytest

from dar_hf.utils.files import flush, new_folder, read_object, resolve_inside, write_json


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_write_json_never_shows_a_half_written_file(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})
    seen = []

    def interrupted(source, target):
        seen.append(json.loads((tmp_path / "a.json").read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"x": 2})
    assert seen == [{"x": 1}] and json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_new_folder(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == plain.stat().st_mode


def test_new_folder_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with new_folder("~/a") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a" / "file").is_file()


def test_new_folder_vanishes_when_the_block_fails(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_new_folder_takes_an_empty_one_and_no_other(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
    for taken in (tmp_path / "empty", tmp_path / "empty" / "x"):
        with pytest.raises(FileExistsError, match="not an empty folder"), new_folder(taken):
            raise AssertionError("the block must not run")
    assert (tmp_path / "empty" / "x").read_text() == "1"


def test_new_folder_behind_a_link(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with new_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "file").read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "empty"}


def test_new_folder_does_not_replace_what_came_meanwhile(tmp_path):
    with pytest.raises(FileExistsError, match="not lost: those that are not in .*/a yet are in") as caught:  # noqa: SIM117
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("ours")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "x").write_text("theirs")
    assert (tmp_path / "a" / "x").read_text() == "theirs"
    assert (kept(caught) / "x").read_text() == "ours"


def kept(caught):
    """The folder that the message says the finished files are in."""
    return Path(str(caught.value).rpartition(" are in ")[2].removesuffix("."))


def write_model(folder):
    (folder / "model_index.json").write_text("{}")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "config.json").write_text("{}")


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """A folder that is the root of a volume: it can neither be removed, nor renamed, nor be put in another's place."""
    volume = tmp_path / "volume"
    volume.mkdir()

    def guard(name):
        call = getattr(os, name)

        def guarded(*paths, **options):
            if any(Path(path) == volume for path in paths):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(volume))
            # the volume is a file system of its own
            if len(paths) == 2 and len({Path(path).is_relative_to(volume) for path in paths}) == 2:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(paths[0]), None, str(paths[1]))
            return call(*paths, **options)

        monkeypatch.setattr(os, name, guarded)

    for name in ("rename", "replace", "rmdir"):
        guard(name)
    return volume


@pytest.mark.parametrize("entries", [[], ["lost+found"], [".unfinished-x"]])
def test_new_folder_on_a_volume(mounted, tmp_path, entries):
    for entry in entries:
        (mounted / entry).mkdir()
    before = mounted.stat()
    with new_folder(mounted) as folder:
        write_model(folder)
        assert not (mounted / "model_index.json").exists()
    assert {path.name for path in mounted.iterdir()} == {"model_index.json", "tokenizer", *entries}
    assert (mounted.stat().st_ino, mounted.stat().st_mode) == (before.st_ino, before.st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_new_folder_where_the_shell_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(".") as folder:
        write_model(folder)
    assert sorted(os.listdir(".")) == ["model_index.json", "tokenizer"]  # not what was deleted under the shell


def test_new_folder_on_a_volume_vanishes_when_the_block_fails(mounted):
    with pytest.raises(RuntimeError), new_folder(mounted) as folder:
        write_model(folder)
        raise RuntimeError
    assert list(mounted.iterdir()) == []


def test_what_cannot_be_moved_is_kept(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    rename = os.rename

    def fail_late(source, target):
        if Path(source).name == "model_index.json":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_late)
    with pytest.raises(OSError, match="Input/output error The finished files are not lost") as caught:  # noqa: SIM117
        with new_folder(tmp_path / "out") as folder:
            write_model(folder)
    assert [path.name for path in kept(caught).iterdir()] == ["model_index.json"]
    assert (tmp_path / "out" / "tokenizer" / "config.json").is_file()  # the index is last: no half model


def test_what_cannot_take_its_name_is_kept(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Invalid cross-device link") as caught, new_folder(tmp_path / "out") as folder:
        write_model(folder)
    assert (kept(caught) / "tokenizer" / "config.json").is_file()


# Links


def test_resolve_inside(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("x")
    (tmp_path / "outside").write_text("x")
    for name, target in (("in", "file"), ("out", "../outside"), ("nothing", "none"), ("loop", "loop"), ("up", "..")):
        (folder / name).symlink_to(target)
    (tmp_path / "link").symlink_to("folder")  # the folder itself may be behind one
    (tmp_path / "folder2").mkdir()
    (folder / "sibling").symlink_to("../folder2")
    assert resolve_inside(folder / "file", folder) == (folder / "file").resolve()
    assert resolve_inside(tmp_path / "link" / "in", tmp_path / "link") == (folder / "file").resolve()
    for name in ("out", "up", "sibling"):
        with pytest.raises(ValueError, match=f"{name} is a link that leads out of the folder, to .*cp -rL"):
            resolve_inside(folder / name, folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    (folder / "hidden").symlink_to(".git/config")
    with pytest.raises(ValueError, match="hidden is a link that leads to a hidden file, .*git/config"):
        resolve_inside(folder / "hidden", folder)
    for name in ("nothing", "loop", "missing"):
        with pytest.raises(ValueError, match=f"{name} is a link that leads to nothing"):
            resolve_inside(folder / name, folder)


def test_files_and_folders_are_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    (tmp_path / "file").write_text("x")
    flush(tmp_path / "file")
    flush(tmp_path)
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    flush(tmp_path)  # not every system flushes folders
    with pytest.raises(OSError, match="no space"):
        flush(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1}x'])
def test_what_holds_no_options_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json is damaged: it holds"):
        read_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(ValueError, match="a.json is a git-lfs pointer"):
        read_object(tmp_path / "a.json")
