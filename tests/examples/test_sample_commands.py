"""The commands around the pipeline that comes with the package: what ships it, what draws with it, its Space."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from pipeline_helpers import PIPELINE_FILES
from safetensors.torch import load_file, save_file
from scripts import load_script

import dar_hf

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def trained(tiny_pipeline, tmp_path):
    """A pipeline folder with what training leaves in it."""
    folder = tmp_path / "trained"
    tiny_pipeline.save_pretrained(folder)
    config = json.loads((folder / "tokenizer" / "config.json").read_text())
    (folder / "tokenizer" / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/tokenizer"}))
    for name in ("training.json", "history.jsonl", "README.md", "samples.png"):
        (folder / name).write_text("left behind")
    (folder / "checkpoints").mkdir()
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_sample_is_the_pipeline_in_half_precision(run_command, trained, tiny_pipeline, tmp_path):
    target = tmp_path / "assets" / "sample"
    printed = run_command("make_sample.py", "--pipeline", trained, "--output_dir", target)
    assert printed.startswith(f"{target}: ") and "MB" in printed
    assert {name for name in files(target) if "." in name} == PIPELINE_FILES
    assert "/home/me" not in (target / "tokenizer" / "config.json").read_text()
    for name in ("tokenizer/diffusion_pytorch_model.safetensors", "transformer/model.safetensors"):
        half, full = load_file(target / name), load_file(trained / name)
        assert set(half) == set(full)
        assert all(torch.equal(half[key], full[key].half()) for key in full)
    pipe = dar_hf.DARPipeline.from_pretrained(target)
    assert pipe.transformer.dtype == pipe.tokenizer.dtype == torch.float32
    assert pipe.config.id2label == tiny_pipeline.config.id2label
    assert list(target.parent.iterdir()) == [target]


def test_a_new_sample_replaces_the_old_one_only_when_it_is_good(run_command, trained, tmp_path, refusal):
    target = tmp_path / "sample"
    run_command("make_sample.py", "--pipeline", trained, "--output_dir", target)
    before = {name: (target / name).read_bytes() for name in files(target) if (target / name).is_file()}
    weights = trained / "transformer" / "model.safetensors"
    good = load_file(weights)

    (name, tensor), *_ = good.items()
    save_file(good | {name: tensor + 1e6}, weights, metadata={"format": "pt"})
    refused = refusal(run_command, "make_sample.py", "--pipeline", trained, "--output_dir", target)
    assert f"{name} holds values beyond the range of float16" in refused
    save_file({"ballast": torch.zeros(8_000_000)} | good, weights, metadata={"format": "pt"})
    refused = refusal(run_command, "make_sample.py", "--pipeline", trained, "--output_dir", target)
    assert "at most 14 are shipped" in refused
    weights.write_bytes(b"damaged")
    refused = refusal(run_command, "make_sample.py", "--pipeline", trained, "--output_dir", target)
    assert f"{weights} is damaged or cut off" in refused
    weights.unlink()
    refused = refusal(run_command, "make_sample.py", "--pipeline", trained, "--output_dir", target)
    assert "No such file" in refused
    assert before == {name: (target / name).read_bytes() for name in files(target) if (target / name).is_file()}

    save_file({key: value * 0 for key, value in good.items()}, weights, metadata={"format": "pt"})
    run_command("make_sample.py", "--pipeline", trained, "--output_dir", target)
    assert not any(value.any() for value in load_file(target / "transformer" / "model.safetensors").values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample", "trained"]


def test_a_sample_that_cannot_take_its_place_is_kept(run_command, trained, tmp_path, refusal, monkeypatch):
    target, replace = tmp_path / "volume", os.replace
    target.mkdir()
    (target / "old").write_text("old")

    def guarded(source, destination):
        if Path(source) == target:
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", guarded)
    refused = refusal(run_command, "make_sample.py", "--pipeline", trained, "--output_dir", target)
    kept = re.search(r"The copy is complete and kept in (\S+)\.\n", refused)
    assert "Device or resource busy" in refused and (Path(kept[1]) / "model_index.json").is_file()
    assert (target / "old").read_text() == "old"


@pytest.mark.slow
def test_the_pictures_of_the_readme(run_command, tmp_path):
    script = load_script("examples/quickstart.py")
    run_command("quickstart.py", "--output_dir", tmp_path, "--layout_tokens", 2)
    config = dar_hf.DARPipeline.from_pretrained(dar_hf.sample_pipeline()).tokenizer.config
    digits = dar_hf.DARPipeline.from_pretrained(dar_hf.sample_pipeline("mnist")).tokenizer.config
    tile, digit = (size * max(1, -(-48 // size)) + 2 for size in (config.sample_size, digits.sample_size))
    sizes = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes == {
        "samples.png": (len(script.EMOJI_PROMPTS) * tile + 2, script.PER_PROMPT * tile + 2),
        "previews.png": (config.num_inference_steps * tile + 2, len(script.DRAWINGS) * tile + 2),
        "layout.png": (12 * digit + 2, 3 * digit + 2),
    }
    run_command("quickstart.py", "--output_dir", tmp_path / "again", "--layout_tokens", 2)
    for name in sizes:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_space_runs_the_versions_that_are_tested():
    space = EXAMPLES / "space"
    constraints = (ROOT / "constraints.txt").read_text().split()
    metadata = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert f"gradio=={metadata['sdk_version']}" in constraints and metadata["sdk"] == "gradio"
    assert (space / metadata["app_file"]).read_text() == (EXAMPLES / "app.py").read_text()
    lines = [line for line in (space / "requirements.txt").read_text().splitlines() if line[0] not in "#-"]
    assert set(lines) <= set(constraints)
    setup = (ROOT / "setup.py").read_text()
    needed = setup.split("install_requires=[")[1].split("],")[0]
    required = {line.split('"')[1].split(">")[0].replace("-", "_") for line in needed.splitlines() if '"' in line}
    assert {line.split("==")[0] for line in lines} == required
