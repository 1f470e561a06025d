"""The cards in model_cards/ are what their script writes."""

import importlib.util
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

FOLDER = Path(__file__).resolve().parents[2] / "model_cards"


@pytest.fixture(scope="module")
def cards():
    specification = importlib.util.spec_from_file_location("make_cards", FOLDER / "make.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.cards()


def test_the_cards_are_those_the_script_writes(cards):
    assert {path.name for path in FOLDER.glob("*.md")} == set(cards)
    for name, text in cards.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, f"{name}: run python model_cards/make.py"


def test_every_card_has_metadata_figures_and_pictures_that_exist(cards):
    for name, text in cards.items():
        data = ModelCard(text).data
        assert data.license == "mit" and data.library_name == "diffusers" and data.eval_results
        measured_here = not any(result.source_url for result in data.eval_results)
        assert measured_here == (FOLDER / "reports" / name).with_suffix(".json").is_file()
        assert all((FOLDER / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", text))


def test_paper_models_have_the_papers_sizes(cards):
    assert "300.1 M parameters" in cards["dar-tokenizer-v1.md"]
    assert "342.9 M parameters" in cards["dar-l.md"] and "| default guidance | 1.1 → 8 |" in cards["dar-l.md"]
    assert "774.7 M parameters" in cards["dar-xl.md"] and "2.09" in cards["dar-xl.md"]
