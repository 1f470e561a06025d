"""Images of a local folder as a data set: their classes by folders, or the rows of their captions."""

import datasets

from .classes import in_order
from .folders import LocalFiles, first_names
from .loading import clear_errors, escaped, pick, split_names, warn_once


def load_image_folder(
    files: LocalFiles, split: str, image_column: str = "image", label_column: str | None = "label"
) -> datasets.Dataset:
    """Images of a folder as a data set of paths: "image", and "label" where they lie in folders of classes.

    Where there are captions (metadata.csv, .jsonl or .parquet) with the columns asked for, the data set is their rows.

    Args:
        files: from `read_folder`.
        split: a split or parts of some, with the names in ``files`` ("train[:10%]").
        image_column, label_column: columns asked for.

    Raises:
        ValueError: if there are no folders of classes where labels are asked for, or most images lie outside of them.
    """
    names = split_names(split)
    parts = {name: _class_folders(files, name) for name in names}
    all_classes = in_order(kind for part in parts.values() for kind in part if kind is not None)
    metadata = {name: files.absolute(files.metadata[name]) for name in names if files.metadata.get(name)}
    if metadata and (image_column != "image" or label_column):
        rows = _load_metadata(files, metadata, split, image_column, label_column, bool(all_classes))
        if rows is not None:
            return rows
    if label_column == "label" and not all_classes:
        raise ValueError(
            f"{files.path} has no column 'label' for the labels; it has image. Images get their labels from folders "
            "of classes: put them into one for each class (one for all, if there is only one)."
        )
    by_split = {}
    for name, classes in parts.items():
        images = files.splits[name]
        if label_column == "label":
            images, classes = _with_class(files, name, classes)
        by_split[name] = _image_table(files.absolute(images), classes, all_classes if label_column else [])
    rows = pick(split, by_split)
    if label_column == "label" and len(set(rows["label"][:])) < len(all_classes):
        warn_once(
            f"{files.path}: {split} has images of {len(set(rows['label'][:]))} of {len(all_classes)} classes only, as "
            "the images are in the order of their classes."
        )
    return rows


def _load_metadata(
    files: LocalFiles,
    metadata: dict[str, list[str]],
    split: str,
    image_column: str,
    label_column: str | None,
    has_classes: bool,
) -> datasets.Dataset | None:
    """Rows of the captions; None if the folders of classes have to give the labels."""
    use_folders = has_classes and image_column == "image" and label_column in (None, "label")
    try:
        with clear_errors(files.path, split):
            rows = datasets.load_dataset("imagefolder", data_files=escaped(metadata), split=split)
    except ValueError as error:
        if not use_folders:
            raise
        warn_once(f"{files.path}: the captions are not read ({error}); labels come from the folders.")
        return None
    if use_folders and label_column not in rows.column_names:
        return None
    count = sum(len(files.splits[name]) for name in metadata)
    if split in files.splits and len(rows) < count:
        warn_once(f"{files.path}: {count} images, but rows for {len(rows)} of them: the others are left out.")
    return rows


def _class_folders(files: LocalFiles, split: str) -> list[str | None]:
    """The class of each image of a split; None for those in no folder."""
    folders = [file.split("/")[files.depth : -1] for file in files.splits[split]]
    if any(len(inner) > 1 for inner in folders):
        warn_once(f"{files.path}: images lie in folders inside of others; the outer ones are their classes.")
    return [inner[0] if inner else None for inner in folders]


def _with_class(files: LocalFiles, split: str, classes: list[str | None]) -> tuple[list[str], list[str | None]]:
    """The images that lie in folders of classes, and their classes."""
    pairs = list(zip(files.splits[split], classes, strict=True))
    stray = [file for file, label in pairs if label is None]
    if 2 * len(stray) > len(pairs):
        raise ValueError(
            f"{len(stray)} of {len(pairs)} images in the split {split} of {files.path} lie in no folder of a class "
            f"({first_names(stray)}): put them into one for each class."
        )
    if stray:
        warn_once(
            f"{files.path}: leaving out {len(stray)} images that lie in no folder of a class, and so have no label: "
            f"{first_names(stray)}."
        )
    kept = [(file, label) for file, label in pairs if label is not None]
    return [file for file, _ in kept], [label for _, label in kept]


def _image_table(paths: list[str], classes: list[str | None], all_classes: list[str]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image()})
    columns: dict[str, list] = {"image": paths}
    if all_classes and None not in classes:
        features["label"] = datasets.ClassLabel(names=all_classes)
        numbers = {name: number for number, name in enumerate(all_classes)}
        columns["label"] = [numbers[label] for label in classes if label is not None]
    return datasets.Dataset.from_dict(columns, features=features)
