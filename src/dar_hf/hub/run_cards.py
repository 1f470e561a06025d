"""Cards of folders: from what a run left there, and from the evaluations taken in."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..evaluation import dataset_names, eval_results, metric, read_report
from ..evaluation.report import REPORT_FILE, public_name
from ..utils.files import read_object, read_text, resolve_inside, write_text
from ..utils.pictures import read_history
from .blocks import merge_cards, replace_block
from .cards import empty_model, model_card
from .remote_code import is_self_contained

EVALUATIONS = "evaluation"  # folder of the evaluations, one for each mode
PICTURES = {
    "preview_strip.png": "Previews: one image of each class, a row for each group of tokens",
    "previews.png": "Previews as the tokens arrive, from left to right",
    "samples.png": "Samples",
    "reconstructions.png": "Images above their reconstructions",
    "fid_over_prefix.png": "Distance to the reference images over the number of tokens",
    "error_over_steps.png": "Error over the denoising steps",
    "loss.png": "Losses",
}
STAGES = {"tokenizer": "Tokenizer (stage 1)", "ar": "Language model (stage 2)"}
# options of a run that say where it ran, and nothing about the model
BOOKKEEPING = {
    "output_dir", "tokenizer", "codes", "init_from", "lpips_weights", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "overwrite_output_dir", "validation_steps", "logging_steps",
    "dataloader_num_workers", "report_to",
    "push_to_hub", "hub_model_id", "hub_private_repo", "push_steps", "dataset_name",
}  # fmt: skip


def run_card(folder: str | Path, repo_id: str) -> ModelCard:
    """The card of a folder: of a finished run its recipe, validation metrics and images; of any what was measured.

    Args:
        folder: a run's output folder, or one that holds a model from elsewhere; with evaluations, see `take_report`.
        repo_id: what the shown lines load.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds a model of another kind, or an evaluation there cannot be read.
    """
    folder = Path(folder)
    model = empty_model(folder)
    reports = {path: read_report(path) for path in sorted(folder.glob(f"{EVALUATIONS}/*/{REPORT_FILE}"))}
    described = _describe_run(folder) if (folder / "training.json").is_file() else {}
    if reports:
        described |= {"results": [result for report in reports.values() for result in eval_results(report)]}
        described |= {"results_note": _note(folder, reports)}
    return model_card(
        model,
        repo_id,
        pictures=_pictures(folder, [path.parent for path in reports]),
        self_contained=is_self_contained(folder),
        **described,
    )


def write_run_card(folder: str | Path, repo_id: str) -> None:
    """Write a folder's card as README.md into it; what people wrote into the one there stays.

    Where no run was, so does the description there (such as what a model was converted from).

    Raises:
        ValueError: if the card there cannot be read, or is a link out of the folder; it is left as it is.
    """
    folder = Path(folder)
    path = folder / "README.md"
    card = str(run_card(folder, repo_id))
    if path.is_file():
        existing = read_text(resolve_inside(path, folder))
        if not (folder / "training.json").is_file():
            for block in ("about", "facts"):
                card = replace_block(card, existing, block)
        card = merge_cards(existing, card)
    write_text(path, card)


def take_report(report: str | Path, folder: str | Path) -> None:
    """Copy a report and the images next to it into a model's folder, where its card and its repository take them.

    It replaces an earlier one of the same mode.

    Args:
        report: report.json or its folder.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds a model of another kind, there is no report, or one of the files is a link that leads
            out of the report's folder.
    """
    report = Path(report)
    folder = Path(folder)
    empty_model(folder)
    mode = read_report(report)["mode"]
    source = report if report.is_dir() else report.parent
    target = folder / EVALUATIONS / mode
    if source.resolve() == target.resolve():
        return
    files = {name: resolve_inside(source / name, source) for name in PICTURES if os.path.lexists(source / name)}
    files[REPORT_FILE] = resolve_inside(source / REPORT_FILE if report.is_dir() else report, source)
    temporary = target.with_name(f".{mode}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, path in files.items():
        shutil.copyfile(path, temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def _note(folder: Path, reports: Mapping[Path, Mapping[str, Any]]) -> str:
    """Where the metrics of reports come from, and their warnings."""
    lines = []
    for path, report in reports.items():
        name = path.relative_to(folder).as_posix()
        versions = ", ".join(f"{package} {version}" for package, version in report.get("versions", {}).items())
        measured = f"; measured with {versions}" if versions else ""
        lines.append(f"[{name}]({name}) holds all settings{measured}.")
        lines += [f"Warning: {warning}" for warning in report.get("warnings", [])]
    return "\n".join(f"- {line}" for line in lines)


def _pictures(folder: Path, evaluations: Sequence[Path]) -> dict[str, str]:
    """Captions and files: an evaluation's image replaces the run's own of that name."""
    found = {}
    for name, caption in PICTURES.items():
        measured = [place / name for place in evaluations if (place / name).is_file()]
        for path in measured or [folder / name]:
            if path.is_file():
                title = f"{caption} ({path.parent.name})" if len(measured) > 1 else caption
                found[title] = path.relative_to(folder).as_posix()
    return found


def _describe_run(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself, as arguments of `model_card`."""
    training = _read_record(folder)
    options = training["arguments"]
    dataset = dataset_names(_data_name(options))
    runs = {training["stage"]: (folder, training)}
    tokenizer = options.get("tokenizer") or ""
    earlier = Path(tokenizer, "training.json")
    if tokenizer and earlier.is_file():  # trained here, too
        runs = {"tokenizer": (earlier.parent, _read_record(earlier.parent))} | runs
    count = training.get("num_samples")  # a stream has none
    facts = {"trained on": f"{dataset[1]}, {count:,} images" if count else dataset[1]}
    if options.get("distill_samples"):
        facts = {"trained on": f"{options['distill_samples']:,} sequences that the model drew itself, with guidance"}
    last = training["max_train_steps"]
    if training.get("trained_steps", last) < last:
        facts["state"] = f"unfinished, after {training['trained_steps']:,} of {last:,} steps"
    described: dict[str, Any] = {
        "facts": facts,
        "results": [result for place, run in runs.values() for result in _validation_results(place, run)],
        "results_note": "On images held out for validation.",
        "recipe": {STAGES[stage]: _recipe(run) for stage, (_, run) in runs.items()},
    }
    if dataset[0] == options["dataset_name"] and "/" in dataset[0]:
        described["datasets"] = [dataset[0]]
    if "/" in tokenizer and public_name(tokenizer) == tokenizer:  # an id on the Hub
        described["base_model"] = tokenizer
    return described


