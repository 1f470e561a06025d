"""Files and folders are complete or absent, whatever happens while they are written."""

import json
import os

import pytest

from dar_hf.files import flush, new_folder, write_json


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
    with pytest.raises(FileExistsError), new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("ours")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").write_text("theirs")
    assert (tmp_path / "a" / "x").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


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
