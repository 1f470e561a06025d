"""report.json: the metrics, and everything they depend on.

Top-level keys: ``mode``, ``model``, ``data``, ``settings``, ``metrics`` (a list of ``name``, ``type``, ``value`` and
what else says which), ``warnings``, ``not_measured`` (metric to reason) and ``versions``; of reconstructions also
``steps``, the error after every denoising step. `eval_results` turns the metrics into those of a card.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .. import __version__
from ..metrics.names import TASKS, metric_name
from ..utils.files import read_text, write_json

REPORT_FILE = "report.json"
PACKAGES = ("torch", "transformers", "diffusers", "datasets", "accelerate", "numpy", "pillow")
_KEYS = ("mode", "model", "data", "settings", "metrics")
_ARGUMENTS = ("count", "seed", "guidance_scale", "num_inference_steps")


def metric(kind: str, value: float, name: str | None = None, **which: Any) -> dict[str, Any]:
    """One entry of a report: machine-readable type, value, display name (default `metric_name`), and which:
    ``num_tokens`` of a preview, ``mode`` where it is another than the report's."""
    return {"name": name or metric_name(kind), "type": kind, "value": value, **which}


def versions() -> dict[str, str]:
    """Versions of what the metrics were computed with."""
    return {"dar_hf": __version__} | {name: version(name) for name in PACKAGES}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json under a temporary name, then rename."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT_FILE, report)


def read_report(path: str | Path) -> dict[str, Any]:
    """A report, from its file or its folder.

    Raises:
        ValueError: if there is none, it lacks one of the keys that every report has, or its mode is not known.
    """
    path = Path(path)
    path = path / REPORT_FILE if path.is_dir() else path
    try:
        report = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"no report can be read from {path}: {error}") from error
    missing = [key for key in _KEYS if not (isinstance(report, dict) and key in report)]
    if missing:
        raise ValueError(f"{path} is no report of this package: it has no {', '.join(missing)}.")
    if report["mode"] not in TASKS:
        raise ValueError(f"{path} has the mode {report['mode']!r}; there are {', '.join(TASKS)}.")
    return report


def eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """Every metric of a report for a model card, at full length and of previews, to four digits.

    Their ``metric_args`` hold ``num_tokens`` where the metric depends on it, and the report's settings where it is of
    the report's mode.
    """
    data = report["data"]
    settings = report["settings"]
    arguments = {name: settings[name] for name in _ARGUMENTS if settings.get(name) is not None}
    if network := settings.get("feature_extractor"):
        arguments["feature_extractor"] = f"{public_name(network['name'])} {network['weights_hash'][:8]}"
    dataset_type, dataset_name = dataset_names(data.get("dataset") or data.get("reference") or "unknown")
    results = []
    for entry in report["metrics"]:
        mode = entry.get("mode", report["mode"])
        own = arguments if mode == report["mode"] else {}
        which = {"num_tokens": entry["num_tokens"]} if "num_tokens" in entry else {}
        results.append(
            EvalResult(
                task_type=TASKS[mode][0],
                task_name=TASKS[mode][1],
                dataset_type=dataset_type,
                dataset_name=dataset_name,
                dataset_config=data.get("config"),
                dataset_split=data.get("split"),
                metric_type=entry["type"],
                metric_name=entry["name"],
                metric_value=float(f"{entry['value']:.4g}"),
                metric_args=(own | which) or None,
            )
        )
    return results


def dataset_names(source: str) -> tuple[str, str]:
    """Id and name of a data set for a card."""
    name = public_name(source)
    return name, "scikit-learn digits" if source == "digits" else name


def public_name(source: str) -> str:
    """What a card calls data or a network: a Hub id as it is, of local files only the last part."""
    path = Path(source).expanduser()
    local = path.exists() or path.is_absolute() or source.startswith(".") or source.count("/") > 1 or ".py:" in source
    return path.resolve().name if local else source
