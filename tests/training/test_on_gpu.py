"""Training on a GPU, through the real command: half precision, compiled, and spread by accelerate's FSDP."""

import os
import subprocess

import pytest
import torch

from dar_hf import DARPipeline

from .commands import Command
from .helpers import OPEN_GATES, TINY_TOKENIZER, TINY_TRANSFORMER
from .test_fsdp import CONFIG

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

OPTIONS = {
    "preset": "digits",
    "max_train_samples": 256,
    "max_validation_samples": 16,
    "max_train_steps": 40,
    "train_batch_size": 16,
    "checkpointing_steps": 20,
    "validation_steps": 0,
    "logging_steps": 1,
}
HALF = {"mixed_precision": "bf16"}


def train(stage, folder, model, launcher=(), **options):
    """The lines of the history, one for each step."""
    command = Command(os.environ, stage, folder, model, **OPTIONS | options)
    line = command.typed(*launcher)
    result = subprocess.run(line, env=os.environ, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return list(command.history().values())


def losses(history, name):
    return torch.tensor([line[f"loss/{name}"] for line in history])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    variants = {"single": {"mixed_precision": "no"}, "half": HALF, "compiled": HALF | {"torch_compile": True}}
    runs = {
        name: train("tokenizer", folder / name, TINY_TOKENIZER, unquantized_steps=10, **variant, **OPEN_GATES)
        for name, variant in variants.items()
    }
    return folder, runs


def test_stage_1_in_half_precision_and_compiled(tokenizers):
    _, runs = tokenizers
    single = losses(runs["single"], "flow")
    for name in ("half", "compiled"):
        curve = losses(runs[name], "flow")
        assert curve[-10:].mean() < curve[:10].mean()
        assert 0 < (curve[:10] / single[:10] - 1).abs().max() < 0.05  # the same run but for rounding


def test_stage_2_in_half_precision_compiled_and_spread(tokenizers, tmp_path):
    options = {"tokenizer": tokenizers[0] / "half", "learning_rate": 1e-3, "muon_learning_rate": 0}
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", "1"]
    variants = {
        "single": {"mixed_precision": "no"},
        "half": HALF,
        "compiled": HALF | {"torch_compile": True},
        "spread": HALF | {"launcher": launch},
    }
    runs = {}
    for name, variant in variants.items():
        no_dropout = {"resid_dropout": 0, "ffn_dropout": 0, "token_dropout": 0, "class_dropout": 0}
        runs[name] = train("ar", tmp_path / name, TINY_TRANSFORMER | no_dropout, **options, **variant)
    single = losses(runs["single"], "cross_entropy")
    for name in ("half", "compiled", "spread"):
        curve = losses(runs[name], "cross_entropy")
        assert curve[-10:].mean() < curve[:10].mean()
        assert (curve / single - 1).abs().max() < 0.05
        pipeline = DARPipeline.from_pretrained(tmp_path / name).to("cuda")
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline([3, 5], generator=torch.Generator().manual_seed(0), output_type="pt").images
        assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


def test_a_spread_run_is_resumed(tokenizers, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--num_processes", "1"]
    options = {"tokenizer": tokenizers[0] / "half", "learning_rate": 1e-3, "launcher": launch}
    options["muon_learning_rate"] = 0
    whole = train("ar", tmp_path / "run", TINY_TRANSFORMER, **options)
    again = train("ar", tmp_path / "run", TINY_TRANSFORMER, **options, resume_from_checkpoint="checkpoint-20")
    assert (losses(again, "cross_entropy") / losses(whole, "cross_entropy") - 1).abs().max() < 1e-3
