"""The processes of one launch, which train or measure together."""

import os
from typing import Any

import torch
from accelerate import Accelerator


def join_processes(**options: Any) -> Accelerator:
    """accelerate's `Accelerator`, over all processes that torchrun or ``accelerate launch`` started.

    Without a GPU accelerate joins them only where ``ACCELERATE_USE_CPU`` says so; otherwise each would do all the work
    alone, and all would write the same files. So it is said here.

    Args:
        options: `Accelerator`'s.

    Raises:
        ValueError: if several processes were started and are not joined.
    """
    launched = "LOCAL_RANK" in os.environ
    if launched and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    accelerator = Accelerator(**options)
    started = int(os.environ.get("WORLD_SIZE", 1)) if launched else 1
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but on {accelerator.device.type} accelerate does not join them: "
            "start one process, or all with ACCELERATE_USE_CPU=true."
        )
    return accelerator
