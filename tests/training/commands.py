"""The training command in processes of its own, run by run, and what runs that should agree are compared by.

Most of the time of a short run is the import of its libraries. So processes are forked from one that has imported them
(multiprocessing's fork server); from there on they do what ``python examples/train.py`` does, up to the interpreter's
end, which they skip. `test_trajectories.py` starts the command itself, and torchrun, too.
"""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

from .helpers import overrides

TRAIN = Path(__file__).parents[2] / "examples" / "train.py"
TIMEOUT = 600  # seconds; against hangs, not a measure of speed
FORK_SERVER = multiprocessing.get_context("forkserver")

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


def start_fork_server(environment: dict[str, str]) -> None:
    """Libraries read some variables as they are imported: the server imports them in this environment."""
    FORK_SERVER.set_forkserver_preload(["dar_hf.training", "matplotlib.pyplot", "sklearn.datasets"])
    with mock.patch.dict(os.environ, environment, clear=True):
        first = FORK_SERVER.Process(target=int)
        first.start()
        first.join()
    assert first.exitcode == 0


def run_here(line: list[str], environment: dict[str, str], log: str) -> None:
    """In a forked process: be ``python *line``, in this environment, with what it says in files."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)  # the server's is not the default
    sys.argv = line
    runpy.run_path(line[0], run_name="__main__")


class Script:
    """A run of ``python *line``, by as many ``processes`` as torchrun would start.

    ``log``: a path to which what it says is written, with the endings .stdout and .stderr. ``kill_at``: once this path
    exists, the run is killed without warning.
    """

    def __init__(self, line, environment, log, processes=1, kill_at=None):
        self.line, self.environment, self.log = list(map(str, line)), environment, str(log)
        self.processes, self.kill_at = processes, kill_at
        self.started = []

    def start(self):
        self.deadline = time.monotonic() + TIMEOUT
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        world |= {name: str(self.processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        for rank in map(str, range(self.processes)):
            variables = world | {"RANK": rank, "LOCAL_RANK": rank} if self.processes > 1 else {}
            process = FORK_SERVER.Process(target=run_here, args=(self.line, self.environment | variables, self.log))
            process.start()
            self.started.append(process)

    def ended(self):
        """Whether it has; kills it where it is time to, or where one of its processes failed a minute ago."""
        codes = [process.exitcode for process in self.started]
        if None not in codes:
            return True
        if any(codes):  # the others fail, too, as soon as they wait for this one
            self.deadline = min(self.deadline, time.monotonic() + 60)
        if time.monotonic() > self.deadline or (self.kill_at and self.kill_at.exists()):
            self.kill()
        return False

    def kill(self):
        for process in self.started:
            process.kill()

    def typed(self, *launcher):
        """The line to start it as a user would."""
        return [sys.executable, *launcher, *self.line]

    def run(self):
        together(self)
        return self

    @property
    def exitcode(self):
        """Of the process of lowest rank that failed, or else 0."""
        return next((process.exitcode for process in self.started if process.exitcode), 0)

    def said(self, name="stderr"):
        return Path(f"{self.log}.{name}").read_text()

    def finished(self):
        assert self.exitcode == 0, f"exit code {self.exitcode}\n{self.said()[-3000:]}"
        return self


class Command(Script):
    """A run of the command; ``history`` and ``weights`` are what it left in the folder.

    ``runner``: a script that is given the command as its arguments. ``kill_at``: a file of the folder.
    """

    def __init__(self, environment, stage, folder, model=None, processes=1, runner=None, kill_at=None, **options):
        self.folder = Path(folder)
        options = options | {"output_dir": folder} | ({"model_overrides": overrides(model)} if model else {})
        line = [*([runner] if runner else []), TRAIN, stage]
        for name, value in options.items():
            line += [f"--{name}", *(value if isinstance(value, list) else [value])]
        super().__init__(line, environment, folder, processes, kill_at and self.folder / kill_at)

    def history(self):
        lines = map(json.loads, (self.folder / "history.jsonl").read_text().splitlines())
        return {line["step"]: line for line in lines if "grad_norm" in line}

    def weights(self, checkpoint=None):
        if checkpoint:
            return load_file(self.folder / "checkpoints" / checkpoint / "model.safetensors")
        (file,) = (self.folder / part for part in ("transformer", ".") if list((self.folder / part).glob("*.saf*")))
        return load_file(next(file.glob("*.safetensors")))


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def together(*commands):
    """Run commands side by side, two at a time."""
    waiting, running = list(commands), []
    try:
        while waiting or running:
            while waiting and len(running) < 2:
                running.append(waiting.pop(0))
                running[-1].start()
            running = [command for command in running if not command.ended()]
            time.sleep(0.005)
    finally:  # after an interruption
        for command in running:
            command.kill()


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
