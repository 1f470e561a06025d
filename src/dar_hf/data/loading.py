"""What is needed around `datasets.load_dataset`: parts of splits, paths instead of patterns, clear errors."""

import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets


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
