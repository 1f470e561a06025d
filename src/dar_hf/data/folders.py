"""What a local folder holds: images, parquet files or webdataset tars, by split, and the classes of images.

**Splits by folders.** The folders at the top are splits if *each* of them is named like one: train or training;
validation, valid, val or dev; test, testing, eval or evaluation; in any case, perhaps with a number (train2017). A
folder ``train`` among folders with other names is a class. There is one exception: where two splits are there and
hold nothing but folders (of classes), the other folders next to them are splits too, under their own names.

**Splits by files.** Names of parquet files and tars that begin with the name of a split and go on with a number
(train-00000-of-00002.parquet, test.tar) say the split; so do names that hold such a word elsewhere, if each file's
does; and any name like data/NAME-00000-of-00001.parquet. Names of images say it only in a flat folder where each of
them does, and ``train`` is one of them.

Where neither says anything, everything is the split ``train``.

**Classes.** The class of an image is the first folder below its split, as in torchvision. Folders that hold only one
folder and nothing else are passed through. Images outside the folders of classes have no class, and are left out where
labels are asked for.

Links are followed. Hidden files are no data. A folder whose README.md configures it (as clones of Hub data sets do)
is left to `datasets`, and so is one of other formats (csv, json, arrow).
"""

import functools
import glob
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import datasets
from huggingface_hub import metadata_load
from PIL import Image

from .classes import in_order

logger = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_FOLDER_NAME = re.compile(r"([a-z]+)[-_. ]?[0-9]*")
_FILE_NAME = re.compile(r"([a-z]+)(?:[-_. ]?[0-9].*)?")
_SHARD_NAME = re.compile(r"data/(\w+)-[0-9]{5}-of-[0-9]{5}.*")
_SEPARATORS = re.compile(r"[-._ 0-9]+")

PARQUET, WEBDATASET, IMAGES = "parquet", "webdataset", "images"
DATA_ENDINGS = {".parquet": PARQUET, ".tar": WEBDATASET, ".tar.gz": WEBDATASET}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ARCHIVES = (".zip", ".tgz", ".gz", ".7z", ".rar", ".bz2", ".xz", ".zst")
OTHER_FORMATS = (".arrow", ".csv", ".tsv", ".json", ".jsonl")  # datasets reads them
SIDE_FILES = (".md", ".txt", ".json", ".jsonl", ".csv", ".xml", ".yaml", ".yml", ".py", ".ini", ".log", ".db")
NOT_ONE_IMAGE = {".h5", ".hdf"}  # pillow knows the endings, but cannot open them
SYSTEM_FOLDERS = ("__MACOSX", "__pycache__")
MAX_NAMED = 5  # names in a message


@dataclass
class LocalFiles:
    """Files of a local data set.

    Attributes:
        path: the folder, or a single file.
        kind: "images", "parquet" or "webdataset".
        splits: paths relative to the folder by split, sorted.
        depth: how many folders lie around the classes, including the one that names the split.
        metadata: files with captions or labels, by split.
        warnings: what is left out.
    """

    path: str
    kind: str
    splits: dict[str, list[str]]
    depth: int = 0
    metadata: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def absolute(self, files: Iterable[str]) -> list[str]:
        """Full paths."""
        return [os.path.join(os.path.abspath(self.path), file) for file in files]

    def known_split(self, name: str) -> str:
        """The split of this name, or of another word for it (val for validation).

        Raises:
            ValueError: if there is none, with the splits that there are.
        """
        if name in self.splits:
            return name
        other = _SPLIT_OF.get(name.lower(), name)
        if other in self.splits:
            return other
        if os.path.isfile(self.path):
            raise ValueError(f"{self.path} is a single file, all of it the split train; it has no split {name!r}.")
        raise ValueError(
            f"{self.path} has no split {name!r}. Found by the names of its folders or files: "
            f"{', '.join(self.splits)}. A folder with such a name is a class only next to folders with other names."
        )


