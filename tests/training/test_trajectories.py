"""The real command, in processes of its own: layouts, kills and resumes, two processes, and what errors look like."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from dar_hf.metrics.lpips import LPIPSNetwork
from dar_hf.metrics.weights import write_weights

from .helpers import overrides

pytestmark = pytest.mark.slow

TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
TIMEOUT = 600  # against hangs, not a measure of speed

TOKENIZER_MODEL = {
    "encoder_dim": 64,
    "decoder_dim": 64,
    "diffusion_dim": 64,
    "attention_head_dim": 32,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "diffusion_depth": 1,
    "codebook_size": 8,  # so few that the latents kept for k-means are trimmed
}
TRANSFORMER_MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_DROPOUT = {"resid_dropout": 0, "ffn_dropout": 0, "token_dropout": 0}  # class dropout stays: it is per sample

COMMON = {
    "preset": "digits",
    "max_train_samples": 50,  # not a multiple of the batch: epochs end inside steps
    "max_validation_samples": 6,
    "max_train_steps": 24,
    "train_batch_size": 8,
    "warmup_steps": 4,
    "decay_fraction": 0.25,
    "adam_epsilon": 1e-6,
    "ema_decay": 0.9,
    "logging_steps": 1,
    "checkpointing_steps": 4,
    "checkpoints_total_limit": 10,
    "validation_steps": 0,
    "mixed_precision": "no",
}
# warm-up without quantizing, k-means, revival of dead codes, and then a stretch without
TOKENIZER = COMMON | {"continuous_steps": 10, "revive_every": 2, "revive_until": 0.8}
ACCUMULATED = {"train_batch_size": 1, "gradient_accumulation_steps": 8}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    changes = {
        "HF_HOME": cache,
        "HF_DATASETS_CACHE": cache,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | changes


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Command:
    """Runs the command; ``history`` and ``weights`` are what it left behind."""

    timeout = TIMEOUT

    def __init__(self, environment, stage, folder, model=None, processes=1, **options):
        self.environment, self.folder = environment, Path(folder)
        options = options | {"output_dir": folder} | ({"model_overrides": overrides(model)} if model else {})
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        self.line = [sys.executable, *(launcher if processes == 2 else []), str(TRAIN), stage]
        for name, value in options.items():
            self.line += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]

    def run(self):
        process = subprocess.Popen(
            self.line, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            output, error = process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers, which a kill would leave behind
            output, error = process.communicate()
            error += f"\nstopped after {self.timeout} seconds"
        self.result = subprocess.CompletedProcess(self.line, process.returncode, output, error)
        return self

    def run_until_killed(self, trace):
        """Kill without warning as soon as ``trace`` exists in the folder."""
        process = subprocess.Popen(
            self.line, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + TIMEOUT
        while process.poll() is None and time.monotonic() < deadline and not (self.folder / trace).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.result = process
        return self

    def finished(self):
        assert self.result.returncode == 0, self.result.stderr[-3000:]
        return self

    def history(self):
        lines = map(json.loads, (self.folder / "history.jsonl").read_text().splitlines())
        return {line["step"]: line for line in lines if "grad_norm" in line}

    def weights(self, checkpoint=None):
        if checkpoint:
            return load_file(self.folder / "checkpoints" / checkpoint / "model.safetensors")
        (file,) = (self.folder / part for part in ("transformer", ".") if list((self.folder / part).glob("*.saf*")))
        return load_file(next(file.glob("*.safetensors")))


def together(*jobs):
    """Run jobs side by side, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


class Runs(dict):
    """Commands by name; getting one that failed shows what it said."""

    def __getitem__(self, name):
        return super().__getitem__(name).finished()


