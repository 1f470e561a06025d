"""Data sets: the digits, folders of images, parquet files, and what is said when something is missing."""

import gzip
import io
import tarfile

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from dar_hf.data import available_splits, load_images, stream_images


def encoded(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(path, values, labels=None, image_column="image", label_column="label", typed=True):
    columns = {image_column: [encoded(value) for value in values]}
    if labels is not None:
        columns[label_column] = labels
    data = datasets.Dataset.from_dict(columns)
    if typed:
        data = data.cast_column(image_column, datasets.Image())
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(path)
    return str(path)


def write_folder(root, files):
    for index, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (index + 1, 0, 0)).save(path)
    return str(root)


def reds(dataset):
    return [np.asarray(image)[0, 0, 0].item() for image in dataset["image"]]


def names(dataset):
    feature = dataset.features["label"]
    assert isinstance(feature, datasets.ClassLabel)
    return [feature.int2str(label) for label in dataset["label"]]


# The digits


@pytest.mark.parametrize("split, size", [("train", 1437), ("test", 360)])
def test_digits_split_sizes(split, size):
    digits = load_images("digits", split)
    assert len(digits) == size and digits.column_names == ["image", "label"]
    assert isinstance(digits.features["image"], datasets.Image)
    assert digits.features["label"] == datasets.ClassLabel(names=[str(i) for i in range(10)])
    assert set(digits["label"]) == set(range(10))


def test_digits_are_sklearns_with_sixteen_levels_over_the_whole_range():
    from sklearn.datasets import load_digits

    digits, source = load_images("digits"), load_digits()
    for index in (0, 7, 1436):
        pixels = np.asarray(digits[index]["image"])
        assert pixels.shape == (8, 8) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.rint(source.images[index] / 16 * 255))
        assert digits[index]["label"] == source.target[index]
    levels = np.unique(np.concatenate([np.asarray(image).ravel() for image in digits["image"]]))
    assert len(levels) == 17 and levels[0] == 0 and levels[-1] == 255
    assert load_images("digits", "test")[0]["label"] == source.target[1437]


def test_digits_without_labels():
    assert load_images("digits", label_column=None).column_names == ["image"]


# Folders and files


def test_folder_of_images_with_classes(tmp_path):
    root = write_folder(tmp_path / "pictures", ["cat/a.png", "cat/b.png", "dog/c.png"])
    data = load_images(root)
    assert data.column_names == ["image", "label"]
    assert sorted(zip(reds(data), names(data), strict=True)) == [(1, "cat"), (2, "cat"), (3, "dog")]


def test_folder_with_splits(tmp_path):
    root = write_folder(tmp_path / "pictures", ["train/cat/a.png", "train/dog/b.png", "test/cat/c.png"])
    assert available_splits(root) == ["train", "test"]
    assert len(load_images(root, "train")) == 2
    assert reds(load_images(root, "test", label_column=None)) == [3]


def test_folder_of_images_without_classes(tmp_path):
    root = write_folder(tmp_path / "pictures", ["a.png", "b.png"])
    assert load_images(root, label_column=None).column_names == ["image"]


def test_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [5, 6, 7], [1, 0, 1])
    data = load_images(path)
    assert reds(data) == [5, 6, 7] and data["label"][:] == [1, 0, 1] and names(data) == ["1", "0", "1"]
    assert available_splits(path) == ["train"]


def test_folder_of_parquet_files(tmp_path):
    for split, values in (("train", [1, 2]), ("test", [3])):
        write_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet", values, ["x"] * len(values))
    assert available_splits(str(tmp_path / "set")) == ["train", "test"]
    assert reds(load_images(str(tmp_path / "set"), "train")) == [1, 2]
    assert reds(load_images(str(tmp_path / "set"), "test")) == [3]


def test_images_stored_as_plain_bytes_are_decoded(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [5, 6], typed=False)
    assert reds(load_images(path, label_column=None)) == [5, 6]


def test_custom_columns(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [5, 6], ["b", "a"], "picture", "kind")
    data = load_images(path, image_column="picture", label_column="kind")
    assert data.column_names == ["image", "label"] and reds(data) == [5, 6] and names(data) == ["b", "a"]


