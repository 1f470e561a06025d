"""The images of a run: a data set to train on and one to validate on, cut out of the splits that there are."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch
from transformers.hf_argparser import HfArg

from .batches import ImageSamples
from .classes import whole_number
from .sources import available_splits, first_rows, load_images, stream_images, training_splits
from .streaming import StreamedImages
from .transforms import ImageTransform

logger = logging.getLogger(__name__)

NO_DATASET = "dataset_name is missing: digits, a folder, a parquet or tar file or a Hub id."
HELD_OUT_PART = 20  # one image in this many is held out for validation where there is no split for it


@dataclass
class DataArguments:
    """Options that say which images a run sees, and how they are cut."""

    dataset_name: str = HfArg(default="", help="digits, a folder of images, parquet files or tars, a file, a Hub id")
    streaming: bool = HfArg(default=False, help="read training images as needed, without a copy on disk")
    stream_block_size: int = HfArg(default=1024, help="rows of a stream that are shuffled together")
    dataset_config_name: str | None = HfArg(default=None, help="configuration of a Hub data set")
    train_split: str = HfArg(default="train", help="split to train on")
    validation_split: str | None = HfArg(default=None, help="split to validate on; default validation or test")
    image_column: str = HfArg(default="image", help="column with the images")
    label_column: str = HfArg(default="label", help="column with the classes")
    caption_column: str | None = HfArg(
        default=None, help="column with captions, for a language model that draws from text instead of classes"
    )
    max_train_samples: int | None = HfArg(
        default=None,
        help="train on N random images; of a stream the first N (of each part, where several processes or workers "
        "read parts of it)",
    )
    max_validation_samples: int = HfArg(default=256, help="validate on at most N images")
    crop: str = HfArg(default="center", help="center, random or ten")
    flip: bool = HfArg(default=False, help="mirror half of the images")
    pixel_noise: float = HfArg(default=0.0, help="standard deviation of noise on training pixels in [-1, 1]")
    seed: int = HfArg(default=0, help="seed of everything random")

    def source(self, with_labels: bool) -> dict[str, Any]:
        """What `load_images` and `stream_images` are told besides the split."""
        columns: dict[str, str | None] = {"image_column": self.image_column, "label_column": None}
        if with_labels and self.caption_column:
            columns["caption_column"] = self.caption_column
        elif with_labels:
            columns["label_column"] = self.label_column
        return {"name": self.dataset_name, "config_name": self.dataset_config_name, **columns}

    def train_transform(self, size: tuple[int, int], channels: int) -> ImageTransform:
        """How training images are cut to ``size`` (height, width)."""
        return ImageTransform(size, channels, self.crop, self.flip, self.pixel_noise)


Splits = tuple[ImageSamples | StreamedImages, ImageSamples | None, datasets.ClassLabel | None]


def image_splits(
    args: DataArguments, size: tuple[int, int], channels: int, with_labels: bool, num_classes: int | None = None
) -> Splits:
    """Images to train on, images to validate on (plain centre crops) or None, and with labels the classes of both.

    Where ``args`` name a column of captions, they are read instead of the labels, and there are no classes.

    Args:
        args: which images.
        size, channels: (height, width) and channels that they are brought to.
        with_labels: whether labels or captions are needed.
        num_classes: of a stream whose labels have no names.

    Raises:
        ValueError: for a data set, split or column that is not there, or labels that are no classes.
    """
    if not args.dataset_name:
        raise ValueError(NO_DATASET)
    if args.streaming:
        return _streamed_splits(args, size, channels, with_labels, num_classes)
    source = args.source(with_labels)
    train = load_images(**source, split=args.train_split)
    classes = train.features.get("label")
    class_names = classes.names if classes else None
    validation = load_validation(args, partial(load_images, **source, class_names=class_names))
    if validation is None:
        train, validation = _hold_out(train, args)
    train = random_subset(train, args.max_train_samples, args.seed)
    samples = ImageSamples(train, args.train_transform(size, channels))
    return samples, validation_samples(validation, size, channels, args), classes


def _streamed_splits(
    args: DataArguments, size: tuple[int, int], channels: int, with_labels: bool, num_classes: int | None
) -> Splits:
    """A stream to train on, and the first images of the validation split, where there is one."""
    stream = stream_images(**args.source(with_labels), split=args.train_split)
    classes = _stream_classes(stream, num_classes) if "label" in stream.column_names else None
    if args.max_train_samples is not None:
        stream = stream.take(args.max_train_samples)
    validation = load_validation(args, partial(_first_images, args, classes, with_labels))
    if validation is None:
        logger.warning("no split to validate on: images of a stream cannot be held out")
    count = classes.num_classes if classes else None
    samples = StreamedImages(stream, args.train_transform(size, channels), args.stream_block_size, count)
    return samples, validation_samples(validation, size, channels, args), classes


def _stream_classes(stream: datasets.IterableDataset, num_classes: int | None) -> datasets.ClassLabel:
    """Classes of a stream, from its labels' names or their number."""
    feature = stream.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return feature
    if not isinstance(num_classes, int):
        raise ValueError("the stream's labels have no names to count: give --model_overrides num_classes=N.")
    return datasets.ClassLabel(names=[str(label) for label in range(num_classes)])


