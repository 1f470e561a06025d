"""The cards in model_cards/ are what their script writes."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from scripts import load_script

import dar_hf

FOLDER = Path(__file__).resolve().parents[2] / "model_cards"
LICENSES = {"emoji.md": ["apache-2.0", "mit", "cc-by-4.0"]}


@pytest.fixture(scope="module")
def script():
    return load_script("model_cards/make.py")


@pytest.fixture(scope="module")
def cards(script):
    return script.cards()


def test_the_cards_are_those_the_script_writes(cards):
    assert {path.name for path in FOLDER.glob("*.md")} == set(cards)
    for name, text in cards.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, f"{name}: run python model_cards/make.py"


def test_every_card_has_metadata_metrics_and_images_that_exist(cards):
    for name, text in cards.items():
        data = ModelCard(text).data
        assert data.license == LICENSES.get(name, "mit") and data.library_name == "diffusers" and data.eval_results
        measured_here = not any(result.source_url for result in data.eval_results)
        assert measured_here == (FOLDER / "reports" / name).with_suffix(".json").is_file()
        assert all((FOLDER / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", text))


def test_paper_models_have_the_papers_sizes(cards):
    assert "300.1 M parameters" in cards["dar-tokenizer-v1.md"]
    assert "342.9 M parameters" in cards["dar-l.md"] and "| default guidance | 1.1 → 8 |" in cards["dar-l.md"]
    assert "774.7 M parameters" in cards["dar-xl.md"] and "2.09" in cards["dar-xl.md"]


def test_the_papers_metrics_are_marked_as_the_papers(script):
    for name in ("v1", "L", "XL"):
        assert {r.source_url for r in script.paper_results(name)} == {"https://arxiv.org/abs/2505.23660"}
    assert {(r.task_type, r.metric_type, r.metric_name) for r in script.paper_results("v1")} == {
        ("image-to-image", "fid", "rFID")
    }
    by_steps = {r.metric_args["num_inference_steps"]: r.metric_value for r in script.paper_results("v1")}
    euler = {"4, Euler": 2.35, "8, Euler": 1.58, "12, Euler": 1.73, "16, Euler": 1.93}
    assert by_steps == euler | {"8, Adams-Bashforth": 1.52}
    guided = [r for r in script.paper_results("XL") if r.metric_args["guidance_scale"] == "1.1 → 10"]
    metrics = {"fid": 2.09, "inception_score": 298.4, "precision": 0.79, "recall": 0.62}
    assert {r.metric_type: r.metric_value for r in guided} == metrics
    with pytest.raises(ValueError, match="no metrics of 'B'"):
        script.paper_results("B")


def test_metrics_say_how_they_were_sampled(cards):
    tokenizer, large = cards["dar-tokenizer-v1.md"], cards["dar-l.md"]
    assert "| 4, Euler | 8, Euler | 8, Adams-Bashforth | 12, Euler | 16, Euler |" in tokenizer
    assert "| rFID | 2.35 | 1.58 | 1.52 | 1.73 | 1.93 |" in tokenizer
    assert "1.2 → 8, at which others measured 2.63" in large and "2.63" not in cards["dar-xl.md"]


def test_sources_are_named(cards):
    root = FOLDER.parent
    assert "labelled MIT" in cards["mnist.md"] and "CC BY-SA 3.0" in cards["mnist.md"]
    sources = ("Noto Emoji", "Fluent Emoji", "Twemoji", "Apache-2.0", "CC BY 4.0")
    for text in (cards["emoji.md"], dar_hf.sample_pipeline.__doc__):
        assert all(name in text for name in sources)
    assert "CC BY-SA 3.0" in dar_hf.sample_pipeline.__doc__
    readme, notice = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "NOTICE"))
    for text in (readme, notice):
        assert all(name in text for name in ("showlab/D-AR", "LlamaGen", "guided-diffusion", "CC BY-SA 3.0", *sources))
    for text in (readme, *cards.values()):
        assert "@inproceedings{gao2026dar," in text and "arXiv:2505.23660" in text and "@article" not in text
