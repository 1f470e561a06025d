"""The real command, in processes of its own: layouts, kills and resumes, two processes, and what errors look like."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from dar_hf.metrics.lpips import LPIPSNetwork
from dar_hf.metrics.weights import write_weights

from .commands import (
    COMMON,
    NO_DROPOUT,
    TIMEOUT,
    TOKENIZER_MODEL,
    TRANSFORMER_MODEL,
    Command,
    assert_same_curve,
    assert_same_weights,
    together,
)

pytestmark = pytest.mark.slow

# warm-up without quantizing, k-means, revival of dead codes, and then a stretch without
TOKENIZER = COMMON | {"unquantized_steps": 10, "dead_code_interval": 2, "revive_until": 0.8}
ACCUMULATED = {"train_batch_size": 1, "gradient_accumulation_steps": 8}


class Runs:
    """Runs by name; getting one that failed shows what it said. ``killed``: how one ended, and its last checkpoint."""

    def __init__(self, commands, killed):
        self.commands, self.killed = commands, killed

    def __getitem__(self, name):
        return self.commands[name].finished()


def all_runs(environment, folder, stage, layouts, resumable):
    """Every run of a stage. ``layouts``: model and options without dropout; ``resumable``: with everything on."""

    def command(name, options, **changes):
        model, options = options
        return Command(environment, stage, folder / name, model, **options | changes)

    commands = {
        "whole": command("whole", layouts),
        "accumulated": command("accumulated", layouts, **ACCUMULATED),
        "two processes": command("two", layouts, processes=2, train_batch_size=4),
    }
    if layouts != resumable:
        commands["uninterrupted"] = command("uninterrupted", resumable)
    killed = command("killed", resumable, kill_at="checkpoints/checkpoint-8")
    together(*commands.values(), killed)
    killed_at = max(
        (int(path.name[11:]) for path in (folder / "killed/checkpoints").glob("checkpoint-*")), default=None
    )
    uninterrupted = commands.setdefault("uninterrupted", commands["whole"])
    # out of the first phase after the kill, and out of a later one on a copy
    shutil.copytree(uninterrupted.folder, folder / "later")
    resumed = {
        "resumed": command("killed", resumable, resume_from_checkpoint="latest"),
        "resumed later": command("later", resumable, resume_from_checkpoint="checkpoint-16"),
    }
    together(*resumed.values())
    return Runs(commands | resumed, (killed.exitcode, killed_at))


@pytest.fixture(scope="module")
def tokenizer_runs(tmp_path_factory, environment):
    options = (TOKENIZER_MODEL, TOKENIZER)
    return all_runs(environment, tmp_path_factory.mktemp("tokenizer"), "tokenizer", options, options)


@pytest.fixture(scope="module")
def ar_runs(tmp_path_factory, environment, tokenizer_runs):
    # at higher rates so small a Llama has steps whose gradients magnify rounding a thousand times
    options = COMMON | {"tokenizer": tokenizer_runs["whole"].folder, "learning_rate": 3e-4}
    layouts, resumable = (TRANSFORMER_MODEL | NO_DROPOUT, options), (TRANSFORMER_MODEL, options)
    return all_runs(environment, tmp_path_factory.mktemp("ar"), "ar", layouts, resumable)


@pytest.fixture(scope="module")
def streamed_runs(tmp_path_factory, environment):
    options = (TOKENIZER_MODEL, TOKENIZER | {"streaming": True, "stream_block_size": 16})
    return all_runs(environment, tmp_path_factory.mktemp("streamed"), "tokenizer", options, options)


# the runs of stage 2 need those of stage 1; a process of their own for the others (tests/conftest.py)
@pytest.fixture(params=["tokenizer", "ar", pytest.param("streamed", marks=pytest.mark.xdist_group("streamed"))])
def runs(request):
    return request.getfixturevalue(f"{request.param}_runs")


def as_typed(command, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return command.typed(*launcher if processes > 1 else [])


def test_the_loss_goes_down(runs):
    history = runs["uninterrupted"].history()
    assert list(history) == list(range(1, 25))
    assert all(np.isfinite(list(line.values())).all() for line in history.values())
    name = "loss/flow" if "loss/flow" in history[1] else "loss/cross_entropy"
    curve = [history[step][name] for step in history]
    assert np.mean(curve[-6:]) < np.mean(curve[:6])


def test_eight_batches_of_one_are_one_batch_of_eight(runs):
    assert_same_curve(runs["whole"].history(), runs["accumulated"].history(), 1e-4)


def test_two_processes_of_four_are_one_of_eight(runs):
    whole, two = runs["whole"], runs["two processes"]
    assert_same_curve(whole.history(), two.history(), 1e-4)
    assert_same_weights(whole.weights(), two.weights(), 1e-4)
    assert_same_weights(whole.weights("checkpoint-20"), two.weights("checkpoint-20"), 1e-4)


def test_a_killed_run_left_complete_checkpoints_and_no_model(runs):
    exitcode, last_checkpoint = runs.killed
    assert exitcode == -signal.SIGKILL
    assert last_checkpoint in (8, 12, 16)


@pytest.mark.parametrize("name", ["resumed", "resumed later"])
def test_a_resumed_run_repeats_the_uninterrupted_one(runs, name):
    whole, resumed = runs["uninterrupted"], runs[name]
    assert_same_curve(whole.history(), resumed.history(), 1e-6)
    assert_same_weights(whole.weights(), resumed.weights(), 1e-6)


def test_all_phases_of_the_codebook_were_passed(tokenizer_runs):
    history = tokenizer_runs["uninterrupted"].history()
    committed = [history[step]["loss/commitment"] > 0 for step in range(1, 25)]
    assert committed == [False] * 10 + [True] * 14
    assert history[11]["loss/codebook"] < 0.8 * history[10]["loss/codebook"]  # k-means put the codes where latents are


def test_the_tokenizers_folder(tokenizer_runs):
    names = {path.name for path in tokenizer_runs["whole"].folder.iterdir()}
    assert {"config.json", "loss.png", "reconstructions.png", "history.jsonl", "training.json"} <= names


GENERATE = """
import sys
import torch
from dar_hf import DARPipeline
pipe = DARPipeline.from_pretrained(sys.argv[1])
generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
images = pipe(["3", 7, 0], generator=generators).images
again = pipe(["3"], generator=torch.Generator().manual_seed(0)).images
steps = list(pipe.stream(3, generator=torch.Generator().manual_seed(0)))
assert len(images) == 3 and all(image.size == (8, 8) for image in images)
assert images[0].tobytes() == again[0].tobytes() == steps[-1].images[0].tobytes()
images[0].save(sys.argv[2])
print(len(steps), pipe.transformer.config.num_classes)
"""


def test_the_pipeline_generates_in_a_fresh_process(ar_runs, environment, tmp_path):
    folder = ar_runs["uninterrupted"].folder
    command = [sys.executable, "-c", GENERATE, str(folder), str(tmp_path / "three.png")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["8", "10"]
    assert Image.open(tmp_path / "three.png").size == (8, 8)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_itself_ends_well(environment, tmp_path, processes):
    options = TOKENIZER | {"max_train_steps": 3, "unquantized_steps": 1}
    command = Command(environment, "tokenizer", tmp_path / "run", TOKENIZER_MODEL, **options)
    line = as_typed(command, processes)
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(command.history()) == [1, 2, 3] and (command.folder / "config.json").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_the_command_with_a_checkpoint(environment, tmp_path, processes):
    options = TOKENIZER | {"max_train_steps": 5000, "checkpointing_steps": 0}
    command = Command(environment, "tokenizer", tmp_path / "run", TOKENIZER_MODEL, **options)
    line = as_typed(command, processes)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, history = time.monotonic() + TIMEOUT, tmp_path / "run" / "history.jsonl"
    while time.monotonic() < deadline and not (history.is_file() and history.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, error = process.communicate(timeout=TIMEOUT)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert f"{checkpoint.name} is saved: continue with --resume_from_checkpoint latest" in error
    assert (checkpoint / "trainer_state.json").is_file() and not (tmp_path / "run" / "config.json").exists()
    assert process.returncode == 128 + signal.SIGTERM if processes == 1 else process.returncode != 0


@pytest.mark.xdist_group("compiled")
def test_a_compiled_run_is_the_plain_one(environment, tmp_path):
    options = TOKENIZER | {"max_train_steps": 12, "checkpointing_steps": 6}
    plain, compiled = (
        Command(environment, "tokenizer", tmp_path / str(compiled), TOKENIZER_MODEL, **options, torch_compile=compiled)
        for compiled in (False, True)
    )
    together(plain, compiled)
    assert_same_curve(plain.finished().history(), compiled.finished().history(), 1e-4)
    assert_same_weights(plain.weights(), compiled.weights(), 1e-4)
    assert_same_weights(plain.weights("checkpoint-6"), compiled.weights("checkpoint-6"), 1e-4)


@pytest.fixture(scope="module")
def full_recipe(tmp_path_factory):
    """Stage 1 with every loss term, on 16 pixels; the networks that judge have random weights."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    write_weights(LPIPSNetwork().state_dict(), folder / "lpips.safetensors")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "encoder")
    size = {"sample_size": 16, "encoder_patch_size": 4, "diffusion_patch_size": 4, "repa_layer": 0, "repa_dim": 16}
    options = TOKENIZER | {
        "max_train_steps": 8,
        "unquantized_steps": 0,
        "group_dropout": 0.5,
        "perceptual_weight": 0.5,
        "lpips_weights": folder / "lpips.safetensors",
        "repa_weight": 0.5,
        "repa_model": folder / "encoder",
        "discriminator_weight": 0.1,
        "discriminator_start": 2,
        "discriminator_layers": 2,
        "discriminator_width": 16,
    }
    return TOKENIZER_MODEL | size, options


