"""The loop both stages share: precision, output folders, failures, averaged weights."""

import json
import math
import weakref

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dar_hf.pictures import read_history
from dar_hf.training import LoopArguments, LossTerm, train
from dar_hf.training.checkpoints import list_checkpoints
from dar_hf.training.loop import (
    NonFiniteLossError,
    TrainingLoop,
    claim_output_dir,
    make_accelerator,
    pick_precision,
)

from .helpers import fresh_process, tokenizer_stage


@pytest.fixture(autouse=True)
def alone():
    with fresh_process():
        yield


# Precision


@pytest.mark.parametrize("requested", ["no", "bf16", "fp16"])
def test_precision_asked_for_is_taken(requested):
    assert pick_precision(requested) == requested


def test_precision_picked_is_one_accelerate_knows():
    assert pick_precision("auto") in ("no", "bf16")


# Output folders


def claim(folder, saved_class="DARTokenizer", **options):
    return claim_output_dir(LoopArguments(output_dir=str(folder), **options), saved_class)


def earlier_run(folder):
    (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (folder / "history.jsonl").write_text("{}\n")
    (folder / "config.json").write_text(json.dumps({"_class_name": "DARTokenizer"}))
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_new_folder_is_made(tmp_path):
    assert claim(tmp_path / "a" / "b").is_dir()


def test_a_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "file, content, found",
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("config.json", {"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ("config.json", {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ("config.json", {"hidden_size": 8}, "another model"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}])
def test_another_model_is_never_overwritten(tmp_path, file, content, found, options):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"holds a {found}, not a DARTokenizer"):
        claim(tmp_path, **options)
    assert json.loads((tmp_path / file).read_text()) == content


def test_a_pipeline_is_no_place_for_a_tokenizer(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DARPipeline"}))
    with pytest.raises(ValueError, match="holds a DARPipeline"):
        claim(tmp_path, "DARTokenizer")


def test_a_self_contained_pipeline_is_a_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline_dar", "DARPipeline"]}))
    claim(tmp_path, "DARPipeline", overwrite_output_dir=True)


def test_a_finished_model_without_a_run_needs_a_decision(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "DARTokenizer"}))
    with pytest.raises(ValueError, match="holds an earlier run or model"):
        claim(tmp_path)
    claim(tmp_path, overwrite_output_dir=True)
    assert (tmp_path / "config.json").is_file()  # the old model stays until the new one is there


@pytest.mark.parametrize("trace", ["checkpoints", "history.jsonl"])
def test_an_earlier_run_needs_a_decision(tmp_path, trace):
    earlier_run(tmp_path)
    other = tmp_path / ("history.jsonl" if trace == "checkpoints" else "checkpoints")
    other.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest .*--overwrite_output_dir"):
        claim(tmp_path)
    assert (tmp_path / trace).exists()


def test_overwriting_clears_the_runs_traces_only(tmp_path):
    claim(earlier_run(tmp_path), overwrite_output_dir=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_resuming_keeps_everything(tmp_path):
    before = sorted(earlier_run(tmp_path).iterdir())
    claim(tmp_path, resume_from_checkpoint="latest")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run is a file"):
        claim(tmp_path / "run")


# Runs


def test_a_run_leaves_model_history_curves_and_record(tmp_path):
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
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["checkpoint-2", "checkpoint-4"]
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


def nan_at(step):
    calls = []

    def function(output, batch):
        calls.append(1)
        return output.velocity.sum() * (math.nan if len(calls) == step else 0.0)

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

    def function(output, batch):
        calls.append(1)
        nothing = output.velocity.sum() * 0
        return nothing.sqrt() if len(calls) == 4 else nothing

    calls = []
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=2)
    stage.terms.append(LossTerm("surprise", 1.0, "images", function))
    with pytest.raises(NonFiniteLossError):
        train(stage, args, make_accelerator(args))
    checkpoints = list_checkpoints(tmp_path / "checkpoints")
    weights = load_file(checkpoints[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values()), checkpoints[-1].name


def test_the_checkpoint_before_a_failure_can_be_resumed(tmp_path):
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=2)
    stage.terms.append(nan_at(5))
    with pytest.raises(NonFiniteLossError):
        train(stage, args, make_accelerator(args))
    AcceleratorState._reset_state(True)
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest")
    train(stage, args, make_accelerator(args))
    assert [line["step"] for line in read_history(tmp_path / "history.jsonl") if "lr" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seed": 1}, "seed"),
        ({"train_batch_size": 2}, "images_per_step"),
        ({"max_train_steps": 8}, "max_train_steps"),
        ({"max_train_samples": 30}, "num_samples"),
        ({"model": {"num_encoder_layers": 2}}, "model num_encoder_layers"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, named):
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=4)
    train(stage, args, make_accelerator(args))
    AcceleratorState._reset_state(True)
    stage, args = tokenizer_stage(tmp_path, resume_from_checkpoint="latest", **changes)
    with pytest.raises(ValueError, match=f"cannot resume .*: {named} was"):
        train(stage, args, make_accelerator(args))


def test_learning_rates_follow_the_schedule_in_every_group(tmp_path):
    stage, args = tokenizer_stage(tmp_path, warmup_steps=4, learning_rate=1e-3, encoder_learning_rate=1e-4)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    batches = loop._batches()
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
    line = loop._step(0, [next(loop._batches())])
    assert line["grad_norm"] > 0.01 and sizes == pytest.approx([0.01], rel=1e-3)


def snapshot(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_averaged_weights_are_put_in_and_taken_out(tmp_path):
    stage, args = tokenizer_stage(tmp_path, ema_decay=0.9)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    batches = loop._batches()
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
    loop.run()
    saved = type(stage.model).from_pretrained(tmp_path)
    assert same(saved.parameters(), loop.ema.shadow_params)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_with_averages_is_resumed_on_a_gpu(tmp_path):
    """Checkpoints are read to the CPU; the averages must not stay there."""
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=4)
    train(stage, args, make_accelerator(args))
    AcceleratorState._reset_state(True)
    stage, args = tokenizer_stage(tmp_path, checkpointing_steps=4, resume_from_checkpoint="latest")
    loop = TrainingLoop(stage, args, make_accelerator(args))
    loop.resume()
    assert all(p.device == loop.accelerator.device for p in loop.ema.shadow_params)
    loop.run()
