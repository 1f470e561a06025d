"""What the shared checks accept; what they refuse is in test_malformed_inputs.py."""

import numpy as np
import pytest
import torch
from pipeline_helpers import seeded

from dar_hf.checks_dar import check_integer, check_tensor, described


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_of_any_type(value):
    assert type(check_integer("n", value)) is int and check_integer("n", value) == 3


def test_a_word_stands_for_any_size():
    check_tensor("x", torch.zeros(2, 3), ("rows", 3))
    with pytest.raises(
        ValueError, match=r"^x must be floating point of shape \(rows, 3\), got torch.float32 of shape"
    ):
        check_tensor("x", torch.zeros(3, 2), ("rows", 3))


@pytest.mark.parametrize("value", [torch.zeros(9, 9), np.zeros((9, 9)), ["x" * 999], "a\nb", object()])
def test_what_was_refused_is_told_in_one_line(value):
    assert 0 < len(described(value)) < 80 and "\n" not in described(value)


@pytest.mark.parametrize("time", [1, np.float32(1.0), torch.tensor(1), torch.ones(1), torch.ones(2), np.ones(2)])
def test_times_of_any_type(tiny_tokenizer, time):
    sample, condition = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 64)
    given, expected = (tiny_tokenizer.velocity(sample, t, condition) for t in (time, 1.0))
    assert torch.equal(given, expected)


def test_labels_and_sizes_of_numpy_and_torch(tiny_pipeline):
    def codes(label, size):
        stream = tiny_pipeline.transformer.stream_codes(label, num_tokens=size, group_size=size, temperature=0)
        return torch.cat(list(stream), dim=1)

    expected = codes(3, 8)
    for label in (np.int64(3), np.array([3]), torch.tensor(3), [torch.tensor(3)]):
        assert torch.equal(codes(label, np.int64(8)), expected)


def test_generators_may_be_a_tuple(tiny_tokenizer):
    codes = torch.zeros(2, 16, dtype=torch.long)
    first, second = (tiny_tokenizer.decode(codes, generator=kind([seeded(), seeded(1)])) for kind in (list, tuple))
    assert torch.equal(first.sample, second.sample)


def test_ids_of_names_as_in_json(tiny_pipeline):
    pipe = type(tiny_pipeline)(**tiny_pipeline.components, id2label={"0": "cat", np.int64(1): "dog"})
    assert pipe.config.id2label == {0: "cat", 1: "dog"} and pipe.get_label_ids(["dog", "cat"]) == [1, 0]