def test_the_full_recipe_does_not_depend_on_the_layout(environment, tmp_path, full_recipe):
    model, options = full_recipe
    layouts = {
        "whole": {},
        "accumulated": {"train_batch_size": 2, "gradient_accumulation_steps": 4},
        "two": {"train_batch_size": 4, "processes": 2},
    }
    runs = {
        name: Command(environment, "tokenizer", tmp_path / name, model, **options | changes)
        for name, changes in layouts.items()
    }
    together(*runs.values())
    whole = runs["whole"].finished()
    assert {"loss/perceptual", "loss/repa", "loss/adversarial", "loss/discriminator"} <= whole.history()[8].keys()
    for name in ("accumulated", "two"):
        assert_same_curve(whole.history(), runs[name].finished().history(), 1e-4)
        assert_same_weights(whole.weights(), runs[name].weights(), 2e-4)


# Errors


def test_a_mistake_ends_with_code_two_and_one_line_and_leaves_the_folder_as_it_was(environment, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    line = as_typed(Command(environment, "tokenizer", folder, preset="digits"))
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, said
    assert len(said) == 1 and said[0].startswith("train.py: "), said
    assert "holds a AutoencoderKL, not a DARTokenizer" in said[0]
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert "AutoencoderKL" in (folder / "config.json").read_text()
