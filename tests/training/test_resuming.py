"""What a run is resumed from: complete, its own, of the same run, and without code of anybody's."""

import json
import logging
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.distributed import checkpoint as sharded

from dar_hf.training import make_accelerator, train
from dar_hf.training.checkpoints import (
    STATE_FILE,
    CheckpointError,
    _check_shards,
    _signature,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    plain_data_only,
)
from dar_hf.training.loop import TrainingLoop
from dar_hf.training.resuming import ResumeError, check_same_run, choose_checkpoint, resuming_from
from dar_hf.utils.pictures import read_history

from .helpers import fresh_process, tokenizer_stage


def run(folder, **changes):
    """A run of the tiny tokenizer in what passes for a new process; returns its loop, which ``train`` would end."""
    AcceleratorState._reset_state(True)
    stage, args = tokenizer_stage(folder, checkpointing_steps=2, **changes)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    if args.resume_from_checkpoint:
        loop.resume(args.resume_from_checkpoint)
    if not loop.finished:
        loop.train_and_save()
    return loop


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with its last two checkpoints, on 32 digits, with averages and a discriminator."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with fresh_process():
        run(folder, **ADVERSARY)
    return folder


ADVERSARY = {"discriminator_weight": 0.1, "discriminator_layers": 1, "discriminator_width": 4}


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def steps(folder):
    return [line["step"] for line in read_history(folder / "history.jsonl") if "lr" in line]


def checkpoints(folder):
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


# Starting, continuing, training longer


def test_latest_starts_a_run_where_there_is_none_and_says_so(tmp_path, capsys):
    run(tmp_path, resume_from_checkpoint="latest", max_train_steps=2)
    assert steps(tmp_path) == [1, 2] and "no checkpoint in" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is(folder, capsys):
    before = (folder / "history.jsonl").read_text()
    loop = run(folder, resume_from_checkpoint="latest", **ADVERSARY)
    assert loop.finished and "has finished its 6 steps" in capsys.readouterr().out
    assert (folder / "history.jsonl").read_text() == before


def test_a_finished_run_of_other_options_is_not_taken_for_this_one(folder):
    with pytest.raises(ResumeError, match="seed was 0 and is now 1"):
        run(folder, resume_from_checkpoint="latest", seed=1, **ADVERSARY)


def test_a_run_that_was_killed_before_its_model_was_saved_saves_it(folder):
    for name in ("config.json", "training.json"):
        (folder / name).unlink()
    run(folder, resume_from_checkpoint="latest", **ADVERSARY)
    assert steps(folder) == [1, 2, 3, 4, 5, 6] and (folder / "config.json").is_file()


def test_a_finished_run_can_be_trained_longer(folder, caplog):
    with caplog.at_level(logging.WARNING):
        run(folder, resume_from_checkpoint="latest", max_train_steps=8, **ADVERSARY)
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7, 8] and "was 6 and is now 8" in caplog.text
    assert json.loads((folder / "training.json").read_text())["trained_steps"] == 8
    assert checkpoints(folder) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.1, "adam_beta2": 0.99, "ema_decay": 0.5}])
def test_a_resumed_run_has_its_own_options_of_the_optimizer_and_the_average(folder, changes):
    options = {"resume_from_checkpoint": "latest", "max_train_steps": 8, **ADVERSARY, **changes}
    loop = run(folder, **options)
    groups = [*loop.optimizer.param_groups, *loop.stage.adversary.optimizer.param_groups]
    assert [group["betas"] for group in groups] == [(0.9, changes.get("adam_beta2", 0.95))] * 3
    assert [group["weight_decay"] for group in groups] == [changes.get("weight_decay", 0.0)] * 2 + [0.0]
    assert loop.ema.decay == changes.get("ema_decay", 0.9)


def test_a_run_cannot_be_made_shorter(folder):
    with pytest.raises(ResumeError, match="max_train_steps was 6 and is now 5. A run can be made longer"):
        run(folder, resume_from_checkpoint="latest", max_train_steps=5, **ADVERSARY)


def test_a_finished_run_without_checkpoints_cannot_go_on(folder):
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ResumeError, match="finished after 6 steps and left no checkpoint.*--init_from"):
        run(folder, resume_from_checkpoint="latest", max_train_steps=8, **ADVERSARY)


