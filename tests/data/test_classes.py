"""Labels as classes: numbers keep their values, names are sorted, and what is neither is refused."""

import logging

import datasets
import pytest

from dar_hf.data.classes import MAX_IDS, whole_number, with_class_labels


def classes(labels, dtype=None, class_names=None):
    """Names of the classes, and the number of each label."""
    data = datasets.Dataset.from_dict({"image": labels, "label": labels})
    if dtype is not None:
        data = data.cast_column("label", datasets.Value(dtype))
    data = with_class_labels(data, "the set", class_names)
    return data.features["label"].names, data["label"][:]


def numbers(count):
    return [str(number) for number in range(count)]


@pytest.mark.parametrize(
    "labels, dtype",
    [
        ([10, 2, 0], None),
        ([10, 2, 0], "uint8"),
        ([10.0, 2.0, 0.0], None),
        ([10.0, 2.0, 0.0], "float32"),
        ([10, 2, 0], "decimal128(22, 1)"),
        (["10", "2", "0"], None),
        (["10", "2", "0"], "large_string"),
        (["10.0", "2.0", "0.0"], None),
        (["10", "2", "0"], "binary"),
    ],
)
def test_numbers_keep_their_values(labels, dtype):
    assert classes(labels, dtype) == (numbers(11), [10, 2, 0])


def test_eleven_classes_as_strings():
    labels = [str(number) for number in (10, 2, *range(11))]
    assert classes(labels) == (numbers(11), [10, 2, *range(11)])


def test_numbers_with_zeros_before_them_stay_names_in_order():
    assert classes(["010", "007", "2"]) == (["2", "007", "010"], [2, 1, 0])


@pytest.mark.parametrize("labels", [[7, 1_000_000, 7], [7.0, 1e6, 7.0], ["7", "1000000", "7"], [7, 2**40, 7]])
def test_sparse_numbers_make_no_million_classes(labels, caplog):
    names, found = classes(labels)
    assert names == ["7", str(int(labels[1]))] and found == [0, 1, 0]
    assert "sparse" in caplog.text


def test_gaps_stay_where_they_cost_little(caplog):
    with caplog.at_level(logging.WARNING):
        assert classes([MAX_IDS - 1, 3])[0] == numbers(MAX_IDS)
        many = list(range(0, 4000, 2))
        assert classes(many) == (numbers(3999), many)
    assert not caplog.text


def test_booleans():
    assert classes([True, False, True]) == (["False", "True"], [1, 0, 1])
    assert classes([True, True]) == (["False", "True"], [1, 1])


def test_names():
    assert classes(["dog", "cat", "1"]) == (["1", "cat", "dog"], [2, 1, 0])


@pytest.mark.parametrize("labels", [[1.5, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_numbers_that_are_not_whole(labels):
    with pytest.raises(ValueError, match=f"the labels of the set must be whole numbers or names, got {labels[0]}"):
        classes(labels)


@pytest.mark.parametrize("labels", [[None, 1], [-1, 1], [-1.0, 1.0], ["-1", "1"], [None, "a"], ["", "a"]])
def test_missing_labels(labels):
    with pytest.raises(ValueError, match="1 of 2 images of the set have no label"):
        classes(labels)


@pytest.mark.parametrize("labels", [[-5, 1], [-5.0, 1.0], ["-5", "1"]])
def test_negative_labels(labels):
    with pytest.raises(ValueError, match="must not be negative, got -5"):
        classes(labels)


@pytest.mark.parametrize(
    "labels, expected", [([2, 0], [2, 0]), ([2.0, 0.0], [2, 0]), (["2", "0"], [2, 0]), ([1000], None), (["x"], None)]
)
def test_the_classes_of_another_split(labels, expected):
    if expected is None:
        with pytest.raises(ValueError, match="classes that the training split does not have: (1000|x)"):
            classes(labels, class_names=numbers(3))
    else:
        assert classes(labels, class_names=numbers(3)) == (numbers(3), expected)


def test_sparse_classes_of_another_split():
    assert classes([1_000_000], class_names=["7", "1000000"])[1] == [1]
    assert classes(["007"], class_names=["2", "007"])[1] == [1]


@pytest.mark.parametrize(
    "label, number",
    [(3, 3), (3.0, 3), ("3", 3), (" 3.0", 3), (True, 1), (-1, -1), ("x", None), (0.5, None), (None, None), ("", None)],
)
def test_whole_numbers(label, number):
    assert whole_number(label) == number
    assert whole_number(float("nan")) is None and whole_number(float("inf")) is None
