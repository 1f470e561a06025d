"""Streams: every row once an epoch, shuffled, split over processes and workers, and continued exactly."""

import io
import json
import logging
import zipfile
import zlib
from itertools import islice

import datasets
import pytest
import torch
from PIL import Image

from dar_hf.data import BatchStream, DataError, ImageTransform, StreamedImages, stream_images
from dar_hf.data.batches import ignore_interrupts

NUM = 23


def encoded(value):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{value}.png"}


def source(num_shards=3, broken=(), labels=True):
    rows = {"image": [{"bytes": b"junk", "path": f"{i}.png"} if i in broken else encoded(i) for i in range(NUM)]}
    rows |= {"label": [i % 5 for i in range(NUM)]} if labels else {}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_iterable_dataset(num_shards)


def stream(num_shards=3, block_size=4, broken=(), num_classes=5, **options):
    images = StreamedImages(source(num_shards, broken), ImageTransform((4, 4), 1), block_size, num_classes)
    return BatchStream(images, **{"batch_size": 4} | options)


def values(batch):
    return ((batch["pixel_values"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def rows(batches):
    columns = ((values(batch), batch["label"].tolist(), batch["seed"].tolist()) for batch in batches)
    return [row for columns_of_one in columns for row in zip(*columns_of_one, strict=True)]


def test_every_row_comes_once_an_epoch_in_another_order():
    seen = rows(islice(iter(stream()), 23))  # 92 rows: four epochs
    epochs = [[value for value, _, _ in seen[i * NUM : (i + 1) * NUM]] for i in range(4)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(label == value % 5 for value, label, _ in seen)
    assert len({seed for _, _, seed in seen}) == len(seen)


@pytest.mark.parametrize("num_shards, num_workers, warns", [(3, 2, True), (4, 2, False), (1, 2, False), (3, 0, False)])
def test_workers_that_read_unequally_are_named(caplog, num_shards, num_workers, warns):
    with caplog.at_level(logging.WARNING):
        stream(num_shards, num_workers=num_workers)
    assert ("2 workers share 3 shards" in caplog.text) == warns


def test_the_seed_decides():
    first, again, other = (rows(islice(iter(stream(seed=seed)), 8)) for seed in (1, 1, 2))
    assert first == again != other


def test_blocks_are_shuffled_and_shards_too():
    plain = rows(islice(iter(stream(block_size=1)), 5))
    starts = {tuple(v for v, _, _ in rows(islice(iter(stream(block_size=1, seed=seed)), 1))) for seed in range(8)}
    assert len(starts) > 1  # only shards move
    values_only = [value for value, _, _ in plain[:7]]
    assert values_only == sorted(values_only)
    mixed = [value for value, _, _ in rows(islice(iter(stream(block_size=100)), 5))]
    assert mixed[:7] != sorted(mixed[:7])


@pytest.mark.parametrize("num_shards, processes", [(3, 2), (1, 2), (1, 4)])
def test_processes_share_the_batches_of_one(num_shards, processes):
    """Where shards do not come out even, two processes see what one sees, image by image and seed by seed."""
    whole = rows(islice(iter(stream(num_shards, batch_size=8)), 6))
    parts = [
        rows(
            islice(
                iter(stream(num_shards, batch_size=8 // processes, num_processes=processes, process_index=index)), 6
            )
        )
        for index in range(processes)
    ]
    each = 8 // processes
    for step in range(6):
        together = [row for part in parts for row in part[step * each : (step + 1) * each]]
        assert sorted(together) == sorted(whole[step * 8 : (step + 1) * 8])


def test_processes_with_shards_of_their_own():
    options = {"batch_size": 1, "num_processes": 2}
    parts = [rows(islice(iter(stream(4, process_index=index, **options)), 11)) for index in range(2)]  # one epoch
    first, second = ({value for value, _, _ in part} for part in parts)
    assert len(first) == len(second) == 11 and not first & second
    assert not {seed for _, _, seed in parts[0]} & {seed for _, _, seed in parts[1]}


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("taken", [0, 1, 5, 7, 13])
def test_a_restored_stream_goes_on_exactly(workers, taken):
    options = {"num_workers": workers}
    whole = rows(islice(iter(stream(**options)), 18))
    interrupted = stream(**options)
    begun = rows(islice(iter(interrupted), taken))
    state = json.loads(json.dumps(interrupted.state_dict()))
    restored = stream(**options)
    restored.load_state_dict(state)
    assert begun + rows(islice(iter(restored), 18 - taken)) == whole


def test_a_stream_restored_twice_goes_on_exactly():
    whole, found, state = rows(islice(iter(stream(num_workers=2)), 12)), [], None
    for count in (5, 4, 3):
        part = stream(num_workers=2)
        if state:
            part.load_state_dict(state)
        found += rows(islice(iter(part), count))
        state = part.state_dict()
    assert found == whole


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "imagefolder"])
def test_files_are_restored_exactly(tmp_path, kind, image_sets):
    from dar_hf.data import stream_images

    def make():
        images = StreamedImages(stream_images(str(image_sets[kind])), ImageTransform((8, 8), 3), 16, 10)
        return BatchStream(images, 7)

    def seen(batches):
        return [[b[name].tolist() for name in ("pixel_values", "label", "seed")] for b in batches]

    whole = seen(islice(iter(make()), 40))
    one = make()
    begun = seen(islice(iter(one), 17))
    two = make()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert begun + seen(islice(iter(two), 23)) == whole
    assert len({str(image) for images, _, _ in whole for image in images}) == 200


def test_workers_leave_a_ctrl_c_to_the_run(monkeypatch):
    options = []
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *args, **given: options.append(given) or [])
    list(stream(num_workers=2))
    assert options[0]["worker_init_fn"] is ignore_interrupts


def test_another_layout_is_refused():
    state = stream().state_dict()
    for change in ({"num_workers": 2}, {"batch_size": 2}, {"block_size": 5}, {"num_processes": 2}):
        with pytest.raises(ValueError, match="the stream was read with"):
            stream(**change).load_state_dict(state)


def test_no_more_workers_than_shards():
    assert stream(2, num_workers=5).num_workers == 2
    assert sorted(value for value, _, _ in rows(islice(iter(stream(2, num_workers=5, batch_size=1)), NUM - 1)))


def test_broken_images_are_left_out_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        batches = list(islice(iter(stream(broken=(3, 17))), 10))
    seen = [value for value, _, _ in rows(batches)]
    assert not {3, 17} & set(seen) and set(seen) == set(range(NUM)) - {3, 17}
    assert "leaving out image 3.png" in caplog.text and "leaving out image 17.png" in caplog.text
    assert len({index for batch in batches for index in batch.get("skipped", [])}) == 2


def test_rows_without_an_image_are_told_apart(caplog):
    rows = {"image": [encoded(0), None, encoded(1), None], "label": [0, 0, 0, 0]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_iterable_dataset()
    images = StreamedImages(data, ImageTransform((4, 4), 1), 4, 1)
    batches = list(islice(iter(BatchStream(images, 2)), 10))  # ten epochs
    assert {value for batch in batches for value in values(batch)} == {0, 1}
    assert len({key for batch in batches for key in batch.get("skipped", [])}) == 2  # of all epochs
    assert "leaving out image without a name" in caplog.text


@pytest.mark.parametrize("labels", [[0.0, 1.0, 2.0], ["0", "1", "2"]])
def test_labels_that_can_be_read_as_integers(labels):
    rows = {"image": [encoded(i) for i in range(3)], "label": labels}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_iterable_dataset()
    batch = next(iter(BatchStream(StreamedImages(data, ImageTransform((4, 4), 1), 4, 3), 3)))
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == values(batch)
    with pytest.raises(DataError, match="has the label 2.*the model has 2 classes"):
        next(iter(BatchStream(StreamedImages(data, ImageTransform((4, 4), 1), 4, 2), 3)))


def test_damage_in_the_middle_of_a_stream():
    def rows():
        yield {"image": encoded(1), "label": 0}
        raise zlib.error("invalid block type")

    data = datasets.IterableDataset.from_generator(rows, features=source().features)
    for workers in (0, 1):
        batches = iter(BatchStream(StreamedImages(data, ImageTransform((4, 4), 1), 4, 1), 1, num_workers=workers))
        with pytest.raises(DataError, match="^the streamed data set cannot be read: invalid block type"):
            next(batches)


def test_images_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for value in range(4):
            archive.writestr(f"{value}.png", encoded(value)["bytes"])
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: images.zip\n---\n")
    images = StreamedImages(stream_images(str(tmp_path), label_column=None), ImageTransform((4, 4), 1))
    assert sorted(values(next(iter(BatchStream(images, 4))))) == [0, 1, 2, 3]


def test_what_ends_a_stream():
    with pytest.raises(DataError, match="holds no images"):
        next(iter(BatchStream(StreamedImages(source().take(0), ImageTransform((4, 4), 1)), 4)))
    for workers in (0, 2):
        with pytest.raises(DataError, match="^a streamed image has the label [34]; the model has 3 classes.$"):
            list(islice(iter(stream(num_classes=3, num_workers=workers)), 10))


def test_a_stream_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    list(islice(iter(stream(num_workers=2)), 4))
    assert torch.equal(torch.get_rng_state(), state)
