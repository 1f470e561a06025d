"""The README does what it says: its Python runs as written, from top to bottom, and its pictures and links exist."""

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)

# what a block contains that cannot run here, and why
NOT_RUN = {"push_to_hub(": "uploads to the Hub; tests/hub does so to one of its own"}


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict = {}
    for block in BLOCKS:
        if not any(part in block for part in NOT_RUN):
            exec(compile(block, "README.md", "exec"), names)
    assert len(names["images"]) == 3 and isinstance(names["images"][0], Image.Image)
    steps = names["pipe"].tokenizer.config.num_inference_steps
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step}.png" for step in range(1, steps + 1)]
    assert names["model"].config.num_classes == 10


def test_what_is_not_run_is_one_block_each():
    assert len(BLOCKS) >= 5
    assert {part: sum(part in block for block in BLOCKS) for part in NOT_RUN} == dict.fromkeys(NOT_RUN, 1)


@pytest.mark.parametrize("file", ["README.md", "examples/README.md"])
def test_links_and_pictures_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert targets
    for target in targets:
        path, _, heading = target.partition("#")
        found = (ROOT / file).parent / path if path else ROOT / file
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}, target
