"""The loop both stages share: precision, output folders, failures, averaged weights."""

import errno
import json
import math
import weakref
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dar_hf.data import ImageSamples
from dar_hf.training import LossTerm, make_accelerator, records, train
from dar_hf.training.checkpoints import SaveError, list_checkpoints
from dar_hf.training.loop import NonFiniteLossError, TrainingLoop
from dar_hf.utils.pictures import read_history

from .helpers import tokenizer_stage

# Runs


def test_a_run_leaves_model_history_curves_and_record(tmp_path, curves):
    stage, args = tokenizer_stage(tmp_path, validation_steps=3, checkpointing_steps=2)
    train(stage, args, make_accelerator(args))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "history.jsonl", "loss.png", "reconstructions.png", "training.json", "checkpoints"} <= names
    assert not [name for name in names if name.startswith(".")]
    lines = read_history(tmp_path / "history.jsonl")
    losses = [line for line in lines if "loss/total" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation/psnr" in line] == [3, 6]
    for line in losses:
        total = line["loss/flow"] + line["loss/codebook"] + line["loss/commitment"]
        assert line["loss/total"] == pytest.approx(total, rel=1e-5) and math.isfinite(line["grad_norm"])
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-4", "checkpoint-6"]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["arguments"]["max_train_steps"] == 6 and record["images_per_step"] == 4


def test_the_wrapped_model_goes_before_the_process_group(tmp_path, monkeypatch):
    """Freed after it, torch's DDP joins a thread of the gloo group that may be waiting for the GIL: a deadlock."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    stage, args = tokenizer_stage(tmp_path)
    accelerator, wrapped, gone = make_accelerator(args), [], []
    prepare = accelerator.prepare

    def prepare_wrapped(model, optimizer):
        wrapper = accelerator._models[:] = [Wrapper(prepare(model, optimizer)[0])]
        wrapped.append(weakref.ref(wrapper[0]))
        return wrapper[0], accelerator._optimizers[0]

    monkeypatch.setattr(accelerator, "prepare", prepare_wrapped)
    monkeypatch.setattr(accelerator, "end_training", lambda: gone.append(wrapped[0]() is None))
    train(stage, args, accelerator)
    assert gone == [True]


def test_the_model_is_saved_before_the_last_validation(tmp_path):
    """Which may fail: of the data that training saw, it reads none."""
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=4)

    def fail(step):
        raise RuntimeError("an image cannot be read")

    stage.validate = fail
    with pytest.raises(RuntimeError, match="cannot be read"):
        train(stage, args, make_accelerator(args))
    saved = type(stage.model).from_pretrained(tmp_path)
    assert saved.config.codebook_size == stage.model.config.codebook_size and (tmp_path / "README.md").is_file()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-4", "checkpoint-6"]


def test_validation_images_that_cannot_be_read_are_left_out_and_named(tmp_path, caplog):
    """Here one that goes while the run is under way."""
    stage, args = tokenizer_stage(tmp_path / "run")
    whole, _ = stage.validate(0)
    paths = []
    for index in range(len(stage.validation)):
        paths.append(str(tmp_path / f"{index}.png"))
        stage.validation.image(index).convert("RGB").save(paths[-1])
    dataset = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    stage.validation = ImageSamples(dataset, stage.validation.transform)
    assert stage.validate(0)[0] == whole
    stage.validation = ImageSamples(dataset, stage.validation.transform)
    Path(paths[0]).unlink()
    figures, pictures = stage.validate(0)
    assert math.isfinite(figures["psnr"]) and figures != whole and pictures and "0.png" in caplog.text
    for path in paths[1:]:
        Path(path).write_bytes(b"no image")
    stage.validation = ImageSamples(dataset, stage.validation.transform)
    assert stage.validate(0) == ({}, {})


@pytest.mark.parametrize("what", ["history.jsonl", "pictures", "model"])
def test_a_disk_that_is_full_ends_the_run_in_one_line(tmp_path, what, monkeypatch):
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=4, validation_steps=5)

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "history.jsonl":
        monkeypatch.setattr(records.RunRecords, "history_path", tmp_path / "none" / "history.jsonl")
        monkeypatch.setattr(records, "write_text", lambda path, text: None)
    elif what == "pictures":
        monkeypatch.setattr(records, "save_picture", fail)
    else:
        stage.save = fail
    with pytest.raises(SaveError, match=f"{what} could not be saved: .*No s.*(checkpoint-[46] is|There is no)"):
        train(stage, args, make_accelerator(args))


def nan_at(number):
    def function(output, batch, step):
        return output.velocity.sum() * (math.nan if step + 1 == number else 0.0)

    return LossTerm("surprise", 1.0, "images", function)


def test_a_loss_that_is_not_finite_is_named_and_leaves_the_last_checkpoint(tmp_path):
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=2)
    stage.terms.append(nan_at(5))
    with pytest.raises(NonFiniteLossError, match=r"'surprise' is nan at step 5\. checkpoint-4 is complete"):
        train(stage, args, make_accelerator(args))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-2", "checkpoint-4"]
    assert all(parameter.isfinite().all() for parameter in stage.model.parameters())  # not stepped any more
    assert [line["step"] for line in read_history(tmp_path / "history.jsonl")] == [1, 2, 3, 4]


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=0)
    stage.terms.append(nan_at(2))
    with pytest.raises(NonFiniteLossError, match=r"is nan at step 2\. There is no checkpoint yet"):
        train(stage, args, make_accelerator(args))


def test_gradients_that_are_not_finite_spoil_no_checkpoint(tmp_path):
    """A finite loss can have NaN gradients; the weights they would spoil must not be saved."""

    def function(output, batch, step):
        nothing = output.velocity.sum() * 0
        return nothing.sqrt() if step + 1 == 4 else nothing

    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=2)
    stage.terms.append(LossTerm("surprise", 1.0, "images", function))
    with pytest.raises(NonFiniteLossError):
        train(stage, args, make_accelerator(args))
    checkpoints = list_checkpoints(tmp_path / "checkpoints")
    weights = load_file(checkpoints[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values()), checkpoints[-1].name


def test_learning_rates_follow_the_schedule_in_every_group(tmp_path):
    stage, args = tokenizer_stage(tmp_path, warmup_steps=4, learning_rate=1e-3, encoder_learning_rate=1e-4)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    batches = iter(loop.batches)
    for step in range(3):
        line = loop._step(step, [next(batches)])
        assert line["lr"] == pytest.approx(1e-3 * (step + 1) / 4)
        assert [g["lr"] for g in loop.optimizer.param_groups] == pytest.approx(
            [1e-3 * (step + 1) / 4, 1e-4 * (step + 1) / 4]
        )


def test_gradients_are_clipped(tmp_path):
    """With plain gradient descent the update is the clipped gradient."""
    stage, args = tokenizer_stage(tmp_path, max_grad_norm=0.01)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    loop.optimizer.step = lambda *a, **k: sizes.append(
        torch.cat([p.grad.flatten() for p in stage.model.parameters()]).norm().item()
    )
    sizes = []
    line = loop._step(0, [next(iter(loop.batches))])
    assert line["grad_norm"] > 0.01 and sizes == pytest.approx([0.01], rel=1e-3)


def snapshot(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_averaged_weights_are_put_in_and_taken_out(tmp_path):
    stage, args = tokenizer_stage(tmp_path, ema_decay=0.9)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    batches = iter(loop.batches)
    for step in range(3):
        loop._step(step, [next(batches)])
    trained = snapshot(stage.model)
    with loop.averaged_weights():
        assert same(stage.model.parameters(), loop.ema.shadow_params)
        assert not same(stage.model.parameters(), trained)
    assert same(stage.model.parameters(), trained)
    with pytest.raises(RuntimeError), loop.averaged_weights():
        raise RuntimeError
    assert same(stage.model.parameters(), trained)


def test_without_averaging_the_weights_stay(tmp_path):
    stage, args = tokenizer_stage(tmp_path, ema_decay=None)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    before = snapshot(stage.model)
    with loop.averaged_weights():
        assert same(stage.model.parameters(), before)


def test_the_averaged_weights_are_saved(tmp_path):
    stage, args = tokenizer_stage(tmp_path, ema_decay=0.9)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    loop.train_and_save()
    saved = type(stage.model).from_pretrained(tmp_path)
    assert same(saved.parameters(), loop.ema.shadow_params)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_with_averages_is_resumed_on_a_gpu(tmp_path):
    """Checkpoints are read to the CPU; the averages must not stay there."""
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=4)
    train(stage, args, make_accelerator(args))
    AcceleratorState._reset_state(True)
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=4, resume_from_checkpoint="checkpoint-4")
    loop = TrainingLoop(stage, args, make_accelerator(args))
    loop.resume("checkpoint-4")
    assert all(p.device == loop.accelerator.device for p in loop.ema.shadow_params)
    loop.train_and_save()
