"""The order in which samples are seen, and every sample's own randomness.

Training is a function of (seed, step): each position of one global stream of samples has its own seed, from which its
crop, time, noise and class dropout follow. So the same images meet the same noise however a batch is split over
processes and accumulation steps, and a resumed run needs no more than its step to continue exactly; except the
language model's dropout, which each process draws from its own generator; a checkpoint holds its state.
"""

import errno
import logging
import os
import random
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Any

import datasets
import torch
from datasets.utils.file_utils import is_local_path, xopen
from PIL import Image

from ..images_dar import read_image
from .transforms import ImageTransform, convert_channels

logger = logging.getLogger(__name__)

UNREADABLE = ValueError  # what `open_image` and `convert_channels` raise for an image that cannot be read
# what the system says of a file that will not be read the next time either
OF_THE_FILE = (
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.ENXIO,
)
LABELS = ("label", "caption")  # columns that say what an image is of
READ_AT_ONCE = 256  # images that are checked at a time
MAX_THREADS = 16
_MASK = (1 << 64) - 1


class DataError(RuntimeError):
    """Images or labels with which training cannot go on."""


class SeedFor(IntEnum):
    """What a seed is for: different purposes never share a generator.

    Crop, flip and pixel noise have no entry: they are drawn from a sample's seed as it is.
    """

    ORDER = 1
    SAMPLE = 2
    TIME = 3
    NOISE = 4
    CLASS_DROPOUT = 5
    CODEBOOK = 6
    DISCRIMINATOR = 7
    GROUP_DROPOUT = 8
    TEACHER = 9


def draw_seed(*parts: int) -> int:
    """A 63-bit seed from integers, well mixed (splitmix64): neighbours give unrelated generators."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class GlobalBatchSampler:
    """Batches of ``(index, seed)`` of one process, cut out of an endless stream of epochs that all processes share.

    Step t holds the positions ``[t * G, (t + 1) * G)`` with ``G = batch_size * num_processes * accumulation``; epochs
    follow each other without a gap, each in its own order.

    Args:
        num_samples: size of the data set.
        batch_size: samples per process and forward pass.
        num_processes, process_index: the layout of the run.
        accumulation: forward passes per step.
        seed: seed of the run.
        start_step, num_steps: which steps to yield.

    Raises:
        ValueError: for an empty data set or sizes below 1.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        start_step: int = 0,
        num_steps: int,
    ):
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.accumulation = accumulation
        self.seed = seed
        self.start_step = start_step
        self.num_steps = num_steps

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = -1
        order = torch.empty(0)
        for micro_step in range(self.start_step * self.accumulation, self.num_steps * self.accumulation):
            first = (micro_step * self.num_processes + self.process_index) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    generator = torch.Generator().manual_seed(draw_seed(self.seed, SeedFor.ORDER, epoch))
                    order = torch.randperm(self.num_samples, generator=generator)
                batch.append((int(order[position % self.num_samples]), draw_seed(self.seed, SeedFor.SAMPLE, position)))
            yield batch