def _first_images(
    args: DataArguments, classes: datasets.ClassLabel | None, with_labels: bool, split: str
) -> datasets.Dataset:
    """The first images of a streamed split to validate on, their labels among the classes of training."""
    stream = stream_images(**args.source(with_labels), split=split)
    rows = first_rows(stream, args.max_validation_samples, args.dataset_name)
    if not rows:
        raise ValueError(f"split {split!r} of {args.dataset_name} holds no images.")
    for row in rows:
        if "caption" in row:
            row["caption"] = row["caption"] or ""
    features = {name: datasets.Value("string") for name in stream.column_names} | {"image": datasets.Image()}
    if classes:
        features["label"] = classes
        for row in rows:
            row["label"] = _training_label(row["label"], stream.features["label"], classes)
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _training_label(label: Any, feature: Any, classes: datasets.ClassLabel) -> int:
    """The number that a label of another split has among the classes of training.

    Raises:
        ValueError: if it is none of them.
    """
    number = whole_number(label)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if names is not None and number is not None and 0 <= number < len(names):
        number = classes.names.index(names[number]) if names[number] in classes.names else None
    if number is None or not 0 <= number < classes.num_classes:
        raise ValueError(f"it has the label {label}, which is none of the {classes.num_classes} classes of training.")
    return number


def load_validation(args: DataArguments, load: Callable[..., datasets.Dataset]) -> datasets.Dataset | None:
    """The split to validate on: the one named, or validation or test, where there is one that can be used.

    A split that training takes images of is none.

    Args:
        load: gives the data set of a ``split``.
    """
    if args.validation_split:
        return load(split=args.validation_split)
    available = available_splits(args.dataset_name, args.dataset_config_name)
    trained = training_splits(args.dataset_name, args.train_split, args.dataset_config_name)
    for split in ("validation", "test"):
        if split in available and split not in trained:
            try:
                return load(split=split)
            except ValueError as error:
                logger.warning("not validating on the split %s: %s", split, error)
    return None


def _hold_out(train: datasets.Dataset, args: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training images without some to validate on, and those."""
    count = min(args.max_validation_samples, len(train) // HELD_OUT_PART)
    if count == 0:
        return train, None
    logger.warning("no split to validate on: holding out %d of %d training images", count, len(train))
    parts = train.train_test_split(test_size=count, seed=args.seed)
    return parts["train"], parts["test"]


def random_subset(dataset: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    """``limit`` random rows in their order: the first ones of a folder would all be of one class."""
    if limit is None or limit >= len(dataset):
        return dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return dataset.select(sorted(order[:limit].tolist()))


def validation_samples(
    dataset: datasets.Dataset | None, size: tuple[int, int], channels: int, args: DataArguments
) -> ImageSamples | None:
    """Centre crops of at most ``args.max_validation_samples`` images that can be read; None if there are none."""
    if dataset is None:
        return None
    dataset = random_subset(dataset, args.max_validation_samples, args.seed)
    transform = ImageTransform(size, channels)
    samples = ImageSamples(dataset, transform)
    readable = samples.readable()
    if not readable:
        logger.warning("not validating: none of the %d images to validate on can be read", len(samples))
        return None
    if len(readable) == len(samples):
        return samples
    return ImageSamples(dataset.select(readable), transform)
