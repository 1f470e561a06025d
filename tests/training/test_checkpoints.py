"""Checkpoints are complete or absent, whatever happens while they are written."""

import resource
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from dar_hf.training.checkpoints import (
    STATE_FILE,
    SaveError,
    find_checkpoint,
    list_checkpoints,
    read_state,
    save_checkpoint,
    saving,
)

from .helpers import fresh_process


@pytest.fixture
def accelerator():
    with fresh_process():
        yield Accelerator(cpu=True)


def fake_checkpoint(folder, name, complete=True):
    (folder / name).mkdir(parents=True)
    if complete:
        (folder / name / STATE_FILE).write_text('{"step": 4}')
    return folder / name


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


# Folders


def test_checkpoints_are_listed_by_step(tmp_path):
    for step in (100, 20, 3):
        fake_checkpoint(tmp_path, f"checkpoint-{step}")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert list_checkpoints(tmp_path / "nothing") == []


def test_half_written_checkpoints_are_never_picked_up(tmp_path):
    fake_checkpoint(tmp_path, "checkpoint-4")
    fake_checkpoint(tmp_path, ".checkpoint-8.tmp")
    fake_checkpoint(tmp_path, "checkpoint-12", complete=False)
    assert names(tmp_path) == ["checkpoint-4"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-4"
    with pytest.raises(ValueError, match="checkpoint-12 is no complete checkpoint"):
        find_checkpoint(tmp_path, "checkpoint-12")


def test_other_folders_are_left_out(tmp_path):
    fake_checkpoint(tmp_path, "checkpoint-4")
    fake_checkpoint(tmp_path, "checkpoint-4-copy")
    assert names(tmp_path) == ["checkpoint-4"]


def test_find_checkpoint(tmp_path, monkeypatch):
    paths = [fake_checkpoint(tmp_path / "run", f"checkpoint-{step}") for step in (5, 10)]
    assert find_checkpoint(tmp_path / "run", "latest") == paths[1]
    assert find_checkpoint(tmp_path / "run", "checkpoint-5") == paths[0]
    assert find_checkpoint(tmp_path / "elsewhere", str(paths[0])) == paths[0]


def test_find_checkpoint_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to resume from in .*run"):
        find_checkpoint(tmp_path / "run", "latest")
    with pytest.raises(ValueError, match=r"checkpoint-7 is no complete checkpoint \(there is no such folder\)"):
        find_checkpoint(tmp_path, "checkpoint-7")


def test_saved_checkpoints_can_be_read_and_old_ones_go(tmp_path, accelerator):
    for step in (2, 4, 6, 8):
        save_checkpoint(accelerator, tmp_path, {"step": step, "seed": 3}, keep=2)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert read_state(find_checkpoint(tmp_path, "latest")) == {"step": 8, "seed": 3}


def test_all_checkpoints_are_kept_without_a_limit(tmp_path, accelerator):
    for step in (2, 4, 6):
        save_checkpoint(accelerator, tmp_path, {"step": step}, keep=None)
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path, accelerator):
    for seed in (1, 2):
        save_checkpoint(accelerator, tmp_path, {"step": 2, "seed": seed}, keep=2)
    assert read_state(tmp_path / "checkpoint-2")["seed"] == 2


def test_a_save_that_fails_leaves_the_earlier_checkpoints(tmp_path, accelerator, monkeypatch):
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    save_checkpoint(accelerator, tmp_path, {"step": 2}, keep=1)
    weights = model.weight.detach().clone()

    def full_disk(folder):
        open(f"{folder}/half", "w").close()
        raise OSError("no space left on device")

    monkeypatch.setattr(accelerator, "save_state", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(accelerator, tmp_path, {"step": 4}, keep=1)
    assert names(tmp_path) == ["checkpoint-2"]
    torch.nn.init.zeros_(model.weight)
    accelerator.load_state(str(find_checkpoint(tmp_path, "latest")))
    assert torch.equal(model.weight, weights)


WRITERS = {
    "text": lambda path: Path(path).write_text("x" * 100_000),
    "torch": lambda path: torch.save(torch.zeros(100_000), path),
    "safetensors": lambda path: save_file({"x": torch.zeros(100_000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whichever_library_finds_the_disk_full_one_error_says_so(tmp_path, writer):
    fake_checkpoint(tmp_path, "checkpoint-2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # Python ignores the signal: writing fails
    message = r"checkpoint-4 could not be saved: .*\. checkpoint-2 is complete: continue with"
    try:
        with pytest.raises(SaveError, match=message), saving("checkpoint-4", tmp_path):
            WRITERS[writer](tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_fault_while_saving_is_no_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="^shapes differ"), saving("the model", tmp_path):
        raise RuntimeError("shapes differ")


def test_what_a_failed_save_left_goes_with_the_next_one(tmp_path, accelerator):
    accelerator.prepare(torch.nn.Linear(2, 2))
    fake_checkpoint(tmp_path, ".checkpoint-2.tmp", complete=False)
    save_checkpoint(accelerator, tmp_path, {"step": 4}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_only_checkpoints_with_a_record_go(tmp_path, accelerator, monkeypatch):
    """Somebody's own, and transformers' Trainer's, stay; a kill while one is deleted leaves no half of it."""
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        fake_checkpoint(tmp_path, name)
    (tmp_path / "checkpoint-1" / STATE_FILE).write_text('{"global_step": 1}')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-2").rename(tmp_path / "elsewhere" / "checkpoint-2")
    (tmp_path / "checkpoint-2").symlink_to("elsewhere/checkpoint-2")
    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)  # never comes to it
    save_checkpoint(accelerator, tmp_path, {"step": 4}, keep=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
