"""Stage 2 under DeepSpeed's ZeRO, through the real command on two CPU processes; skipped where it is not installed.

accelerate offers DeepSpeed for accelerators only, but all that it does then works on CPUs with gloo, too. So the
runner lets two CPU processes pass for DeepSpeed's while accelerate decides, and starts the command.
"""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from dar_hf import DARPipeline

from .commands import COMMON, NO_DROPOUT, TRANSFORMER_MODEL, Command, assert_same_curve, assert_same_weights
from .helpers import tiny_tokenizer

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "deepspeed_zero3_8gpu.yaml"
RUNNER = """
import os
import runpy
import sys
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

initialize = AcceleratorState.__init__

def initialize_as_on_gpus(self, *args, **kwargs):
    PartialState(cpu=True)
    os.environ["ACCELERATE_USE_CPU"] = "false"
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        from deepspeed import comm

        comm.init_distributed("gloo", auto_mpi_discovery=False)
        PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    initialize(self, *args, **kwargs)

AcceleratorState.__init__ = initialize_as_on_gpus
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# a loss that is finite, with gradients that are not
POISON = """
from dar_hf.training import ar_stage

cross_entropy_sum = ar_stage.cross_entropy_sum
ar_stage.cross_entropy_sum = lambda logits, codes: cross_entropy_sum(logits, codes) + (0 * logits).sum().sqrt()
"""
OPTIONS = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.2,
}  # which is less than the norm


def deepspeed_environment(environment: dict[str, str], *options: str) -> dict[str, str]:
    """What `accelerate launch` makes of the configuration that comes with the examples."""
    options = ("--config_file", str(CONFIG), "--num_processes", "2", *options)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*options, "train.py"]))
    args.deepspeed_fields_from_accelerate_config = ""  # those that a DeepSpeed file would contradict: there is none
    _, variables = prepare_deepspeed_cmd_env(args)
    return variables | environment


@pytest.fixture(scope="module")
def runs(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "runner.py").write_text(RUNNER)
    (folder / "poisoned.py").write_text(POISON + RUNNER)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    options = COMMON | OPTIONS | {"tokenizer": folder / "tokenizer", "learning_rate": 3e-4, "ema_decay": 0}
    options["muon_learning_rate"] = 0
    model = TRANSFORMER_MODEL | NO_DROPOUT

    def command(name, environment=environment, model=model, **changes):
        return Command(environment, "ar", folder / name, model, processes=2, **options | changes)

    def spread(name, runner="runner.py", zero_stage=3, mixed_precision="no", **changes):
        given = "--zero_stage", str(zero_stage), "--mixed_precision", mixed_precision
        changes |= {"runner": folder / runner, "mixed_precision": mixed_precision}
        return command(name, deepspeed_environment(environment, *given), **changes)

    runs = {
        "copies": command("copies"),
        "zero 2": spread("zero2", zero_stage=2),
        "zero 3": spread("zero3", gradient_checkpointing=True),
        "bf16": spread("bf16", mixed_precision="bf16"),
        "poisoned": spread("poisoned", runner="poisoned.py", checkpointing_steps=1),
    }
    for run in runs.values():
        run.run()
    runs["zero 3"].finished()
    shutil.copytree(folder / "zero3", folder / "resumed")
    runs["resumed"] = spread("resumed", resume_from_checkpoint="checkpoint-8").run()
    adapted = {"init_from": folder / "zero3", "lora_rank": 4, "max_train_steps": 6, "model": None}
    runs["adapted copies"] = command("adapted_copies", **adapted).run()
    runs["adapted"] = spread("adapted", **adapted).run()
    return runs


@pytest.mark.parametrize("copies, spread", [("copies", "zero 2"), ("copies", "zero 3"), ("adapted copies", "adapted")])
def test_spread_parameters_train_like_copies(runs, copies, spread):
    copies, spread = runs[copies].finished(), runs[spread].finished()
    assert_same_curve(copies.history(), spread.history(), 1e-4)
    assert_same_weights(copies.weights(), spread.weights(), 1e-4)


def test_gradients_are_clipped(runs):
    assert min(line["grad_norm"] for line in runs["copies"].history().values()) > OPTIONS["max_grad_norm"]


def test_a_resumed_run_repeats_the_uninterrupted_one(runs):
    resumed = runs["resumed"].finished()
    assert_same_curve(runs["zero 3"].history(), resumed.history(), 1e-6)
    assert_same_weights(runs["zero 3"].weights(), resumed.weights(), 1e-6)


def test_half_precision(runs):
    half, single = runs["bf16"].finished().history(), runs["zero 3"].history()
    losses = [abs(half[step]["loss/cross_entropy"] / single[step]["loss/cross_entropy"] - 1) for step in single]
    assert 0 < max(losses) < 0.02
    assert {weight.dtype for weight in runs["bf16"].weights().values()} == {torch.float32}


def test_gradients_that_are_not_finite_stop_the_run(runs):
    poisoned = runs["poisoned"]
    assert poisoned.exitcode != 0 and "the gradient is not finite at step 1" in poisoned.said()
    assert not list(poisoned.folder.glob("checkpoints/*")) and not (poisoned.folder / "model_index.json").exists()


def test_the_pipeline_generates(runs):
    pipeline = DARPipeline.from_pretrained(runs["zero 3"].folder)
    (image,) = pipeline(3, generator=torch.Generator().manual_seed(0)).images
    assert image.size == (8, 8)
