"""Cards of runs."""

import json
import shutil

import pytest

from dar_hf.training import train
from dar_hf.training.cards import run_card, take_report, write_run_card
from dar_hf.training.loop import make_accelerator

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
    for part in ("reconstructions.png", "loss.png", "PSNR (dB)", "| `learning_rate` | 0.0015 |", "digits, 32 images"):
        assert part in card
    card = (runs / "pipeline" / "README.md").read_text()
    for part in ("samples.png", "Cross-entropy", "Tokenizer (stage 1)", "Language model (stage 2)", "Adams-Bashforth"):
        assert part in card
    assert "output_dir" not in card


def test_a_report_takes_the_place_of_validation_figures(folder, tmp_path):
    report = {
        "dataset": "the test digits",
        "generation": {"previews": [{"num_tokens": 16, "label_agreement": 0.75}]},
        "versions": {"torch": "1.0"},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "preview_strip.png").write_bytes(b"picture")
    take_report(tmp_path / "report.json", folder)
    card = run_card(folder, "user/x")
    assert [(r.metric_type, r.metric_value, r.metric_args) for r in card.data.eval_results] == [
        ("label_agreement", 0.75, {"num_tokens": 16})
    ]
    assert "Measured on the test digits." in str(card) and "torch 1.0" in str(card)
    assert "preview_strip.png" in str(card) and (folder / "preview_strip.png").read_bytes() == b"picture"


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


def test_no_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        run_card(tmp_path, "user/x")
    with pytest.raises(FileNotFoundError):
        take_report(tmp_path / "report.json", tmp_path)