def data_kind(file: str) -> str | None:
    """Kind of a data file, or None; images and files with captions are none."""
    name = os.path.basename(file).lower()
    if name in METADATA:
        return None
    return next((kind for ending, kind in DATA_ENDINGS.items() if name.endswith(ending)), None)


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings of the files that pillow opens."""
    Image.init()
    return frozenset(ending for ending, name in Image.EXTENSION.items() if name in Image.OPEN) - NOT_ONE_IMAGE


@functools.cache
def warn_once(text: str) -> None:
    """A warning, the first time that it is given."""
    logger.warning("%s", text)


def read_folder(path: str) -> LocalFiles | None:
    """What a folder holds, by the rules above; None if that is left to `datasets`.

    Raises:
        ValueError: if there is no data in it, or its splits cannot be told.
    """
    if _is_configured(path):
        return None
    files = list_files(path)
    kind, chosen = _choose_kind(files)
    if kind is None:
        if any(_ending(file) in OTHER_FORMATS for file in files) and not _archives(files):
            return None
        raise ValueError(f"{path} holds no images, parquet files or tars: {_what_else(files)}.")
    depth, splits = _splits_by_folders(path, chosen)
    by_folders = bool(splits)
    if not by_folders:
        splits = _splits_by_files(path, chosen, kind) or {"train": chosen}
    found = LocalFiles(path, kind, _in_order(splits), depth)
    if kind == IMAGES:
        found.metadata = _metadata(files, splits, depth if by_folders else None)
    found.warnings = _left_out(files, found)
    return found


def _is_configured(path: str) -> bool:
    """Whether a README.md or .huggingface.yaml says which files are which split, for `datasets`."""
    if os.path.isfile(os.path.join(path, ".huggingface.yaml")):
        return True
    readme = os.path.join(path, "README.md")
    if not os.path.isfile(readme):
        return False
    try:
        content = metadata_load(readme)
    except Exception as error:  # yaml has several, and text in other encodings ends here too
        warn_once(f"{readme} is not read: its header cannot be parsed ({type(error).__name__}).")
        return False
    return bool(isinstance(content, dict) and content.get("configs"))


def list_files(path: str) -> list[str]:
    """Regular files below a folder, relative to it, sorted; hidden ones are left out. Links are followed, though not
    back into a folder that they lie in. Links that lead nowhere count as files: they are images that cannot be read.
    """
    found: list[str] = []
    pending: list[tuple[str, tuple]] = [("", ())]
    while pending:
        folder, above = pending.pop()
        status = os.stat(os.path.join(path, folder))
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            warn_once(f"the link {os.path.join(path, folder)} leads back to a folder around it: it is not followed.")
            continue
        with os.scandir(os.path.join(path, folder)) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                    continue
                if entry.is_dir():
                    pending.append((name, (*above, identity)))
                elif entry.is_file():
                    found.append(name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    found.append(name)
                    warn_once(f"the link {entry.path} leads nowhere.")
    return sorted(found)


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _archives(files: list[str]) -> list[str]:
    return [file for file in files if _ending(file) in ARCHIVES and data_kind(file) is None]


def _choose_kind(files: list[str]) -> tuple[str | None, list[str]]:
    """The kind of data and its files: of two kinds parquet or tars if their names say splits, else what is more."""
    endings = image_endings()
    by_kind: dict[str, list[str]] = {IMAGES: [file for file in files if _ending(file) in endings]}
    for kind in (PARQUET, WEBDATASET):
        by_kind[kind] = [file for file in files if data_kind(file) == kind]
    for kind in (PARQUET, WEBDATASET):
        if any(_file_split(file) == "train" for file in by_kind[kind]):
            return kind, by_kind[kind]
    best = max(by_kind, key=lambda kind: len(by_kind[kind]))
    return (best if by_kind[best] else None), by_kind[best]


def _what_else(files: list[str]) -> str:
    """What a folder without data has instead."""
    archives = _archives(files)
    if archives:
        return f"archives must be unpacked first ({_some(archives)})"
    if not files:
        return "it is empty"
    counts = Counter(_ending(file) or "without an ending" for file in files)
    return "its files are " + ", ".join(f"{count} {ending}" for ending, count in counts.most_common(MAX_NAMED))


def _some(names: list[str]) -> str:
    """The first few names."""
    more = [f"and {len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
    return ", ".join([*names[:MAX_NAMED], *more])


def _in_order(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """train, validation and test first."""
    known = [split for split in SPLIT_WORDS if split in splits]
    return {split: splits[split] for split in [*known, *sorted(splits.keys() - set(known))]}


# Splits


def _folder_split(name: str) -> str | None:
    """The split that a folder's name stands for."""
    match = _FOLDER_NAME.fullmatch(name.lower())
    return _SPLIT_OF.get(match[1]) if match else None


def _file_split(file: str) -> str | None:
    """The split that a file's name begins with, if nothing but numbers follows."""
    match = _FILE_NAME.fullmatch(os.path.basename(file).split(".")[0].lower())
    return _SPLIT_OF.get(match[1]) if match else None


