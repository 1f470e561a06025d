"""What an evaluation draws: grids of images, previews of a few, and metrics over prefix length and steps."""

import math
from pathlib import Path
from typing import Any

import torch

from ..utils.pictures import draw_curves, image_grid, interleave_rows, save_picture
from .images import to_float
from .shards import ShardFolder

NUM_PAIRS = 32
COLUMNS = 10


def draw_reconstruction(folder: Path, report: dict[str, Any], shards: ShardFolder) -> None:
    """reconstructions.png (references above), previews.png, fid_over_prefix.png, error_over_steps.png."""
    references = to_float(shards.rows("references"))
    shown = to_float(shards.rows("shown"))
    columns = min(NUM_PAIRS // 4, len(shown))
    pairs = interleave_rows(references[:NUM_PAIRS], shown[:NUM_PAIRS], columns=columns)
    save_picture(image_grid(pairs, columns), folder / "reconstructions.png")
    _draw_previews(folder, shards, references)
    draw_distances(folder, report)
    steps = report["steps"]
    points = [(step["step"], 255 * math.sqrt(step["mse"])) for step in steps]
    draw_curves(
        {"root mean squared error (grey levels)": points},
        folder / "error_over_steps.png",
        xlabel="denoising step",
        ylabel="grey levels of 255",
        title="Error of previews",
    )


def draw_generation(folder: Path, report: dict[str, Any], shards: ShardFolder) -> None:
    """samples.png (classes in turn), previews.png, fid_over_prefix.png."""
    save_picture(image_grid(to_float(shards.rows("shown")), COLUMNS), folder / "samples.png")
    _draw_previews(folder, shards)
    draw_distances(folder, report)


def _draw_previews(folder: Path, shards: ShardFolder, references: torch.Tensor | None = None) -> None:
    """One row per image: the reference where there is one, then the image after every step."""
    rows = to_float(shards.rows("previews"))
    if references is not None:
        rows = torch.cat([references[: len(rows), None], rows], dim=1)
    save_picture(image_grid(rows.flatten(0, 1), rows.shape[1]), folder / "previews.png")


def draw_distances(folder: Path, report: dict[str, Any]) -> None:
    """fid_over_prefix.png: Frechet distances over the number of tokens."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in report["metrics"]:
        if entry["type"] in ("fid", "frechet_distance"):
            curves.setdefault(entry["name"], []).append((entry["num_tokens"], entry["value"]))
    draw_curves(
        curves,
        folder / "fid_over_prefix.png",
        xlabel="tokens",
        ylabel="Frechet distance",
        title="Distance of previews",
    )
