"""Grids of images and loss curves."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dar_hf.utils.pictures import (
    MIN_TILE,
    Row,
    draw_curves,
    heat,
    image_grid,
    interleave_rows,
    labelled_grid,
    plot_history,
    read_history,
    save_animation,
    save_picture,
)

# Grids


def test_tiles_lie_row_by_row_on_white():
    values = torch.linspace(-1, 1, 5)
    images = values[:, None, None, None].expand(5, 3, 50, 60)
    grid = np.asarray(image_grid(images, columns=3, gap=2))
    assert grid.shape == (2 * 52 + 2, 3 * 62 + 2, 3)
    expected = np.full_like(grid, 255)
    for index, level in enumerate((0, 64, 128, 191, 255)):
        top, left = 2 + index // 3 * 52, 2 + index % 3 * 62
        expected[top : top + 50, left : left + 60] = level
    assert np.array_equal(grid, expected)


def test_channels_keep_their_order():
    image = torch.stack([torch.full((64, 64), v) for v in (-1.0, 0.2, 1.0)])[None]
    assert np.asarray(image_grid(image, 1))[30, 30].tolist() == [0, 153, 255]


def test_small_images_are_enlarged_pixel_by_pixel():
    image = torch.rand(1, 3, 8, 10) * 2 - 1
    scale = -(-MIN_TILE // 8)
    grid = np.asarray(image_grid(image, 1, gap=0))
    expected = ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(grid, np.kron(expected, np.ones((scale, scale, 1), dtype=np.uint8)))


def test_large_images_keep_their_size():
    assert image_grid(torch.zeros(1, 3, 96, 64), 1, gap=0).size == (64, 96)


def test_grey_images_and_values_out_of_range():
    grid = np.asarray(image_grid(torch.tensor([-3.0, 3.0])[:, None, None, None].expand(2, 1, 64, 64), 2, gap=0))
    assert grid.shape == (64, 128, 3) and (grid[:, :64] == 0).all() and (grid[:, 64:] == 255).all()


def test_rows_are_put_above_each_other():
    above, below = torch.arange(5), torch.arange(10, 15)
    assert interleave_rows(above, below, columns=2).tolist() == [0, 1, 10, 11, 2, 3, 12, 13, 4, 14]


# Grids with text


def colour(*values):
    """An image of one colour; large ones are shown as they are."""
    return torch.tensor(values)[:, None, None].expand(-1, 50, 60)


def test_rows_have_labels_on_their_left_and_captions_above_their_images():
    red, blue = colour(1.0, -1.0, -1.0), colour(-1.0, -1.0, 1.0)
    grid = np.asarray(labelled_grid([Row("one\nrow", [red, None, blue], ["first"]), Row("", [None, blue])])).astype(
        int
    )
    places = {}
    for name, pixel in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        rows, columns = np.nonzero((grid == pixel).all(axis=2))
        places[name] = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        assert len(rows) == 50 * 60 * {"red": 1, "blue": 2}[name]
    top, bottom, left, right = places["red"]
    assert (bottom - top, right - left) == (50, 60)
    assert places["blue"][0] == top and places["blue"][1] > bottom + 50 and places["blue"][2] > right
    black = (grid == 0).all(axis=2)
    assert black[top:bottom, :left].any() and black[:top, left:right].any()  # its label and its caption
    black[:bottom, :right] = False
    assert not black.any()


def test_captions_wider_than_images_do_not_overlap():
    narrow = torch.zeros(1, 50, 50)
    plain = labelled_grid([Row("", [narrow, narrow])])
    wide = labelled_grid([Row("", [narrow, narrow], ["a caption wider than its image", ""])])
    assert wide.width > 2 * plain.width and wide.height == plain.height


def test_heat_goes_from_black_over_red_and_yellow_to_white():
    colours = heat(torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0, 2.0]]))
    expected = [[-1, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1], [1, 1, 1]]
    assert torch.allclose(colours[:, 0].T, torch.tensor(expected, dtype=torch.float32), atol=1e-6)
    assert heat(torch.zeros(4, 6, 7)).shape == (4, 3, 6, 7)


def test_save_picture(tmp_path):
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    save_picture(picture, tmp_path / "new" / "a.png")
    loaded = Image.open(tmp_path / "new" / "a.png")
    assert np.array_equal(np.asarray(loaded), np.asarray(picture))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_save_animation(tmp_path):
    frames = [Image.new("RGB", (3, 2), (value, 0, 0)) for value in (0, 100, 200)]
    save_animation(frames, tmp_path / "new" / "a.gif", milliseconds=50)
    loaded = Image.open(tmp_path / "new" / "a.gif")
    shown = []
    for index in range(loaded.n_frames):
        loaded.seek(index)
        shown.append((loaded.convert("RGB").getpixel((1, 1)), loaded.info["duration"]))
    assert shown == [((0, 0, 0), 50), ((100, 0, 0), 50), ((200, 0, 0), 200)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.gif"]


# Histories


def losses(steps, start=1.0):
    return [{"step": s, "loss/total": start / s, "loss/flow": start / s, "lr": 0.1} for s in steps]


def test_read_history(tmp_path):
    lines = losses(range(1, 4))
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(tmp_path / "h.jsonl") == lines
    assert read_history(tmp_path / "nothing.jsonl") == []


def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "h.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/to')
    assert read_history(tmp_path / "h.jsonl") == [{"step": 1, "loss/total": 2.0}]


def coloured_pixels(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.ptp(pixels, axis=2) > 40).sum())


@pytest.fixture(autouse=True)
def needs_matplotlib():
    pytest.importorskip("matplotlib")


def test_plot_is_written_with_curves(tmp_path):
    assert plot_history({"tokenizer": losses(range(1, 60))}, tmp_path / "plots" / "loss.png")
    assert coloured_pixels(tmp_path / "plots" / "loss.png") > 100
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]


def test_one_panel_a_run(tmp_path):
    plot_history({"one": losses([1, 2])}, tmp_path / "one.png")
    plot_history({"one": losses([1, 2]), "two": losses([1, 2, 3])}, tmp_path / "two.png")
    assert Image.open(tmp_path / "two.png").width == 2 * Image.open(tmp_path / "one.png").width


@pytest.mark.parametrize("history", [[], losses([1]), [{"step": 5, "validation/psnr": 10.0}]])
def test_short_histories_are_no_error(tmp_path, history):
    assert plot_history({"run": history}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").is_file()


def test_curves_are_drawn_when_a_validation_came_first(tmp_path):
    history = [{"step": 1, "validation/psnr": 10.0}, *losses(range(2, 60))]
    plot_history({"run": history}, tmp_path / "loss.png")
    assert coloured_pixels(tmp_path / "loss.png") > 100


def test_terms_that_are_zero_at_first_are_drawn_later(tmp_path):
    history = [line | {"loss/commitment": 0.0 if line["step"] < 5 else 0.1} for line in losses(range(1, 20))]
    assert plot_history({"run": history}, tmp_path / "loss.png")


# Curves


def test_curves_are_drawn_from_zero_or_as_they_are(tmp_path):
    path = tmp_path / "new" / "curves.png"
    assert draw_curves({"a": [(4, 2.0), (8, 1.0)], "b": [(4, 3.0)]}, path, xlabel="x", ylabel="y", title="t")
    assert Image.open(path).size == (600, 400)
    other = tmp_path / "other.png"
    assert draw_curves({"a": [(4, 2.0), (8, 1.5)], "b": [(4, 3.0)]}, other, xlabel="x", ylabel="y", title="t")
    assert path.read_bytes() != other.read_bytes()
    labels = {"xlabel": "x", "ylabel": "y", "title": "t"}
    assert draw_curves({"a": [(4, 2.0), (8, 1.5)], "b": [(4, 3.0)]}, path, from_zero=False, **labels)
    assert path.read_bytes() != other.read_bytes()
    assert draw_curves({}, other, xlabel="x", ylabel="y", title="t")  # nothing to draw is no error
