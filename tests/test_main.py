"""``python -m dar_hf``."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_helpers import seeded
from tiny_models import make_text_pipeline

import dar_hf
from dar_hf.__main__ import main
from dar_hf.utils import sample
from dar_hf.utils.pictures import image_grid


def test_it_draws_every_class(tiny_pipeline, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "new" / "a.png"), "--seed", "3"])
    generators = [torch.Generator().manual_seed(3 + label) for label in range(5)]
    images = tiny_pipeline(list(range(5)), generator=generators, output_type="pt").images
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "new" / "a.png")), np.asarray(image_grid(images * 2 - 1, columns=5))
    )
    printed = capsys.readouterr().out
    for part in (
        f"dar_hf {dar_hf.__version__}, torch {torch.__version__}",
        "device: c",
        "8 × 8 pixels",
        "5 images in",
    ):
        assert part in printed


def test_of_many_classes_it_draws_the_first_ten(make_transformer, tiny_tokenizer, tmp_path, capsys):
    scheduler = dar_hf.FlowMatchAdamsBashforthScheduler()
    dar_hf.DARPipeline(tiny_tokenizer, make_transformer(num_classes=30), scheduler).save_pretrained(tmp_path / "m")
    main(["--model", str(tmp_path / "m"), "--output", str(tmp_path / "a.png")])
    assert "10 images in" in capsys.readouterr().out


def test_it_draws_the_classes_it_is_told(tiny_pipeline, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    main(["shark", "4", "--pipeline", str(tmp_path / "model"), "--output", str(tmp_path / "a.png"), "--seed", "3"])
    images = tiny_pipeline([2, 4], generator=[seeded(3), seeded(4)], output_type="pt").images
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "a.png")), np.asarray(image_grid(images * 2 - 1, columns=2))
    )
    assert "2 images in" in capsys.readouterr().out


@pytest.fixture
def text_pipeline(tiny_tokenizer, tmp_path):
    pipeline = make_text_pipeline(tiny_tokenizer)
    pipeline.save_pretrained(tmp_path / "model")
    return pipeline


def test_it_draws_texts(text_pipeline, tmp_path, capsys):
    prompts = ["a red apple", "a book", "a red apple"]
    main([*prompts, "--pipeline", str(tmp_path / "model"), "--output", str(tmp_path / "a.png"), "--seed", "3"])
    generators = [seeded(3), seeded(4), seeded(5)]
    images = text_pipeline(prompt=prompts, generator=generators, output_type="pt").images
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "a.png")), np.asarray(image_grid(images * 2 - 1, columns=3))
    )
    assert "3 images in" in capsys.readouterr().out


def test_texts_that_are_missing_are_one_line(text_pipeline, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--pipeline", str(tmp_path / "model"), "--output", str(tmp_path / "a.png")])
    assert caught.value.code == 2 and not (tmp_path / "a.png").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dar-hf: error: this pipeline draws from text: say what to draw")


def test_the_word_serve_is_drawn_after_two_dashes(text_pipeline, tmp_path):
    main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "a.png"), "--", "serve"])
    images = text_pipeline(prompt="serve", generator=[seeded(0)], output_type="pt").images
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(image_grid(images * 2 - 1, 1)))


@pytest.mark.parametrize("missing", ["ray", "prometheus_client"])
def test_without_ray_serve_says_what_to_install(missing, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("dar_hf.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which has options for Ray afterwards
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--model", "somewhere"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dar-hf: error: serve needs Ray Serve") and '-e ".[serve]"' in line
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64  # nobody else can use it


def test_a_wrong_model_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--model", str(tmp_path)])
    assert caught.value.code == 2
    assert f"dar-hf: error: cannot load the pipeline at {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--pipeline", "somewhere", "--sample", "mnist"], ["--sample", "cats"]])
def test_another_sample_or_two_models_are_refused(options, capsys):
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2 and "argument --sample" in capsys.readouterr().err


def test_a_pipeline_is_drawn_without_the_samples(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "FOLDER", tmp_path / "nothing")
    tiny_pipeline.save_pretrained(tmp_path / "model")
    main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").is_file()


def test_with_no_words_the_sample_draws_its_own_prompts(text_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "FOLDER", tmp_path)
    (tmp_path / "model").rename(tmp_path / sample.SAMPLES[0])
    main(["--output", str(tmp_path / "a.png")])
    prompts = sample.EMOJI_PROMPTS
    images = text_pipeline(prompt=prompts, generator=[seeded(i) for i in range(len(prompts))], output_type="pt").images
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(image_grid(images * 2 - 1, 5)))


def test_the_other_sample_draws_classes(tmp_path, capsys):
    main(["--sample", "mnist", "3", "7", "--output", str(tmp_path / "a.png")])
    folder = dar_hf.sample_pipeline("mnist")
    images = dar_hf.DARPipeline.from_pretrained(folder)([3, 7], generator=[seeded(0), seeded(1)], output_type="pt")
    expected = np.asarray(image_grid(images.images * 2 - 1, columns=2))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected)
    assert folder in capsys.readouterr().out


@pytest.mark.slow
def test_a_fresh_process_draws_the_sample(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "dar_hf"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert (
        f"samples.png: {len(sample.EMOJI_PROMPTS)} images in" in result.stdout
        and dar_hf.sample_pipeline() in result.stdout
    )
    assert [path.name for path in Path(tmp_path).iterdir()] == ["samples.png"]
