"""Figures as the Hub knows them: the names of tasks and metrics, the paper's figures, and tables of any."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

GENERATION = "unconditional-image-generation"  # the Hub has no task for class-conditional images
RECONSTRUCTION = "image-to-image"

# the Hub's id and the display name of what is measured
TASKS = {
    "reconstruction": (RECONSTRUCTION, "Image reconstruction"),
    "generation": (GENERATION, "Class-conditional image generation"),
}

# display names of metrics, where they are not the type with blanks
_NAMES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "fid": "FID",
    "sfid": "sFID",
    "frechet_distance": "FD",
    "spatial_frechet_distance": "spatial FD",
    "inception_score": "Inception score",
    "cross_entropy": "cross-entropy (nats per code)",
    "codebook_usage": "codebook usage (share)",
    "codebook_position_usage_min": "fewest codes at a position",
    "codebook_position_usage_max": "most codes at a position",
}


def metric_name(kind: str, task: str = "", network: str = "") -> str:
    """Display name of a metric, the same in reports, cards and the paper's tables.

    Args:
        kind: its machine-readable type, such as "fid".
        task: reconstruction or generation: it tells rFID from gFID.
        network: whose features it is taken on, where that is not the one the metric is named for.
    """
    name = _NAMES.get(kind, kind.replace("_", " "))
    if kind in ("fid", "frechet_distance"):
        name = task[:1] + name
    return f"{name} ({network})" if network else name


PAPER_NAME = "D-AR, ICLR 2026, arXiv 2505.23660"
PAPER_URL = "https://arxiv.org/abs/2505.23660"
_IMAGENET = ("ILSVRC/imagenet-1k", "ImageNet 256×256")
_SAMPLED = ("fid", "inception_score", "precision", "recall")

# the paper's tables: rFID by denoising steps; FID, IS, precision and recall by guidance; FID of previews
_PAPER: dict[str, list[tuple[str, dict[str, Any], dict[str, float]]]] = {
    "v1": [
        ("reconstruction", {"num_inference_steps": steps}, {"fid": rfid})
        for steps, rfid in (
            ("4, Euler", 2.35),
            ("8, Euler", 1.58),
            ("8, Adams-Bashforth", 1.52),  # the default
            ("12, Euler", 1.73),
            ("16, Euler", 1.93),
        )
    ],
    "L": [
        ("generation", {"guidance_scale": guidance}, dict(zip(_SAMPLED, values, strict=True)))
        for guidance, values in (
            ("none", (7.43, 117.6, 0.71, 0.63)),
            ("1.5", (3.50, 245.2, 0.83, 0.54)),
            ("1.1 → 8", (2.44, 263.0, 0.78, 0.61)),
        )
    ]
    + [
        ("generation", {"num_tokens": tokens}, {"fid": fid})
        for tokens, fid in ((64, 7.38), (128, 3.94), (192, 2.93), (256, 2.44))
    ],
    "XL": [
        ("generation", {"guidance_scale": guidance}, dict(zip(_SAMPLED, values, strict=True)))
        for guidance, values in (
            ("none", (5.11, 145.8, 0.73, 0.64)),
            ("1.5", (3.39, 276.4, 0.84, 0.55)),
            ("1.1 → 10", (2.09, 298.4, 0.79, 0.62)),
        )
    ],
}


def paper_results(name: str) -> list[EvalResult]:
    """The paper's own figures of a released model, marked as the paper's.

    Args:
        name: v1 (the tokenizer), L or XL.

    Raises:
        ValueError: for another name.
    """
    if name not in _PAPER:
        raise ValueError(f"no figures of {name!r} here; there are {', '.join(_PAPER)}.")
    return [
        EvalResult(
            task_type=TASKS[task][0],
            task_name=TASKS[task][1],
            dataset_type=_IMAGENET[0],
            dataset_name=_IMAGENET[1],
            metric_type=kind,
            metric_value=value,
            metric_name=metric_name(kind, task),
            metric_args=settings,
            source_name=PAPER_NAME,
            source_url=PAPER_URL,
        )
        for task, settings, figures in _PAPER[name]
        for kind, value in figures.items()
    ]


def setting_text(value: Any) -> str:
    """A setting as people write it; the ends of a linear scale as "1.1 → 8"."""
    if isinstance(value, (list, tuple)):
        return " → ".join(map(setting_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Table:
    """A table of a card: a title, the columns' heads and the rows' cells."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(results: Sequence[EvalResult]) -> list[Table]:
    """Results as tables, for each task and data set one for each kind of setting; a row a metric, a column a setting.

    Settings that all results of a task and data set share stand in the title.
    """
    subjects: dict[tuple[str, ...], list[EvalResult]] = {}
    for result in results:
        names = (result.task_name, result.dataset_name, result.dataset_config, result.dataset_split)
        subjects.setdefault(tuple(name for name in names if name), []).append(result)
    return [table for title, group in subjects.items() for table in _tables(", ".join(title), group)]


def _tables(title: str, results: list[EvalResult]) -> list[Table]:
    """Tables of one task and data set."""
    arguments = [
        {name: setting_text(value) for name, value in (result.metric_args or {}).items()} for result in results
    ]
    common = dict(set.intersection(*(set(settings.items()) for settings in arguments)))
    groups: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, str]]] = {}
    for result, settings in zip(results, arguments, strict=True):
        own = {name: value for name, value in settings.items() if name not in common}
        cells = groups.setdefault(tuple(own), {}).setdefault(tuple(own.values()), {})
        cells[result.metric_name or result.metric_type] = f"{result.metric_value:.4g}"
    shared = [f"{name.replace('_', ' ')} {value}" for name, value in arguments[0].items() if name in common]
    title = f"{title} ({', '.join(shared)})" if shared else title
    return [
        Table(
            title,
            [" / ".join(names).replace("_", " "), *(" / ".join(values) or "value" for values in columns)],
            [
                [name, *(cells.get(name, "") for cells in columns.values())]
                for name in dict.fromkeys(name for cells in columns.values() for name in cells)
            ],
        )
        for names, columns in groups.items()
    ]