def test_string_labels_become_classes_in_order(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [1, 2, 3], ["dog", "cat", "dog"])
    data = load_images(path)
    assert data.features["label"].names == ["cat", "dog"] and data["label"][:] == [1, 0, 1]


def test_integer_labels_keep_their_values(tmp_path):
    labels = list(range(12))
    data = load_images(write_parquet(tmp_path / "data.parquet", [1] * 12, labels))
    assert data["label"][:] == labels


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "pictures", ["cat/a.png"])
    assert len(load_images("~/pictures", label_column=None)) == 1


# What is said


@pytest.mark.parametrize("name", ["./nothing-here", "/nothing-here", "~/nothing-here"])
def test_unknown_path(name):
    with pytest.raises(ValueError, match="no such file or folder: .*nothing-here"):
        load_images(name)


def test_unknown_hub_data_set(monkeypatch):
    def missing(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(ValueError, match="no data set 'nobody/nothing'"):
        load_images("nobody/nothing")


def test_unknown_split_of_the_digits():
    with pytest.raises(ValueError, match="train and test, got 'validation'"):
        load_images("digits", "validation")


def test_unknown_split_of_a_folder(tmp_path):
    root = write_folder(tmp_path / "pictures", ["a.png"])
    with pytest.raises(ValueError, match="'dev'.*train"):
        load_images(root, "dev", label_column=None)


@pytest.mark.parametrize("options", [{"image_column": "picture"}, {"label_column": "kind"}])
def test_unknown_column_names_those_there_are(options):
    column = next(iter(options.values()))
    with pytest.raises(ValueError, match=f"no column '{column}'.*it has image, label"):
        load_images("digits", **options)


def test_no_labels(tmp_path):
    root = write_folder(tmp_path / "pictures", ["a.png", "b.png"])
    with pytest.raises(ValueError, match="no column 'label' for the labels; it has image"):
        load_images(root)


def test_a_file_without_images(tmp_path):
    path = tmp_path / "empty.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    datasets.Dataset.from_dict({"image": [], "label": []}, features=features).to_parquet(path)
    with pytest.raises(ValueError, match="empty.parquet.*no data"):
        load_images(str(path))


def test_a_split_without_images(tmp_path):
    root = write_folder(tmp_path / "pictures", ["a.png"])
    with pytest.raises(ValueError, match="'train\\[:0\\]' of .*pictures.*(no data|no images)"):
        load_images(root, "train[:0]", label_column=None)


def test_empty_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="pictures"):
        load_images(str(tmp_path / "pictures"))


def test_a_file_that_is_no_parquet(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match="photo.png"):
        load_images(str(path))


# Single files, and damage


def write_tar(path, count=8, ending="png"):
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            for name, content in ((ending, encoded(index)["bytes"]), ("cls", b"1")):
                entry = tarfile.TarInfo(f"{index}.{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("load", [load_images, stream_images])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_single_file_is_the_split_train_alone(tmp_path, load, kind):
    path = tmp_path / f"test.{kind.upper()}"
    write_parquet(path, [1, 2], [0, 1]) if kind == "parquet" else write_tar(path)
    assert list(load(str(path))) and available_splits(str(path)) == ["train"]
    for split in ("test", "validation", "anything"):
        with pytest.raises(ValueError, match=f"is a single file, .*split train; it has no split '{split}'"):
            load(str(path), split)


def test_parts_of_a_file_and_of_the_digits(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [1, 2, 3, 4], [0, 1, 0, 1])
    assert reds(load_images(path, "train[1:3]")) == [2, 3]
    assert load_images("digits", "train[:3]+test[:2]")["label"][3] == load_images("digits", "test")["label"][0]


@pytest.mark.parametrize("split", ["train[:50%]", "train+test"])
@pytest.mark.parametrize("name", ["digits", "file", "somebody/something"])
def test_streams_refuse_parts_of_splits(tmp_path, split, name):
    path = write_parquet(tmp_path / "data.parquet", [1, 2, 3], [0, 1, 0])
    with pytest.raises(ValueError, match="a stream takes a whole split"):
        stream_images(path if name == "file" else name, split)


def test_avif_images_in_tars(tmp_path):
    data = load_images(str(write_tar(tmp_path / "data.tar", ending="avif")))
    assert len(data) == 8 and isinstance(data.features["image"], datasets.Image)


@pytest.mark.parametrize("load", [load_images, stream_images])
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("zero.parquet", b"", "damaged or no parquet file"),
        ("junk.parquet", b"junk" * 100, "damaged or no parquet file"),
        ("zero.tar", b"", "damaged or no tar file"),
        ("junk.tar", b"junk" * 1000, "damaged or no tar file"),
        ("blank.tar", bytes(10240), "no data, it is empty"),
    ],
)
def test_files_that_are_none(tmp_path, load, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load(str(tmp_path / name))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / f"train-{name}").write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load(str(tmp_path / "set"))


