"""What the commands share that judge small pipelines: sets of images that fit into memory, in one process."""

import time
from pathlib import Path
from typing import Any

import torch

from ..data import normal_noise
from ..scheduling_dar import FlowMatchAdamsBashforthScheduler
from ..tokenizer_dar import DARTokenizer
from ..utils.pictures import plot_history, read_history
from .report import public_name, versions


@torch.no_grad()
def reconstruct_steps(
    tokenizer: DARTokenizer, images: torch.Tensor, scheduler: FlowMatchAdamsBashforthScheduler, batch_size: int
) -> tuple[list[tuple[int, torch.Tensor]], torch.Tensor]:
    """The previews of reconstructions; the start noise of image i is drawn from the seed i.

    Args:
        images: ``(n, C, H, W)`` in [-1, 1].

    Returns:
        For each denoising step the number of codes so far and the previews ``(n, C, H, W)``, not clamped; and the
        codes ``(n, N)``.
    """
    batches = []
    all_codes = []
    for indices in torch.arange(len(images)).split(batch_size):
        codes = tokenizer.encode(images[indices]).codes
        noise = normal_noise(indices, images.shape[1:], images.device)
        batches.append(list(tokenizer.decode_stream([codes], noise=noise, scheduler=scheduler)))
        all_codes.append(codes)
    steps = [(step[0].num_tokens, torch.cat([part.sample for part in step])) for step in zip(*batches, strict=True)]
    return steps, torch.cat(all_codes)


def generation_report(
    pipeline: str,
    data: dict[str, Any],
    settings: dict[str, Any],
    metrics: list[dict[str, Any]],
    started: float,
) -> dict[str, Any]:
    """A report of a pipeline's generation, and of what its tokenizer keeps.

    Args:
        pipeline: its folder or Hub id.
        data: with ``dataset`` as it was given to the command.
        started: `time.perf_counter` at the beginning.
    """
    return {
        "mode": "generation",
        "model": {"name": pipeline, "revision": None},
        "data": data | {"dataset": public_name(data["dataset"])},
        "settings": settings,
        "metrics": metrics,
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def draw_losses(folder: Path) -> None:
    """loss.png of the runs in the folder's tokenizer/ and pipeline/, if there are any."""
    histories = {
        "tokenizer": read_history(folder / "tokenizer" / "history.jsonl"),
        "language model": read_history(folder / "pipeline" / "history.jsonl"),
    }
    if histories := {title: history for title, history in histories.items() if history}:
        plot_history(histories, folder / "loss.png")
