"""Where images come from: scikit-learn's digits, a folder of images, parquet files, webdataset tars, or the Hub.

Each is loaded whole (indexed, on disk) or as a stream. `folders` says how the splits and classes of a local folder are
found, `classes` how labels are numbered.
"""

import itertools
import os
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .captions import check_captions, with_captions
from .classes import whole_number, with_class_labels
from .folders import DATA_ENDINGS, IMAGES, WEBDATASET, LocalFiles, data_kind, image_endings, read_folder
from .image_folders import load_image_folder
from .loading import check_tar, clear_errors, escaped, pick, split_names, warn_once, with_known_splits, with_rows

DIGITS = "digits"
NUM_TRAIN_DIGITS = 1437  # the first 80 %; the split is fixed so that metrics can be compared


def load_images(
    name: str,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    class_names: list[str] | None = None,
    caption_column: str | None = None,
) -> datasets.Dataset:
    """Load a data set of images, with labels or captions if asked for.

    Args:
        name: "digits", a folder of images, parquet files or webdataset tars, one such file, or a Hub id.
        split: name of the split, or parts of some ("train[:10%]"). A single file is the split train.
        config_name: configuration of a Hub data set.
        image_column: column with the images; of webdatasets "image" stands for the only field with images.
        label_column: column with the classes; None where no labels are needed; of webdatasets "label" stands for cls.
        class_names: number the classes in this order, as another split does.
        caption_column: column with captions, to be read instead of labels; of webdatasets "caption" stands for txt.

    Returns:
        A data set with the columns "image" and, with labels, "label" (a `datasets.ClassLabel`) or, with captions,
        "caption". Labels that are numbers keep their values, see `dar_hf.data.classes`.

    Raises:
        ValueError: for a path, split or column that is not there, files that are damaged, a data set without images,
            or labels that are missing or neither whole numbers nor names.
    """
    if caption_column:
        label_column = None
    dataset = _load(name, split, config_name, image_column, caption_column or label_column)
    dataset = _select(dataset, name, image_column, label_column, caption_column)
    if len(dataset) == 0:
        raise ValueError(f"split {split!r} of {name} holds no images.")
    if caption_column:
        return with_captions(dataset, name)
    return with_class_labels(dataset, name, class_names) if label_column else dataset


def stream_images(
    name: str,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    caption_column: str | None = None,
) -> datasets.IterableDataset:
    """Like `load_images`, but read as it is needed, and never written to disk. Labels stay as they are.

    Raises:
        ValueError: for a path, split or column that is not there, a part of a split, labels that are no integers, or
            captions that are no texts.
    """
    if "[" in split or "+" in split:
        raise ValueError(
            f"a stream takes a whole split, not {split!r}: do without streaming, or take the first images "
            "(--max_train_samples)."
        )
    if caption_column:
        label_column = None
    dataset = _load(name, split, config_name, image_column, caption_column or label_column, streaming=True)
    dataset = _select(dataset, name, image_column, label_column, caption_column)
    if caption_column:
        check_captions(dataset.features["caption"], name)
        return dataset.cast_column("caption", datasets.Value("string"))
    if label_column and not _are_numbers(dataset, name):
        raise ValueError(
            f"labels of a stream must be integers, those of {name} are {dataset.features['label']}: do without "
            "streaming."
        )
    return dataset


def _are_numbers(stream: datasets.IterableDataset, name: str) -> bool:
    """Whether labels are integers, or can be read as such; of strings the first one is looked at."""
    feature = stream.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return True
    if not isinstance(feature, datasets.Value):
        return False
    if "string" in feature.dtype:
        return all(whole_number(row["label"]) is not None for row in first_rows(stream, 1, name))
    return feature.dtype.startswith(("int", "uint", "float", "decimal", "bool"))


def first_rows(stream: datasets.IterableDataset, count: int, name: str) -> list[dict]:
    """The first rows of a stream; images are not decoded.

    Raises:
        ValueError: if they cannot be read.
    """
    with clear_errors(name):
        return list(stream.cast_column("image", datasets.Image(decode=False)).take(count))


def _select(
    dataset: Any, name: str, image_column: str, label_column: str | None, caption_column: str | None = None
) -> Any:
    """The columns "image" and "label" or "caption" of a data set or stream."""
    if dataset.features is None:
        with clear_errors(name):
            dataset = dataset._resolve_features()
    if dataset.features is None:
        raise ValueError(f"{name} holds no images.")
    if "__key__" in dataset.column_names:
        image_column, label_column, caption_column = _webdataset_fields(
            dataset, image_column, label_column, caption_column
        )
    columns = {"image": image_column}
    if label_column:
        columns["label"] = label_column
    if caption_column:
        columns["caption"] = caption_column
    if image_column in (label_column, caption_column):
        other = list(columns)[1]
        raise ValueError(f"the images and the {other}s of {name} cannot both be the column {image_column!r}.")
    for role, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has no column {column!r} for the {role}s; it has {', '.join(dataset.column_names)}."
            )
    _check_image_feature(dataset.features[image_column], image_column, name)
    if isinstance(dataset, datasets.IterableDataset):
        # renaming columns of a stream decodes them, and broken images would fail there
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({column: role for role, column in columns.items() if column != role})
    if not isinstance(dataset.features["image"], datasets.Image):
        with clear_errors(name):
            dataset = dataset.cast_column("image", datasets.Image())
    return dataset


