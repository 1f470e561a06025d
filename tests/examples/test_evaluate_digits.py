"""The evaluation of pipelines of digits, on another set than scikit-learn's."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import load_script

from dar_hf import DARPipeline, FlowMatchAdamsBashforthScheduler
from dar_hf.data import normal_noise
from dar_hf.evaluation import read_report
from dar_hf.metrics import psnr

COMMAND = Path(__file__).parents[2] / "examples" / "evaluate_digits.py"


@pytest.fixture(scope="module")
def command():
    return load_script("examples/evaluate_digits.py")


@pytest.fixture
def run(command, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate_digits.py", *map(str, arguments)])
        command.main()

    return run


def test_any_labelled_digits(command, run, make_tokenizer, make_transformer, image_sets, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "BATCH", 64)
    data = tmp_path / "numbers"
    data.mkdir()
    for split in ("train", "test"):
        shutil.copy(image_sets["parquet"] / "train.parquet", data / f"{split}.parquet")
    model = make_transformer(num_classes=10)
    pipe = DARPipeline(make_tokenizer(in_channels=1), model, FlowMatchAdamsBashforthScheduler())
    pipe.save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "out"
    run("--pipeline", tmp_path / "pipeline", "--dataset_name", data, "--num_images", 20, "--output_dir", out)
    report = read_report(out)
    assert report["data"] == {
        "dataset": "numbers",
        "split": "test",
        "description": "200 to train, 200 to test",
        "count": 200,
    }
    assert report["settings"]["judge_accuracy_on_test_digits"] == 1.0  # it was trained on them here
    figures = {(m["type"], m.get("mode"), m.get("num_tokens")): m["value"] for m in report["metrics"]}
    for tokens in (4, 8, 12, 16):
        assert {("label_agreement", None, tokens), ("label_agreement", "reconstruction", tokens)} <= set(figures)
    images, labels = command.load_split(str(data), "test", pipe)
    assert images.shape == (200, 1, 8, 8) and labels.tolist() == sorted(labels.tolist())
    noise = normal_noise(torch.arange(200), images.shape[1:], images.device)
    whole = pipe.tokenizer.decode(pipe.tokenizer.encode(images).codes, noise=noise).sample  # in one batch
    assert figures["psnr", "reconstruction", 16] == pytest.approx(float(psnr(whole, images).mean()), abs=1e-3)
    for name in ("samples", "reconstructions", "previews", "preview_strip"):
        assert Image.open(out / f"{name}.png").size[0] > 100
    assert not (out / "loss.png").exists()  # no run lies there


def test_the_judge_sees_large_digits_small(command):
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 64, 64)
    assert command.Judge._features(images).shape == (2, 16 * 16)
    assert command.Judge._features(images[..., :8, :8]).shape == (2, 8 * 8)


def test_a_missing_set_is_one_line(run, tiny_pipeline, tmp_path, capsys):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(SystemExit) as caught:
        run("--pipeline", tmp_path / "pipeline", "--dataset_name", tmp_path / "nowhere")
    assert caught.value.code == 2 and "no such file or folder" in capsys.readouterr().err
