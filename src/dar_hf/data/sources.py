"""Where images come from: scikit-learn's digits, a folder of images, parquet files, or any data set of the Hub."""

import os

import datasets
import numpy as np
from PIL import Image

DIGITS = "digits"
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
        name: "digits", a folder of images or of parquet files, one parquet file, or a Hub id.
        split: name of the split.
        config_name: configuration of a Hub data set.
        image_column: column with the images.
        label_column: column with the classes; None where no labels are needed.
        class_names: number the classes in this order, as another split does.

    Returns:
        A data set with the columns "image" and, with labels, "label" (a `datasets.ClassLabel`).

    Raises:
        ValueError: for a path, split or column that is not there, or a data set without images.
    """
    dataset = _load(name, split, config_name)
    columns = {"image": image_column} | ({"label": label_column} if label_column else {})
    for role, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has no column {column!r} for the {role}s; it has {', '.join(dataset.column_names)}."
            )
    if len(dataset) == 0:
        raise ValueError(f"split {split!r} of {name} holds no images.")
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({column: role for role, column in columns.items() if column != role})
    if not isinstance(dataset.features["image"], datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image())
    return _with_class_labels(dataset, name, class_names) if label_column else dataset


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


def _load(name: str, split: str, config_name: str | None) -> datasets.Dataset:
    if name == DIGITS:
        return load_digits(split)
    path = os.path.expanduser(name)
    try:
        if os.path.isfile(path):
            return datasets.load_dataset("parquet", data_files={split: path}, split=split)
        if os.path.isdir(path) or not name.startswith((".", "/", "~")):
            return datasets.load_dataset(path, config_name, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"no data set {name!r} (digits, a folder, a parquet file, a Hub id): {error}") from error
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
