"""Which data a run was trained on, in a few characters: a resumed run must go on with the same."""

import copy
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from ..data import DataError, ImageSamples, StreamedImages
from ..data.batches import LABELS, image_path
from ..utils.errors import one_line
from .codes import CodeSamples

ROWS = 64  # whose images are read: enough to tell data sets apart, and soon done on any disk


def data_fingerprint(samples: Any) -> dict[str, str]:
    """Hashes of some images as they are stored (of a stream the first ones), of all labels and of the classes' names.

    They do not depend on where the data lie. Data sets of other kinds than this package's have none.

    Args:
        samples: what a stage trains on.

    Raises:
        DataError: for a stream that cannot be read.
    """
    if isinstance(samples, StreamedImages):
        rows = _first_rows(samples.dataset)
        labels = [row[name] for name in LABELS for row in rows if name in row]
        images = (_image_bytes(row["image"]) for row in rows)
        return {"images": _digest(images), "labels": _digest(_words(labels, samples.dataset.features))}
    if isinstance(samples, ImageSamples):
        dataset = samples.dataset
        images = (_image_bytes(dataset[index]["image"]) for index in _spread(len(dataset)))
        return {"images": _digest(images), "labels": _digest(_words(samples.labels, dataset.features))}
    if isinstance(samples, CodeSamples):
        codes = (_words(samples.codes[index].flatten().tolist()) for index in _spread(len(samples)))
        return {"codes": _digest(b" ".join(row) for row in codes), "labels": _digest(_words(samples.labels))}
    return {}


def _spread(size: int) -> Iterator[int]:
    count = min(size, ROWS)
    return (position * size // count for position in range(count))


def _first_rows(dataset: datasets.IterableDataset) -> list[dict]:
    try:
        return list(islice(copy.deepcopy(dataset), ROWS))  # its epoch lies in memory that all copies share
    except Exception as error:  # of the file system, the network, or the format
        raise DataError(f"the streamed data set cannot be read: {one_line(error)}") from error


def _image_bytes(image: dict | None) -> bytes:
    """An image as it is stored; the name of one that cannot be read."""
    if image is not None and image["bytes"] is not None:
        return image["bytes"]
    path = image_path(image)
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError):  # a name may hold what none on a disk can
        return _text(Path(path).name)


def _words(values: Iterable[Any], features: datasets.Features | None = None) -> list[bytes]:
    """Labels as text, after the names of their classes."""
    feature = (features or {}).get("label")
    names = feature.names if isinstance(feature, datasets.ClassLabel) else []
    return [_text(value) for value in (*names, *values)]


def _text(value: Any) -> bytes:
    return str(value).encode("utf-8", "surrogateescape")  # folders may have names that are no UTF-8


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
