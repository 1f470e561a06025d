"""Class names by id: ImageNet's, and those a user has in a file."""

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path


def imagenet_labels() -> dict[int, str]:
    """Names of ImageNet's 1,000 classes by id (in the order of their WordNet ids), synonyms separated by commas."""
    text = resources.files("dar_hf").joinpath("assets/imagenet_classes.txt").read_text(encoding="utf-8")
    return dict(enumerate(text.splitlines()))


def ids_and_names(words: Iterable[str], labels: Mapping[str, int]) -> list[int | str]:
    """Classes as commands get them: a number is an id, unless a class has it as its name.

    Args:
        labels: class ids by name, of a pipeline.
    """
    found: list[int | str] = list(words)
    for index, word in enumerate(found):
        if word not in labels and str(word).isdecimal():
            found[index] = int(word)
    return found


def read_labels(path: str | Path, num_classes: int) -> dict[int, str]:
    """Class names of a file: JSON (a list, or a dictionary by id), or text with one name a line.

    Raises:
        ValueError: if the file is neither, or does not name each of ``num_classes`` classes once.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text) if Path(path).suffix == ".json" else text.splitlines()
        names = {
            int(key): name for key, name in (content.items() if isinstance(content, dict) else enumerate(content))
        }
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no class names by id: {error}") from error
    if not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise ValueError(f"{path} must hold names that are not empty.")
    if set(names) != set(range(num_classes)):
        raise ValueError(f"{path} must name the classes 0 to {num_classes - 1}, each once; it has {len(names)} names.")
    return dict(sorted(names.items()))
