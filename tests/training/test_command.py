"""The command of training: presets, files of options and the command line, and what mistakes look like."""

import json
import shutil
import sys

import datasets
import pytest
from PIL import Image
from scripts import load_script

from dar_hf.presets import get_preset


@pytest.fixture
def command():
    return load_script("examples/train.py")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path, command):
    recipe = get_preset("digits").tokenizer_recipe
    (tmp_path / "run.yaml").write_text(
        "preset: digits\nlearning_rate: 1e-4\nseed: 5\nmodel_overrides: [data_std=0.5]\n"
    )
    args = command.parse("tokenizer", ["--config", str(tmp_path / "run.yaml"), "--seed", "6"])
    assert (args.seed, args.learning_rate, args.model_overrides) == (6, 1e-4, ["data_std=0.5"])
    assert args.max_train_steps == recipe["max_train_steps"] and args.adam_beta2 == 0.95
    plain = command.parse("tokenizer", ["--preset=digits"])
    assert plain.learning_rate == recipe["learning_rate"] and plain.seed == 0


def test_former_names_of_options_are_taken(tmp_path, command, monkeypatch):
    care = {"unquantized_steps": 7, "dead_code_interval": 3}
    former = {"continuous_steps": 7, "revive_every": 3}

    def chosen(*words):
        return {name: getattr(command.parse("tokenizer", ["--preset", "digits", *words]), name) for name in care}

    assert chosen("--continuous_steps", "7", "--revive-every=3") == care
    (tmp_path / "run.yaml").write_text(json.dumps(former))
    assert chosen("--config", str(tmp_path / "run.yaml")) == care
    preset = get_preset("digits")
    preset.tokenizer_recipe.update(former)
    for name in care:
        del preset.tokenizer_recipe[name]
    monkeypatch.setattr(command, "get_preset", lambda name: preset)
    assert chosen() == care


def test_unknown_options_in_a_file_are_named(tmp_path, command):
    (tmp_path / "run.yaml").write_text("learning_rat: 1e-4\n")
    with pytest.raises(ValueError, match="unknown options in .*run.yaml: learning_rat"):
        command.parse("ar", ["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "stage, preset", [("tokenizer", "v1"), ("tokenizer", "digits"), ("ar", "L"), ("ar", "digits")]
)
def test_every_recipe_is_accepted(command, stage, preset):
    args, recipe = command.parse(stage, ["--preset", preset]), get_preset(preset)
    wanted = recipe.tokenizer_recipe if stage == "tokenizer" else recipe.ar_recipe
    assert wanted and {name: getattr(args, name) for name in wanted} == wanted


def test_each_stage_has_a_preset_by_default(command):
    assert get_preset(command.parse("ar", []).preset).transformer
    assert command.parse("tokenizer", []).preset == "v1"


MISTAKES = {
    ("tokenizer", "--preset huge"): "unknown preset 'huge'; there are v1, B, L, XL, XXL, 3B, digits",
    ("tokenizer", "--image_column picture"): "no column 'picture' for the images; it has image, label",
    ("tokenizer", "--model_overrides encoder_dmi=64"): "encoder_dmi",
    ("tokenizer", "--output_dir {earlier}"): "holds an earlier run or model: pass --resume_from_checkpoint latest",
    ("ar", "--dataset_name {unlabelled}"): "no column 'label' for the labels; it has image",
    ("ar", "--model_overrides hidden_size=33"): "hidden size (33)",
}


@pytest.fixture
def no_progress_bars():
    datasets.utils.disable_progress_bars()
    yield
    datasets.utils.enable_progress_bars()


@pytest.mark.usefixtures("no_progress_bars")
@pytest.mark.parametrize("stage, options", MISTAKES)
def test_mistakes_end_the_command_with_one_line(tmp_path, tokenizer, command, monkeypatch, capsys, stage, options):
    (tmp_path / "unlabelled").mkdir()
    for index in range(3):
        Image.new("L", (8, 8), 80 * index).save(tmp_path / "unlabelled" / f"{index}.png")
    earlier = shutil.copytree(tokenizer, tmp_path / "earlier")
    (earlier / "history.jsonl").write_text('{"step": 1}\n')
    before = {path: path.read_bytes() for path in earlier.iterdir()}
    argv = ["--preset", "digits", "--output_dir", str(tmp_path / "run")]
    argv += ["--tokenizer", str(tokenizer)] if stage == "ar" else []
    argv += options.format(earlier=earlier, unlabelled=tmp_path / "unlabelled").split()
    monkeypatch.setattr(sys, "argv", ["train.py", stage, *argv])
    with pytest.raises(SystemExit) as ended:
        command.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(said) == 1 and said[0].startswith("train.py: ") and MISTAKES[stage, options] in said[0], said
    assert {path: path.read_bytes() for path in earlier.iterdir()} == before
