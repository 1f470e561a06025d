"""From images to new images, by the commands in processes of their own: both stages of training, then generation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dar_hf import DARPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINING = (
    "--preset digits --dataset_name digits --max_train_samples 64 --max_validation_samples 8 --train_batch_size 16 "
    "--warmup_steps 2 --logging_steps 1 --validation_steps 20 --mixed_precision no"
)
TOKENIZER = (
    "--max_train_steps 40 --unquantized_steps 10 --model_overrides encoder_dim=32 decoder_dim=32 diffusion_dim=32 "
    "attention_head_dim=16 num_encoder_layers=1 num_decoder_layers=1 diffusion_depth=1 codebook_size=16"
)
LANGUAGE_MODEL = (
    "--max_train_steps 20 --model_overrides hidden_size=32 intermediate_size=64 num_hidden_layers=1 "
    "num_attention_heads=2"
)


@pytest.fixture
def run(tmp_path):
    """A function that runs a command in a folder of its own, without a GPU, a Hub or the user's caches."""
    home = str(tmp_path / "home")
    changes = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def run(line: str) -> None:
        name, *options = line.split()
        command = [sys.executable, str(EXAMPLES / name), *options]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | changes, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def losses(folder: Path, name: str) -> list[float]:
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.end_to_end
def test_two_stages_and_generation(run, tmp_path):
    run(f"train.py tokenizer {TRAINING} {TOKENIZER} --output_dir tokenizer")
    flow = losses(tmp_path / "tokenizer", "loss/flow")
    assert len(flow) == 40 and sum(flow[-10:]) < 0.9 * sum(flow[:10])
    assert (tmp_path / "tokenizer" / "reconstructions.png").is_file()

    run(f"train.py ar {TRAINING} {LANGUAGE_MODEL} --tokenizer tokenizer --output_dir pipeline")
    cross_entropy = losses(tmp_path / "pipeline", "loss/cross_entropy")
    assert len(cross_entropy) == 20 and sum(cross_entropy[-5:]) < sum(cross_entropy[:5])
    assert {"model_index.json", "README.md", "loss.png"} <= {path.name for path in (tmp_path / "pipeline").iterdir()}

    run("generate.py --pipeline pipeline --class_labels 3 7 --output_dir drawn --previews strip")
    names = {path.name for path in (tmp_path / "drawn").iterdir()}
    assert names == {"0000.png", "0001.png", "grid.png", "previews.png"}
    pipe = DARPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    expected = pipe([3, 7], generator=[torch.Generator().manual_seed(seed) for seed in range(2)]).images
    for name, image in zip(("0000.png", "0001.png"), expected, strict=True):
        drawn = np.array(Image.open(tmp_path / "drawn" / name), dtype=int)
        assert drawn.std() > 1 and np.abs(drawn - np.array(image, dtype=int)).max() <= 1  # of 255 levels
