"""Images that are read in their stored order, without an index: large sets, webdataset tars, the Hub.

A stream is shuffled twice: the order of its shards is drawn anew for each epoch, and rows are read in blocks, each of
which is permuted. A block is read again after a resume, so the position is exact, which a buffer that mixes rows as
they come does not allow.
"""

import copy
import logging
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node

from .batches import (
    UNREADABLE,
    DataError,
    SeedFor,
    collate,
    convert_channels,
    draw_seed,
    ignore_interrupts,
    image_path,
    open_image,
    warn_unreadable,
)
from .classes import whole_number
from .transforms import ImageTransform

logger = logging.getLogger(__name__)

MAX_UNREADABLE_IN_A_ROW = 1000


class UnreadableError(ValueError):
    """An image of a stream cannot be read."""


class StreamedImages:
    """Images of a streaming data set, endlessly, as tensors in [-1, 1].

    Args:
        dataset: columns "image" and perhaps "label" or "caption".
        transform: image to tensor.
        block_size: rows that are shuffled together, and held in memory (encoded) by every worker.
        num_classes: labels must lie below; None where there are none.

    Attributes:
        encode_captions: makes the ``label`` of each of a list of captions; None where there are none.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: ImageTransform,
        block_size: int = 1024,
        num_classes: int | None = None,
    ):
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.transform = transform
        self.block_size = block_size
        self.num_classes = num_classes
        self.encode_captions: Callable[[list[str]], torch.Tensor] | None = None

    def captions(self, count: int) -> list[str]:
        """The first ``count`` captions."""
        captions = self.dataset.select_columns("caption")  # without the images
        rows = islice(copy.deepcopy(captions), count)  # its epoch lies in memory that all copies share
        return [row["caption"] or "" for row in rows]

    def sample(self, row: dict, seed: int) -> dict:
        """``pixel_values (C, H, W)``, ``seed`` and perhaps ``label``.

        Raises:
            UnreadableError: for an image that cannot be read.
            DataError: for a label outside the classes.
            OSError: for a fault of disk or network, which says nothing about the image.
        """
        try:
            image = convert_channels(open_image(row["image"]), self.transform.channels)
        except UNREADABLE as error:
            raise UnreadableError(str(error)) from error
        sample = {"pixel_values": self.transform(image, seed), "seed": seed}
        if self.num_classes is not None:
            label = whole_number(row["label"])
            if label is None or not 0 <= label < self.num_classes:
                raise DataError(
                    f"a streamed image has the label {row['label']}; the model has {self.num_classes} classes."
                )
            sample["label"] = label
        if self.encode_captions is not None:
            (sample["label"],) = self.encode_captions([row["caption"] or ""])
        return sample


def _key(row: dict) -> int:
    """A checksum of an image's name or, where it has none, of its bytes; 0 for rows without an image."""
    image = row["image"] or {"path": None, "bytes": None}
    return zlib.crc32((image["path"] or "").encode() or image["bytes"] or b"")