def _read_record(folder: Path) -> dict[str, Any]:
    """A run's ``training.json``.

    Raises:
        ValueError: if it is none.
    """
    path = folder / "training.json"
    record = read_object(path)
    wanted = {"arguments": dict, "stage": str, "max_train_steps": int, "images_per_step": int}
    wrong = [name for name, kind in wanted.items() if not isinstance(record.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} is no record of a run: it does not say {', '.join(wrong)}.")
    return record


def _validation_results(folder: Path, training: Mapping[str, Any]) -> list[EvalResult]:
    """The last validation in a run's history, as results."""
    metrics: dict[str, float] = {}
    for line in read_history(folder / "history.jsonl"):
        metrics |= {
            name.removeprefix("validation/"): value for name, value in line.items() if name.startswith("validation/")
        }
    report = {
        "mode": "reconstruction" if training["stage"] == "tokenizer" else "generation",
        "data": {"dataset": _data_name(training["arguments"])},
        "settings": {},
        "metrics": [metric(kind, value) for kind, value in metrics.items()],
    }
    return eval_results(report)


def _data_name(options: Mapping[str, Any]) -> str:
    """What a run was trained on: images, or a set of codes."""
    return options["dataset_name"] or options.get("codes") or ""


def _recipe(training: dict) -> dict[str, Any]:
    """Options of a run that are set, for a table."""
    options = {
        name: value
        for name, value in training["arguments"].items()
        if name not in BOOKKEEPING and value not in (None, False)
    }
    return {"images_per_step": training["images_per_step"]} | options
