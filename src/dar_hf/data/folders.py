"""What a local folder holds: images, parquet files or webdataset tars, by split, and the classes of images.

**Splits by folders.** The folders at the top are splits if *each* of them is named like one: train or training;
validation, valid, val or dev; test, testing, eval or evaluation; in any case, perhaps with a number (train2017). A
folder ``train`` among folders with other names is a class, and a warning says so. There is one exception: where two
splits are there and hold nothing but folders (of classes), the other folders next to them are splits too, under their
own names.

**Splits by files.** Names of parquet files and tars that begin with the name of a split and go on with a number
(train-00000-of-00002.parquet, test.tar) say the split; so do names that hold such a word elsewhere, if each file's
does; and any name like data/NAME-00000-of-00001.parquet. Names of images say it only in a flat folder where each of
them does, and ``train`` is one of them.

Where neither says anything, everything is the split ``train``.

**Classes.** The class of an image is the first folder below its split, as in torchvision. Folders that hold only one
folder and nothing else, in all splits, are passed through. Images outside the folders of classes have no class, and
are left out where labels are asked for.

Links are followed. Hidden files are no data, and neither are files whose names are not UTF-8. A folder whose README.md
configures it (as clones of Hub data sets do) is left to `datasets`, and so is one of other formats (csv, json, arrow).
"""

import functools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from huggingface_hub import metadata_load
from PIL import Image

from .loading import warn_once

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_FOLDER_NAME = re.compile(r"([a-z]+)[-_. ]?[0-9]*")
_FILE_NAME = re.compile(r"([a-z]+)(?:[-_. ]?[0-9].*)?")
_SHARD_NAME = re.compile(r"data/(\w+)-[0-9]{5}-of-[0-9]{5}.*")
_SHARD_NUMBER = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5}).*")
_SEPARATORS = re.compile(r"[-._ 0-9]+")

