"""The commands, as a user runs them."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from dar_hf import DARForCausalLM, DARPipeline, DARTokenizer
from dar_hf.conversion import convert_tokenizer, convert_transformer

from . import originals

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def files(tmp_path):
    config = originals.tokenizer_config(time_shift=1.5)
    weights = {name: tensor * 0.05 for name, tensor in originals.tokenizer_weights(config).items()}
    originals.save(originals.tokenizer_checkpoint(weights, config), tmp_path / "tokenizer.pt")
    model = originals.transformer_checkpoint(originals.transformer_weights(**originals.TRANSFORMER), n_head=2)
    torch.save(model, tmp_path / "transformer.pt")
    return ["--tokenizer", str(tmp_path / "tokenizer.pt"), "--transformer", str(tmp_path / "transformer.pt")]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: starting one takes longer than all that these do."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        code = None
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as error:
            code = error.code
        output, errors = capsys.readouterr()
        if isinstance(code, str):  # as the interpreter does
            code, errors = 1, errors + code
        return subprocess.CompletedProcess(sys.argv, code or 0, output, errors)

    return call


@pytest.mark.slow
def test_a_pipeline(files, tmp_path):
    weights = originals.transformer_weights(**originals.TRANSFORMER | {"num_classes": 1000})
    torch.save(originals.transformer_checkpoint(weights, n_head=2), files[3])
    command = [sys.executable, EXAMPLES / "convert_checkpoint.py", *files, "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in ("tokenizer: ", " M (REPA head, for training)", "transformer: 0.7 M parameters", "codebook_used"):
        assert line in result.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`tokenizer.pt`, `transformer.pt`" in card and "library_name: diffusers" in card
    pipeline = DARPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.transformer.config.num_image_tokens == 16  # the tokenizer's: the file does not say
    assert pipeline.transformer.config.tokens_per_group == 4
    assert pipeline.scheduler.config.shift == 1.5 and not pipeline.scheduler.config.variable_step
    for converted, loaded in (
        (convert_tokenizer(files[1]), pipeline.tokenizer),
        (convert_transformer(files[3], num_image_tokens=16), pipeline.transformer),
    ):
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in converted.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("golden retriever").images[0].size == (16, 16) and pipeline.get_label_ids("goldfish") == [1]


def test_options(run, files, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(["a", "b", "c", "d", "e"]))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"num_denoising_steps": 3}}))
    result = run(
        "convert_checkpoint.py",
        *files,
        *("--output_dir", tmp_path / "out", "--id2label", tmp_path / "labels.json", "--sampling", "XL"),
        *("--config", tmp_path / "config.yaml", "--tokenizer_options", "strict_sample_size=True"),
        *("--transformer_options", "num_attention_heads=2", "class_dropout=0.3"),
    )
    assert result.returncode == 0, result.stderr
    pipeline = DARPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.get_label_ids("e") == [4]
    assert pipeline.transformer.generation_config.guidance_scale == [1.1, 10.0]
    assert pipeline.tokenizer.config.num_inference_steps == 3 and pipeline.tokenizer.config.strict_sample_size
    assert pipeline.transformer.config.class_dropout == 0.3


def test_options_that_say_nothing(run, files, tmp_path):
    (tmp_path / "labels.txt").write_text("a")
    for options, message in (
        ((*files[:2], "--id2label", tmp_path / "labels.txt"), "--id2label needs --tokenizer and --transformer"),
        ((*files[2:], "--config", tmp_path / "labels.txt"), "--config needs --tokenizer"),
    ):
        result = run("convert_checkpoint.py", *options, "--output_dir", tmp_path / "out")
        assert result.returncode == 2 and message in result.stderr and not (tmp_path / "out").exists()


def test_one_model(run, files, tmp_path):
    assert run("convert_checkpoint.py", *files[:2], "--output_dir", tmp_path / "a").returncode == 0
    DARTokenizer.from_pretrained(tmp_path / "a")
    options = ("--transformer_options", "num_image_tokens=16")
    assert run("convert_checkpoint.py", *files[2:], *options, "--output_dir", tmp_path / "b").returncode == 0
    DARForCausalLM.from_pretrained(tmp_path / "b")


def test_what_goes_wrong_leaves_nothing(run, files, tmp_path):
    (tmp_path / "labels.txt").write_text("a\n")
    other = originals.transformer_weights(**originals.TRANSFORMER | {"vocab_size": 33})
    torch.save(originals.transformer_checkpoint(other, n_head=2), tmp_path / "other.pt")
    (tmp_path / "short.pt").write_bytes(Path(files[1]).read_bytes()[:10_000])
    out = tmp_path / "out"
    for options, message in (
        ((*files, "--id2label", tmp_path / "labels.txt"), "must name the classes 0 to 4"),
        ((*files[:3], tmp_path / "other.pt"), "disagree: codebook_size 32 and 33"),
        ((*files[:1], tmp_path / "short.pt", *files[2:]), "short.pt"),
        ((*files[:1], tmp_path / "none.pt", *files[2:]), "no checkpoint at"),
        ((*files, "--tokenizer_options", "encoder_dim"), "name=value"),
        ((*files, "--transformer_options", "num_image_tokens=17"), "number of tokens 16 and 17"),
    ):
        before = set(tmp_path.iterdir())
        result = run("convert_checkpoint.py", *options, "--output_dir", out)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
        assert set(tmp_path.iterdir()) == before


def test_nothing_is_overwritten(run, files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    for script, options in (("convert_checkpoint.py", files), ("export_llama.py", ["--model", tmp_path])):
        result = run(script, *options, "--output_dir", tmp_path / "out")
        assert result.returncode == 1 and "not an empty folder" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_output_folder_stays_the_one_it_is(run, files, tiny_transformer, tmp_path, monkeypatch):
    """A volume cannot be replaced, and the folder that the shell is in should not be."""
    tiny_transformer.save_pretrained(tmp_path / "model")
    for script, options in (("convert_checkpoint.py", files), ("export_llama.py", ["--model", tmp_path / "model"])):
        folder = tmp_path / script
        folder.mkdir()
        monkeypatch.chdir(folder)
        number = folder.stat().st_ino
        result = run(script, *options, "--output_dir", ".")
        assert result.returncode == 0, result.stderr
        assert folder.stat().st_ino == number and Path.cwd() == folder and len(list(folder.iterdir())) > 3


def test_class_names_come_along(run, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    tiny_pipeline.transformer.save_pretrained(tmp_path / "alone")
    model = tmp_path / "pipeline"
    for number, options in enumerate(([model, "--subfolder", "transformer"], [model / "transformer"])):
        result = run("export_llama.py", "--model", *options, "--output_dir", tmp_path / str(number))
        assert result.returncode == 0, result.stderr
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert tokenizer("goldfish").input_ids == tokenizer("<class_1>").input_ids == [33]
    assert run("export_llama.py", "--model", tmp_path / "alone", "--output_dir", tmp_path / "2").returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "2")
    assert tokenizer("<class_1>").input_ids == [33]
    with pytest.raises(Exception, match="Missing"):
        tokenizer("goldfish")


def test_class_names_come_along_from_the_home_folder_and_damaged_ones_are_named(
    run, tiny_pipeline, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    options = ("export_llama.py", "--model", "~/pipeline/transformer", "--output_dir")
    assert run(*options, "~/llama").returncode == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "llama")("goldfish").input_ids == [33]
    index = json.loads((tmp_path / "pipeline/model_index.json").read_text())
    for names in (["goldfish"], "goldfish", {"one": "goldfish"}):
        (tmp_path / "pipeline/model_index.json").write_text(json.dumps(index | {"id2label": names}))
        result = run(*options, tmp_path / "damaged")
        assert result.returncode == 1 and "model_index.json is damaged" in result.stderr
        assert "cannot write" not in result.stderr and not (tmp_path / "damaged").exists()


def test_export_llama(run, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    options = ("--model", tmp_path / "pipeline", "--subfolder", "transformer", "--output_dir", tmp_path / "llama")
    result = run("export_llama.py", *options)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["model_type"] == "llama"
    shutil.rmtree(tmp_path / "llama")
    result = run("export_llama.py", "--model", tmp_path / "none", "--output_dir", tmp_path / "llama")
    assert result.returncode == 1 and "Traceback" not in result.stderr and not (tmp_path / "llama").exists()
