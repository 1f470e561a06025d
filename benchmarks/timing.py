"""Times, the machine's limits, and the table that `speed.py` prints."""

import statistics
import time
from collections.abc import Callable

import torch

from dar_hf.acceleration_dar import accelerated

HEAD = "| | plain / ours | stock / ours | ours / limit | ours | |\n|---|---|---|---|---|---|"
PROBE_ROWS = 4096  # of the matrix product
NOTES = [
    "difference",
    "share",
    "images/s",
    "language model",
    "decoding",
    "steps beyond",
    "agreement",
    "bytes",
    "two passes / one",
]


def seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def probe(device: torch.device, repeats: int) -> dict[str, float]:
    """Bytes read and operations done per second: what no implementation can exceed."""
    data = torch.ones(2**28 // 4, device=device)  # 256 MB: more than a cache holds
    result = {"bytes": data.numel() * 4 / seconds(data.sum, repeats, device)}
    for dtype in (torch.float32, torch.bfloat16):
        layer = accelerated(torch.nn.Linear(1024, 4096, bias=False).to(device, dtype).eval())
        x = torch.randn(PROBE_ROWS, 1024, device=device, dtype=dtype)
        result[name(dtype)] = 2 * PROBE_ROWS * 1024 * 4096 / seconds(lambda m=layer, x=x: m(x), repeats, device)
    return result


def format_row(row: dict, unit: str, scale: float) -> str:
    columns = [
        row["what"],
        f"{row['plain'] / row['ours']:.2f}×",
        f"{row['stock'] / row['ours']:.2f}×" if "stock" in row else "",
        f"{row['ours'] / row['limit']:.2f}" if "limit" in row else "",
        f"{row['ours'] * scale:.1f} {unit}",
        ", ".join(f"{key} {row[key]:.3g}" for key in NOTES if key in row),
    ]
    return f"| {' | '.join(columns)} |"
