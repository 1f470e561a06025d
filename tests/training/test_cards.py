"""Cards of runs."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

from dar_hf.evaluation import metric, write_report
from dar_hf.hub import model_card
from dar_hf.hub.run_cards import run_card, take_report, write_run_card
from dar_hf.training import make_accelerator, train
from dar_hf.training.records import recorded_arguments

from .helpers import ar_stage, fresh_process, tokenizer_stage


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of both stages, trained for a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    for name, make in (("tokenizer", tokenizer_stage), ("pipeline", ar_stage)):
        with fresh_process():
            arguments = () if name == "tokenizer" else (folder / "tokenizer",)
            stage, args = make(folder / name, *arguments)
            train(stage, args, make_accelerator(args))
    return folder


@pytest.fixture
def folder(runs, tmp_path):
    return shutil.copytree(runs / "pipeline", tmp_path / "pipeline")


def test_every_run_leaves_a_card_with_its_recipe_figures_and_pictures(runs):
    card = (runs / "tokenizer" / "README.md").read_text()
    for part in (
        "reconstructions.png",
        "loss.png",
        "PSNR (dB)",
        "codebook usage (share)",
        "| `learning_rate` | 0.0015 |",
        "digits, 32 images",
    ):
        assert part in card
    card = (runs / "pipeline" / "README.md").read_text()
    for part in ("samples.png", "cross-entropy", "Tokenizer (stage 1)", "Language model (stage 2)", "Adams-Bashforth"):
        assert part in card
    assert "output_dir" not in card


def write_evaluation(folder, mode="generation", value=0.75, pictures=("preview_strip.png",), **report):
    """A folder as an evaluation leaves it."""
    report = {
        "mode": mode,
        "model": {"name": "m"},
        "data": {"dataset": "digits", "split": "test"},
        "settings": {"count": 500},
        "metrics": [metric("label_agreement", value * tokens / 16, num_tokens=tokens) for tokens in (8, 16)],
        "versions": {"torch": "1.0"},
    } | report
    write_report(folder, report)
    for name in pictures:
        (folder / name).write_bytes(mode.encode())
    return folder


def test_reports_take_the_place_of_validation_figures(folder, tmp_path):
    take_report(write_evaluation(tmp_path / "g", warnings=["too few"]) / "report.json", folder)
    card = run_card(folder, "user/x")
    assert [(r.metric_type, r.metric_value, r.metric_args) for r in card.data.eval_results] == [
        ("label_agreement", 0.375, {"count": 500, "num_tokens": 8}),
        ("label_agreement", 0.75, {"count": 500, "num_tokens": 16}),
    ]
    text = str(card)
    for part in (
        "- [evaluation/generation/report.json](evaluation/generation/report.json) holds all settings; measured with "
        "torch 1.0.\n- Warning: too few\n",
        "Image generation, scikit-learn digits, test (count 500)",
        "| num tokens | 8 | 16 |\n|---|---:|---:|\n| label agreement | 0.375 | 0.75 |",
        "](evaluation/generation/preview_strip.png)",
        "](samples.png)",
        "Language model (stage 2)",
    ):
        assert part in text
    assert "cross-entropy" not in text
    assert (folder / "evaluation" / "generation" / "preview_strip.png").read_bytes() == b"generation"


def test_one_report_of_each_mode(folder, tmp_path):
    pictures = ("previews.png", "samples.png")
    take_report(write_evaluation(tmp_path / "old", value=0.25, pictures=("loss.png",)), folder)
    take_report(write_evaluation(tmp_path / "g", pictures=pictures), folder)
    take_report(write_evaluation(tmp_path / "r", "reconstruction", 0.5, ("previews.png",)), folder)
    take_report(folder / "evaluation" / "generation", folder)  # what is there already stays
    card = run_card(folder, "user/x")
    assert [(r.task_type, r.metric_value) for r in card.data.eval_results if r.metric_args["num_tokens"] == 16] == [
        ("unconditional-image-generation", 0.75),
        ("image-to-image", 0.5),
    ]
    captions = dict(re.findall(r"!\[(.*?)\]\((.*?)\)", str(card)))
    assert captions == {
        "Previews as the tokens arrive, from left to right (generation)": "evaluation/generation/previews.png",
        "Previews as the tokens arrive, from left to right (reconstruction)": "evaluation/reconstruction/previews.png",
        "Samples": "evaluation/generation/samples.png",
        "Losses": "loss.png",
    }
    for caption, path in captions.items():
        assert caption.startswith("Losses") or (folder / path).read_bytes() == path.split("/")[1].encode()
    files = sorted(path.relative_to(folder / "evaluation").as_posix() for path in folder.glob("evaluation/**/*.*"))
    assert files == [
        *("generation/previews.png", "generation/report.json", "generation/samples.png"),
        *("reconstruction/previews.png", "reconstruction/report.json"),
    ]


def test_a_model_from_elsewhere_keeps_its_description(tiny_pipeline, tmp_path):
    folder = tmp_path / "converted"
    tiny_pipeline.save_pretrained(folder)
    model_card(tiny_pipeline, str(folder), facts={"converted from": "`a.pt`"}).save(folder / "README.md")
    take_report(write_evaluation(tmp_path / "g"), folder)
    write_run_card(folder, "user/x")
    text = (folder / "README.md").read_text()
    for part in (
        "| converted from | `a.pt` |",
        "| label agreement | 0.375 | 0.75 |",
        'from_pretrained("user/x")',
        "](evaluation/generation/preview_strip.png)",
    ):
        assert part in text
    assert "model-index" in text and "## Recipe" not in text


def test_writing_again_keeps_edits_and_refuses_a_broken_card(folder):
    path = folder / "README.md"
    path.write_text(path.read_text() + "\nMine.\n")
    write_run_card(folder, "user/renamed")
    assert path.read_text().endswith("\nMine.\n") and 'from_pretrained("user/renamed")' in path.read_text()
    path.write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match="metadata"):
        write_run_card(folder, "user/x")
    assert path.read_text() == "---\na: [\n---\n"


def test_metadata_names_what_is_on_the_hub_and_no_local_path(folder):
    training = json.loads((folder / "training.json").read_text())
    assert "datasets" not in run_card(folder, "user/x").data.to_dict()
    training["arguments"] |= {"dataset_name": "user/birds", "tokenizer": "user/tokenizer"}
    (folder / "training.json").write_text(json.dumps(training))
    data = run_card(folder, "user/x").data
    assert data.datasets == ["user/birds"] and data.base_model == "user/tokenizer"
    training["arguments"]["dataset_name"] = str(folder)
    (folder / "training.json").write_text(json.dumps(training))
    card = run_card(folder, "user/x")
    assert card.data.datasets is None and str(folder) not in str(card) and "| trained on | pipeline," in str(card)


def test_what_is_refused_leaves_no_trace(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        run_card(tmp_path, "user/x")
    report = write_evaluation(tmp_path / "g")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        take_report(report, tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    with pytest.raises(ValueError, match="no report can be read"):
        take_report(tmp_path / "report.json", folder)
    write_evaluation(tmp_path / "old", reconstruction={}).joinpath("report.json").write_text('{"generation": {}}')
    with pytest.raises(ValueError, match="is no report of this package"):
        take_report(tmp_path / "old", folder)
    assert not (folder / "evaluation").exists()


def test_local_places_are_told_from_the_hubs_wherever_the_card_is_made(runs, tmp_path, monkeypatch):
    """A run is often published from another folder or machine than the one it was trained on."""
    monkeypatch.chdir(runs)
    options = SimpleNamespace(dataset_name="digits", tokenizer="runs/tokenizer", codes="user/codes", init_from=None)
    (runs / "runs").symlink_to(runs)
    (runs / "digits").mkdir()
    recorded = recorded_arguments(options)
    assert recorded == vars(options) | {"tokenizer": "./runs/tokenizer"}
    folder = shutil.copytree(runs / "pipeline", tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    training = json.loads((folder / "training.json").read_text())
    training["arguments"] |= recorded
    (folder / "training.json").write_text(json.dumps(training))
    assert "base_model" not in run_card(folder, "user/x").data.to_dict()
    training["arguments"]["tokenizer"] = "outputs/digits/tokenizer"  # no id has two slashes
    (folder / "training.json").write_text(json.dumps(training))
    assert "base_model" not in run_card(folder, "user/x").data.to_dict()


def test_a_run_in_the_current_folder_is_not_its_own_tokenizer(runs, tmp_path, monkeypatch):
    folder = shutil.copytree(runs / "pipeline", tmp_path / "pipeline")
    training = json.loads((folder / "training.json").read_text())
    training["arguments"]["tokenizer"] = None
    (folder / "training.json").write_text(json.dumps(training))
    monkeypatch.chdir(folder)
    assert "Tokenizer (stage 1)" not in str(run_card(".", "user/x"))
