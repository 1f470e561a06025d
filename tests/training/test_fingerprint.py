"""Which data a run was trained on: the same wherever they lie, others for any other images, labels or classes."""

import copy
import io

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from dar_hf.data import DataError, ImageSamples, ImageTransform, StreamedImages
from dar_hf.training.codes import CodeSamples
from dar_hf.training.fingerprint import ROWS, data_fingerprint

TRANSFORM = ImageTransform((8, 8), 3)
NAMES = ["cat", "dog"]


def rows(seed=0, count=100):
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        found.append({"image": {"bytes": buffer.getvalue(), "path": f"{index}.png"}, "label": index % 2})
    return found


def dataset(found, names=NAMES):
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_list(found, features=features)


def of_images(found, names=NAMES):
    return data_fingerprint(ImageSamples(dataset(found, names), TRANSFORM))


def test_the_same_images_have_one_fingerprint_wherever_they_lie(tmp_path):
    found = rows()
    moved = copy.deepcopy(found)
    for row in moved:
        path = tmp_path / row["image"]["path"]
        path.write_bytes(row["image"]["bytes"])
        row["image"] = {"bytes": None, "path": str(path)}
    assert of_images(found) == of_images(moved)


def test_what_differs_shows():
    found = rows()
    first = of_images(found)
    assert of_images(rows(seed=1))["images"] != first["images"]
    assert of_images(rows(seed=1))["labels"] == first["labels"]
    swapped = copy.deepcopy(found)
    swapped[-1]["label"] = 0
    assert of_images(swapped)["labels"] != first["labels"] and of_images(swapped)["images"] == first["images"]
    assert of_images(found, ["dog", "cat"])["labels"] != first["labels"]
    assert of_images(found[::-1])["images"] != first["images"]


def test_images_are_sampled_over_the_whole_set():
    found = rows(count=4 * ROWS)
    for index in (0, 2 * ROWS, 4 * ROWS - 4):
        changed = copy.deepcopy(found)
        changed[index]["image"]["bytes"] += b"x"
        assert of_images(changed)["images"] != of_images(found)["images"]


@pytest.mark.parametrize(
    "image",
    [
        None,
        *({"bytes": None, "path": path} for path in ("gone.png", "", "a\0b.png", "https://x.org/a.png", "/")),
        {"bytes": b"", "path": None},
    ],
)
def test_images_that_cannot_be_read_are_no_obstacle(image):
    found = rows()
    found[0]["image"] = image
    assert of_images(found) == of_images(copy.deepcopy(found)) != of_images(rows())


def test_a_row_without_bytes_and_path_is_no_obstacle():
    storage = pa.array([{"bytes": None, "path": None}, {"bytes": b"x", "path": "x.png"}], datasets.Image().pa_type)
    table = pa.table({"image": storage, "label": [0, 1]})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    data = datasets.Dataset(datasets.table.InMemoryTable(table).cast(features.arrow_schema))
    assert data_fingerprint(ImageSamples(data, TRANSFORM))["images"]


def test_names_of_classes_that_are_no_utf_8():
    """As folders may have them."""
    assert of_images(rows(), ["\udcff", "b"]) != of_images(rows(), ["\udcfe", "b"])


def of_stream(found):
    stream = dataset(found).to_iterable_dataset(num_shards=2)
    return data_fingerprint(StreamedImages(stream, TRANSFORM))


def test_a_stream_is_known_by_its_first_rows():
    assert of_stream(rows()) == of_stream(rows()) != of_stream(rows(seed=1))


def test_looking_at_a_stream_moves_nothing():
    images = StreamedImages(dataset(rows()).to_iterable_dataset(num_shards=2), TRANSFORM)
    before = images.dataset.state_dict()
    data_fingerprint(images)
    assert images.dataset.state_dict() == before
    assert next(iter(images.dataset))["image"]["path"] == "0.png"


def test_a_stream_that_cannot_be_read_is_an_error_of_the_data():
    def broken():
        raise OSError("the tar is cut off")
        yield

    features = datasets.Features({"image": datasets.Image(decode=False)})
    stream = datasets.IterableDataset.from_generator(broken, features=features)
    with pytest.raises(DataError, match="cannot be read: .*cut off"):
        data_fingerprint(StreamedImages(stream, TRANSFORM))


def test_codes_are_known_by_codes_and_labels():
    codes = torch.arange(100 * 2 * 4).view(100, 2, 4)
    labels = [index % 2 for index in range(100)]
    first = data_fingerprint(CodeSamples(codes, labels, TRANSFORM))
    assert data_fingerprint(CodeSamples(codes.clone(), list(labels), TRANSFORM)) == first
    assert data_fingerprint(CodeSamples(codes + 1, labels, TRANSFORM))["codes"] != first["codes"]
    assert data_fingerprint(CodeSamples(codes, labels[::-1], TRANSFORM))["labels"] != first["labels"]


def test_data_of_other_kinds_have_none():
    assert data_fingerprint(torch.utils.data.TensorDataset(torch.zeros(3))) == {}
