"""The order of samples and every sample's own randomness."""

import errno
import os
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image

from dar_hf.data import (
    BatchStream,
    DataError,
    GlobalBatchSampler,
    ImageSamples,
    ImageTransform,
    SeedFor,
    StreamedImages,
    bernoulli_mask,
    draw_seed,
    load_images,
    normal_noise,
    sample_times,
)

# processes x accumulation x batch, all of them 8 a step
LAYOUTS = [(1, 1, 8), (8, 1, 1), (1, 8, 1), (2, 1, 4), (1, 2, 4), (2, 2, 2)]


def steps(num_samples, processes, accumulation, batch, start=0, stop=6, seed=0):
    """The stream of every step: micro-batches in order, processes side by side."""
    samplers = [
        GlobalBatchSampler(
            num_samples,
            batch,
            num_processes=processes,
            process_index=index,
            accumulation=accumulation,
            seed=seed,
            start_step=start,
            num_steps=stop,
        )
        for index in range(processes)
    ]
    micro = [sum(parts, []) for parts in zip(*samplers, strict=True)]
    return [sum(micro[i : i + accumulation], []) for i in range(0, len(micro), accumulation)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_sees_the_same_stream(layout):
    assert steps(21, *layout) == steps(21, 1, 1, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_later_start_continues_exactly(layout):
    assert steps(21, *layout, start=4) == steps(21, *layout)[4:]


def test_epochs_are_permutations_without_a_gap():
    stream = sum(steps(5, 1, 1, 3, stop=10), [])
    epochs = [[index for index, _ in stream[i : i + 5]] for i in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_may_be_larger_than_the_data_set():
    (batch,) = steps(3, 1, 1, 8, stop=1)
    assert sorted(index for index, _ in batch[:3]) == sorted(index for index, _ in batch[3:6]) == [0, 1, 2]
    assert len({seed for _, seed in batch}) == 8


def test_runs_differ_by_seed():
    first, second = steps(50, 1, 1, 8, seed=0), steps(50, 1, 1, 8, seed=1)
    assert [i for i, _ in first[0]] != [i for i, _ in second[0]]
    assert not {s for batch in first for _, s in batch} & {s for batch in second for _, s in batch}


def test_length():
    sampler = GlobalBatchSampler(10, 2, accumulation=3, start_step=4, num_steps=9)
    assert len(sampler) == len(list(sampler)) == 15


@pytest.mark.parametrize("sizes", [(0, 4, 1), (10, 0, 1), (10, 4, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GlobalBatchSampler(sizes[0], sizes[1], accumulation=sizes[2], num_steps=1)


def test_draw_seed_is_well_mixed():
    seeds = [draw_seed(0, 2, position) for position in range(2000)]
    assert len(set(seeds)) == 2000 and all(0 <= seed < 1 << 63 for seed in seeds)
    flips = [bin(a ^ b).count("1") for a, b in zip(seeds, seeds[1:], strict=False)]
    assert 30.5 < sum(flips) / len(flips) < 32.5  # half of 63 bits
    ones = [sum(seed >> bit & 1 for seed in seeds) for bit in range(63)]
    assert all(850 < count < 1150 for count in ones)
    assert draw_seed(1, 2) != draw_seed(2, 1) and draw_seed(0) != draw_seed(0, 0)


# Randomness of single samples

SEEDS = torch.tensor([draw_seed(7, i) for i in range(4000)])


def per_sample(function):
    whole = function(SEEDS[:20])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(function(SEEDS[:20][order]), whole[order])
    assert torch.equal(function(SEEDS[3:4]), whole[3:4])


def test_times_depend_on_nothing_but_their_seed():
    per_sample(sample_times)
    per_sample(lambda seeds: sample_times(seeds, 3))


def test_noise_depends_on_nothing_but_its_seed():
    per_sample(lambda seeds: normal_noise(seeds, (3, 4, 4), torch.device("cpu")))


def test_dropped_classes_depend_on_nothing_but_their_seed():
    per_sample(lambda seeds: bernoulli_mask(seeds, 0.5, SeedFor.CLASS_DROPOUT))


@pytest.mark.parametrize("count", [1, 4])
def test_times_are_uniform(count):
    times = sample_times(SEEDS, count)
    assert times.shape == (len(SEEDS), count)
    assert (times.mul(count).floor().clamp(max=count - 1) == torch.arange(count)).all()  # one in each stratum
    times = times.double().flatten().sort().values
    assert times.dtype == torch.float64 and times[0] >= 0 and times[-1] <= 1
    grid = (torch.arange(len(times)) + 0.5) / len(times)
    assert (times - grid).abs().max() < 1.63 / len(times) ** 0.5  # Kolmogorov-Smirnov, 1 %


def test_noise_is_standard_normal():
    noise = normal_noise(SEEDS[:500], (3, 8, 8), torch.device("cpu"))
    assert noise.shape == (500, 3, 8, 8) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert (noise.mean(dim=0).abs() < 0.2).all()  # no pixel is special


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_dropped_share(rate):
    share = bernoulli_mask(SEEDS, rate, SeedFor.CLASS_DROPOUT).float().mean()
    assert abs(share - rate) < 0.02 and (0 < rate < 1 or share == rate)


def test_draws_of_one_sample_are_unrelated():
    times, drops = sample_times(SEEDS)[:, 0], bernoulli_mask(SEEDS, 0.5, SeedFor.CLASS_DROPOUT).float()
    noise = normal_noise(SEEDS, (16,), torch.device("cpu"))[:, 0]
    assert torch.corrcoef(torch.stack([times, drops, noise])).fill_diagonal_(0).abs().max() < 0.06


# Images


@pytest.fixture
def opened(monkeypatch):
    """Counts decoded images."""
    calls, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    return calls


def digits(count=6, **options):
    return ImageSamples(load_images("digits").select(range(count)), ImageTransform((8, 8), 1), **options)


def test_samples(tmp_path):
    source = load_images("digits")
    samples = digits()
    sample = samples[4, 99]
    assert len(samples) == 6 and set(sample) == {"pixel_values", "seed", "label"}
    assert (sample["seed"], sample["label"]) == (99, source[4]["label"])
    assert torch.equal(sample["pixel_values"], ImageTransform((8, 8), 1)(source[4]["image"]))


def test_samples_without_labels():
    samples = ImageSamples(load_images("digits", label_column=None), ImageTransform((8, 8), 1))
    assert "label" not in samples[0, 0] and not samples.labels


def test_samples_from_files(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8), 51).save(tmp_path / "a" / "x.png")
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "a" / "x.png")]})
    samples = ImageSamples(data.cast_column("image", datasets.Image()), ImageTransform((8, 8), 1))
    torch.testing.assert_close(samples[0, 0]["pixel_values"], torch.full((1, 8, 8), -0.6))


def test_images_of_unknown_range_are_left_out_and_damaged_exif_blocks_are_not(tmp_path, caplog):
    values = [range(64), [value / 64 for value in range(64)]]
    for index, (row, dtype) in enumerate(zip(values, (torch.int32, torch.float32), strict=True)):
        image = torch.tensor(list(row), dtype=dtype).reshape(8, 8)
        Image.fromarray(image.numpy()).save(tmp_path / f"{index}.tiff")
    Image.new("L", (8, 8), 51).save(tmp_path / "2.png", exif=b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03")
    names = [str(tmp_path / name) for name in ("0.tiff", "1.tiff", "2.png")]
    data = datasets.Dataset.from_dict({"image": names}).cast_column("image", datasets.Image())
    sample = ImageSamples(data, ImageTransform((8, 8), 1))[0, 0]
    assert sample["skipped"] == [0, 1]
    torch.testing.assert_close(sample["pixel_values"], torch.full((1, 8, 8), -0.6))
    assert "0.tiff" in caplog.text and "of 8 bits a channel" in caplog.text


def test_images_are_decoded_once(opened):
    samples = digits()
    first = [samples[i, 0]["pixel_values"] for i in range(6)]
    again = [samples[i, 0]["pixel_values"] for i in range(6)]
    assert len(opened) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_memory_budget(opened):
    samples = digits(memory_budget=2 * 64 + 10)  # two images of 64 bytes
    for _ in range(3):
        for index in range(6):
            samples.image(index)
    assert len(opened) == 2 + 3 * 4


def test_stack_renders_one_variant():
    samples = ImageSamples(load_images("digits").select(range(4)), ImageTransform((8, 8), 1, flip=True))
    plain, mirrored = samples.stack([2, 0], 0), samples.stack([2, 0], 1)
    assert plain.shape == (2, 1, 8, 8) and torch.equal(mirrored, plain.flip(-1))


def test_a_stack_names_the_image_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"junk")
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "broken.png")]})
    samples = ImageSamples(data.cast_column("image", datasets.Image()), ImageTransform((8, 8), 1))
    with pytest.raises(ValueError, match="image 0 .*broken.png. cannot be read"):
        samples.stack([0])


