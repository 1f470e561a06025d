"""Micro-batches of one process, cut out of a data set or read from a stream."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data import BatchStream, DataError, GlobalBatchSampler, StreamedImages, collate
from ..data.batches import ignore_interrupts
from .arguments import LoopArguments
from .checkpoints import CheckpointError, read_position, resume_hint
from .run_folder import CHECKPOINTS

ON_HOST = ("seed", "skipped")  # read one by one: on a GPU each would wait for the device


class TrainingBatches:
    """The micro-batches of this process from a step on; iterate once.

    Args:
        samples: data set addressed by ``(index, seed)``, or a stream.
        args: the options of the run.
        accelerator: says which process this is.
    """

    def __init__(self, samples: Any, args: LoopArguments, accelerator: Accelerator):
        self.samples = samples
        self.args = args
        self.layout = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
        self.pin_memory = accelerator.device.type == "cuda"
        self.start_step = 0
        self.corrupt_images: set[int] = set()
        self.stream: BatchStream | None = None
        if isinstance(samples, StreamedImages):
            self.stream = BatchStream(
                samples,
                args.train_batch_size,
                **self.layout,
                num_workers=args.dataloader_num_workers,
                seed=args.seed,
                pin_memory=self.pin_memory,
            )

    def position(self) -> dict | None:
        """The place in the stream, for a checkpoint; None for a data set, where it follows from the step."""
        return None if self.stream is None else self.stream.state_dict()

    def resume(self, step: int, checkpoint: Path) -> None:
        """Continue after ``step`` steps, from a stream's position in the checkpoint.

        Raises:
            CheckpointError: if the checkpoint holds none, or one of another layout.
        """
        self.start_step = step
        if self.stream is not None:
            position = read_position(checkpoint, self.layout["process_index"])
            try:
                self.stream.load_state_dict(position)
            except (ValueError, KeyError, TypeError) as error:  # a file from anywhere may hold anything
                raise CheckpointError(str(error)) from error

    def count_corrupt(self, batches: list[dict]) -> None:
        """Count distinct images that could not be read, of all processes; they call this together.

        Raises:
            DataError: if there are too many.
        """
        own = [index for batch in batches for index in batch.get("skipped", [])]
        self.corrupt_images.update(gather_object(own))
        if len(self.corrupt_images) > self.args.max_corrupt_images:
            hint = resume_hint(Path(self.args.output_dir, CHECKPOINTS))
            raise DataError(
                f"{len(self.corrupt_images)} images could not be read, more than max_corrupt_images="
                f"{self.args.max_corrupt_images}; the warnings above name them. {hint}"
            )

    def __iter__(self) -> Iterator[dict]:
        if self.stream is not None:
            return iter(self.stream)
        args = self.args
        sampler = GlobalBatchSampler(
            len(self.samples),
            args.train_batch_size,
            **self.layout,
            accumulation=args.gradient_accumulation_steps,
            seed=args.seed,
            start_step=self.start_step,
            num_steps=args.max_train_steps,
        )
        loader = torch.utils.data.DataLoader(
            self.samples,
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=self.pin_memory,
            # without its own generator the loader takes a number from the global one, which changes dropout on resume
            generator=torch.Generator().manual_seed(args.seed),
            worker_init_fn=ignore_interrupts,
        )
        return iter(loader)


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with the tensors that models take on the device."""
    return {name: value if name in ON_HOST else value.to(device, non_blocking=True) for name, value in batch.items()}