def _splits_by_folders(path: str, files: list[str]) -> tuple[int, dict[str, list[str]]]:
    """How many folders lie around the classes, and the files by split; none where folders do not say it."""
    folders = {os.path.dirname(file) for file in files} - {""}
    depth = 0
    while True:
        tops = {tuple(folder.split("/")[: depth + 1]) for folder in folders if folder.count("/") >= depth}
        names = _folder_splits(tops, folders)
        if names:
            splits: dict[str, list[str]] = defaultdict(list)
            for file in files:
                parts = tuple(file.split("/")[: depth + 1])
                if parts in names:
                    splits[names[parts]].append(file)
            return depth + 1, dict(splits)
        if len(tops) != 1 or "/".join(*tops) in folders:
            _refuse_inner_splits(path, folders, depth)
            return depth, {}
        depth += 1  # a folder that holds only one folder


def _folder_splits(tops: set[tuple], folders: set[str]) -> dict[tuple, str]:
    """The split of each folder on one level, or nothing if they are classes."""
    found = {top: _folder_split(top[-1]) for top in tops}
    named = {top: split for top, split in found.items() if split}
    of_folders = not any("/".join(top) in folders for top in named)
    if len(named) == len(tops) or (len(set(named.values())) > 1 and of_folders):
        return {top: split or re.sub(r"\W+", "_", top[-1]) for top, split in found.items()}
    return {}


def _refuse_inner_splits(path: str, folders: set[str], depth: int) -> None:
    """Raise a ValueError for splits inside of classes: they would all be trained on."""
    inner: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        parts = folder.split("/")
        for place in range(depth + 1, len(parts)):
            split = _folder_split(parts[place])
            if split:
                inner["/".join(parts[:place])].add(split)
    for parent, splits in sorted(inner.items()):
        if len(splits) > 1:
            raise ValueError(
                f"{path} holds splits inside of other folders ({parent} has {', '.join(sorted(splits))}): put the "
                "folders of the splits at the top, or name one of these folders as the data set."
            )


def _splits_by_files(path: str, files: list[str], kind: str) -> dict[str, list[str]]:
    """Files by split, as far as their names say it."""
    if kind == IMAGES:
        flat = len({os.path.dirname(file) for file in files}) == 1
        splits = _grouped(files, _file_split)
        return splits if flat and "" not in splits and "train" in splits else {}
    for split_of in (_shard_split, _word_split):
        splits = _grouped(files, split_of)
        if "" not in splits:
            return splits
    splits = _grouped(files, _file_split)
    others = splits.pop("", [])
    if len(splits) == 1 and len(others) > len(files) / 2:
        named = next(iter(splits.values()))
        raise ValueError(
            f"{path}: {_some(named)} is named like a split, {_some(others)} are not. Give all of them names like "
            "train-00000-of-00002 and test-00000-of-00001, or none, or put them into folders train and test."
        )
    return splits


def _grouped(files: list[str], split_of: Callable[[str], str | None]) -> dict[str, list[str]]:
    """Files by split; those without one by an empty name."""
    splits: dict[str, list[str]] = defaultdict(list)
    for file in files:
        splits[split_of(file) or ""].append(file)
    return dict(splits)


def _shard_split(file: str) -> str | None:
    """Any name of a shard in data/, as `datasets` writes them."""
    match = _SHARD_NAME.fullmatch(file)
    return _SPLIT_OF.get(match[1], match[1]) if match else None


def _word_split(file: str) -> str | None:
    """The one split whose word a file's name holds anywhere (imagenet-train-0001.tar)."""
    words = _SEPARATORS.split(os.path.basename(file).lower())
    splits = {_SPLIT_OF[word] for word in words if word in _SPLIT_OF}
    return splits.pop() if len(splits) == 1 else None


def _metadata(files: list[str], splits: dict[str, list[str]], depth: int | None) -> dict[str, list[str]]:
    """Files with captions or labels: those in the folders that name a split, or all where there is one split only."""
    found = [file for file in files if os.path.basename(file) in METADATA]
    if depth is None:
        return {"train": found} if splits.keys() == {"train"} else {}
    by_split = {}
    for split, images in splits.items():
        folders = {tuple(file.split("/")[:depth]) for file in images}
        by_split[split] = [file for file in found if tuple(file.split("/")[:depth]) in folders]
    return by_split


