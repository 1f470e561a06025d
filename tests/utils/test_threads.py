"""How many processor cores a small model is given."""

import pytest
import torch

from dar_hf.utils import threads


@pytest.fixture
def two(monkeypatch):
    """A process with two threads, whose environment says nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


def test_small_models_get_one(two, tiny_tokenizer, tiny_transformer):
    threads.limit_threads(tiny_tokenizer, tiny_transformer)
    assert torch.get_num_threads() == 1


def test_larger_models_keep_all(two, monkeypatch, tiny_tokenizer, tiny_transformer):
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tiny_tokenizer, tiny_transformer)]
    monkeypatch.setattr(threads, "SMALL", sum(sizes))
    threads.limit_threads(tiny_tokenizer, tiny_transformer)
    assert torch.get_num_threads() == 2


def test_models_elsewhere_keep_all(two, tiny_tokenizer):
    threads.limit_threads(tiny_tokenizer.to("meta"))
    assert torch.get_num_threads() == 2


def test_the_environment_decides(two, monkeypatch, tiny_tokenizer):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.limit_threads(tiny_tokenizer)
    assert torch.get_num_threads() == 2
