import re

import pytest
from datasets import Dataset
from huggingface_hub import EvalResult

from dar_hf import DARForCausalLM, DARPipeline, DARTokenizer
from dar_hf.hub import describe, empty_model, model_card

PARTS = ("tokenizer", "transformer", "scheduler")


def text_without_comments(card):
    return re.sub(r"<!--.*?-->\n?", "", str(card))


@pytest.mark.parametrize(
    "place, title", [("user/x", "x"), (".", "here"), ("./", "here"), ("..", "above"), ("/a/b/", "b")]
)
def test_the_title_is_the_name_of_the_repository_or_folder(tiny_tokenizer, tmp_path, monkeypatch, place, title):
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert f"# {title}\n" in model_card(tiny_tokenizer, place).text


def test_a_whole_card(tiny_pipeline):
    tiny_pipeline.transformer.generation_config.guidance_scale = [1.1, 8.0]
    results = [EvalResult("generation", "d", "D", "fid", 3.25, "Generation", metric_name="FID")]
    card = model_card(
        tiny_pipeline,
        "user/x",
        title="Tiny",
        summary="A summary.",
        facts={"converted from": "`a.pt`"},
        results=results,
        results_note="The paper's.",
        pictures={"Samples": "samples.png"},
        recipe={"Stage 1": {"learning_rate": 0.1}},
        sections={"Limits": "Only tiny."},
        base_model="user/base",
        datasets=["user/data"],
        tags=["mine"],
    )
    assert card.data.library_name == "diffusers" and card.data.license == "mit"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.base_model == "user/base" and card.data.datasets == ["user/data"]
    assert {"d-ar", "arxiv:2505.23660", "mine"} == set(card.data.tags)
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("fid", 3.25)]
    assert card.data.model_name == "Tiny"
    text = text_without_comments(card)
    for part in (
        "# Tiny\n\nA summary.\n\n![Samples](samples.png)\n\n| | |\n|---|---|\n| images | 8 × 8 pixels |",
        "16 tokens in 4 groups, codebook 32 × 8, 4 denoising steps |",
        "| default guidance | 1.1 → 8 |",
        "| converted from | `a.pt` |",
        'DARPipeline.from_pretrained("user/x")',
        "## Results\n\nThe paper's.\n\nGeneration, D\n\n|  | value |\n|---|---:|\n| FID | 3.25 |",
        "<details><summary>Stage 1</summary>\n\n| option | value |\n|---|---|\n| `learning_rate` | 0.1 |",
        "## Limits\n\nOnly tiny.\n\n## Citation",
        "@inproceedings{gao2026dar,",
    ):
        assert part in text
    assert "trust_remote_code" not in text


@pytest.mark.parametrize("name", PARTS)
def test_the_card_of_a_part_alone(tiny_pipeline, name):
    part = getattr(tiny_pipeline, name)
    card = model_card(part, "user/x")
    text = text_without_comments(card)
    assert f"from dar_hf import {type(part).__name__}\n" in text
    assert card.data.library_name == ("transformers" if name == "transformer" else "diffusers")
    assert "## Results" not in text and "## Recipe" not in text
    assert card.data.eval_results is None


def test_a_card_says_which_conditions_a_step_sees(tiny_tokenizer):
    assert describe(tiny_tokenizer)["tokenizer"].endswith("4 denoising steps")
    tiny_tokenizer.register_to_config(condition_scope="prefix")
    assert describe(tiny_tokenizer)["tokenizer"].endswith("each with the conditions of all groups so far")


def test_a_self_contained_repository_says_how_to_load_its_code(tiny_pipeline):
    assert "trust_remote_code=True" in str(model_card(tiny_pipeline, "user/x", self_contained=True))


def test_the_shown_lines_run(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline.save_pretrained("model")
    usage = re.search(r"```python\n(.*?)```", str(model_card(tiny_pipeline, "model")), re.DOTALL)[1]
    scope = {}
    exec(usage, scope)
    assert (tmp_path / "step_4.png").is_file() and len(scope["images"]) == 1


def test_the_card_of_a_data_set():
    codes = Dataset.from_dict({"codes": [[1, 2], [3, 4]], "label": [0, 1]})
    card = model_card(codes, "user/codes", summary="Codes.")
    assert card.repo_type == "dataset" and "library_name" not in card.data.to_dict()
    assert "| rows | 2 |" in str(card) and "`codes`, `label`" in str(card)


def test_an_empty_model_describes_a_folder_without_its_weights(tiny_pipeline, tmp_path):
    tiny_pipeline.transformer.generation_config.guidance_scale = [1.1, 8.0]
    tiny_pipeline.save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    empty = empty_model(tmp_path)
    assert type(empty) is DARPipeline and empty.transformer.device.type == "meta"
    assert str(model_card(empty, "user/x")) == str(model_card(tiny_pipeline, "user/x"))
    assert type(empty_model(tmp_path / "tokenizer")) is DARTokenizer
    assert type(empty_model(tmp_path / "transformer")) is DARForCausalLM


def test_folders_without_a_model_of_ours_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        empty_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM"):
        empty_model(tmp_path)
