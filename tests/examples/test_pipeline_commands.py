"""The commands that generate and reconstruct, run on a tiny pipeline."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_helpers import picture, seeded
from tiny_models import make_text_pipeline

from dar_hf.evaluation import draw_swaps, swap_groups

TILE = 48 + 2  # an enlarged 8x8 image and the gap next to it


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path


@pytest.fixture
def run(folder, run_command):
    """Run a command on the pipeline in the folder; returns what it printed."""

    def command(name, *arguments):
        return run_command(name, "--pipeline", folder / "pipeline", *arguments)

    return command


def test_generate(folder, run, tiny_pipeline):
    out = folder / "out"
    run("generate.py", "--output_dir", out, "--class_labels", "shark", "0", "--seed", 5, "--guidance_scale", 1.1, 8)
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "0001.png", "grid.png"]
    expected = tiny_pipeline(["shark", 0], generator=[seeded(5), seeded(6)], guidance_scale=(1.1, 8.0)).images
    for index, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(out / f"{index:04d}.png")), np.asarray(image))
    assert Image.open(out / "grid.png").size == (2 * TILE + 2, TILE + 2)
    run("generate.py", "--output_dir", out, "--class_labels", 0, "--seed", 6, "--guidance_scale", 1.1, 8)
    alone = np.asarray(Image.open(out / "0000.png"))  # what is generated with an image does not matter
    assert np.abs(alone.astype(int) - np.asarray(expected[1]).astype(int)).max() <= 1


def test_generate_shows_every_step(folder, run):
    out = folder / "out"
    options = ("--num_images_per_prompt", 3, "--num_inference_steps", 6, "--timing", "--previews")
    printed = run("generate.py", "--output_dir", out, *options, "strip", "noisy", "gif")
    assert len(list(out.glob("0*.png"))) == 15  # five classes
    assert Image.open(out / "grid.png").size == (3 * TILE + 2, 5 * TILE + 2)  # one row per class
    assert Image.open(out / "previews.png").size == (15 * TILE + 2, 6 * TILE + 2)  # one row per step
    noisy = np.asarray(Image.open(out / "noisy.png"))
    assert noisy.shape[:2] == (12 * TILE + 2, 15 * TILE + 2)  # one row per step, and above each its noisy state
    rows = [noisy[2 + row * TILE : (row + 1) * TILE].astype(int) for row in range(12)]
    strip = np.asarray(Image.open(out / "previews.png"))
    assert all(np.array_equal(rows[2 * i + 1], strip[2 + i * TILE : (i + 1) * TILE]) for i in range(6))
    distances = [np.abs(rows[2 * i] - rows[2 * i + 1]).mean() for i in range(6)]
    assert distances[0] > distances[2] > distances[4] and distances[5] <= 1  # noise becomes the image
    assert Image.open(out / "previews.gif").n_frames == 6
    report = json.loads(printed.splitlines()[-1])
    assert 0 < report["first_preview_seconds"] < report["whole_call_seconds"]


@pytest.mark.parametrize(
    "options, call",
    [
        (("--layout_image", "--layout_tokens", 5), {"layout_tokens": 5}),
        (("--image", "--strength", 0.5), {"strength": 0.5}),
    ],
)
def test_generate_from_an_image(folder, run, tiny_pipeline, options, call):
    picture(size=(20, 30)).save(folder / "given.png")
    out = folder / "out"
    run("generate.py", "--output_dir", out, options[0], folder / "given.png", *options[1:])
    call[options[0].strip("-")] = picture(size=(20, 30))
    expected = tiny_pipeline(list(range(5)), generator=[seeded(i) for i in range(5)], **call).images
    for index, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(out / f"{index:04d}.png")), np.asarray(image))
    assert Image.open(out / "grid.png").size == (5 * TILE + 2, 2 * TILE + 2)  # the given image above the others


def test_generate_from_text(tiny_tokenizer, tmp_path, run_command, refusal, folder):
    pipe = make_text_pipeline(tiny_tokenizer)
    pipe.save_pretrained(tmp_path / "text")
    out = tmp_path / "out"
    options = ("--pipeline", tmp_path / "text", "--output_dir", out, "--guidance_scale", 2)
    run_command("generate.py", *options, "--prompt", "noto red apple", "猫", "--negative_prompt", "book")
    generators = [seeded(i) for i in range(2)]
    prompts = ["noto red apple", "猫"]
    images = pipe(prompt=prompts, negative_prompt="book", guidance_scale=2.0, generator=generators).images
    for index, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(out / f"{index:04d}.png")), np.asarray(image))
    assert "draws from text" in refusal(run_command, "generate.py", *options)
    assert "draws from text" in refusal(run_command, "generate.py", *options, "--class_labels", 0)
    said = refusal(
        run_command, "generate.py", "--pipeline", folder / "pipeline", "--prompt", "red", "--output_dir", out
    )
    assert "draws from class labels" in said


def test_generate_refuses(folder, run, refusal):
    assert "unknown class name 'whale'" in refusal(run, "generate.py", "--class_labels", "whale")
    picture().save(folder / "given.png")
    lonely = refusal(run, "generate.py", "--layout_image", folder / "given.png")
    assert "layout_image and layout_tokens go together" in lonely
    assert "No such file" in refusal(run, "generate.py", "--image", folder / "no.png", "--strength", 1)


@pytest.mark.parametrize("options, rows", [((), 2), (("--previews",), 5), (("--num_tokens", 8, "--previews"), 3)])
def test_reconstruct(folder, run, tiny_pipeline, options, rows):
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    files = [folder / f"{seed}.png" for seed in range(3)]
    printed = run("reconstruct.py", "--images", *files, "--output", folder / "out.png", *options)
    assert Image.open(folder / "out.png").size == (3 * TILE + 2, rows * TILE + 2)
    top = np.asarray(Image.open(folder / "out.png"))[2 : 2 + 48 : 6, 2 : 2 + 48 : 6]
    assert np.array_equal(top, np.asarray(picture(0)))
    figures = [float(figure) for figure in printed.splitlines()[0].split(": ")[1].split(", ")]
    images = [picture(seed) for seed in range(3)]
    count = options[1] if "--num_tokens" in options else None
    result = tiny_pipeline.reconstruct(images, generator=seeded(), num_tokens=count, output_type="pt").images
    inputs = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])
    error = (result - inputs).square().mean(dim=(1, 2, 3))
    assert figures[-1] == pytest.approx(float(-10 * error.log10().mean()), abs=0.01)
    assert len(figures) == (2 if count else 4)


def test_reconstruct_a_data_set(folder, run, refusal):
    (folder / "images").mkdir()
    for seed in range(4):
        picture(seed, size=(12, 20)).save(folder / "images" / f"{seed}.png")
    options = ("--dataset_name", folder / "images", "--num_images", 3, "--output", folder / "out.png")
    run("reconstruct.py", *options)
    assert Image.open(folder / "out.png").size == (3 * TILE + 2, 2 * TILE + 2)
    assert "image size 16x16" in refusal(run, "reconstruct.py", *options, "--height", 16, "--width", 16)
    assert "--num_images must be at least 1" in refusal(run, "reconstruct.py", *options, "--num_images", 0)


DAMAGED_EXIF = b"Exif\0\0\x00\x08\x00\x02\x01\x12\x00\x03"


def test_commands_read_images_as_the_pipeline_does(folder, run, tiny_pipeline):
    """A transparent image, a damaged EXIF block and a photograph on its side, from files and in memory."""
    logo = picture(size=(20, 30)).convert("RGBA")
    logo.putalpha(Image.linear_gradient("L").resize(logo.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    logo.save(folder / "0.png")
    picture(1, size=(30, 20)).save(folder / "1.png", exif=DAMAGED_EXIF)
    picture(2, size=(20, 30)).save(folder / "2.jpg", exif=exif)
    for name in ("0.png", "1.png", "2.jpg"):
        image, options = Image.open(folder / name), ("--seed", 3, "--class_labels", 1)
        run("generate.py", "--image", folder / name, "--strength", 0.5, "--output_dir", folder / "out", *options)
        expected = tiny_pipeline(1, image=image, strength=0.5, generator=[seeded(3)]).images[0]
        assert np.array_equal(np.asarray(Image.open(folder / "out" / "0000.png")), np.asarray(expected))
        printed = run("reconstruct.py", "--images", folder / name, "--output", folder / "out.png")
        result = tiny_pipeline.reconstruct(image, generator=seeded(), output_type="pt").images * 2 - 1
        error = (result - tiny_pipeline.prepare_images("image", image)).square().mean() / 4
        assert printed.splitlines()[0].endswith(f"{float(-10 * error.log10()):.2f}")


def test_a_data_set_is_reconstructed_without_what_cannot_be_read(folder, run, refusal):
    (folder / "images").mkdir()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(folder / "images" / "0.tiff")
    options = ("--dataset_name", folder / "images", "--num_images", 3, "--output", folder / "out.png")
    assert "none of the 1 images" in refusal(run, "reconstruct.py", *options)
    picture().save(folder / "images" / "1.png", exif=DAMAGED_EXIF)
    run("reconstruct.py", *options)
    assert Image.open(folder / "out.png").size == (TILE + 2, 2 * TILE + 2)
    assert "0.tiff: an image must have pixels" in refusal(
        run, "reconstruct.py", "--images", folder / "images" / "0.tiff"
    )


def effects_of(printed):
    """The table of `explain.py`: group, codes, and both effects in percent."""
    lines = [line.split() for line in printed.splitlines()[1:-1]]
    return [(int(group), codes, float(one.strip("%")), float(all_.strip("%"))) for group, codes, one, all_ in lines]


def test_explain(folder, run, tiny_pipeline):
    files = [folder / f"{seed}.png" for seed in range(2)]
    picture(size=(12, 20)).save(files[0])
    Image.new("RGB", (8, 8), "white").save(files[1])
    out = folder / "out.png"
    printed = run("explain.py", "--images", *files, "--output", out, "--seed", 3)
    images = [Image.open(path) for path in files]
    *_, expected = swap_groups(tiny_pipeline, *images, generator=seeded(3))
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(draw_swaps(expected)))
    table = effects_of(printed)
    assert [row[:2] for row in table] == [(1, "1-4"), (2, "5-8"), (3, "9-12"), (4, "13-16")]
    assert [row[2] for row in table] == pytest.approx([100 * effect for effect in expected.effects()], abs=0.01)
    assert [row[3] for row in table] == pytest.approx([100 * e for e in expected.leading_effects()], abs=0.01)
    assert table[0][2] == table[0][3] > 0
    printed = run("explain.py", "--images", files[0], files[0], "--output", out)
    assert [row[2:] for row in effects_of(printed)] == [(0.0, 0.0)] * 4


def test_explain_a_data_set(folder, run, refusal):
    (folder / "images").mkdir()
    for index in range(6):  # three images, each twice
        image = (picture(), Image.new("RGB", (8, 8), "white"), picture(2))[index // 2]
        image.save(folder / "images" / f"{index}.png")
    options = ("--dataset_name", folder / "images", "--output", folder / "out.png", "--num_images")
    mean = effects_of(run("explain.py", *options, 3))  # from all over the set, so these three
    pairs = []
    for seed, pair in enumerate(([0, 2], [2, 4], [4, 0])):
        files = [folder / "images" / f"{index}.png" for index in pair]
        output = folder / f"{seed}.png"
        pairs.append(effects_of(run("explain.py", "--images", *files, "--output", output, "--seed", seed)))
    for row, rows in zip(mean, zip(*pairs, strict=True), strict=True):
        assert row[2:] == pytest.approx(np.mean([row[2:] for row in rows], axis=0), abs=0.011)
    assert (folder / "out.png").read_bytes() == (folder / "0.png").read_bytes()
    assert "two images are needed" in refusal(run, "explain.py", *options, 1)
    assert "expected 2 arguments" in refusal(run, "explain.py", "--images", folder / "0.png")
