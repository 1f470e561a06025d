"""Labels as classes: which names there are, and which number each has.

Labels that are numbers (integers, floats that are whole, strings of digits) keep their values, so that class 2 is
drawn by ``pipe(2)``: the classes are 0 to the largest one, those without images included. Only where that would make
many classes without images (ids above `MAX_IDS`, most of them unused) the values that are there are numbered in their
order. False is 0 and True is 1. All other labels are names, numbered in the order of words; folders of classes with
numbers as names are numbered in the order of their values.
"""

import logging
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import datasets

logger = logging.getLogger(__name__)

MAX_IDS = 1000  # gaps between labels are kept up to here, and above it if at least half of the ids are used
_WHOLE = re.compile(r"(-?[0-9]+)(\.0*)?", re.ASCII)


def whole_number(label: Any) -> int | None:
    """The integer that a label stands for: 3, 3.0, "3", "3.0"; False is 0. None for anything else."""
    if isinstance(label, str):
        match = _WHOLE.fullmatch(label.strip())
        return int(match[1]) if match else None
    if isinstance(label, (int, float, Decimal)) and math.isfinite(label) and label == int(label):
        return int(label)
    return None


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes, sorted: by value if all are numbers, else as words."""
    names = set(names)
    if all(re.fullmatch("[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def with_class_labels(dataset: datasets.Dataset, name: str, class_names: list[str] | None) -> datasets.Dataset:
    """The data set with "label" as a `datasets.ClassLabel`.

    Args:
        dataset: with the column "label".
        name: of the data set, for messages.
        class_names: number the classes in this order.

    Raises:
        ValueError: for labels that are missing, negative, no whole numbers, or not among ``class_names``.
    """
    if dataset.features["label"] in (datasets.Value("binary"), datasets.Value("large_binary")):
        dataset = dataset.cast_column("label", datasets.Value("string"))
    feature = dataset.features["label"]
    labels = dataset["label"][:]
    if isinstance(feature, datasets.ClassLabel):
        _reject_missing(labels, name)
        if class_names in (None, feature.names):
            return dataset
        named = [feature.names[label] for label in labels]
    elif isinstance(feature, datasets.Value):
        named = _label_names(labels, feature, name, class_names or [])
    else:
        raise ValueError(f"the labels of {name} are neither integers nor strings but {feature}.")
    class_names = class_names or _number_classes(set(named), feature, name)
    unknown = in_order(set(named) - set(class_names))
    if unknown:
        raise ValueError(f"{name} has classes that the training split does not have: {', '.join(unknown)}.")
    numbers = {class_name: number for number, class_name in enumerate(class_names)}
    dataset = dataset.remove_columns("label").add_column("label", [numbers[label] for label in named])
    return dataset.cast_column("label", datasets.ClassLabel(names=class_names))


def _reject_missing(labels: list, name: str) -> None:
    """-1 is how data sets hide the labels of a test split."""
    missing = sum(label is None or label == "" or whole_number(label) == -1 for label in labels)
    if missing:
        raise ValueError(f"{missing} of {len(labels)} images of {name} have no label.")


def _label_names(labels: list, feature: datasets.Value, name: str, known: list[str]) -> list[str]:
    """The class of each image by name: numbers as integers are written, strings as they are if one is no number."""
    _reject_missing(labels, name)
    if feature.dtype == "bool":
        return [str(label) for label in labels]
    if not feature.dtype.startswith(("int", "uint", "float", "decimal", "string", "large_string")):
        return [str(label) for label in labels]
    numbers = {label: whole_number(label) for label in set(labels)}
    strings = "string" in feature.dtype
    if strings and (None in numbers.values() or _are_padded(numbers) or numbers.keys() <= set(known)):
        return labels
    for label, number in numbers.items():
        if number is None:
            raise ValueError(f"the labels of {name} must be whole numbers or names, got {label}.")
        if number < 0:
            raise ValueError(f"the labels of {name} must not be negative, got {label}.")
    return [str(numbers[label]) for label in labels]


def _are_padded(numbers: dict[str, int | None]) -> bool:
    """Whether zeros stand before some (007): such labels are names, though in the order of their values."""
    return any(len(label.strip().split(".")[0]) != len(str(number)) for label, number in numbers.items())


def _number_classes(names: set[str], feature: Any, name: str) -> list[str]:
    """Names of the classes in their order."""
    if isinstance(feature, datasets.Value) and feature.dtype == "bool":
        return ["False", "True"]
    if not all(label == str(whole_number(label)) for label in names):
        return in_order(names)
    highest = max(int(label) for label in names)
    if highest < max(MAX_IDS, 2 * len(names)):
        return [str(number) for number in range(highest + 1)]
    logger.warning(
        "the labels of %s are sparse, up to %d: its %d classes are numbered in order, and named by their labels.",
        name,
        highest,
        len(names),
    )
    return in_order(names)
