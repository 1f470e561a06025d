"""A tiny pipeline on disk, a feature network of a few numbers, and processes that are none."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dar_hf.evaluation import GenerationArguments, ReconstructionArguments

FEATURES = """
import torch
from dar_hf.metrics import ImageFeatures

class Features(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(192, 6, generator=generator) / 14)
        self.head = torch.nn.Parameter(torch.randn(6, 5, generator=generator))

    def forward(self, images):
        x = images.float().flatten(1) / 127.5 - 1
        pool = x @ self.weight
        return ImageFeatures(pool=pool, spatial=x[:, :192:24], logits=pool @ self.head)
"""


@pytest.fixture
def workplace(tmp_path, tiny_pipeline):
    """A folder with ``pipeline``, ``tokenizer`` and ``features.py``."""
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    tiny_pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "features.py").write_text(FEATURES)
    return tmp_path


@pytest.fixture
def common(workplace):
    return {
        "pipeline": str(workplace / "pipeline"),
        "features": f"{workplace / 'features.py'}:Features",
        "output_dir": str(workplace / "out"),
        "shard_size": 7,
        "batch_size": 4,
    }


@pytest.fixture
def generation(common):
    """A function that makes arguments for generation."""

    def make(**changes):
        options = common | {"dataset_name": "digits", "num_images": 30} | changes
        return GenerationArguments(**options)

    return make


@pytest.fixture
def reconstruction(common):
    """A function that makes arguments for reconstruction."""

    def make(**changes):
        return ReconstructionArguments(**common | {"dataset_name": "digits", "num_images": 30} | changes)

    return make


@pytest.fixture
def process():
    """A function that stands in for an accelerator: one process of several, which come one after the other."""

    def make(index=0, count=1):
        return SimpleNamespace(
            process_index=index,
            num_processes=count,
            is_main_process=index == 0,
            device=torch.device("cpu"),
            wait_for_everyone=lambda: None,
            main_process_first=nullcontext,
        )

    return make