def test_the_checkpoint_just_saved_is_never_the_one_that_goes(folder):
    """Resumed from an earlier one by name, where later ones are kept."""
    run(folder, resume_from_checkpoint="checkpoint-4", max_train_steps=7, checkpoints_total_limit=1, **ADVERSARY)
    assert checkpoints(folder) == ["checkpoint-7"]


def test_accumulation_may_change_between_start_and_resume(folder):
    """accelerate restores its count of micro-batches, which would then end the first step early."""
    changes = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
    loop = run(folder, resume_from_checkpoint="checkpoint-4", **changes, **ADVERSARY)
    assert steps(folder) == [1, 2, 3, 4, 5, 6] and loop.accelerator.step % 4 == 0
    assert all(state["step"] == 6 for state in loop.optimizer.state.values())


# Of the same run


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1}, "seed"),
        ({"train_batch_size": 2}, "images_per_step"),
        ({"max_train_samples": 30}, "num_samples"),
        ({"model": {"num_encoder_layers": 2}}, "model num_encoder_layers"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(folder, changes, named):
    with pytest.raises(ResumeError, match=f"cannot resume .*: {named} was"):
        run(folder, resume_from_checkpoint="checkpoint-6", **changes, **ADVERSARY)


def images(folder, seed, count=6):
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for index in range(count):
        pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return {"dataset_name": str(folder), "max_train_samples": None}


def test_other_images_of_the_same_number_are_refused_wherever_the_same_lie(tmp_path):
    options = {"max_train_steps": 2, "model": {"in_channels": 3}}
    run(tmp_path / "run", **images(tmp_path / "one", 0), **options)
    options |= {"resume_from_checkpoint": "checkpoint-2", "max_train_steps": 3}
    with pytest.raises(ResumeError, match="data images was"):
        run(tmp_path / "run", **images(tmp_path / "two", 1), **options)
    run(tmp_path / "run", **images(tmp_path / "moved", 0), **options)


def test_a_checkpoint_that_says_nothing_of_its_data_is_resumed_with_a_warning(caplog):
    description = {"seed": 0, "data": {"images": "x"}, "layout": "copies", "max_train_steps": 4}
    check_same_run("place", {"seed": 0, "max_train_steps": 4}, description)
    assert "does not say what data it was trained on" in caplog.text
    with pytest.raises(ResumeError, match="layout was copies and is now FSDP"):
        check_same_run("place", description, description | {"layout": "FSDP"})


def test_the_version_of_transformers_may_change(caplog):
    description = {"model": {"hidden_size": 4}, "data": {}, "layout": "copies", "max_train_steps": 4}
    check_same_run("place", description | {"model": {"hidden_size": 4, "transformers_version": "4"}}, description)
    with pytest.raises(ResumeError, match="model hidden_size was 8 and is now 4"):
        check_same_run("place", description | {"model": {"hidden_size": 8}}, description)


def test_faults_of_this_package_are_not_blamed_on_the_checkpoint():
    with pytest.raises(KeyError), resuming_from("checkpoint-4"):
        raise KeyError("name")


# Complete


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


FILES = ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", STATE_FILE]


@pytest.mark.parametrize("harm", [cut_off, flip, empty, os.remove])
@pytest.mark.parametrize("file", FILES)
def test_latest_is_the_newest_that_is_complete(folder, file, harm, caplog):
    newest = folder / "checkpoints" / "checkpoint-6"
    harm(newest / file)
    loop = loop_for(folder)
    assert choose_checkpoint(loop.checkpoints, "latest").name == "checkpoint-4"
    assert "checkpoint-6" in caplog.text and file in caplog.text and "resuming from checkpoint-4" in caplog.text
    with pytest.raises(ResumeError, match=rf"checkpoint-6 is no complete checkpoint \(.*{file}.*checkpoint-4"):
        choose_checkpoint(loop.checkpoints, "checkpoint-6")
    harm(folder / "checkpoints" / "checkpoint-4" / file)
    with pytest.raises(ResumeError, match="no checkpoint in .* is complete: checkpoint-6.*checkpoint-4"):
        choose_checkpoint(loop.checkpoints, "latest")


def loop_for(folder, **changes):
    AcceleratorState._reset_state(True)
    stage, args = tokenizer_stage(folder, checkpointing_steps=2, **changes, **ADVERSARY)
    return TrainingLoop(stage, args, make_accelerator(args))


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", "{", '{"step": -1}', '{"step": "6"}', '{"step": 6, "saved": 1}']
)
def test_a_record_that_says_nothing_is_damage(folder, content):
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    (checkpoint / STATE_FILE).write_text(content)
    assert STATE_FILE in find_damage(checkpoint)


@pytest.mark.parametrize("files", [[], {"model.safetensors": 3}, {"model.safetensors": {}}, {"../../x": {"size": 1}}])
def test_a_record_of_nonsense_is_damage(folder, files):
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    (checkpoint / STATE_FILE).write_text(json.dumps({"step": 6, "saved": {"files": files or [1]}}))
    assert find_damage(checkpoint) is not None


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [cut_off, empty, as_pipe])
def test_damage_that_nobody_noted_is_found(folder, harm, caplog):
    """A checkpoint of a version that noted no files."""
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    unsealed(checkpoint)
    harm(checkpoint / "optimizer.bin")
    loop = loop_for(folder, resume_from_checkpoint="checkpoint-6")
    message = r"checkpoint-6 is no complete checkpoint \(optimizer.bin is .*Complete in .*: checkpoint-4"
    with pytest.raises(ResumeError, match=message) as caught:
        loop.resume("checkpoint-6")
    assert "\n" not in str(caught.value)
    assert choose_checkpoint(loop.checkpoints, "latest").name == "checkpoint-4"
    assert "checkpoint-6 (optimizer.bin is" in caplog.text


