import os

import datasets
import pytest
from PIL import Image

from dar_hf.training import records
from dar_hf.utils.pictures import plot_history

from .commands import start_fork_server
from .helpers import fresh_process, tiny_tokenizer


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """Every test has accelerate as in a new process, and a cache of data sets of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    with fresh_process():
        yield


@pytest.fixture(autouse=True)
def blank_curves(monkeypatch):
    """A run's curves are a blank image: drawing them takes longer than training a tiny model."""
    monkeypatch.setattr(records, "plot_history", lambda histories, path: Image.new("L", (8, 8)).save(path))


@pytest.fixture
def curves(blank_curves, monkeypatch):
    """A run's curves are drawn."""
    monkeypatch.setattr(records, "plot_history", plot_history)


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """That of the commands, which find no GPU, no Hub and no cache of the user's."""
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
    environment = os.environ | changes
    start_fork_server(environment)
    return environment


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of a small tokenizer in which every part is alive."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
