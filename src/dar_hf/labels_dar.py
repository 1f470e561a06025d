"""Class names of a pipeline: by id as they are saved, and ids by name as users ask for them."""

import difflib
from numbers import Integral
from typing import Any

from .checks_dar import described


def names_by_id(id2label: Any, num_classes: int) -> dict[int, str]:
    """Class names by id, checked; JSON files hold the ids as text."""
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label must be a dictionary of names by class id, got {type(id2label).__name__}.")
    names: dict[int, str] = {}
    for key, name in id2label.items():
        whole = isinstance(key, Integral) and not isinstance(key, bool)
        if not (whole or (isinstance(key, str) and key.isdecimal())) or not 0 <= int(key) < num_classes:
            raise ValueError(f"id2label must name classes in [0, {num_classes}), got the id {described(key)}.")
        if not isinstance(name, str):
            raise ValueError(f"id2label must hold names, got {described(name)} for class {int(key)}.")
        names[int(key)] = name
    return names


def index_names(id2label: dict) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Class ids by name, and the classes that share a name: ImageNet has two cranes, and a crayfish by two names.

    A whole entry wins over a first name, and that over any other.
    """
    levels: list[dict[str, set[int]]] = [{}, {}, {}]
    for label, entry in id2label.items():
        first, *others = str(entry).split(",")
        for level, names in zip(levels, ([str(entry)], [first], others), strict=True):
            for name in names:
                level.setdefault(name.strip(), set()).add(int(label))
    owners: dict[str, set[int]] = {}
    for level in levels:
        for name, ids in level.items():
            owners.setdefault(name, ids)
    owners.pop("", None)
    labels = {name: min(ids) for name, ids in owners.items() if len(ids) == 1}
    return labels, {name: sorted(ids) for name, ids in owners.items() if len(ids) > 1}


def class_id(name: str, labels: dict[str, int], shared_names: dict[str, list[int]]) -> int:
    """The id of a class by name; ``labels`` and ``shared_names`` are those of `index_names`.

    Raises:
        ValueError: for a name that no class has, or that several share.
    """
    if name in shared_names:
        ids = ", ".join(map(str, shared_names[name]))
        raise ValueError(f"the class name {name!r} is shared by the classes {ids}: give the id.")
    if name not in labels:
        raise ValueError(f"unknown class name {name!r}; {known_names(labels, name)}.")
    return labels[name]


def known_names(labels: dict[str, int], name: str) -> str:
    """The class names there are, and those similar to ``name``, for a message."""
    known = [known for known in labels if "," not in known]
    if not known:
        return "known names: none: the pipeline has no id2label"
    text = f"known names: {', '.join(known[:20])}"
    if len(known) > 20:
        text += f", … ({len(known)} in all)"
    if close := difflib.get_close_matches(str(name), known):
        text += f"; similar: {', '.join(close)}"
    return text