def test_rows_without_an_image_are_left_out_and_named(caplog):
    source = load_images("digits").select(range(4)).cast_column("image", datasets.Image(decode=False))
    rows = source.to_list()
    rows[1]["image"] = rows[2]["image"] = None
    data = datasets.Dataset.from_list(rows, features=load_images("digits").features)
    samples = ImageSamples(data, ImageTransform((8, 8), 1))
    sample = samples[1, 0]
    assert torch.equal(sample["pixel_values"], samples[3, 0]["pixel_values"]) and sample["skipped"] == [1, 2]
    assert "leaving out image 1, which cannot be read: the row holds no image" in caplog.text
    assert samples.readable() == [0, 3] and samples.readable(1) == [0]


def test_pipes_and_folders_are_no_images(tmp_path, caplog):
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    paths = [str(tmp_path / "pipe.png"), str(tmp_path)]
    data = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
    assert ImageSamples(data, ImageTransform((8, 8), 1)).readable() == []
    assert caplog.text.count("this is no regular file") == 2


def test_images_that_cannot_be_converted_are_left_out(caplog, monkeypatch):
    def refuse(image, channels):
        raise ValueError("no such image")

    monkeypatch.setattr("dar_hf.data.batches.convert_channels", refuse)
    samples = digits(3)
    with pytest.raises(DataError, match="none of the 3 images can be read"):
        samples[0, 7]
    assert caplog.text.count("no such image") == 3