class ImageSamples(torch.utils.data.Dataset):
    """Images of a `datasets.Dataset` by ``(index, seed)``, as tensors in [-1, 1].

    Args:
        dataset: columns "image" and perhaps "label" or "caption".
        transform: image to tensor.
        memory_budget: decoded images are kept, up to this many bytes, since small data sets are seen hundreds of
            times and decoding them costs more than training on them. The workers of a loader, each of which has a
            copy of its own, share this amount.

    Attributes:
        labels: what each image is of: classes by number, captions, or whatever is put in their place, such as a
            tensor with the tokens of each caption; empty where the data set has none.
    """

    def __init__(self, dataset: datasets.Dataset, transform: ImageTransform, memory_budget: int = 1 << 28):
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.labels: Any = next((dataset[name][:] for name in LABELS if name in dataset.column_names), [])
        self.transform = transform
        self._decoded: dict[int, Image.Image] = {}
        self._decoded_size = 0  # bytes
        self._budget = memory_budget
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Image.Image:
        """The decoded image, as it is stored."""
        if index in self._decoded:
            return self._decoded[index]
        image = open_image(self.dataset[index]["image"])
        size = image.width * image.height * len(image.getbands())
        worker = torch.utils.data.get_worker_info()
        budget = self._budget
        if worker is not None:
            budget //= worker.num_workers
        if self._decoded_size + size <= budget:
            self._decoded_size += size
            self._decoded[index] = image
        return image

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """``pixel_values (C, H, W)``, ``seed`` and, where there are labels, ``label``.

        Unreadable images are replaced by the next one, and ``skipped`` lists them.

        Raises:
            DataError: if no image can be read.
            OSError: for a fault of disk or network, which says nothing about the image.
        """
        index, seed = key
        skipped = []
        image = self.readable_image(index)
        while image is None:
            skipped.append(index)
            if len(skipped) == len(self):
                raise DataError(f"none of the {len(self)} images can be read.")
            index = (index + 1) % len(self)
            image = self.readable_image(index)
        sample = {"pixel_values": self.transform(image, seed), "seed": seed}
        if len(self.labels):
            sample["label"] = self.labels[index]
        if skipped:
            sample["skipped"] = skipped
        return sample

    def readable_image(self, index: int) -> Image.Image | None:
        """The image, upright and in the transform's channels; None, and once a warning, if it cannot be read."""
        if index in self._unreadable:
            return None
        try:
            return convert_channels(self.image(index), self.transform.channels)
        except UNREADABLE as error:
            self._unreadable.add(index)
            warn_unreadable(self.name(index), error)
            return None

    def readable(self, count: int | None = None) -> list[int]:
        """The first ``count`` images that can be read, or all of them; several threads read."""
        found: list[int] = []
        with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
            for start in range(0, len(self), READ_AT_ONCE):
                indices = range(start, min(start + READ_AT_ONCE, len(self)))
                flags = threads.map(lambda index: self.readable_image(index) is not None, indices)
                found += [index for index, flag in zip(indices, flags, strict=True) if flag]
                if count is not None and len(found) >= count:
                    return found[:count]
        return found

    def name(self, index: int) -> str:
        """The number of an image in the data set and, where it has one, its file."""
        path = image_path(self.dataset[index]["image"])
        return f"{index} ({path})" if path else str(index)

    def stack(self, indices: Sequence[int], variant: int = 0) -> torch.Tensor:
        """``(len(indices), C, H, W)``: one countable variant of several images.

        Raises:
            ValueError: if one cannot be read, with its name.
        """
        pixels = []
        for index in indices:
            try:
                pixels.append(self.transform.render(self.image(index), variant))
            except UNREADABLE as error:
                raise ValueError(f"image {self.name(index)} cannot be read: {error}") from error
        return torch.stack(pixels)

    def stack_readable(self, indices: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """The first variant of the images that can be read: which these are, and ``(n, C, H, W)``."""
        images = {index: self.readable_image(index) for index in indices}
        pixels = {index: self.transform.render(image, 0) for index, image in images.items() if image is not None}
        if not pixels:
            return [], torch.empty(0)
        return list(pixels), torch.stack(list(pixels.values()))


def open_image(source: dict) -> Image.Image:
    """A decoded image from the ``bytes`` or ``path`` of a data set's row; of an animated one the first frame.

    Raises:
        ValueError: if there is none, or it cannot be read.
        OSError: for a fault of disk or network that says nothing about the image, and may pass.
    """
    if source is None or (source["bytes"] is None and not source["path"]):
        raise ValueError("the row holds no image.")
    path = source["path"]
    if source["bytes"] is not None:
        return read_image(source["bytes"])
    read = xopen  # streams name images on the Hub (hf://) and in archives (zip://)
    if is_local_path(path):
        read = open
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: this is no regular file.")  # reading a pipe would wait for ever
    try:
        with read(path, "rb") as file:
            content = file.read()
    except OSError as error:
        if error.errno is not None and error.errno not in OF_THE_FILE:
            raise
        raise ValueError(f"{path}: {error.strerror or error}.") from error
    return read_image(content, path)


def image_path(source: dict | None) -> str:
    """Path of the image in a data set's row, empty where there is none."""
    return (source or {}).get("path") or ""


def warn_unreadable(name: str, error: BaseException) -> None:
    """Say once which image is left out, and why."""
    logger.warning("leaving out image %s, which cannot be read: %s", name, error)


def collate(samples: list[dict]) -> dict:
    """Samples as one batch; ``skipped`` lists what was left out of any of them, where there is any."""
    skipped = [index for sample in samples for index in sample.pop("skipped", [])]
    batch = torch.utils.data.default_collate(samples)
    if skipped:
        batch["skipped"] = skipped
    return batch


def ignore_interrupts(worker: int) -> None:
    """For a loader's workers, which a Ctrl-C reaches, too: they end with the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def sample_times(seeds: torch.Tensor, count: int = 1) -> torch.Tensor:
    """Uniform times ``(B, count)`` in [0, 1] from each sample's seed, float32, which can round up to 1.

    A sample's times are stratified: time i is uniform in [i / count, (i + 1) / count].
    """
    rows = []
    for seed in seeds.tolist():
        rng = random.Random(draw_seed(seed, SeedFor.TIME))
        rows.append([(stratum + rng.random()) / count for stratum in range(count)])
    return torch.tensor(rows)


def normal_noise(seeds: torch.Tensor, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Standard normal noise ``(B, *shape)`` float32, each row from its own sample's seed."""
    generator = torch.Generator(device)
    noise = torch.empty(len(seeds), *shape, device=device)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(draw_seed(seed, SeedFor.NOISE)))
    return noise


def bernoulli_mask(seeds: torch.Tensor, rate: float, purpose: SeedFor) -> torch.Tensor:
    """True with probability ``rate`` for each sample, drawn from its own seed for this purpose; ``(B,)`` bool."""
    draws = [random.Random(draw_seed(int(seed), purpose)).random() for seed in seeds]
    return torch.tensor([draw < rate for draw in draws], dtype=torch.bool)
