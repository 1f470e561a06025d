"""Grids of images and plots of loss curves, for people to look at."""

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MIN_TILE = 48  # small images are shown enlarged, pixel by pixel
MIN_TEXT = 12  # pixels of a line of text; larger next to large images


def image_grid(images: torch.Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images ``(n, C, H, W)`` in [-1, 1], row by row, as one image on white."""
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    scale = max(1, -(-MIN_TILE // min(pixels.shape[2:])))
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    if pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    height, width = pixels.shape[2:]
    rows = -(-len(pixels) // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * (height + gap) + gap, (index % columns) * (width + gap) + gap
        canvas[top : top + height, left : left + width] = image.permute(1, 2, 0).numpy()
    return Image.fromarray(canvas)


def interleave_rows(*rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Stack equally long rows of images so that a grid of ``columns`` shows them above each other."""
    blocks = []
    for start in range(0, len(rows[0]), columns):
        blocks += [row[start : start + columns] for row in rows]
    return torch.cat(blocks)


@dataclass(frozen=True)
class Row:
    """One row of a `labelled_grid`.

    Attributes:
        label: text on the left, one or several lines.
        images: ``(C, H, W)`` in [-1, 1], of the same size in all rows; None leaves a place empty.
        captions: text above the images, from the first one on.
    """

    label: str
    images: Sequence[torch.Tensor | None]
    captions: Sequence[str] = ()


def labelled_grid(rows: Sequence[Row], gap: int = 4) -> Image.Image:
    """Rows of images on white, with a label on the left of each and captions above the images."""
    width, height = next(image_grid(image[None], 1, gap=0).size for image in rows[0].images if image is not None)
    size = max(MIN_TEXT, height // 6)
    font = ImageFont.load_default(size)
    lines = [line for row in rows for line in row.label.splitlines()]
    captions = [caption for row in rows for caption in row.captions]
    left = max((math.ceil(font.getlength(line)) for line in lines), default=0) + 3 * gap
    column = max(width, *(math.ceil(font.getlength(caption)) for caption in captions), 0) + 2 * gap
    line_height = round(1.5 * size)
    row_height = line_height + height + gap
    columns = max(len(row.images) for row in rows)
    canvas = Image.new("RGB", (left + column * columns, row_height * len(rows) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for index, row in enumerate(rows):
        top = index * row_height + line_height
        draw.multiline_text((gap, top + height / 2), row.label, "black", font, anchor="lm")
        for place, image in enumerate(row.images):
            if image is not None:
                tile = image_grid(image[None], 1, gap=0)
                canvas.paste(tile, (left + place * column + (column - width) // 2, top))
        for place, caption in enumerate(row.captions):
            middle = left + place * column + column / 2
            draw.text((middle, top - size // 3), caption, "black", font, anchor="ms")
    return canvas


def heat(values: torch.Tensor) -> torch.Tensor:
    """Values ``(..., H, W)`` in [0, 1] as images ``(..., 3, H, W)`` in [-1, 1]: black, red, yellow, white."""
    return torch.stack([3 * values, 3 * values - 1, 3 * values - 2], dim=-3).clamp(0, 1) * 2 - 1


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_picture(image: Image.Image, path: Path) -> None:
    """Save a PNG under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def save_animation(frames: list[Image.Image], path: Path, milliseconds: int = 400) -> None:
    """Save a GIF that shows the last frame four times as long as the others, under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    durations = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    os.replace(temporary, path)


def read_history(path: Path) -> list[dict]:
    """The lines of a run's ``history.jsonl``, without a last one that a crash cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_history(histories: dict[str, list[dict]], path: Path, smoothing: int = 25) -> bool:
    """Draw one panel a run with every logged loss over the steps; False without matplotlib.

    Args:
        histories: lines of ``history.jsonl`` by title.
        path: PNG to write.
        smoothing: centred running mean over at most this many logged points, drawn over the raw curve.
    """
    made = _new_figure(6 * len(histories))
    if made is None:
        return False
    figure, save = made
    panels = figure.subplots(1, len(histories), squeeze=False)[0]
    for axes, (title, history) in zip(panels, histories.items(), strict=True):
        names = dict.fromkeys(name for line in history for name in line if name.startswith("loss/"))
        for name in names:
            points = [(line["step"], line[name]) for line in history if line.get(name, 0) > 0]
            if not points:
                continue
            steps, values = np.array(points).T
            window = min(smoothing, max(1, len(values) // 10))
            first = (window - 1) // 2
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            (line,) = axes.plot(steps[first : first + len(smooth)], smooth, label=name.removeprefix("loss/"))
            axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.7)
        axes.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
        if names:
            axes.legend()
    save(path)
    return True


def draw_curves(
    curves: dict[str, list[tuple[float, float]]],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    from_zero: bool = True,
) -> bool:
    """Draw points ``(x, y)`` of each curve by its name, from zero up unless that is not wanted.

    Returns:
        False without matplotlib.
    """
    made = _new_figure(6)
    if made is None:
        return False
    figure, save = made
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
    if from_zero:
        axes.set_ylim(0, 1.08 * max((y for points in curves.values() for _, y in points), default=1) or 1)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    save(path)
    return True


def _new_figure(width: float) -> tuple[Any, Callable[[Path], None]] | None:
    """An empty figure four inches high and the function that saves it as a PNG; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, 4), layout="constrained")

    def save(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        FigureCanvasAgg(figure).print_png(temporary)
        os.replace(temporary, path)

    return figure, save
