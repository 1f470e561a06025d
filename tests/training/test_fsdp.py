"""Stage 2 under accelerate's FSDP, through the real command: two CPU processes, and real GPUs where there are any.

accelerate offers FSDP for accelerators only, but all that it does then works on CPUs with gloo, too. So the runner
lets two CPU processes pass for GPUs while accelerate decides, and starts the command.
"""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from dar_hf import DARPipeline

from .commands import COMMON, NO_DROPOUT, TRANSFORMER_MODEL, Command, assert_same_curve, assert_same_weights, together
from .helpers import tiny_tokenizer

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "fsdp2_8gpu.yaml"
RUNNER = """
import runpy
import sys
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

initialize = AcceleratorState.__init__

def initialize_as_on_gpus(self, *args, **kwargs):
    PartialState(cpu=True)
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    initialize(self, *args, **kwargs)

AcceleratorState.__init__ = initialize_as_on_gpus
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def fsdp_environment(environment: dict[str, str], mixed_precision: str) -> dict[str, str]:
    """What `accelerate launch` makes of the configuration that comes with the examples."""
    options = ["--config_file", str(CONFIG), "--num_processes", "2", "--mixed_precision", mixed_precision, "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    return prepare_multi_gpu_env(args) | environment


@pytest.fixture(scope="module")
def runs(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "runner.py").write_text(RUNNER)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    options = COMMON | {"tokenizer": folder / "tokenizer", "learning_rate": 3e-4, "train_batch_size": 4}
    options |= {"ema_decay": 0, "muon_learning_rate": 0}  # Muon needs whole matrices
    model = TRANSFORMER_MODEL | NO_DROPOUT

    def command(name, environment=environment, **changes):
        return Command(environment, "ar", folder / name, model, processes=2, **options | changes)

    def spread(name, mixed_precision="no", **changes):
        changes |= {"runner": folder / "runner.py", "mixed_precision": mixed_precision}
        return command(name, fsdp_environment(environment, mixed_precision), **changes)

    runs = {
        "copies": command("copies"),
        "spread": spread("spread"),
        "bf16": spread("bf16", mixed_precision="bf16"),
        "compiled": spread("compiled", torch_compile=True, gradient_checkpointing=True),
    }
    together(*runs.values())
    runs["spread"].finished()
    shutil.copytree(folder / "spread", folder / "resumed")
    runs["resumed"] = spread("resumed", resume_from_checkpoint="checkpoint-8").run()
    return {name: run.finished() for name, run in runs.items()}


@pytest.mark.parametrize("name", ["spread", "compiled"])
def test_spread_parameters_train_like_copies(runs, name):
    assert_same_curve(runs["copies"].history(), runs[name].history(), 1e-4)
    assert_same_weights(runs["copies"].weights(), runs[name].weights(), 1e-4)


def test_a_resumed_run_repeats_the_uninterrupted_one(runs):
    assert_same_curve(runs["spread"].history(), runs["resumed"].history(), 1e-6)
    assert_same_weights(runs["spread"].weights(), runs["resumed"].weights(), 1e-6)


def test_checkpoints_hold_shards(runs):
    checkpoint = runs["spread"].folder / "checkpoints" / "checkpoint-20"
    shards = sorted(path.name for path in (checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))
    assert shards == ["__0_0.distcp", "__1_0.distcp"] and not list(checkpoint.glob("*.safetensors"))


def test_half_precision(runs):
    half, single = (runs[name].history() for name in ("bf16", "spread"))
    losses = [abs(half[step]["loss/cross_entropy"] / single[step]["loss/cross_entropy"] - 1) for step in single]
    assert 0 < max(losses) < 0.02


def test_the_pipeline_generates(runs):
    pipeline = DARPipeline.from_pretrained(runs["spread"].folder)
    (image,) = pipeline(3, generator=torch.Generator().manual_seed(0)).images
    assert image.size == (8, 8)
