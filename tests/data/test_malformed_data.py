"""Data that cannot be what it seems to be: every load ends in one clear error, and nothing passes in silence."""

import io
import os
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from dar_hf.data import load_images, stream_images


def png(size=(8, 8), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parquet(path, **columns):
    rows = {"image": [{"bytes": png(), "path": None}] * 4} | columns
    rows = {name: values for name, values in rows.items() if values is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_dict(rows)
    if "image" in rows and not isinstance(next(iter(rows["image"]), None), int):
        data = data.cast_column("image", datasets.Image())
    data.to_parquet(path)
    return path


def tar(path, members, cut=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return put(path, buffer.getvalue()[:cut])


def folder(root, **files):
    for name, content in files.items():
        put(root / name.replace("__", "/").replace("_dot_", "."), content)
    return root


LABELS = {
    "fractional": [0.5, 1.0, 2.0, 3.0],
    "nan": [0.0, float("nan"), 1.0, 2.0],
    "infinite": [0.0, float("inf"), 1.0, 2.0],
    "missing": [0, None, 1, 2],
    "hidden": [0, -1, 1, 2],
    "negative": [0, -7, 1, 2],
    "lists": [[0], [1], [2], [3]],
    "objects": [{"a": 1}] * 4,
}
PATHS = {
    "nothing there": lambda root: root / "none",
    "an empty file": lambda root: put(root / "data.parquet"),
    "text as parquet": lambda root: put(root / "data.parquet", b"hello"),
    "an image as parquet": lambda root: put(root / "data.parquet", png()),
    "text as tar": lambda root: put(root / "data.tar", b"hello" * 1000),
    "an empty tar": lambda root: put(root / "data.tar"),
    "a blank tar": lambda root: put(root / "data.tar", bytes(10240)),
    "a cut-off tar": lambda root: tar(root / "data.tar", [(f"{i}.png", png()) for i in range(9)], cut=1300),
    "another ending": lambda root: put(root / "data.json", b"{}"),
    "no ending": lambda root: put(root / "data", b"x"),
    "an empty folder": lambda root: (root / "x").mkdir() or root / "x",
    "a zip in a folder": lambda root: folder(root / "x", images_dot_zip=b"PK\3\4"),
    "text in a folder": lambda root: folder(root / "x", a_dot_txt=b"hello"),
    "hidden images": lambda root: folder(root / "x", _dot_a_dot_png=png()),
    "empty class folders": lambda root: [(root / "x" / name).mkdir(parents=True) for name in "ab"] and root / "x",
    "a cut-off parquet in a folder": lambda root: folder(root / "x", train_dot_parquet=b"PAR1 and no more"),
    "no rows": lambda root: parquet(root / "data.parquet", image=[], label=[]),
    "no image column": lambda root: parquet(root / "data.parquet", image=None, label=[0, 1]),
    "images are numbers": lambda root: parquet(root / "data.parquet", image=[1, 2], label=[0, 1]),
    "a pipe": lambda root: os.mkfifo(root / "data.parquet") or root / "data.parquet",
    "a link to nothing": lambda root: (root / "data.tar").symlink_to(root / "none") or root / "data.tar",
    "a circle of links": lambda root: (root / "data.tar").symlink_to(root / "data.tar") or root / "data.tar",
    "a null in the path": lambda root: "\0",
    "no name": lambda root: "",
}
CALLS = {
    "another split": {"split": "test"},
    "a split of nonsense": {"split": "train[:"},
    "no split": {"split": ""},
    "an unknown column of images": {"image_column": "picture"},
    "an unknown column of labels": {"label_column": "kind"},
}


def outcome(load, *args, **options):
    """How a load ended: a clear error, another exception, or silence."""
    try:
        load(*args, **options)
    except (ValueError, OSError) as error:
        text = str(error)
        clear = text and len(text) < 600 and "Traceback" not in text
        return "clear error" if clear else f"unclear: {text[:200]!r}"
    except Exception as error:
        return f"other exception: {type(error).__name__}: {error}"
    return "silently accepted"


@pytest.mark.parametrize("load", [load_images, stream_images])
@pytest.mark.parametrize("name", PATHS)
def test_places_without_images(tmp_path, name, load):
    source = PATHS[name](tmp_path)
    label = None if "image" in name and "column" not in name else "label"
    assert outcome(load, str(source), label_column=label) == "clear error"


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_are_no_classes(tmp_path, name):
    assert outcome(load_images, str(parquet(tmp_path / "data.parquet", label=LABELS[name]))) == "clear error"


@pytest.mark.parametrize("load", [load_images, stream_images])
@pytest.mark.parametrize("name", CALLS)
def test_what_the_data_do_not_have(tmp_path, name, load):
    source = parquet(tmp_path / "data.parquet", label=[0, 1, 0, 1])
    assert outcome(load, str(source), **CALLS[name]) == "clear error"


def test_classes_without_a_name(tmp_path):
    source = parquet(tmp_path / "data.parquet", label=[0, 1, 0, 1])
    assert outcome(load_images, str(source), class_names=["0"]) == "clear error"


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, 4096, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("ending", ["parquet", "tar"])
@pytest.mark.parametrize("seed", range(8))
def test_noise_as_data(tmp_path, ending, seed):
    assert outcome(load_images, str(put(tmp_path / f"data.{ending}", noise(seed)))) == "clear error"