PARQUET, WEBDATASET, IMAGES = "parquet", "webdataset", "images"
DATA_ENDINGS = {".parquet": PARQUET, ".tar": WEBDATASET, ".tar.gz": WEBDATASET}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ARCHIVES = (".zip", ".tgz", ".gz", ".7z", ".rar", ".bz2", ".xz", ".zst")
OTHER_FORMATS = (".arrow", ".csv", ".tsv", ".json", ".jsonl")  # datasets reads them
SIDE_FILES = (".md", ".txt", ".json", ".jsonl", ".csv", ".xml", ".yaml", ".yml", ".py", ".ini", ".log", ".db")
NOT_ONE_IMAGE = {".h5", ".hdf"}  # pillow knows the endings, but cannot open them
SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN")
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
    found = LocalFiles(path, kind, _in_order(splits))
    if kind == IMAGES:
        found.metadata = _metadata(files, splits, depth if by_folders else None)
        found.depth = _class_depth(splits, depth)
    found.warnings = [*_left_out(files, found), *_missing_shards(found)]
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
                if not _is_utf8(entry.name):
                    warn_once(f"leaving out {ascii(entry.path)}, whose name is not UTF-8: rename it.")
                    continue
                if entry.is_dir():
                    pending.append((name, (*above, identity)))
                elif entry.is_file():
                    found.append(name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    found.append(name)
                    warn_once(f"the link {entry.path} leads nowhere.")
    return sorted(found)


def _is_utf8(name: str) -> bool:
    """Whether a file's name can be stored in a table; the file system allows other bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _archives(files: list[str]) -> list[str]:
    return [file for file in files if _ending(file) in ARCHIVES and data_kind(file) is None]


def _choose_kind(files: list[str]) -> tuple[str | None, list[str]]:
    """The kind of data and its files: of two kinds parquet or tars if their names say splits, else what is more."""
    endings = image_endings()
    by_kind = {IMAGES: [file for file in files if _ending(file) in endings]}
    for kind in (PARQUET, WEBDATASET):
        by_kind[kind] = [file for file in files if data_kind(file) == kind]
        if any(_file_split(file) == "train" for file in by_kind[kind]):
            return kind, by_kind[kind]
    best = max(by_kind, key=lambda kind: len(by_kind[kind]))
    if not by_kind[best]:
        return None, []
    return best, by_kind[best]


def _what_else(files: list[str]) -> str:
    """What a folder without data has instead."""
    archives = _archives(files)
    if archives:
        return f"archives must be unpacked first ({first_names(archives)})"
    if not files:
        return "it is empty"
    counts = Counter(_ending(file) or "without an ending" for file in files)
    return "its files are " + ", ".join(f"{count} {ending}" for ending, count in counts.most_common(MAX_NAMED))


def first_names(names: list[str]) -> str:
    """The first few names."""
    text = ", ".join(names[:MAX_NAMED])
    if len(names) > MAX_NAMED:
        text += f", and {len(names) - MAX_NAMED} more"
    return text


def _in_order(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """train, validation and test first."""
    known = [split for split in SPLIT_WORDS if split in splits]
    return {split: splits[split] for split in [*known, *sorted(splits.keys() - set(known))]}


# Splits


def _folder_split(name: str) -> str | None:
    """The split that a folder's name stands for."""
    return _named_split(_FOLDER_NAME, name)


def _file_split(file: str) -> str | None:
    """The split that a file's name begins with, if nothing but numbers follows."""
    return _named_split(_FILE_NAME, os.path.basename(file).split(".")[0])


def _named_split(pattern: re.Pattern, name: str) -> str | None:
    match = pattern.fullmatch(name.lower())
    return _SPLIT_OF.get(match[1]) if match else None


def _splits_by_folders(path: str, files: list[str]) -> tuple[int, dict[str, list[str]]]:
    """How many folders lie around the classes, and the files by split; none where folders do not say it."""
    folders = {os.path.dirname(file) for file in files} - {""}
    depth = 0
    while True:
        tops = {tuple(folder.split("/")[: depth + 1]) for folder in folders if folder.count("/") >= depth}
        names = _folder_splits(path, tops, folders)
        if names:
            break
        if len(tops) != 1 or "/".join(*tops) in folders:
            _reject_inner_splits(path, folders, depth)
            return depth, {}
        depth += 1  # a folder that holds only one folder
    splits = _grouped(files, lambda file: names.get(tuple(file.split("/")[: depth + 1])))
    splits.pop("", None)
    return depth + 1, splits


def _folder_splits(path: str, tops: set[tuple], folders: set[str]) -> dict[tuple, str]:
    """The split of each folder on one level, or nothing if they are no splits."""
    found = {top: _folder_split(top[-1]) for top in tops}
    named = {top: split for top, split in found.items() if split}
    of_folders = not any("/".join(top) in folders for top in named)
    if len(named) == len(tops) or (len(set(named.values())) > 1 and of_folders):
        return {top: split or re.sub(r"\W+", "_", top[-1]) for top, split in found.items()}
    if named:
        words, others = (sorted(top[-1] for top in part) for part in (named, tops - named.keys()))
        warn_once(
            f"{path}: folders named like splits ({first_names(words)}) are not taken for splits, because there are "
            f"others next to them ({first_names(others)})."
        )
    return {}


def _reject_inner_splits(path: str, folders: set[str], depth: int) -> None:
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


def _class_depth(splits: dict[str, list[str]], depth: int) -> int:
    """How many folders lie around the classes, if ``depth`` of them lie around the images of a split."""
    inner = {tuple(file.split("/")[depth:-1]) for files in splits.values() for file in files} - {()}
    while inner and len({parts[0] for parts in inner}) == 1 and min(map(len, inner)) > 1:
        inner = {parts[1:] for parts in inner}
        depth += 1
    return depth


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
            f"{path}: {first_names(named)} is named like a split, {first_names(others)} are not. Give all of them "
            "names like train-00000-of-00002 and test-00000-of-00001, or none, or use folders train and test."
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
    data = [f for f in rest if _ending(f) in endings or data_kind(f) or os.path.basename(f) in METADATA]
    others = sorted(set(rest) - set(archives) - set(data))
    others = [file for file in others if _ending(file) not in SIDE_FILES and not os.path.basename(file).isupper()]
    texts = []
    if data:
        texts.append(
            f"{len(data)} files that belong to none of the splits {', '.join(found.splits)}: {first_names(data)}"
        )
    if archives:
        texts.append(f"archives, which must be unpacked to be read: {first_names(archives)}")
    if others:
        texts.append(f"{len(others)} files that are no images: {first_names(others)}")
    return [f"{found.path}: leaving out {text}." for text in texts]


def _missing_shards(found: LocalFiles) -> list[str]:
    """Which splits lack files, as far as names like train-00000-of-00002 say it."""
    numbers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for file in sorted(file for files in found.splits.values() for file in files):
        match = _SHARD_NUMBER.fullmatch(file)
        if match:
            numbers[match[1], match[3]].add(match[2])
    return [
        f"{found.path}: there are {len(there)} of the {int(total)} files {name}-*-of-{total}; the others are missing."
        for (name, total), there in numbers.items()
        if len(there) < int(total)
    ]
