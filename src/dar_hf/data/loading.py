"""What `datasets.load_dataset` lacks: parts of splits, paths that are no patterns, clear errors, checks for damage."""

import functools
import glob
import gzip
import logging
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

import datasets
import pyarrow
import pyarrow.parquet

logger = logging.getLogger(__name__)

TAR_BLOCK = 512


@functools.cache
def warn_once(text: str) -> None:
    """A warning, the first time that it is given."""
    logger.warning("%s", text)


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


# Damage


def with_rows(paths: list[str]) -> list[str]:
    """The parquet files that have rows. Some writers leave empty ones, which `datasets` may fail to read.

    Raises:
        ValueError: if one is damaged, or all are empty.
    """
    found = []
    for path in paths:
        try:
            if pyarrow.parquet.read_metadata(path).num_rows:
                found.append(path)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path} is damaged or no parquet file: {error}") from error
    if not found:
        raise ValueError(f"{', '.join(paths)}: no data, all of them are empty.")
    return found


def check_tar(path: str, streaming: bool) -> None:
    """Raise a ValueError for a tar without members, or one that cannot be read to its end.

    What reads it stops in silence at a damaged header, and where another tar was appended. The headers of a stream
    are not looked through, which may take minutes, if it ends as a tar should.
    """
    try:
        with tarfile.open(path) as tar:
            if tar.next() is None:
                raise ValueError(f"{path}: no data, it is empty.")
            if streaming and _ends_with_mark(path):
                return
            while tar.next() is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            _check_tar_end(path, cast("IO[bytes]", tar.fileobj), tar.offset)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or no tar file: {error}.") from error


def _ends_with_mark(path: str) -> bool:
    """Whether a file's last block holds zeros only. That of a compressed tar never does."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAR_BLOCK))
        return not file.read().strip(bytes(1))


def _check_tar_end(path: str, tar: IO[bytes], end: int) -> None:
    """Raise a ValueError if anything but zeros follows the last member."""
    tar.seek(end)
    block = tar.read(TAR_BLOCK)
    if not block:
        warn_once(f"{path} has no mark at its end: if it was cut off, the files after its last one are missing.")
    while block:
        if block.strip(bytes(1)):
            raise ValueError(
                f"{path} is damaged, or several tars in one file: nothing after its byte {end} can be read."
            )
        block = tar.read(1 << 20)