@pytest.mark.parametrize("load", [load_images, stream_images])
def test_a_tar_cut_off_anywhere(tmp_path, load, caplog):
    whole = write_tar(tmp_path / "whole.tar").read_bytes()
    for length in (600, 3 * 512, 3000, 5000, 9 * 512 + 100):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.tar is damaged"):
            load(str(tmp_path / "cut.tar"))
    (tmp_path / "cut.tar").write_bytes(whole[: 12 * 512])  # between two samples: some tools write no mark at the end
    assert len(list(load(str(tmp_path / "cut.tar")))) == 3
    assert "cut.tar has no mark at its end: if it was cut off" in caplog.text


def test_a_damaged_tar_and_tars_in_one_file(tmp_path):
    whole = write_tar(tmp_path / "whole.tar").read_bytes()
    (tmp_path / "two.tar").write_bytes(whole + whole)
    (tmp_path / "damaged.tar").write_bytes(whole[: 8 * 512] + b"\xff" * 100 + whole[8 * 512 + 100 :])
    for name, place in (("two", 32 * 512), ("damaged", 8 * 512)):
        with pytest.raises(ValueError, match=f"{name}.tar is damaged, or several tars.* after its byte {place}"):
            load_images(str(tmp_path / f"{name}.tar"))


@pytest.mark.parametrize("load", [load_images, stream_images])
def test_compressed_tars(tmp_path, load):
    whole = gzip.compress(write_tar(tmp_path / "whole.tar").read_bytes())
    path = tmp_path / "data.tar.gz"
    path.write_bytes(whole)
    assert len(list(load(str(path)))) == 8
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="data.tar.gz is damaged or no tar file"):
        load(str(path))


def test_one_column_cannot_be_both(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [1], [0])
    for load in (load_images, stream_images):
        with pytest.raises(ValueError, match="cannot both be the column 'image'"):
            load(path, label_column="image")


@pytest.mark.parametrize("load", [load_images, stream_images])
def test_a_parquet_cut_off_or_empty(tmp_path, load):
    path = tmp_path / "data.parquet"
    write_parquet(path, [1, 2], [0, 1])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="data.parquet is damaged or no parquet file"):
        load(str(path))
    datasets.Dataset.from_dict({"image": [], "label": []}).to_parquet(path)
    with pytest.raises(ValueError, match="data.parquet: no data"):
        load(str(path))
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), path)
    write_parquet(tmp_path / "more.parquet", [1, 2], [0, 1])
    assert len(list(load(str(tmp_path)))) == 2


@pytest.mark.parametrize("load", [load_images, stream_images])
def test_a_column_that_holds_no_images(tmp_path, load):
    datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]}).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="the column 'image' of .*holds no images"):
        load(str(tmp_path / "data.parquet"))


def test_what_the_hub_raises_is_one_clear_error(monkeypatch):
    def script(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found something.py")

    monkeypatch.setattr(datasets, "load_dataset", script)
    with pytest.raises(ValueError, match="cannot load split 'train' of nobody/nothing: Dataset scripts"):
        load_images("nobody/nothing")


@pytest.mark.parametrize("labels", [[1.0, 0.0], ["1", "0"], [True, False]])
def test_streams_take_labels_that_are_numbers(tmp_path, labels):
    path = write_parquet(tmp_path / "data.parquet", [1, 2], labels)
    assert [row["label"] for row in stream_images(path)] == labels
    names = write_parquet(tmp_path / "names.parquet", [1, 2], ["cat", "1"])
    with pytest.raises(ValueError, match="labels of a stream must be integers"):
        stream_images(names)
