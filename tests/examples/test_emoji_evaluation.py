"""The judge of emoji and what it says of a pipeline: right drawings, styles, copies, and every preview."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import make_text_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
STYLES = ["noto", "fluent", "twemoji"]


def drawing(index):
    """A coloured bar on white, at a place and in a colour of its own."""
    pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
    pixels[index % 14 : index % 14 + 3, :, index % 3] = 40 * (index % 5)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Folder of a data set such as emoji_dataset.py makes."""
    folder = tmp_path_factory.mktemp("emoji")
    features = {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "name": datasets.Value("string"),
        "style": datasets.ClassLabel(names=STYLES),
    }
    # each name in three styles, one of which is held out for every third name
    held_out = [index for index in range(36) if index // 3 % 3 == 0 and index % 3 == index // 9 % 3]
    for split, rows in (("train", [index for index in range(36) if index not in held_out]), ("validation", held_out)):
        columns = {
            "image": [drawing(index) for index in rows],
            "caption": [f"{STYLES[index % 3]} bar {index // 3}" for index in rows],
            "name": [f"bar {index // 3}" for index in rows],
            "style": [index % 3 for index in rows],
        }
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(
            folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture
def scripts(monkeypatch):
    """evaluate_emoji.py imports its neighbour."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("emoji_judge", "evaluate_emoji"):
        sys.modules.pop(name, None)


def test_a_drawing_is_nearest_to_itself_and_ranks_count_nearer_ones(scripts):
    from emoji_judge import ranks

    drawings = torch.eye(3)
    assert ranks(drawings, drawings).tolist() == [0, 0, 0]
    assert ranks(torch.tensor([[0.5, 0.4, 0.9]]).expand(3, -1), drawings).tolist() == [1, 2, 0]


def test_a_judge_learns_which_drawings_are_the_same_and_their_styles(scripts, run_command, drawings, tmp_path):
    said = run_command("emoji_judge.py", "--dataset_name", drawings, "--output_dir", tmp_path, "--steps", 60)
    found, right = re.search(r"found among 4: (\S+), styles right: (\S+)", said).groups()
    assert float(found) >= 0.7 and float(right) >= 0.7
    from emoji_judge import Judge, load

    judge = load(tmp_path)
    assert type(judge) is Judge and not judge.training
    embeddings, styles = judge.judge(torch.rand(5, 3, 40, 40) * 2 - 1)
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(5)) and styles.shape == (5,)


def test_what_is_no_judge_is_refused(scripts, tmp_path):
    from emoji_judge import load

    save_file({"style.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no judge. Train it by"):
        load(tmp_path)


def test_the_least_guidance_with_the_most_right_drawings_and_styles_is_chosen(scripts, monkeypatch):
    import evaluate_emoji

    found = {
        1.0: {"top1": 0.2, "style": 0.0, "style_of_name": 0.9},
        2.0: {"top1": 0.4, "style": 0.0, "style_of_name": 0.8},
        3.0: {"top1": 0.5, "style": 1.0, "style_of_name": 0.6},
        4.0: {"top1": 0.4, "style": 0.8},
    }
    monkeypatch.setattr(evaluate_emoji, "generate", lambda pipe, captions, scale, seed: [(1, scale)])
    drawings = SimpleNamespace(split=SimpleNamespace(captions=[]), compare=lambda scale: (found[scale], 0.0))
    assert evaluate_emoji.choose_scale(None, drawings, list(found), seed=0) == 2.0


def test_a_style_is_told_by_the_drawings_of_the_same_name(scripts):
    from emoji_judge import Split
    from evaluate_emoji import RealDrawings, see

    names = ["cat", "cat", "cat", "dog"]
    real = Split(torch.eye(4), torch.tensor([0, 1, 2, 0]), [f"a {name}" for name in names], names)
    judge = SimpleNamespace(judge=lambda images: (images, torch.zeros(len(images), dtype=torch.long)))
    drawings = RealDrawings(judge, real.take(torch.tensor([0, 1, 3])), see(judge, real))
    assert drawings.rivals.tolist() == [[False, True, True, False], [True, False, True, False], [False] * 4]
    # the first is nearest to a drawing of another name, the second to one of its own name in another style
    found, _ = drawings.compare(torch.tensor([[0.3, 0.2, 0.1, 0.9], [0.1, 0.2, 0.3, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    assert found["style_of_name"] == 0.5 and found["top1"] == pytest.approx(2 / 3)


def test_an_evaluation_says_what_is_drawn_and_chooses_the_guidance(
    scripts, run_command, drawings, make_tokenizer, tmp_path
):
    run_command("emoji_judge.py", "--dataset_name", drawings, "--output_dir", tmp_path / "judge", "--steps", 1)
    pipe = make_text_pipeline(make_tokenizer())
    pipe.save_pretrained(tmp_path / "pipeline")
    options = ["--pipeline", tmp_path / "pipeline", "--dataset_name", drawings, "--judge", tmp_path / "judge"]
    said = run_command(
        "evaluate_emoji.py", *options, "--num_captions", 6, "--guidance_scale", 1, 3, "--output_dir", tmp_path / "out"
    )
    assert "guidance 1: top1 " in said and "guidance 3: top1 " in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    groups = pipe.tokenizer.config.num_groups
    by_name = {}
    for entry in report["metrics"]:
        by_name.setdefault(entry["name"], []).append(entry["value"])
    assert report["settings"]["guidance_scale"] in (1.0, 3.0) and report["settings"]["training_captions"] == 6
    for split in ("training", "validation"):
        assert len(by_name[f"right drawing is the nearest ({split} captions)"]) == groups
        (*_, style) = by_name[f"right style is the nearest of three ({split} captions)"]
        assert 0 <= style <= 1
        assert len(by_name[f"Fréchet distance × 100 ({split} captions)"]) == groups
    copied = by_name["pixels' distance to the nearest training drawing, real (validation captions)"]
    assert copied[0] > 0
    assert all((tmp_path / "out" / name).stat().st_size > 0 for name in ("samples.png", "preview_strip.png"))