def _check_image_feature(feature: Any, column: str, name: str) -> None:
    """Raise a ValueError for a column that cannot hold images: encoded bytes, paths, or both."""
    if isinstance(feature, datasets.Image):
        return
    if isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary", "string", "large_string"):
        return
    if isinstance(feature, dict) and feature.keys() >= {"bytes", "path"}:
        return
    raise ValueError(f"the column {column!r} of {name} holds no images (encoded bytes, or paths) but {feature}.")


def _webdataset_fields(
    dataset: Any, image_column: str, label_column: str | None, caption_column: str | None
) -> tuple[str, str | None, str | None]:
    """Webdatasets name fields by their file endings: jpg or another has the image, cls the class, txt the caption."""
    endings = image_endings()
    images = [
        column
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.Image) or f".{column.lower()}" in endings
    ]
    if image_column == "image" and "image" not in dataset.column_names and len(images) == 1:
        image_column = images[0]
    if label_column == "label" and "label" not in dataset.column_names:
        label_column = "cls"
    if caption_column == "caption" and "caption" not in dataset.column_names:
        caption_column = "txt"
    return image_column, label_column, caption_column


def _load(
    name: str,
    split: str,
    config_name: str | None,
    image_column: str,
    label_column: str | None,
    streaming: bool = False,
) -> Any:
    """A data set or stream with all its columns."""
    if name == DIGITS:
        digits = pick(split, {part: load_digits(part) for part in split_names(split)})
        return digits.to_iterable_dataset() if streaming else digits
    files = local_files(name, config_name)
    if files is None:
        with clear_errors(name, split):
            return datasets.load_dataset(os.path.expanduser(name), config_name, split=split, streaming=streaming)
    split = with_known_splits(split, files.known_split)
    for text in files.warnings:
        warn_once(text)
    if files.kind == IMAGES:
        images = load_image_folder(files, split, image_column, label_column)
        return images.to_iterable_dataset() if streaming else images
    wanted = {part: files.absolute(files.splits[part]) for part in split_names(split)}
    if files.kind == WEBDATASET:
        for path in itertools.chain(*wanted.values()):
            check_tar(path, streaming)
    else:
        wanted = {part: with_rows(paths) for part, paths in wanted.items()}
    with clear_errors(name, split):
        return datasets.load_dataset(files.kind, data_files=escaped(wanted), split=split, streaming=streaming)


def local_files(name: str, config_name: str | None = None) -> LocalFiles | None:
    """What a local file or folder holds; None for data sets of the Hub, and folders that `datasets` reads by itself.

    Raises:
        ValueError: if it is not there, or holds no data.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        files = read_folder(path)
        if files is not None and config_name not in (None, "default"):
            raise ValueError(f"{name} has no configuration {config_name!r}: its README.md names none.")
        return files
    if os.path.isfile(path):
        kind = data_kind(path)
        if kind is None:
            raise ValueError(f"cannot load {name}: a single file must end in {' or '.join(DATA_ENDINGS)}.")
        return LocalFiles(path, kind, {"train": [os.path.abspath(path)]})
    if name.startswith((".", "/", "~")) or os.path.lexists(path):
        raise ValueError(f"no such file or folder: {path}.")
    return None


def available_splits(name: str, config_name: str | None = None) -> list[str]:
    """Names of the splits of a data set.

    Raises:
        ValueError: for a path that is not there or holds no data.
    """
    if name == DIGITS:
        return ["train", "test"]
    files = local_files(name, config_name)
    if files is not None:
        return list(files.splits)
    return datasets.get_dataset_split_names(os.path.expanduser(name), config_name)


def training_splits(name: str, train_split: str, config_name: str | None = None) -> list[str]:
    """Names of the splits that ``train_split`` takes all or a part of, as `available_splits` has them."""
    names = split_names(train_split)
    files = None
    if name != DIGITS:
        files = local_files(name, config_name)
    if files is not None:
        return [files.known_split(part) for part in names]
    if "all" in names:  # the word of `datasets` for every split
        return available_splits(name, config_name)
    return names


def load_digits(split: str) -> datasets.Dataset:
    """scikit-learn's 1,797 real handwritten digits, 8x8 grey, as a `datasets.Dataset`.

    Args:
        split: "train" (the first 1,437) or "test" (the other 360).

    Raises:
        ValueError: for another split.
        ImportError: without scikit-learn, which comes with ``pip install "dar-hf[demo]"``.
    """
    if split not in ("train", "test"):
        raise ValueError(f"the digits have the splits train and test, got {split!r}.")
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "dar-hf[demo]".') from error
    digits = sklearn_digits()
    rows = slice(0, NUM_TRAIN_DIGITS)
    if split == "test":
        rows = slice(NUM_TRAIN_DIGITS, None)
    pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)  # levels 0 to 16
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target[rows].tolist()}
    return datasets.Dataset.from_dict(columns, features=features)
