"""Captions: from a column, from metadata next to images, from the .txt of webdatasets."""

import io
import json
import logging
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dar_hf.data import (
    BatchStream,
    DataArguments,
    ImageSamples,
    ImageTransform,
    image_splits,
    load_images,
    stream_images,
)

TEXTS = ["a red apple", "Ein grüner Apfel", "猫", "a red apple"]


def encoded(value):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, captions, name="caption", feature=None):
    columns = {"image": [{"bytes": encoded(i), "path": None} for i in range(len(captions))], name: captions}
    features = datasets.Features({"image": datasets.Image(), name: feature or datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return str(path)


def in_parquet(folder):
    return write_parquet(folder / "train.parquet", TEXTS)


def in_metadata(folder):
    lines = []
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.png").write_bytes(encoded(index))
        lines.append(json.dumps({"file_name": f"{index}.png", "caption": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def in_tar(folder):
    with tarfile.open(folder / "train.tar", "w") as tar:
        for index, text in enumerate(TEXTS):
            for ending, content in (("png", encoded(index)), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{index}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(folder)


@pytest.mark.parametrize("write", [in_parquet, in_metadata, in_tar])
def test_captions_belong_to_their_images(write, tmp_path):
    dataset = load_images(write(tmp_path), caption_column="caption")
    assert dataset.column_names == ["image", "caption"]
    assert dict(enumerate(TEXTS)) == {int(np.asarray(row["image"])[0, 0, 0]): row["caption"] for row in dataset}
    samples = ImageSamples(dataset, ImageTransform((4, 4), 3))
    assert samples.labels == TEXTS and samples[2, 0]["label"] == "猫"


def test_other_columns(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", TEXTS, "title")
    assert load_images(source, caption_column="title")["caption"][:] == TEXTS
    with pytest.raises(ValueError, match="has no column 'caption' for the captions; it has image, title"):
        load_images(source, caption_column="caption")
    with pytest.raises(ValueError, match="the images and the captions .* cannot both be the column 'image'"):
        load_images(source, caption_column="image")
    source = write_parquet(tmp_path / "b.parquet", [text.encode() for text in TEXTS], feature=datasets.Value("binary"))
    assert load_images(source, caption_column="caption")["caption"][:] == TEXTS


def test_names_of_classes_are_captions():
    digits = load_images("digits", caption_column="label")
    assert set(digits["caption"][:]) == {str(i) for i in range(10)}


def test_missing_captions_are_empty(tmp_path, caplog):
    source = write_parquet(tmp_path / "a.parquet", ["a", None, ""])
    with caplog.at_level(logging.WARNING):
        assert load_images(source, caption_column="caption")["caption"][:] == ["a", "", ""]
    assert "2 of 3 images" in caplog.text
    with pytest.raises(ValueError, match="have no captions"):
        load_images(write_parquet(tmp_path / "b.parquet", [None, ""]), caption_column="caption")


def test_what_is_no_caption(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [["a", "b"]], feature=datasets.List(datasets.Value("string")))
    with pytest.raises(ValueError, match="must be one text for each image"):
        load_images(source, caption_column="caption")
    source = write_parquet(tmp_path / "b.parquet", [b"\xff\xfe"], feature=datasets.Value("binary"))
    with pytest.raises(ValueError, match=r"cannot load .*b\.parquet"):
        load_images(source, caption_column="caption")


def test_splits(tmp_path):
    write_parquet(tmp_path / "train.parquet", TEXTS)
    write_parquet(tmp_path / "test.parquet", ["unseen", "a red apple"])
    args = DataArguments(str(tmp_path), caption_column="caption")
    samples, validation, classes = image_splits(args, (4, 4), 3, with_labels=True)
    assert (samples.labels, validation.labels, classes) == (TEXTS, ["unseen", "a red apple"], None)
    samples, _, _ = image_splits(args, (4, 4), 3, with_labels=False)
    assert samples.labels == [] and "label" not in samples[0, 0]


@pytest.mark.parametrize("write", [in_parquet, in_metadata, in_tar])
def test_captions_of_a_stream(write, tmp_path):
    write(tmp_path)
    args = DataArguments(str(tmp_path), streaming=True, caption_column="caption", stream_block_size=1)
    samples, _, classes = image_splits(args, (4, 4), 3, with_labels=True)
    assert samples.captions(3) == TEXTS[:3] and classes is None
    samples.encode_captions = lambda texts: torch.tensor([[len(text)] for text in texts])
    stream = iter(BatchStream(samples, 4, num_processes=1, process_index=0, num_workers=0, seed=0))
    batch = next(stream)
    values = ((batch["pixel_values"][:, 0, 0, 0] + 1) * 127.5).round().long()
    assert batch["label"].flatten().tolist() == [len(TEXTS[value]) for value in values]


def test_a_stream_without_texts(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", [["a", "b"]], feature=datasets.List(datasets.Value("string")))
    with pytest.raises(ValueError, match="must be one text for each image"):
        stream_images(source, caption_column="caption")


def test_validation_of_a_stream(tmp_path):
    write_parquet(tmp_path / "train.parquet", TEXTS)
    write_parquet(tmp_path / "test.parquet", ["unseen", "a red apple"])
    args = DataArguments(str(tmp_path), streaming=True, caption_column="caption")
    _, validation, _ = image_splits(args, (4, 4), 3, with_labels=True)
    assert validation.labels == ["unseen", "a red apple"]


def test_missing_captions_of_a_streamed_validation_are_empty(tmp_path):
    write_parquet(tmp_path / "train.parquet", TEXTS)
    write_parquet(tmp_path / "validation.parquet", ["a book", None, "a red book"])
    args = DataArguments(dataset_name=str(tmp_path), streaming=True, caption_column="caption")
    stream, validation, _ = image_splits(args, (4, 4), 3, with_labels=True)
    assert validation.labels == ["a book", "", "a red book"]
    assert stream.captions(3) == TEXTS[:3]