def _left_out(files: list[str], found: LocalFiles) -> list[str]:
    """What of a folder is not used."""
    used = {file for split in found.splits.values() for file in split}
    used |= {file for split in found.metadata.values() for file in split}
    rest = [file for file in files if file not in used]
    archives = _archives(rest)
    endings = image_endings()
    data = [file for file in rest if _ending(file) in endings or data_kind(file) or _ending(file) == ".parquet"]
    data += [file for file in rest if os.path.basename(file) in METADATA and _ending(file) != ".parquet"]
    others = sorted(set(rest) - set(archives) - set(data))
    others = [file for file in others if _ending(file) not in SIDE_FILES and not os.path.basename(file).isupper()]
    texts = []
    if data:
        texts.append(f"{len(data)} files that belong to none of the splits {', '.join(found.splits)}: {_some(data)}")
    if archives:
        texts.append(f"archives, which must be unpacked to be read: {_some(archives)}")
    if others:
        texts.append(f"{len(others)} files that are no images: {_some(others)}")
    return [f"{found.path}: leaving out {text}." for text in texts]


# Images


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
    return pick(split, by_split)


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
    folders = {os.path.dirname(file) for file in files.splits[split]}
    inner = {tuple(folder.split("/")[files.depth :]) for folder in folders} - {(), ("",)}
    passed = 0
    while len({parts[: passed + 1] for parts in inner}) == 1 and not any(len(parts) == passed + 1 for parts in inner):
        passed += 1
    place = files.depth + passed
    if any(len(parts) > passed + 1 for parts in inner):
        warn_once(f"{files.path}: images lie in folders inside of others; the outer ones are their classes.")
    classes: list[str | None] = []
    for file in files.splits[split]:
        parts = file.split("/")
        classes.append(parts[place] if len(parts) > place + 1 else None)
    return classes


def _with_class(files: LocalFiles, split: str, classes: list[str | None]) -> tuple[list[str], list[str | None]]:
    """The images that lie in folders of classes, and their classes."""
    pairs = list(zip(files.splits[split], classes, strict=True))
    stray = [file for file, label in pairs if label is None]
    if 2 * len(stray) > len(pairs):
        raise ValueError(
            f"{len(stray)} of {len(pairs)} images in the split {split} of {files.path} lie in no folder of a class "
            f"({_some(stray)}): put them into one for each class."
        )
    if stray:
        warn_once(
            f"{files.path}: leaving out {len(stray)} images that lie in no folder of a class, and so have no label: "
            f"{_some(stray)}."
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


# Parts of splits


def split_names(split: str) -> list[str]:
    """The splits that "train[:10%]+test" is made of."""
    return [part.split("[")[0].split("(")[0].strip() for part in split.split("+")]


def with_known_splits(split: str, known: Callable[[str], str]) -> str:
    """The same parts, of splits whose names ``known`` returns."""
    parts = []
    for part, name in zip(split.split("+"), split_names(split), strict=True):
        parts.append(known(name) + part.strip()[len(name) :])
    return "+".join(parts)


def pick(split: str, by_split: dict[str, datasets.Dataset]) -> datasets.Dataset:
    """Parts of data sets that are in memory, in the notation of `datasets`.

    Raises:
        ValueError: for another notation.
    """
    if split in by_split:
        return by_split[split]
    sizes = {name: len(dataset) for name, dataset in by_split.items()}
    parts = []
    for part in datasets.ReadInstruction.from_spec(split).to_absolute(sizes):
        parts.append(by_split[part.splitname].select(range(part.from_, max(part.from_, part.to))))
    return datasets.concatenate_datasets(parts)


def escaped(files: dict[str, list[str]]) -> dict[str, list[str]]:
    """Paths for `datasets`, which takes them as patterns."""
    return {split: [glob.escape(path) for path in paths] for split, paths in files.items()}


@contextmanager
def clear_errors(name: str, split: str | None = None) -> Iterator[None]:
    """Whatever damaged or unknown data raises, as a ValueError; trouble with network or disk stays what it is."""
    what = name
    if split is not None:
        what = f"split {split!r} of {name}"
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"no data set {name!r} (digits, a folder, a file, a Hub id): {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"cannot load {what}: {error}") from error
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # tarfile, zlib, pyarrow and pandas have their own
        cause: BaseException = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            cause = error.__cause__
        raise ValueError(f"cannot load {what}: {str(cause) or type(cause).__name__}") from error