class _Reader(torch.utils.data.IterableDataset):
    """Collated batches of one process, as each worker reads them, with the state after each of them."""

    def __init__(self, images: StreamedImages, batch_size: int, num_processes: int, process_index: int, seed: int):
        self.images = images
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        dataset = images.dataset
        # whole shards for each process where they come out even; else every process reads all and keeps its rows
        self.by_shards = dataset.num_shards % num_processes == 0
        if self.by_shards and num_processes > 1:
            dataset = split_dataset_by_node(dataset, rank=process_index, world_size=num_processes)
        self.dataset = dataset
        self.states: list[dict] = []  # of each worker, to continue from
        self.silent_workers = 0  # the first ones have had their turn

    def __iter__(self) -> Iterator[dict | None]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if worker < self.silent_workers:
            yield None
        self.dataset = copy.deepcopy(self.dataset)  # its epoch lies in memory that all workers share
        state = dict(self.states[worker]) if self.states else {"epoch": 0, "block": 0, "row": 0, "count": 0}
        samples = self._samples(state, worker, num_workers)
        while True:
            try:
                batch = collate([next(samples) for _ in range(self.batch_size)])
            except (DataError, OSError) as error:  # out of a worker it would come with a traceback in its message
                yield {"error": str(error)}
                return
            yield {"batch": batch, "worker": worker, "state": dict(state)}

    def _samples(self, state: dict, worker: int, num_workers: int) -> Iterator[dict]:
        """Samples from ``state`` on, which is kept up to date; images that cannot be read are left out and noted."""
        skipped: list[int] = []
        for row, count in self._rows(state, worker):
            position = count * self.num_processes + self.process_index if self.by_shards else count
            seed = draw_seed(self.seed, SeedFor.SAMPLE, position * num_workers + worker)
            try:
                sample = self.images.sample(row, seed)
            except UnreadableError as error:
                skipped.append(self._key_of_unreadable(row, state, worker))
                warn_unreadable(image_path(row["image"]) or "without a name", error)
                if len(skipped) > MAX_UNREADABLE_IN_A_ROW:
                    raise DataError(f"{len(skipped)} images in a row cannot be read: {error}") from error
                continue
            if skipped:
                sample["skipped"] = skipped
                skipped = []
            yield sample

    def _key_of_unreadable(self, row: dict, state: dict, worker: int) -> int:
        """Tells images apart that cannot be read; rows without any image are numbered, from 0 in each epoch."""
        key = _key(row)
        if key:
            return key
        state["nameless"] = state.get("nameless", 0) + 1
        return draw_seed(self.process_index, worker, state["nameless"])

    def _block(self, rows: Iterator[dict]) -> list[dict]:
        """The next rows that are shuffled together.

        Raises:
            DataError: if the files they come from are damaged.
        """
        try:
            return list(islice(rows, self.images.block_size))
        except Exception as error:  # tarfile, zlib, pyarrow, pillow and the network have their own
            raise DataError(f"the streamed data set cannot be read: {str(error) or type(error).__name__}") from error

    def _rows(self, state: dict, worker: int) -> Iterator[tuple[dict, int]]:
        """Rows of this process and their place in the worker's stream."""
        while True:
            # datasets draws the order of shards from the epoch's number, and leaves it alone in epoch 0
            self.dataset.set_epoch(1 + draw_seed(self.seed, SeedFor.ORDER, state["epoch"]) % (1 << 31))
            if state.get("source"):
                self.dataset.load_state_dict(state["source"])
            rows = iter(self.dataset)
            found = state["block"] > 0
            while block := self._block(rows):
                found = True
                seed = draw_seed(self.seed, SeedFor.ORDER, state["epoch"], state["block"], worker)
                order = torch.randperm(len(block), generator=torch.Generator().manual_seed(seed)).tolist()
                for place in order[state["row"] :]:
                    count = state["count"]
                    state["row"], state["count"] = state["row"] + 1, count + 1
                    if self.by_shards or count % self.num_processes == self.process_index:
                        yield block[place], count
                state |= {"block": state["block"] + 1, "row": 0, "source": self.dataset.state_dict()}
            if not found:
                raise DataError("the streamed data set holds no images.")
            state |= {"epoch": state["epoch"] + 1, "block": 0, "row": 0, "source": None, "nameless": 0}


class BatchStream:
    """Batches of one process out of a stream, and the position in it.

    Args:
        images: the stream.
        batch_size: samples per process and forward pass.
        num_processes, process_index: the layout of the run.
        num_workers: processes that read; at most one a shard.
        seed: seed of the run.
        pin_memory: keep batches where a GPU can copy them from.
    """

    def __init__(
        self,
        images: StreamedImages,
        batch_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
    ):
        self.reader = _Reader(images, batch_size, num_processes, process_index, seed)
        num_shards = self.reader.dataset.num_shards
        self.num_workers = min(num_workers, num_shards)
        if self.num_workers and num_shards % self.num_workers:
            logger.warning(
                "%d workers share %d shards: images of workers with fewer shards are seen more often. "
                "--dataloader_num_workers should divide the number of shards of a process.",
                self.num_workers,
                num_shards,
            )
        self.pin_memory = pin_memory
        self.layout = {
            "num_processes": num_processes,
            "num_workers": self.num_workers,
            "batch_size": batch_size,
            "block_size": images.block_size,
        }
        self._states: dict[int, dict] = {}
        self._num_batches = 0

    def __iter__(self) -> Iterator[dict]:
        loader = torch.utils.data.DataLoader(
            self.reader,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.reader.seed),  # leaves the global one alone
            worker_init_fn=ignore_interrupts,
        )
        for item in loader:
            if item is None:
                continue
            if "error" in item:
                raise DataError(item["error"])
            self._states[item["worker"]] = item["state"]
            self._num_batches += 1
            yield item["batch"]

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was taken; JSON."""
        fresh = {"epoch": 0, "block": 0, "row": 0, "count": 0}
        workers = [self._states.get(worker, fresh) for worker in range(max(1, self.num_workers))]
        return {"layout": self.layout, "num_batches": self._num_batches, "workers": workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, before the first batch is taken.

        Raises:
            ValueError: if it belongs to another layout.
        """
        if state["layout"] != self.layout:
            raise ValueError(f"the stream was read with {state['layout']}, and is now with {self.layout}")
        self.reader.states = state["workers"]
        self._states = dict(enumerate(state["workers"]))
        self._num_batches = state["num_batches"]
        self.reader.silent_workers = self._num_batches % max(1, self.num_workers) if self.num_workers else 0
