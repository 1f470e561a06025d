"""The README and the pages in docs/ do what they say: their blocks of Python and bash run from top to bottom.

Commands run in this process, with the small settings below. A block that cannot run here has a comment above it,
``<!-- not tested: reason -->``. Links, headings, images and the files that the text names must exist.
"""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
from PIL import Image
from pipeline_helpers import picture
from tiny_models import make_text_pipeline
from training.helpers import fresh_process

from dar_hf import DARPipeline, FlowMatchAdamsBashforthScheduler

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, "examples/README.md", *sorted(f"model_cards/{path.name}" for path in ROOT.glob("model_cards/*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<comment>[^>]*) -->\n)?^```(?P<language>python|bash)\n(?P<code>.*?)^```", re.M | re.S)
MARK = "not tested: "

# options that are added to a command, by its name: of an option that is given twice, the last one counts
SMALL = {
    "train.py": "--max_train_steps 2 --train_batch_size 4 --max_train_samples 40 --max_validation_samples 4 "
    "--checkpointing_steps 0 --validation_steps 0 --dataloader_num_workers 0 --mixed_precision no",
    "train.py tokenizer": "--unquantized_steps 0",
    "--preset digits-distilled": "--distill_samples 8 --overwrite_output_dir",  # other pages need it already
    "extract_codes.py": "--batch_size 40",
    "measure.py": "--num_images 20",
    "small_features.py": "--steps 2",
    "evaluate_digits.py": "--num_images 20",
    "generate.py": "--num_images_per_prompt 1",
}
# changes to the models of presets, where nothing is fine-tuned
SMALL_MODELS = {
    "train.py tokenizer": "encoder_dim=32 decoder_dim=32 diffusion_dim=32 attention_head_dim=16 num_encoder_layers=1 "
    "num_decoder_layers=1 diffusion_depth=1 codebook_size=16",
    "train.py ar": "hidden_size=32 intermediate_size=64 num_hidden_layers=1 num_attention_heads=2",
}


class Block(NamedTuple):
    language: str
    code: str
    comment: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return [Block(found["language"], found["code"], found["comment"] or "") for found in BLOCK.finditer(text_of(page))]


def small(line: str) -> list[str]:
    """The words of a command with its settings made small."""
    for name, options in SMALL_MODELS.items():
        if f"{name} " in line and "--init_from" not in line:
            if "--model_overrides" not in line:
                line += " --model_overrides"
            line = line.replace("--model_overrides", f"--model_overrides {options}")
    for name, options in SMALL.items():
        if f"{name} " in line:
            line += f" {options}"
    return shlex.split(line, comments=True)


def run_line(line: str, monkeypatch) -> None:
    """Run one line of bash in this process: a command of this repository, with or without a launcher, or an export."""
    words = small(line)
    if not words:
        return
    if words[0] == "export":
        monkeypatch.setenv(*words[1].split("=", 1))
        return
    assert words[0] in ("python", "accelerate", "torchrun"), f"test_docs.py cannot run {line!r}"
    with fresh_process():
        try:
            if words[1] == "-m":
                monkeypatch.setattr(sys, "argv", words[2:])
                runpy.run_module(words[2], run_name="__main__")
            else:
                (script, *_) = (index for index, word in enumerate(words) if word.endswith(".py"))
                monkeypatch.setattr(sys, "argv", words[script:])
                runpy.run_path(words[script], run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, f"exit code {ended.code}: {line}"


@pytest.fixture
def folder(make_tokenizer, make_transformer, image_sets, tmp_path, monkeypatch):
    """A folder with everything that the pages name."""
    tokenizer, model = make_tokenizer(in_channels=1), make_transformer(num_classes=10)
    pipe = DARPipeline(tokenizer, model, FlowMatchAdamsBashforthScheduler())
    pipe.set_progress_bar_config(disable=True)
    for name in ("path/to/pipeline", "outputs/digits/pipeline", "outputs/digits/distilled", "outputs/dar-l", "DIR"):
        pipe.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "path/to/tokenizer")
    make_text_pipeline(tokenizer).save_pretrained(tmp_path / "path/to/text-pipeline")
    captioned = datasets.load_dataset(
        "parquet", data_files=str(image_sets["parquet"] / "train.parquet"), split="train"
    )
    (tmp_path / "path/to/captioned").mkdir()
    captioned.rename_column("label", "caption").to_parquet(tmp_path / "path/to/captioned/train.parquet")
    (tmp_path / "outputs/emoji").mkdir()
    (tmp_path / "outputs/emoji/data").symlink_to(tmp_path / "path/to/captioned")
    (tmp_path / "path/to/images").symlink_to(image_sets["imagefolder"])
    (tmp_path / "path/to/mnist").mkdir()
    for split in ("train", "test"):
        shutil.copy(image_sets["parquet"] / "train.parquet", tmp_path / f"path/to/mnist/{split}.parquet")
    for index, name in enumerate(("cat.png", "dog.jpg")):
        picture(index, size=(20, 30)).save(tmp_path / name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return pipe


def names_of(page: str, pipe: DARPipeline) -> dict:
    """What a page's Python may use without having made it: the README makes everything itself."""
    if page == "README.md":
        return {}
    codebook_size = pipe.transformer.config.codebook_size
    ids = torch.tensor([[codebook_size + 3, *range(16)]])
    return {"pipe": pipe, "ids": ids, "codebook_size": codebook_size}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_run_in_order(page, folder, monkeypatch):
    names = names_of(page, folder)
    for block in blocks(page):
        if block.comment.startswith(MARK):
            continue
        if block.language == "python":
            exec(compile(block.code, page, "exec"), names)
        else:
            for line in block.code.replace("\\\n", " ").splitlines():
                run_line(line, monkeypatch)
    if page == "README.md":
        check_readme(names)


def check_readme(names: dict) -> None:
    assert len(names["images"]) == 2 and isinstance(names["images"][0], Image.Image)
    steps = names["pipe"].tokenizer.config.num_inference_steps
    assert sorted(path.name for path in Path().glob("step_*.png")) == [f"step_{i}.png" for i in range(1, steps + 1)]
    assert names["model"].config.text_vocab_size > 0
    for name in ("samples.png", "docs/previews.png", "outputs/tokenizer/reconstructions.png"):
        assert Path(name).is_file(), name
    assert DARPipeline.from_pretrained("outputs/pipeline").transformer.config.num_classes == 10


def test_blocks_are_marked_with_a_reason():
    found = {page: blocks(page) for page in PAGES}
    for page, parts in found.items():
        for block in parts:
            if block.comment:
                assert block.comment.startswith(MARK) and len(block.comment) > len(MARK) + 10, (page, block)
        # every mark stands directly above a block
        assert text_of(page).count(f"<!-- {MARK}") == sum(bool(block.comment) for block in parts), page
    tested = [block for parts in found.values() for block in parts if not block.comment]
    assert sum(block.language == "python" for block in tested) >= 5
    assert sum(block.language == "bash" for block in tested) >= 13
    # what needs nothing but this machine is not marked
    for parts in found.values():
        for block in parts:
            assert not (block.comment and re.search(r"train\.py (tokenizer|ar) --preset (digits|mnist)", block.code))


@pytest.mark.parametrize("page", LINKED)
def test_links_and_images_exist(page):
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text_of(page)) if "://" not in target]
    assert targets or page.startswith("model_cards/")
    for target in targets:
        path, _, heading = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}, target


@pytest.mark.parametrize("page", LINKED)
def test_the_files_that_the_text_names_exist(page):
    for name in re.findall(r"(?:examples|benchmarks|src|docs|model_cards|\.ci)/[\w/.-]*\w", text_of(page)):
        if not name.startswith("docs/images/"):
            assert (ROOT / name).exists(), name


def test_the_table_of_commands_is_complete():
    table = re.findall(r"^\| `(\w+\.py)", text_of("examples/README.md"), flags=re.MULTILINE)
    assert set(table) == {path.name for path in (ROOT / "examples").glob("*.py")}