def all_runs(environment, folder, stage, layouts, resumable):
    """Every run of a stage. ``layouts``: model and options without dropout; ``resumable``: with everything on."""

    def command(name, options, **changes):
        model, options = options
        return Command(environment, stage, folder / name, model, **options | changes)

    shared = layouts == resumable
    jobs = {
        "whole": command("whole", layouts),
        "accumulated": command("accumulated", layouts, **ACCUMULATED),
        "two processes": command("two", layouts, processes=2, train_batch_size=4),
    }
    if not shared:
        jobs["uninterrupted"] = command("uninterrupted", resumable)
    killed = command("killed", resumable)
    together(*(job.run for job in jobs.values()), lambda: killed.run_until_killed("checkpoints/checkpoint-8"))
    runs = Runs(jobs)
    if shared:
        dict.__setitem__(runs, "uninterrupted", jobs["whole"])
    dict.__setitem__(runs, "killed", killed)
    # out of the first phase after the kill, and out of a later one on a copy
    shutil.copytree(folder / "uninterrupted" if not shared else folder / "whole", folder / "later")
    options = {"resume_from_checkpoint": "latest"}
    later = {"resume_from_checkpoint": "checkpoint-16"}
    dict.__setitem__(runs, "resumed", command("killed", resumable, **options))
    dict.__setitem__(runs, "resumed later", command("later", resumable, **later))
    runs.killed_at = max((int(path.name[11:]) for path in (folder / "killed/checkpoints").glob("c*")), default=None)
    together(dict.__getitem__(runs, "resumed").run, dict.__getitem__(runs, "resumed later").run)
    return runs


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


@pytest.fixture(params=["tokenizer", "ar", "streamed"])
def runs(request):
    return request.getfixturevalue(f"{request.param}_runs")


def assert_same_curve(first, second, tolerance, exactly=("step", "lr")):
    assert first.keys() == second.keys()
    for step in sorted(first):
        names = [name for name in first[step] if name.startswith("loss/") or name == "grad_norm"]
        assert len(names) > 2
        for name in names:
            assert second[step][name] == pytest.approx(first[step][name], abs=tolerance, rel=tolerance), (step, name)
        assert all(first[step][name] == second[step][name] for name in exactly)


def assert_same_weights(first, second, tolerance):
    assert first.keys() == second.keys()
    worst = {name: (first[name] - second[name]).abs().max().item() for name in first}
    assert max(worst.values()) <= tolerance, max(worst.items(), key=lambda item: item[1])


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
    killed = dict.__getitem__(runs, "killed")
    assert killed.result.returncode == -signal.SIGKILL
    assert runs.killed_at in (8, 12, 16)


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
    assert result.stdout.split() == ["4", "10"]
    assert Image.open(tmp_path / "three.png").size == (8, 8)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_ends_the_command_with_a_checkpoint(environment, tmp_path, processes):
    options = TOKENIZER | {"max_train_steps": 5000, "checkpointing_steps": 0}
    command = Command(environment, "tokenizer", tmp_path / "run", TOKENIZER_MODEL, processes=processes, **options)
    process = subprocess.Popen(
        command.line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline, history = time.monotonic() + TIMEOUT, tmp_path / "run" / "history.jsonl"
    while time.monotonic() < deadline and not (history.is_file() and history.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, error = process.communicate(timeout=TIMEOUT)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert f"{checkpoint.name} is saved: continue with --resume_from_checkpoint latest" in error
    assert (checkpoint / "trainer_state.json").is_file() and not (tmp_path / "run" / "config.json").exists()
    assert process.returncode == 128 + signal.SIGTERM if processes == 1 else process.returncode != 0


def test_a_compiled_run_is_the_plain_one(environment, tmp_path):
    options = TOKENIZER | {"max_train_steps": 12, "checkpointing_steps": 6}
    plain, compiled = (
        Command(environment, "tokenizer", tmp_path / str(compiled), TOKENIZER_MODEL, **options, torch_compile=compiled)
        for compiled in (False, True)
    )
    together(plain.run, compiled.run)
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
        "continuous_steps": 0,
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
    together(*(command.run for command in runs.values()))
    whole = runs["whole"].finished()
    assert {"loss/perceptual", "loss/repa", "loss/adversarial", "loss/discriminator"} <= whole.history()[8].keys()
    for name in ("accumulated", "two"):
        assert_same_curve(whole.history(), runs[name].finished().history(), 1e-4)
        assert_same_weights(whole.weights(), runs[name].weights(), 2e-4)


# Errors


def test_a_mistake_ends_with_code_two_and_one_line_and_leaves_the_folder_as_it_was(environment, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    result = Command(environment, "tokenizer", tmp_path, preset="digits").run().result
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stderr[-2000:]
    assert len(said) == 1 and said[0].startswith("train.py: "), said
    assert "holds a AutoencoderKL, not a DARTokenizer" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "AutoencoderKL" in (tmp_path / "config.json").read_text()
