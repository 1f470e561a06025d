"""report.json: the figures, and everything they depend on.

Top-level keys: ``mode``, ``model``, ``data``, ``settings``, ``metrics`` (a list of ``name``, ``type``, ``value`` and
what else says which), ``warnings``, ``not_measured`` (figure to reason) and ``versions``; of reconstructions also
``steps``, the error after every denoising step. `eval_results` turns the figures at full length into those of a card.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from .. import __version__
from ..files import write_json

REPORT_FILE = "report.json"
PACKAGES = ("torch", "transformers", "diffusers", "datasets", "accelerate", "numpy")
TASKS = {"reconstruction": "image-to-image", "generation": "unconditional-image-generation"}
TASK_NAMES = {"reconstruction": "Image reconstruction", "generation": "Class-conditional image generation"}
_KEYS = ("mode", "model", "data", "settings", "metrics")
_ARGUMENTS = ("count", "seed", "guidance_scale", "num_inference_steps", "feature_extractor", "reference")


def metric(name: str, kind: str, value: float, **which: Any) -> dict[str, Any]:
    """One entry of a report: display name, machine-readable type, value, and which: ``num_tokens`` of a preview,
    ``mode`` where it is another than the report's."""
    return {"name": name, "type": kind, "value": value, **which}


def versions() -> dict[str, str]:
    """Versions of what the figures were made with."""
    return {"dar_hf": __version__} | {name: version(name) for name in PACKAGES}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json under a temporary name, then rename."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT_FILE, report)


def read_report(path: str | Path) -> dict[str, Any]:
    """A report, from its file or its folder.

    Raises:
        ValueError: if there is none or it lacks one of the keys that every report has.
    """
    path = Path(path)
    path = path / REPORT_FILE if path.is_dir() else path
    try:
        report = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"no report can be read from {path}: {error}") from error
    missing = [key for key in _KEYS if key not in report]
    if missing:
        raise ValueError(f"{path} is no report of this package: it has no {', '.join(missing)}.")
    return report


def eval_results(report: dict[str, Any]) -> list[EvalResult]:
    """The figures at full length, for `huggingface_hub.ModelCardData(eval_results=...)`, without those of previews."""
    data, settings = report["data"], report["settings"]
    arguments = {name: settings[name] for name in _ARGUMENTS if settings.get(name) is not None}
    name = data.get("dataset") or data.get("reference") or "unknown"
    return [
        EvalResult(
            task_type=TASKS[entry.get("mode", report["mode"])],
            task_name=TASK_NAMES[entry.get("mode", report["mode"])],
            dataset_type=name,
            dataset_name=name,
            dataset_config=data.get("config"),
            dataset_split=data.get("split"),
            metric_type=entry["type"],
            metric_name=entry["name"],
            metric_value=entry["value"],
            metric_args=arguments,
        )
        for entry in report["metrics"]
        if entry.get("num_tokens") in (None, settings["num_tokens"])
    ]


def model_index(report: dict[str, Any], model_name: str) -> list[dict]:
    """The ``model-index`` entry of a model card's metadata."""
    return eval_results_to_model_index(model_name, eval_results(report))
