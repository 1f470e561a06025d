"""The pipelines that come with the package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipeline_helpers import PIPELINE_FILES

import dar_hf
from dar_hf.utils import sample

ROOT = Path(__file__).parents[2]
FILES = {
    "emoji": PIPELINE_FILES | {"text_tokenizer/tokenizer.json", "text_tokenizer/tokenizer_config.json"},
    "mnist": PIPELINE_FILES,
}
MAX_BYTES = {"emoji": 14e6, "mnist": 12e6}
SUBJECTS = {
    "emoji": {"prompt": ["noto red apple", "twemoji octopus", "fluent sunflower", "something never heard of"]},
    "mnist": {"class_labels": [str(digit) for digit in range(10)]},
}


@pytest.fixture(scope="module", params=sample.SAMPLES)
def pipe(request):
    pipe = dar_hf.DARPipeline.from_pretrained(dar_hf.sample_pipeline(request.param))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", sample.SAMPLES)
def test_it_is_small_and_holds_nothing_but_a_pipeline(name):
    folder = Path(dar_hf.sample_pipeline(name))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) == FILES[name]
    assert sum(path.stat().st_size for path in files.values()) <= MAX_BYTES[name]
    assert not any("_name_or_path" in path.read_text() for name, path in files.items() if name.endswith(".json"))


def test_the_guidance_of_digits_is_distilled():
    pipe = dar_hf.DARPipeline.from_pretrained(dar_hf.sample_pipeline("mnist"))
    assert pipe.transformer.generation_config.guidance_scale == 1.0


def test_it_loads_in_float32_and_draws_what_it_is_told(pipe):
    models = (pipe.tokenizer, pipe.transformer)
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.float32}
    subjects = SUBJECTS[Path(pipe.config._name_or_path).name]
    images = pipe(**subjects, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert len(images) == len(*subjects.values()) and torch.isfinite(images).all()
    assert images.flatten(1).std(dim=1).min() > 0.1  # something is drawn
    assert (images[0] - images[1]).abs().mean() > 0.05  # not always the same


def test_the_language_model_alone_loads_in_float32_too():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{dar_hf.sample_pipeline()}/transformer")
    assert type(model) is dar_hf.DARForCausalLM and model.dtype == torch.float32


def test_an_installation_without_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="no sample pipeline 'cats'; there are emoji, mnist"):
        dar_hf.sample_pipeline("cats")
    with pytest.raises(FileNotFoundError, match="comes without its sample pipeline: .* holds no model_index.json"):
        dar_hf.sample_pipeline()


def test_an_installation_takes_it_along(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    folder = Path(dar_hf.sample_pipeline()).parent
    assert {path.name for path in folder.iterdir()} >= set(sample.SAMPLES)
    for path in folder.rglob("*"):
        installed = tmp_path / "dar_hf" / "assets" / path.relative_to(folder)
        assert path.is_dir() or installed.read_bytes() == path.read_bytes()