def unsealed(checkpoint):
    record = json.loads((checkpoint / STATE_FILE).read_text())
    record.pop("saved")
    (checkpoint / STATE_FILE).write_text(json.dumps(record))


def test_a_checkpoint_of_an_earlier_version_is_resumed(folder):
    checkpoint = folder / "checkpoints" / "checkpoint-4"
    unsealed(checkpoint)
    run(folder, resume_from_checkpoint="checkpoint-4", **ADVERSARY)
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


# Random states


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_are_restored(folder):
    first, second = [], []
    for found in (first, second):
        loop = loop_for(folder, resume_from_checkpoint="checkpoint-4")
        loop.resume("checkpoint-4")
        found.append(drawn())
        drawn()
    assert first == second


@pytest.mark.parametrize("harm", ["missing", "garbage", "empty dictionary", "wrong values"])
def test_a_run_without_its_random_state_does_not_go_on(folder, harm):
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    unsealed(checkpoint)
    path = checkpoint / "random_states_0.pkl"
    if harm == "missing":
        path.unlink()
    elif harm == "garbage":
        path.write_bytes(b"garbage")
    else:
        state = {"torch_manual_seed": torch.zeros(3), "random_state": (), "numpy_random_seed": ()}
        torch.save(state if harm == "wrong values" else {}, path)
    with pytest.raises(ResumeError, match="random.states"):
        loop_for(folder, resume_from_checkpoint="checkpoint-6").resume("checkpoint-6")


def test_another_number_of_processes_is_said(folder, caplog):
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    record = json.loads((checkpoint / STATE_FILE).read_text())
    record["saved"]["num_processes"] = 2
    (checkpoint / STATE_FILE).write_text(json.dumps(record))
    loop = loop_for(folder)
    load_checkpoint(loop.accelerator, checkpoint)
    assert "saved by 2 processes, these are 1" in caplog.text


# Without code of anybody's


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


