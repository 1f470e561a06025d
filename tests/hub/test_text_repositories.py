"""Repositories of pipelines that draw from text: pushed, loaded in fresh processes, with and without the package."""

import pytest
import torch
from tiny_models import make_text_pipeline

from dar_hf import DARPipeline
from dar_hf.hub import export_remote_code, model_card, push_folder
from dar_hf.hub.cards import empty_model

CODE = """
import importlib.util, sys, torch
from {library} import {name}

assert (importlib.util.find_spec("dar_hf") is None) == (len(sys.argv) > 3)
pipeline = {name}.from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) > 3)
pipeline.set_progress_bar_config(disable=True)
images = pipeline(prompt=["red apple", "猫"], generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.save(images, sys.argv[2])
"""
WITH_THE_PACKAGE = CODE.format(library="dar_hf", name="DARPipeline")
WITHOUT_THE_PACKAGE = CODE.format(library="diffusers", name="DiffusionPipeline")


@pytest.fixture
def pipeline(tiny_tokenizer):
    return make_text_pipeline(tiny_tokenizer)


@pytest.fixture
def expected(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt=["red apple", "猫"], generator=generator, output_type="pt").images


@pytest.mark.slow
def test_a_pushed_pipeline_brings_its_text_tokenizer(hub, pipeline, expected, tmp_path):
    pipeline.push_to_hub("user/text")
    done = hub.python(WITH_THE_PACKAGE, "user/text", tmp_path / "images.pt")
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)


@pytest.mark.slow
def test_a_self_contained_repository(hub, pipeline, expected, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    export_remote_code(tmp_path / "pipeline")
    push_folder(tmp_path / "pipeline", "user/text")
    for place in (tmp_path / "pipeline", "user/text"):
        done = hub.python(WITHOUT_THE_PACKAGE, place, tmp_path / "images.pt", "without", package=False)
        assert done.returncode == 0, done.stderr
        assert torch.equal(torch.load(tmp_path / "images.pt"), expected)


def test_the_exported_folder_loads_where_the_package_is(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    written = export_remote_code(tmp_path)
    assert "text_dar.py" in {path.name for path in written}
    loaded = DARPipeline.from_pretrained(tmp_path)
    assert type(loaded) is DARPipeline
    assert loaded.text_tokenizer("red apple").input_ids == pipeline.text_tokenizer("red apple").input_ids


def test_cards(pipeline, tiny_pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    text = str(model_card(empty_model(tmp_path), "user/text"))
    assert 'images = pipe(prompt="a red apple").images' in text and "pipe(0)" not in text
    assert "text of up to 6 of 300 tokens" in text and "pipeline_tag: text-to-image" in text
    text = str(model_card(pipeline.transformer, "user/text"))
    assert "config.text_token_ids(" in text and "class_token_id" not in text
    text = str(model_card(tiny_pipeline, "user/classes"))
    assert "pipe(0)" in text and "5 classes" in text and "prompt" not in text
