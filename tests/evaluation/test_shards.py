"""Shards: complete or absent, and nobody else's."""

import json

import pytest
import torch

from dar_hf.evaluation.shards import ShardFolder


def compute(indices):
    values = torch.arange(indices.start, indices.stop)
    tensors = {"values": values, "view": values[:1].expand(2)}
    return tensors | ({"first": values[:2]} if indices.start == 0 else {})


@pytest.fixture
def shards(tmp_path, process):
    folder = ShardFolder(tmp_path / "shards", {"seed": 1}, 10, 4)
    folder.claim(overwrite=False)
    folder.fill(process(), compute, "title")
    return folder


def test_parts_come_in_order(shards):
    assert [part.tolist() for part in shards.parts("values")] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert shards.rows("values").tolist() == list(range(10))
    assert shards.has("values") and not shards.has("others")
    assert [part.tolist() for part in shards.parts("first")] == [[0, 1]]  # only where it is


def test_processes_share_the_shards(tmp_path, process):
    folder = ShardFolder(tmp_path / "shards", {}, 10, 4)
    folder.claim(overwrite=False)
    made = []
    for index in (1, 0):
        folder.fill(process(index, 2), lambda indices: made.append(indices.start) or compute(indices), "title")
    assert made == [4, 0, 8]


def test_only_what_is_missing_or_damaged_or_of_another_length_is_made(shards, process):
    shards._path(0).unlink()
    shards._path(1).write_bytes(b"damaged")
    made = []
    shards.fill(process(), lambda indices: made.append(indices.start) or compute(indices), "title")
    assert made == [0, 4]
    longer = ShardFolder(shards.folder, {"seed": 1}, 11, 4)
    longer.claim(overwrite=False)
    assert [longer.is_done(i) for i in range(3)] == [True, True, False]


def test_a_failure_leaves_no_half_shard(tmp_path, process):
    folder = ShardFolder(tmp_path / "shards", {}, 4, 4)
    folder.claim(overwrite=False)

    def failing(indices):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        folder.fill(process(), failing, "title")
    assert not folder.is_done(0) and [path.name for path in folder.folder.iterdir()] == ["settings.json"]


def test_a_folder_belongs_to_its_settings(shards):
    other = ShardFolder(shards.folder, {"seed": 2}, 10, 4)
    with pytest.raises(ValueError, match="seed was 1, now 2"):
        other.claim(overwrite=False)
    with pytest.raises(ValueError, match="shard_size was 4, now 5"):
        ShardFolder(shards.folder, {"seed": 1}, 10, 5).claim(overwrite=False)
    assert shards.is_done(0)
    other.claim(overwrite=True)
    assert not shards.is_done(0) and json.loads((shards.folder / "settings.json").read_text())["seed"] == 2


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="files that are no evaluation's"):
        ShardFolder(tmp_path, {}, 10, 4).claim(overwrite=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