def image_file(folder):
    Image.new("L", (8, 8), 51).save(folder / "x.png")
    data = datasets.Dataset.from_dict({"image": [str(folder / "x.png")]})
    return data.cast_column("image", datasets.Image())


def test_a_fault_of_the_transform_is_not_blamed_on_the_image():
    class Faulty(ImageTransform):
        def __call__(self, image, seed=0):
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        ImageSamples(load_images("digits").select(range(3)), Faulty((8, 8), 1))[0, 0]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_passing_fault_of_the_disk_leaves_no_image_out(tmp_path, monkeypatch, streamed):
    def fail(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    data = image_file(tmp_path)
    if streamed:
        batches = BatchStream(StreamedImages(data.to_iterable_dataset(), ImageTransform((8, 8), 1)), 1)
        with monkeypatch.context() as patch, pytest.raises(DataError, match="Input/output error"):
            patch.setattr("dar_hf.data.batches.open", fail, raising=False)
            next(iter(batches))
        return
    samples = ImageSamples(data, ImageTransform((8, 8), 1))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr("dar_hf.data.batches.open", fail, raising=False)
        samples[0, 0]
    assert "skipped" not in samples[0, 0]


def test_images_that_have_gone_are_left_out_of_a_stack(tmp_path, caplog):
    data = datasets.concatenate_datasets([image_file(tmp_path), load_images("digits", label_column=None).select([0])])
    samples = ImageSamples(data, ImageTransform((8, 8), 1))
    (tmp_path / "x.png").unlink()
    kept, pixels = samples.stack_readable([0, 1])
    assert kept == [1] and torch.equal(pixels, samples.stack([1])) and "No such file" in caplog.text
    assert samples.stack_readable([0])[0] == []


def test_workers_share_the_memory(opened, monkeypatch):
    samples = digits(memory_budget=4 * 64)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    for _ in range(2):
        for index in range(6):
            samples.image(index)
    assert len(opened) == 2 + 2 * 4


def test_workers_change_nothing():
    def batches(workers):
        sampler = GlobalBatchSampler(6, 4, num_steps=4)
        samples = ImageSamples(load_images("digits").select(range(6)), ImageTransform((8, 8), 1, "random", flip=True))
        return list(torch.utils.data.DataLoader(samples, batch_sampler=sampler, num_workers=workers))

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert alone.keys() == shared.keys()
        assert all(torch.equal(alone[name], shared[name]) for name in alone)
