"""Captions of images: one text each."""

import logging
from typing import Any

import datasets

from .loading import clear_errors

logger = logging.getLogger(__name__)


def check_captions(feature: Any, name: str) -> None:
    """Refuse a column that cannot be read as one text for each image.

    Raises:
        ValueError: that says what it holds.
    """
    if not isinstance(feature, datasets.Value):
        raise ValueError(f"the captions of {name} must be one text for each image, got {feature}.")


def with_captions(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """The data set with "caption" as text; classes become their names. An image without a caption has an empty one.

    Args:
        dataset: with the column "caption".
        name: of the data set, for messages.

    Raises:
        ValueError: for a column that holds no texts, or none but empty ones.
    """
    feature = dataset.features["caption"]
    if isinstance(feature, datasets.ClassLabel):
        texts = [feature.names[label] if label is not None and label >= 0 else None for label in dataset["caption"][:]]
    else:
        check_captions(feature, name)
        with clear_errors(name):
            texts = dataset.cast_column("caption", datasets.Value("string"))["caption"][:]
    missing = sum(not text for text in texts)
    if missing == len(texts):
        raise ValueError(f"the images of {name} have no captions.")
    if missing:
        logger.warning("%d of %d images of %s have no caption: theirs is empty", missing, len(texts), name)
    dataset = dataset.remove_columns("caption").add_column("caption", [text or "" for text in texts])
    return dataset.cast_column("caption", datasets.Value("string"))
