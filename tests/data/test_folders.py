"""Splits and classes of local folders: what names say, and what they do not."""

import io
import logging
import os

import datasets
import pytest
from PIL import Image

from dar_hf.data import available_splits, load_images, stream_images


def encoded():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder: images, other files with their text, links to folders."""

    def write(*files, text=None, links=None):
        root = tmp_path / "my set"
        contents = {name: encoded() for name in files} | {name: t.encode() for name, t in (text or {}).items()}
        for name, content in contents.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for name, target in (links or {}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(target, root / name)
        return str(root)

    return write


def images(*folders, count=2, ending="png"):
    return [f"{name}/{index}.{ending}" for name in folders for index in range(count)]


def write_parquet(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": encoded(), "path": None} for _ in values], "label": values}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)


def counts(root, split="train", **options):
    """How many images each class has."""
    data = load_images(root, split, **options)
    names = data.features["label"].names
    return {name: data["label"][:].count(number) for number, name in enumerate(names)}


# Words that are splits only where everything says so


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "train", "plane"),
        ("test tube", "flask"),
        ("bullet_train", "bus"),
        ("test tube", "bullet_train"),
        ("dev", "ops"),
        ("val", "test", "other"),
        ("Train", "Bus"),
        ("evaluation", "a-test-b"),
    ],
)
def test_classes_named_like_splits(folder, classes, caplog):
    root = folder(*images(*classes))
    assert available_splits(root) == ["train"]
    is_named = any(name.lower() in ("train", "dev", "val", "evaluation") for name in classes)
    assert ("not taken for splits, because there are others next to them" in caplog.text) == is_named
    assert counts(root) == dict.fromkeys(sorted(classes), 2)
    assert len(load_images(root, label_column=None)) == 2 * len(classes)
    assert len(list(stream_images(root))) == 2 * len(classes)


@pytest.mark.parametrize(
    "files",
    [
        ["train.png", "a.png", "b.png"],
        ["test.png", "val-1.png", "a.png"],
        ["dog-test-1.jpg", "cat-1.jpg"],
        ["test_1.png", "test_2.png"],
        ["cat/1.png", "dog/dog-test-1.png", "dog/train.png"],
    ],
)
def test_images_named_like_splits(folder, files):
    assert len(load_images(folder(*files), label_column=None)) == len(files)


@pytest.mark.parametrize(
    "train, validation",
    [("train", "validation"), ("train", "val"), ("training", "dev"), ("Train", "Valid"), ("train2017", "val2017")],
)
def test_folders_that_are_splits(folder, train, validation):
    root = folder(*images(f"{train}/cat", f"{train}/dog", f"{validation}/cat"))
    assert available_splits(root) == ["train", "validation"]
    assert counts(root) == {"cat": 2, "dog": 2}
    for name in ("validation", "val"):
        assert counts(root, name, class_names=["cat", "dog"]) == {"cat": 2, "dog": 0}


def test_flat_images_whose_names_all_say_the_split(folder):
    root = folder("train_1.png", "train_2.png", "test_1.png")
    assert available_splits(root) == ["train", "test"]
    assert len(load_images(root, label_column=None)) == 2


def test_other_folders_next_to_splits_of_classes_are_splits(folder):
    root = folder(*images("train/1", "test/1", "extra/1"))
    assert available_splits(root) == ["train", "test", "extra"]
    assert counts(root) == {"1": 2}


def test_splits_inside_of_classes_are_refused(folder):
    root = folder(*images("bottle/train/good", "bottle/test/bad", "cable/train/good"))
    with pytest.raises(ValueError, match="splits inside of other folders .bottle has test, train.*at the top"):
        load_images(root, label_column=None)


def test_an_unknown_split_says_what_was_found(folder):
    with pytest.raises(ValueError, match="no split 'train'.*names of its folders or files: validation"):
        load_images(folder(*images("dev")), label_column=None)


@pytest.mark.parametrize("split, count", [("train[:50%]", 4), ("train[2:3]", 1), ("train[-1:]+test[:1]", 2)])
def test_parts_of_splits(folder, split, count, caplog):
    data = load_images(folder(*images("train/a", "train/b", "test/a", count=4)), split)
    assert len(data) == count and data.features["label"].names == ["a", "b"]
    assert (f"{split} has images of 1 of 2 classes only" in caplog.text) == ("test" not in split)


def test_what_is_no_part(folder):
    for split in ("train[", "train[:x]"):
        with pytest.raises(ValueError):
            load_images(folder(*images("a")), split)


# Files of tables and tars


@pytest.mark.parametrize(
    "names, split, count",
    [
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], "train", 2),
        (["train", "validation", "test"], "validation", 1),
        (["data/train-00000-of-00001-a0b1c2", "data/val-00000-of-00001-ffff"], "validation", 1),
        (["data/train-00000-of-00001", "data/unlabeled-00000-of-00001"], "unlabeled", 1),
        (["imagenet-train-0001", "imagenet-train-0002", "imagenet-val-0001"], "train", 2),
        (["train/a", "train/b", "val/a"], "train", 2),
        (["part-0", "part-1"], "train", 2),
        (["dog-test-1", "cat-1", "bird-2"], "train", 3),
        (["my [data]*"], "train", 1),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_parquet_files(tmp_path, names, split, count, streaming):
    for name in names:
        write_parquet(tmp_path / "s[e]t" / f"{name}.parquet", [0])
    load = stream_images if streaming else load_images
    assert len(list(load(str(tmp_path / "s[e]t"), split))) == count


def test_a_few_files_named_like_splits(tmp_path, caplog):
    for name in ("train", "extra"):
        write_parquet(tmp_path / "set" / f"{name}.parquet", [0])
    assert len(load_images(str(tmp_path / "set"))) == 1
    assert "leaving out 1 files that belong to none of the splits train: extra.parquet" in caplog.text
    write_parquet(tmp_path / "set" / "bus.parquet", [0])
    with pytest.raises(ValueError, match="train.parquet is named like a split, bus.parquet, extra.parquet are not"):
        load_images(str(tmp_path / "set"))


def test_missing_shards_are_named(tmp_path, caplog):
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00001"):
        write_parquet(tmp_path / "set" / f"{name}.parquet", [0])
    assert len(load_images(str(tmp_path / "set"))) == 2
    assert "there are 2 of the 3 files train-*-of-00003; the others are missing" in caplog.text
    assert "00001" not in caplog.text


def test_images_next_to_parquet_files(tmp_path, caplog):
    write_parquet(tmp_path / "set" / "train.parquet", [0])
    for index in range(3):
        (tmp_path / "set" / f"preview{index}.png").write_bytes(encoded())
    assert len(load_images(str(tmp_path / "set"))) == 1 and "leaving out 3 files" in caplog.text


def test_a_configured_folder_is_left_to_datasets(folder):
    header = "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: odd\n    path: b/*.png\n---\n"
    root = folder(*images("a", "b"), text={"README.md": header})
    assert available_splits(root, "small") == ["odd"]
    assert len(load_images(root, "odd", config_name="small", label_column=None)) == 2


def test_an_unknown_configuration(folder):
    with pytest.raises(ValueError, match="no configuration 'large'"):
        load_images(folder(*images("a")), config_name="large")


# Classes


def test_one_class(folder):
    assert counts(folder(*images("face"))) == {"face": 2}


def test_folders_around_classes_are_passed_through(folder):
    assert counts(folder(*images("data/cat", "data/dog"))) == {"cat": 2, "dog": 2}


def test_folders_inside_of_classes(folder, caplog):
    assert counts(folder(*images("cat/small", "cat/large", "dog"))) == {"cat": 4, "dog": 2}
    assert "the outer ones are their classes" in caplog.text


def test_a_split_of_one_class_has_the_classes_of_the_others(folder):
    root = folder(*images("train/cat", "train/dog", "val/cat/more"))
    assert counts(root, "val", class_names=["cat", "dog"]) == {"cat": 2, "dog": 0}


def test_tiny_imagenets_folders(folder):
    root = folder(*images("train/n1/images", "train/n2/images", "val/images"))
    assert counts(root) == {"n1": 2, "n2": 2}


def test_classes_with_numbers_are_in_the_order_of_their_values(folder):
    data = load_images(folder(*images(*map(str, range(12)), count=1)))
    assert data.features["label"].names == [str(i) for i in range(12)]


def test_linked_folders_and_circles(folder, tmp_path, caplog):
    for name in images("cat", "dog"):
        path = tmp_path / "elsewhere" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded())
    links = {name: tmp_path / "elsewhere" / name for name in ("cat", "dog")}
    root = folder("bird/0.png", links=links | {"bird/around": "..", "self": "."})
    assert counts(root) == {"bird": 1, "cat": 2, "dog": 2}
    assert "leads back to a folder around it" in caplog.text


def test_links_that_lead_nowhere_are_named(folder, caplog):
    root = folder("cat/0.png", "dog/0.png", links={"cat/1.png": "gone.png", "bird": "gone"})
    assert counts(root) == {"cat": 2, "dog": 1}  # the missing image cannot be read, and is counted as such
    assert "bird leads nowhere" in caplog.text and "1.png leads nowhere" in caplog.text


def test_pipes_are_no_images(folder):
    root = folder("cat/0.png")
    os.mkfifo(os.path.join(root, "cat", "pipe.png"))
    assert counts(root) == {"cat": 1}


def test_stray_images(folder, caplog):
    root = folder(*images("cat", "dog"), "preview.jpg")
    assert counts(root) == {"cat": 2, "dog": 2} and "preview.jpg" in caplog.text
    assert len(load_images(root, label_column=None)) == 5


def test_more_stray_images_than_others(folder):
    with pytest.raises(ValueError, match="3 of 4 images in the split train.*lie in no folder of a class .1.png"):
        load_images(folder("cat/0.png", "1.png", "2.png", "3.png"))


def test_images_outside_the_splits_are_named(folder, caplog):
    assert counts(folder(*images("train/cat", "test/cat"), "preview.jpg")) == {"cat": 2}
    assert "preview.jpg" in caplog.text


def test_brackets_in_the_path(folder, tmp_path):
    os.rename(folder(*images("cat", "dog")), tmp_path / "[my] d*ta?")
    assert counts(str(tmp_path / "[my] d*ta?")) == {"cat": 2, "dog": 2}


def test_hidden_files_are_no_data(folder):
    root = folder("a/0.png", "a/.1.png", "a/._0.png", ".git/x.png", "__MACOSX/0.png", "@eaDir/0.png", "b/0.png")
    assert counts(root) == {"a": 1, "b": 1}


def test_names_that_are_not_utf8_are_left_out_and_named(folder, caplog):
    root = folder(*images("a", "b"), os.fsdecode(b"a/\xe9.png"), os.fsdecode(b"\xe9/0.png"))
    assert counts(root) == {"a": 2, "b": 2}
    assert caplog.text.count("whose name is not UTF-8: rename it") == 2


def test_every_ending_that_pillow_opens(folder):
    assert counts(folder("a/0.PNG", "a/1.Jpeg", "a/2.avif", "b/3.AVIF", "b/4.webp")) == {"a": 3, "b": 2}


def test_other_files_are_named(folder, caplog):
    root = folder(*images("a", "b"), text={"b.zip": "x", "a/9.heic": "x", "a/notes.txt": "x"})
    assert counts(root) == {"a": 2, "b": 2}
    assert "unpacked to be read: b.zip" in caplog.text and "no images: a/9.heic" in caplog.text
    assert "notes.txt" not in caplog.text


@pytest.mark.parametrize(
    "text, message",
    [
        ({"photos.zip": "x"}, "archives must be unpacked first .photos.zip"),
        ({"a/1.heic": "x", "a/2.heic": "x"}, "its files are 2 .heic"),
        ({}, "it is empty"),
    ],
)
def test_folders_without_data(folder, tmp_path, text, message):
    (tmp_path / "my set").mkdir()
    root = folder(text=text)
    for load in (load_images, stream_images, available_splits):
        with pytest.raises(ValueError, match=f"my set holds no images, parquet files or tars: {message}"):
            load(root)


# Captions


ROWS = "file_name,text,kind\ncat/0.png,one,x\ncat/1.png,two,y\n"


def test_captions_next_to_classes(folder):
    assert counts(folder(*images("cat", "dog"), text={"metadata.csv": ROWS})) == {"cat": 2, "dog": 2}


def test_labels_from_captions(folder, caplog):
    root = folder(*images("cat", "dog"), text={"metadata.csv": ROWS})
    with caplog.at_level(logging.WARNING):
        assert counts(root, label_column="kind") == {"x": 1, "y": 1}
    assert "4 images, but rows for 2 of them: the others are left out" in caplog.text
    assert len(load_images(root, "train[:1]", label_column="kind")) == 1


def test_streamed_labels_from_captions(folder):
    rows = "file_name,kind\ncat/0.png,7\ncat/1.png,8\n"
    root = folder(*images("cat"), text={"metadata.csv": rows})
    assert [row["label"] for row in stream_images(root, label_column="kind")] == [7, 8]


def test_captions_of_each_split(folder):
    text = {
        "train/metadata.csv": "file_name,label\n0.png,x\n1.png,y\n",
        "test/metadata.csv": "file_name,label\n0.png,x\n",
    }
    root = folder(*images("train", "test"), text=text)
    assert counts(root) == {"x": 1, "y": 1} and counts(root, "test") == {"x": 1}


@pytest.mark.parametrize("text", ["", "name,kind\ncat/0.png,x\n"])
def test_captions_that_cannot_be_read(folder, caplog, text):
    root = folder(*images("cat", "dog"), text={"metadata.csv": text})
    assert counts(root) == {"cat": 2, "dog": 2} and "the captions are not read" in caplog.text
    with pytest.raises(ValueError, match="cannot load split 'train' of .*my set"):
        load_images(root, label_column="kind")


def test_images_in_no_folders_have_no_labels(folder):
    with pytest.raises(ValueError, match="no column 'label' for the labels; it has image. .*one for each class"):
        load_images(folder("a.png", "b.png"))
