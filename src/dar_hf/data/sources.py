"""Where images come from: scikit-learn's digits, a folder of images, parquet files, webdataset tars, or the Hub.

Each is loaded whole (indexed, on disk) or as a stream.
"""

import os
from typing import Any

import datasets
import numpy as np
from PIL import Image

DIGITS = "digits"
FORMATS = {".parquet": "parquet", ".tar": "webdataset"}
NUM_TRAIN_DIGITS = 1437  # the first 80 %; the split is fixed so that figures can be compared


def load_images(
    name: str,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    class_names: list[str] | None = None,
) -> datasets.Dataset:
    """Load a data set of images, with labels if asked for.

    Args:
        name: "digits", a folder of images, parquet files or webdataset tars, one such file, or a Hub id.
        split: name of the split.
        config_name: configuration of a Hub data set.
        image_column: column with the images; of webdatasets "image" stands for the only field with images.
        label_column: column with the classes; None where no labels are needed; of webdatasets "label" stands for cls.
        class_names: number the classes in this order, as another split does.

    Returns:
        A data set with the columns "image" and, with labels, "label" (a `datasets.ClassLabel`).

    Raises:
        ValueError: for a path, split or column that is not there, or a data set without images.
    """
    dataset = _select(_load(name, split, config_name), name, image_column, label_column)
    if len(dataset) == 0:
        raise ValueError(f"split {split!r} of {name} holds no images.")
    return _with_class_labels(dataset, name, class_names) if label_column else dataset


def stream_images(
    name: str,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
) -> datasets.IterableDataset:
    """Like `load_images`, but read as it is needed, and never written to disk. Labels stay as they are.

    Raises:
        ValueError: for a path, split or column that is not there, or labels that are no integers.
    """
    dataset = _select(_load(name, split, config_name, streaming=True), name, image_column, label_column)
    if label_column:
        feature = dataset.features["label"]
        integers = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
        if not (integers or isinstance(feature, datasets.ClassLabel)):
            raise ValueError(
                f"labels of a stream must be integers, those of {name} are {feature}: do without streaming."
            )
    return dataset


def _select(dataset: Any, name: str, image_column: str, label_column: str | None) -> Any:
    """The columns "image" and "label" of a data set or stream."""
    if dataset.features is None:
        dataset = dataset._resolve_features()
    if "__key__" in dataset.column_names:
        image_column, label_column = _webdataset_fields(dataset, image_column, label_column)
    columns = {"image": image_column} | ({"label": label_column} if label_column else {})
    for role, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has no column {column!r} for the {role}s; it has {', '.join(dataset.column_names)}."
            )
    if isinstance(
        dataset, datasets.IterableDataset
    ):  # renaming its columns decodes them, and broken images fail there
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({column: role for role, column in columns.items() if column != role})
    if not isinstance(dataset.features["image"], datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image())
    return dataset


def _webdataset_fields(dataset: Any, image_column: str, label_column: str | None) -> tuple[str, str | None]:
    """Webdatasets name fields by their file endings: the image's is jpg or png or another, the class's is cls."""
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if image_column == "image" and "image" not in dataset.column_names and len(images) == 1:
        image_column = images[0]
    if label_column == "label" and "label" not in dataset.column_names:
        label_column = "cls"
    return image_column, label_column


def _with_class_labels(dataset: datasets.Dataset, name: str, class_names: list[str] | None) -> datasets.Dataset:
    """The data set with "label" as a `datasets.ClassLabel`; integers keep their values, names are sorted."""
    feature, labels = dataset.features["label"], dataset["label"][:]
    missing = labels.count(None) + labels.count(-1)  # -1 is how data sets hide the labels of a test split
    if missing:
        raise ValueError(f"{missing} of {len(labels)} images of {name} have no label.")
    if isinstance(feature, datasets.ClassLabel) and class_names in (None, feature.names):
        return dataset
    if isinstance(feature, datasets.ClassLabel):
        labels = [feature.names[label] for label in labels]
    elif isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint")):
        if min(labels) < 0:
            raise ValueError(f"the labels of {name} must not be negative, got {min(labels)}.")
        class_names = class_names or [str(label) for label in range(max(labels) + 1)]
    elif not isinstance(feature, datasets.Value):
        raise ValueError(f"the labels of {name} are neither integers nor strings but {feature}.")
    labels = [str(label) for label in labels]
    class_names = class_names or sorted(set(labels))
    unknown = sorted(set(labels) - set(class_names))
    if unknown:
        raise ValueError(f"{name} has classes that the training split does not have: {', '.join(unknown)}.")
    numbers = {class_name: number for number, class_name in enumerate(class_names)}
    dataset = dataset.remove_columns("label").add_column("label", [numbers[label] for label in labels])
    return dataset.cast_column("label", datasets.ClassLabel(names=class_names))


def _load(name: str, split: str, config_name: str | None, streaming: bool = False) -> Any:
    if name == DIGITS:
        digits = load_digits(split)
        return digits.to_iterable_dataset() if streaming else digits
    path = os.path.expanduser(name)
    try:
        if os.path.isfile(path):
            ending = os.path.splitext(path)[1]
            if ending not in FORMATS:
                raise ValueError(f"a single file must end in {' or '.join(FORMATS)}")
            return datasets.load_dataset(FORMATS[ending], data_files={split: path}, split=split, streaming=streaming)
        if os.path.isdir(path) or not name.startswith((".", "/", "~")):
            return datasets.load_dataset(path, config_name, split=split, streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"no data set {name!r} (digits, a folder, a file, a Hub id): {error}") from error
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"cannot load split {split!r} of {name}: {error}") from error
    raise ValueError(f"no such file or folder: {path}.")


def available_splits(name: str, config_name: str | None = None) -> list[str]:
    """Names of the splits of a data set."""
    path = os.path.expanduser(name)
    if name == DIGITS:
        return ["train", "test"]
    return ["train"] if os.path.isfile(path) else datasets.get_dataset_split_names(path, config_name)


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
    rows = slice(0, NUM_TRAIN_DIGITS) if split == "train" else slice(NUM_TRAIN_DIGITS, None)
    pixels = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)  # levels 0 to 16
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": digits.target[rows].tolist()}
    return datasets.Dataset.from_dict(columns, features=features)
