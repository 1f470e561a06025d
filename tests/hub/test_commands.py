"""The commands that publish, as people run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from scripts import load_script
from training.helpers import QUICK, TINY_TOKENIZER, TINY_TRANSFORMER, fresh_process, overrides, tokenizer_stage

from dar_hf.training import TokenizerArguments, loop, make_accelerator, pushing, train
from dar_hf.training.pushing import PushError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FEATURES = """
import torch

class Features(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()

    def forward(self, images):
        return images.float().mean(dim=(2, 3))
"""
TWO_LINES = """
from dar_hf import DARPipeline

images = DARPipeline.from_pretrained("user/digits")([3, 1, 4]).images
print(len(images), images[0].size)
"""


def command(hub, name, *arguments, **changes):
    """Run a command as the user of a Hub."""
    environment = hub.environment(**{"HF_TOKEN": "hf_test", **changes})
    line = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)


def options(**changes):
    given = {name: value for name, value in (QUICK | changes).items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


@pytest.mark.slow
def test_train_and_push_what_the_two_lines_load(hub, tmp_path):
    tokenizer, pipeline = tmp_path / "tokenizer", tmp_path / "pipeline"
    given = options(output_dir=tokenizer, unquantized_steps=2)
    done = command(hub, "train.py", "tokenizer", *given, "--model_overrides", *overrides(TINY_TOKENIZER))
    assert done.returncode == 0, done.stderr
    assert not hub.repositories
    done = command(
        hub,
        "train.py",
        "ar",
        *options(output_dir=pipeline, tokenizer=tokenizer, hub_model_id="digits"),
        *("--push_to_hub", "--hub_private_repo", "--model_overrides", *overrides(TINY_TRANSFORMER)),
    )
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stdout
    assert hub.repositories["model", "user/digits"].private
    loaded = hub.python(TWO_LINES, HF_TOKEN="hf_test")
    assert loaded.stdout.splitlines()[-1] == "3 (8, 8)", loaded.stderr

    card = hub.read("user/digits", "README.md").decode()
    files = set(hub.repositories["model", "user/digits"].files())
    pictures = set(re.findall(r"!\[.*?\]\((.*?)\)", card))
    assert {"samples.png", "loss.png"} == pictures <= files
    assert not any("checkpoint" in name for name in files)
    assert 'from_pretrained("user/digits")' in card and str(tmp_path) not in card
    metadata = yaml.safe_load(card.split("---")[1])
    metrics = {m["type"] for group in metadata["model-index"][0]["results"] for m in group["metrics"]}
    assert metrics == {"psnr", "codebook_usage", "cross_entropy"}
    assert "Tokenizer (stage 1)" in card and "Language model (stage 2)" in card
    assert 'from_pretrained("user/digits")' in (pipeline / "README.md").read_text()

    # a report comes later, and somebody has edited the card meanwhile
    hub.write("user/digits", "README.md", card + "\n## Limits\n\nToo small.\n")
    measured = [tmp_path / name for name in ("digits", "reconstruction")]
    done = command(hub, "evaluate_digits.py", "--pipeline", pipeline, "--output_dir", measured[0], "--num_images", 20)
    assert done.returncode == 0, done.stderr
    (tmp_path / "features.py").write_text(FEATURES)
    data = ("--dataset_name", "digits", "--num_images", 20, "--features", f"{tmp_path / 'features.py'}:Features")
    done = command(hub, "measure.py", "reconstruction", "--pipeline", pipeline, *data, "--output_dir", measured[1])
    assert done.returncode == 0, done.stderr
    push = ("push_to_hub.py", pipeline, "user/digits", "--report", *measured, "--self_contained")
    done = command(hub, *push)
    assert done.returncode == 0, done.stderr
    after = hub.read("user/digits", "README.md").decode()
    files = set(hub.repositories["model", "user/digits"].files())
    assert after.endswith("\n## Limits\n\nToo small.\n") and str(tmp_path) not in after
    for row in ("num tokens | 4 | 8 | 12 | 16", "PSNR (dB)", "label agreement (SVM)", "rFD (features.py:Features)"):
        assert f"\n| {row} |" in after
    metadata = yaml.safe_load(after.split("---")[1])
    figures = {
        (metric["type"], metric.get("args", {}).get("num_tokens"))
        for group in metadata["model-index"][0]["results"]
        for metric in group["metrics"]
    }
    assert {(kind, n) for kind in ("label_agreement", "frechet_distance", "psnr") for n in (4, 8, 12, 16)} <= figures
    assert "trust_remote_code=True" in after and "pipeline_dar.py" in files
    pictures = set(re.findall(r"!\[.*?\]\((.*?)\)", after))
    assert {"evaluation/generation/preview_strip.png", "evaluation/reconstruction/previews.png"} <= pictures <= files
    assert {"evaluation/generation/report.json", "evaluation/reconstruction/report.json"} <= files
    loaded = hub.python(TWO_LINES, HF_TOKEN="hf_test")
    assert loaded.stdout.splitlines()[-1] == "3 (8, 8)", loaded.stderr


def test_push_to_hub_says_in_one_line_what_is_wrong(hub, tmp_path, tiny_tokenizer, monkeypatch, capsys):
    push = load_script("examples/push_to_hub.py").main

    def last_line(*options):
        with pytest.raises(SystemExit) as caught:
            push([str(tmp_path), "user/x", *options])
        assert caught.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    expected = f"push_to_hub.py: {tmp_path} holds no model: it has neither model_index.json nor config.json."
    assert last_line() == expected
    tiny_tokenizer.save_pretrained(tmp_path)
    with monkeypatch.context() as logged_out:
        logged_out.delenv("HF_TOKEN")
        logged_out.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        said = last_line()
    assert "401" in said and "hf auth login" in said
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in last_line("--self_contained")
    assert not list(tmp_path.glob("*.py"))  # the folder is as it was


@pytest.fixture
def run(tmp_path):
    with fresh_process():
        stage, args = tokenizer_stage(tmp_path / "run", push_to_hub=True, hub_model_id="user/x")
        yield stage, args


def test_a_failed_upload_after_training_loses_nothing(hub, run, monkeypatch):
    stage, args = run

    def fail(*arguments, **keywords):
        raise OSError("no route to the Hub")

    monkeypatch.setattr(pushing, "push_folder", fail)
    with pytest.raises(PushError, match="no route to the Hub.*push_to_hub.py .*run user/x") as caught:
        train(stage, args, make_accelerator(args))
    assert args.output_dir in str(caught.value)
    folder = Path(args.output_dir)
    assert (folder / "diffusion_pytorch_model.safetensors").is_file() and (folder / "README.md").is_file()


def test_what_would_refuse_the_model_does_so_before_training(hub, run, tiny_transformer):
    stage, args = run
    tiny_transformer.push_to_hub("user/x")
    before = [parameter.clone() for parameter in stage.model.parameters()]
    with pytest.raises(PushError, match="holds a DARForCausalLM, not a DARTokenizer"):
        train(stage, args, make_accelerator(args))
    assert all(torch.equal(a, b) for a, b in zip(before, stage.model.parameters(), strict=True))


def test_a_tokenizer_is_pushed_after_training(hub, run):
    stage, args = run
    args.hub_model_id = None  # the folder's name
    train(stage, args, make_accelerator(args))
    assert "diffusion_pytorch_model.safetensors" in hub.repositories["model", "user/run"].files()
    assert "DARTokenizer" in hub.read("user/run", "README.md").decode()


def test_a_run_is_pushed_while_it_trains(hub, run, monkeypatch, caplog):
    stage, args = run
    args.push_steps, args.validation_steps, tried = 2, 2, []
    upload = pushing.push_folder

    def unreliable(folder, repo_id, message):
        tried.append(message)
        if len(tried) == 2:
            raise OSError("no route to the Hub")
        if len(tried) == 3:  # the finished model comes later: this is what the first upload left
            assert {"config.json", "loss.png", "reconstructions.png"} <= set(
                hub.repositories["model", repo_id].files()
            )
            assert f"{args.max_train_steps} steps" in hub.read(repo_id, "README.md").decode()
        return upload(folder, repo_id, message)

    monkeypatch.setattr(pushing, "push_folder", unreliable)
    validate = loop.TrainingLoop._validate

    def validate_later(self, step):
        self.background.join()  # so that no upload is skipped because the last one is still under way
        return validate(self, step)

    monkeypatch.setattr(loop.TrainingLoop, "_validate", validate_later)
    args.max_train_steps = 6
    Path(args.output_dir).mkdir()
    (Path(args.output_dir) / "previews.png").touch()  # of an earlier run
    train(stage, args, make_accelerator(args))
    assert tried == ["Step 2 of 6", "Step 4 of 6", "Train 6 steps"]
    assert "Step 4 of 6 is not pushed to the Hub: no route to the Hub" in caplog.text
    assert not (Path(args.output_dir) / ".pushing").exists()
    assert "unfinished" not in hub.read("user/x", "README.md").decode()


def test_push_steps_need_a_repository():
    with pytest.raises(ValueError, match="give --push_to_hub"):
        TokenizerArguments(output_dir="x", push_steps=5)