WRITERS = {
    "torch": lambda content, path: torch.save(content, path),
    "torch, old format": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    "pickle, protocol 4": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=4)),
}
TARGETS = [
    "optimizer.bin",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",  # the averages
    "custom_checkpoint_1.pkl",  # of the codebook
    "custom_checkpoint_2.pkl",  # the discriminator
    "pytorch_model.bin",
    "custom_checkpoint_3.pkl",
    "scheduler.bin",
    "scaler.pt",
    "sampler.bin",
    "dl_state_dict.bin",
]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("file", TARGETS)
def test_no_file_of_a_strangers_checkpoint_is_run(folder, tmp_path, file, writer, monkeypatch):
    """Whatever the environment says of torch.load."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    unsealed(checkpoint)
    if file == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    is_read = (checkpoint / file).exists() or file in ("pytorch_model.bin", "custom_checkpoint_3.pkl")
    WRITERS[writer]({"state": Hostile(tmp_path / "ran")}, checkpoint / file)
    loop = loop_for(folder, resume_from_checkpoint="checkpoint-6")
    if is_read:
        with pytest.raises(ResumeError, match="checkpoint-6 is no complete checkpoint") as caught:
            loop.resume("checkpoint-6")
        said = str(caught.value)
        assert "\n" not in said and "weights_only" not in said and len(said) < 600 and file in said
    else:
        loop.resume("checkpoint-6")
    assert not (tmp_path / "ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_no_file_of_a_strangers_checkpoint_with_right_checksums_is_run(folder, tmp_path, file):
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    record = json.loads((checkpoint / STATE_FILE).read_text())
    torch.save({"state": Hostile(tmp_path / "ran")}, checkpoint / file)
    record["saved"]["files"][file] = _signature(checkpoint / file)
    (checkpoint / STATE_FILE).write_text(json.dumps(record))
    with pytest.raises(ResumeError, match="cannot resume .*checkpoint-6: .*it wants to run or build.*mkdir") as caught:
        loop_for(folder, resume_from_checkpoint="checkpoint-6").resume("checkpoint-6")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_plain_data_is_read_under_any_settings(tmp_path, monkeypatch):
    torch.save({"state": Hostile(tmp_path / "ran")}, tmp_path / "file")
    with plain_data_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ and not (tmp_path / "ran").exists()


def test_tables_of_shards_may_describe_tensors_and_nothing_else(tmp_path):
    state = {"model": {"a": torch.zeros(3, 4, dtype=torch.bfloat16)}, "step": 3, "nested": [{"lr": 0.1, "b": (1, 2)}]}
    folder = tmp_path / "pytorch_model_fsdp_0"
    sharded.save(state, storage_writer=sharded.FileSystemWriter(folder), no_dist=True)
    _check_shards(tmp_path)
    found = {"model": {"a": torch.ones(3, 4, dtype=torch.bfloat16)}, "step": 0, "nested": [{"lr": 0.0, "b": (0, 0)}]}
    with plain_data_only():
        sharded.load(found, storage_reader=sharded.FileSystemReader(folder), no_dist=True)
    assert found["step"] == 3 and not found["model"]["a"].any() and found["nested"] == state["nested"]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (folder / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran"), protocol=protocol))
        with pytest.raises(CheckpointError, match=r"fsdp_0/.metadata is refused or damaged: it wants to run.*mkdir"):
            _check_shards(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "linking").mkdir()
    (tmp_path / "linking" / "pytorch_model_fsdp_0").symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match="it wants to run"):
        _check_shards(tmp_path / "linking")
    assert not (tmp_path / "ran").exists()


def test_a_run_resumes_after_a_failure(tmp_path):
    """With `train`, which claims and leaves the folder."""
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=2)
    stage.save = lambda folder: (_ for _ in ()).throw(OSError("the disk is full"))
    with pytest.raises(Exception, match="the model could not be saved: the disk is full. checkpoint-6 is complete"):
        train(stage, args, make_accelerator(args))
    assert not (tmp_path / ".run.lock").exists()
    AcceleratorState._reset_state(True)
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest")
    train(stage, args, make_accelerator(args))
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6] and (tmp_path / "config.json").is_file()


def test_what_can_fail_comes_after_what_is_saved(tmp_path):
    """A validation that fails costs no step before it, and an upload that hangs no model."""
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=2, validation_steps=2)
    stage.validate = lambda step: 1 / 0
    loop = TrainingLoop(stage, args, make_accelerator(args))
    with pytest.raises(ZeroDivisionError):
        loop.train_and_save()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    saved = []
    loop = run(tmp_path, resume_from_checkpoint="latest")
    (tmp_path / "config.json").unlink()
    loop.background.join = lambda: saved.append((tmp_path / "config.json").is_file())
    loop.start_step = args.max_train_steps
    loop.train_and_save()
    assert saved == [True]


def test_runs_of_before_the_scope_of_conditions_can_be_resumed(tmp_path):
    """A tokenizer whose steps see their own group's conditions is described as it was then."""
    for scope in ("group", "prefix"):
        stage, _ = tokenizer_stage(tmp_path / scope, {"condition_scope": scope})
        assert stage.describe().get("condition_scope") == {"group": None, "prefix": "prefix"}[scope]
