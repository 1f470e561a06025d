"""Figures as the Hub knows them: `EvalResult`s from reports and from the paper, and tables of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

GENERATION = "unconditional-image-generation"  # the Hub has no task for class-conditional images
RECONSTRUCTION = "image-to-image"

_TASKS = {
    "reconstruction": (RECONSTRUCTION, "Reconstruction"),
    "generation": (GENERATION, "Class-conditional generation"),
}

# figures that a report may hold, by their names there; the settings they may depend on
METRICS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "rfid": "rFID",
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
    "svm_accuracy": "read correctly by an SVM",
    "label_agreement": "read as their label by an SVM",
    "cross_entropy": "Cross-entropy (nats per code)",
    "usage": "Codebook in use (share)",
    "codebook_usage": "Codebook in use (share)",
    "perplexity": "Codebook perplexity",
}
_SETTINGS = ("num_tokens", "num_inference_steps", "guidance_scale")

PAPER_NAME = "D-AR, arXiv 2505.23660"
PAPER_URL = "https://arxiv.org/abs/2505.23660"
_IMAGENET = ("ILSVRC/imagenet-1k", "ImageNet 256×256")
_SAMPLED = ("fid", "inception_score", "precision", "recall")

# the paper's tables: rFID by denoising steps; FID, IS, precision and recall by guidance; FID of previews
_PAPER: dict[str, list[tuple[str, dict[str, Any], dict[str, float]]]] = {
    "v1": [
        ("reconstruction", {"num_inference_steps": steps}, {"rfid": rfid})
        for steps, rfid in (("4", 2.35), ("8, Euler", 1.58), ("8", 1.52), ("12", 1.73), ("16", 1.93))
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
    source = {"source_name": PAPER_NAME, "source_url": PAPER_URL}
    return [
        _result(task, _IMAGENET, metric, value, settings, source)
        for task, settings, figures in _PAPER[name]
        for metric, value in figures.items()
    ]


def report_results(report: Mapping[str, Any], dataset: tuple[str, str]) -> list[EvalResult]:
    """Every known figure in a report, one for each setting it was measured at.

    Args:
        report: holds ``reconstruction`` and ``generation``, as ``report.json`` does: figures by name, the same in
            sections, and under ``previews`` a list of them by number of tokens.
        dataset: id and name of the data measured on.
    """
    results = []
    for task in _TASKS:
        seen = set()
        for settings, figures in _figures(report.get(task, {})):
            for metric, value in figures.items():
                if settings or metric not in seen:  # the finished images are the last preview
                    results.append(_result(task, dataset, metric, value, settings, {}))
                    seen.add(metric)
    return results


def _figures(section: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Settings and figures of a section of a report: previews first, then its own figures, then its sections'."""
    for row in section.get("previews", []):
        yield {name: row[name] for name in _SETTINGS if name in row}, _known(row)
    yield {}, _known(section)
    for part in section.values():
        if isinstance(part, Mapping):
            yield from _figures(part)


def _known(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in METRICS if isinstance(row.get(name), (int, float))}


def _result(
    task: str,
    dataset: tuple[str, str],
    metric: str,
    value: float,
    settings: Mapping[str, Any],
    source: Mapping[str, str],
) -> EvalResult:
    task_type, task_name = _TASKS[task]
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type=dataset[0],
        dataset_name=dataset[1],
        metric_type=metric,
        metric_name=METRICS[metric],
        metric_value=float(f"{value:.4g}"),
        metric_args=dict(settings) or None,
        **source,
    )


@dataclass(frozen=True)
class Table:
    """A table of a card: a title, the columns' heads and the rows' cells."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(results: Sequence[EvalResult]) -> list[Table]:
    """Results as tables, one for each task, data set and kind of setting; a row a metric, a column a setting."""
    groups: dict[tuple, dict[tuple, dict[str, str]]] = {}
    for result in results:
        settings = result.metric_args or {}
        title = f"{result.task_name}, {result.dataset_name}"
        columns = groups.setdefault((title, tuple(settings)), {})
        name = result.metric_name or result.metric_type
        columns.setdefault(tuple(settings.values()), {})[name] = f"{result.metric_value:.4g}"
    return [
        Table(
            title,
            [" / ".join(names).replace("_", " "), *(" / ".join(map(str, values)) or "value" for values in columns)],
            [
                [name, *(cells.get(name, "") for cells in columns.values())]
                for name in dict.fromkeys(name for cells in columns.values() for name in cells)
            ],
        )
        for (title, names), columns in groups.items()
    ]
