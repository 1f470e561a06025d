"""The card of a training run, from what the run left in its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..files import write_text
from ..hub import empty_model, merge_cards, model_card, report_results
from ..pictures import read_history

PICTURES = {
    "preview_strip.png": "Previews: one image of each class, a row for each group of tokens",
    "previews.png": "Previews: the same samples after each group of tokens, a class a row",
    "samples.png": "Samples, one class a row",
    "reconstructions.png": "Images above their reconstructions",
    "loss.png": "Losses",
}
STAGES = {"tokenizer": "Tokenizer (stage 1)", "ar": "Language model (stage 2)"}
# options of a run that say where it ran, and nothing about the model
BOOKKEEPING = {
    "output_dir", "tokenizer", "codes", "init_from", "lpips_weights", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "overwrite_output_dir", "validation_steps", "logging_steps",
    "dataloader_num_workers", "report_to",
    "push_to_hub", "hub_model_id", "hub_private_repo", "dataset_name",
}  # fmt: skip


def run_card(folder: str | Path, repo_id: str) -> ModelCard:
    """The card of a finished run: its recipe, its validation figures, its pictures, and ``report.json`` where it is.

    Args:
        folder: the run's output folder.
        repo_id: what the shown lines load.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
    """
    folder = Path(folder)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    options = training["arguments"]
    dataset = _dataset(options["dataset_name"] or options.get("codes") or "")
    runs = {training["stage"]: (folder, training)}
    earlier = Path(options.get("tokenizer") or "", "training.json")
    if earlier.is_file():  # a tokenizer trained here, too
        runs = {"tokenizer": (earlier.parent, json.loads(earlier.read_text(encoding="utf-8")))} | runs
    results, note = [], "On images held out for validation."
    for run_folder, _ in runs.values():
        results += _validation_results(run_folder, dataset)
    count = training["num_samples"]  # a stream has none
    facts = {"trained on": dataset[1] + (f", {count:,} images" if count else "")}
    report_path = folder / "report.json"
    if report_path.is_file():
        report = json.loads(report_path.read_text(encoding="utf-8"))
        results = report_results(report, dataset)
        note = f"Measured on {report['dataset']}." if "dataset" in report else ""
        if "versions" in report:
            facts["made with"] = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    metadata: dict[str, Any] = {}
    if dataset[0] == options["dataset_name"] and "/" in dataset[0]:
        metadata["datasets"] = [dataset[0]]
    if options.get("tokenizer") and not Path(options["tokenizer"]).exists():
        metadata["base_model"] = options["tokenizer"]  # an id on the Hub
    return model_card(
        empty_model(folder),
        repo_id,
        facts=facts,
        results=results,
        results_note=note,
        pictures={caption: name for name, caption in PICTURES.items() if (folder / name).is_file()},
        recipe={STAGES[stage]: _recipe(run) for stage, (_, run) in runs.items()},
        self_contained=any(folder.glob("*_dar.py")),
        **metadata,
    )


def write_run_card(folder: str | Path, repo_id: str) -> None:
    """Write a run's card as README.md into its folder; what people wrote into the one there stays.

    Raises:
        ValueError: if the card there cannot be read; it is left as it is.
    """
    path, card = Path(folder) / "README.md", str(run_card(folder, repo_id))
    if path.is_file():
        card = merge_cards(path.read_text(encoding="utf-8"), card)
    write_text(path, card)


def take_report(report: str | Path, folder: str | Path) -> None:
    """Copy a report and the pictures beside it into a run's folder, where its card and its repository take them.

    Raises:
        FileNotFoundError: if there is no report.
    """
    report, folder = Path(report), Path(folder)
    if not report.is_file():
        raise FileNotFoundError(f"no report {report}.")
    sources = {"report.json": report} | {name: report.with_name(name) for name in PICTURES}
    for name, source in sources.items():
        if source.is_file() and source.resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)


def _dataset(name: str) -> tuple[str, str]:
    """Id and name of a data set for a card; of a local folder only its last part."""
    if name == "digits":
        return name, "scikit-learn digits"
    local = Path(name)
    return (local.name, local.name) if local.exists() else (name, name)


def _validation_results(folder: Path, dataset: tuple[str, str]) -> list[EvalResult]:
    """The last validation in a run's history, as results."""
    figures: dict[str, float] = {}
    for line in read_history(folder / "history.jsonl"):
        figures |= {
            name.removeprefix("validation/"): value for name, value in line.items() if name.startswith("validation/")
        }
    by_task: dict[str, dict[str, float]] = {"reconstruction": {}, "generation": {}}
    for name, value in figures.items():
        by_task["generation" if name == "cross_entropy" else "reconstruction"][name] = value
    return report_results(by_task, dataset)


def _recipe(training: dict) -> dict[str, Any]:
    """Options of a run that are set, for a table."""
    options = {
        name: value
        for name, value in training["arguments"].items()
        if name not in BOOKKEEPING and value not in (None, False)
    }
    return {"images_per_step": training["images_per_step"]} | options
