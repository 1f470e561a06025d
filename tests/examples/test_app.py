"""The page without a browser: its checks, what its buttons do, and a server that visitors use and leave."""

import base64
import gc
import io
import math
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dar_hf.evaluation import draw_swaps, swap_groups

gr = pytest.importorskip("gradio")
from pipeline_helpers import picture, seeded, tensor_of  # noqa: E402
from tiny_models import make_text_pipeline  # noqa: E402

APP = Path(__file__).parents[2] / "examples" / "app.py"
SHARED = (2.0, 7, False, 0.0)  # guidance, seed, another seed each time, pause


@pytest.fixture
def artist(app, tiny_pipeline):
    return app.Artist(tiny_pipeline)


def saved(path, image, **options):
    image.save(path, **options)
    return str(path)


def png_of_size(width, height):
    """A small file that says how large a picture it is, and holds no pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


# Uploads


def test_an_upload_is_cut_and_scaled(app, tmp_path):
    path = saved(tmp_path / "wide.png", picture(size=(16, 40)))
    image, remark = app.read_upload(path, 8, 8, 3)
    middle = picture(size=(16, 40)).crop((12, 0, 28, 16))
    assert remark == "" and np.array_equal(np.asarray(image), np.asarray(middle.resize((8, 8), Image.Resampling.BOX)))
    grey, _ = app.read_upload(path, 8, 8, 1)
    assert grey.mode == "L" and grey.size == (8, 8)
    tall, _ = app.read_upload(path, 16, 8, 3)
    assert tall.size == (8, 16)


def test_what_a_model_drew_comes_back_unchanged(app, tmp_path):
    image, _ = app.read_upload(saved(tmp_path / "a.png", picture()), 8, 8, 3)
    assert np.array_equal(np.asarray(image), np.asarray(picture()))


@pytest.mark.parametrize("size", [(16_384, 4), (4, 16_384)])
def test_long_thin_uploads_are_not_enlarged_whole(app, tmp_path, size):
    image, _ = app.read_upload(saved(tmp_path / "a.png", Image.new("L", size, 200)), 256, 256, 3)
    assert image.size == (256, 256) and np.all(np.asarray(image) == 200)


def test_an_animation_gives_its_first_frame(app, tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    image, remark = app.read_upload(path, 8, 8, 3)
    assert remark == "the first frame of an animation" and image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(8, 8), (8, 16)])
def test_photographs_stand_upright(app, tmp_path, shape):
    upright = Image.new("L", (40, 20))
    upright.paste(255, (0, 0, 20, 20))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    path = saved(tmp_path / "a.jpg", upright.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=100)
    image, _ = app.read_upload(path, *shape, 1)
    assert image.size == shape[::-1]
    assert np.asarray(image)[:, :2].min() > 200 and np.asarray(image)[:, -2:].max() < 50


def test_transparency_and_16_bits(app, tmp_path):
    image, _ = app.read_upload(saved(tmp_path / "a.png", Image.new("RGBA", (9, 9), (0, 0, 0, 0))), 8, 8, 3)
    assert image.getpixel((4, 4)) == (255, 255, 255)
    deep = Image.fromarray(np.full((9, 9), 0x8000, dtype=np.uint16))
    image, _ = app.read_upload(saved(tmp_path / "b.png", deep), 8, 8, 1)
    assert image.getpixel((4, 4)) == 128


def _truncated():
    buffer = io.BytesIO()
    picture(size=(64, 64)).save(buffer, "PNG")
    return buffer.getvalue()[:4000]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no picture"),
        (b"not a picture at all", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),  # would start another program
        (_truncated(), "no picture"),
        (png_of_size(8, 8), "no picture"),  # no pixels
        (png_of_size(3, 300), "too small: 3x300 pixels"),
        (png_of_size(20_000, 10), "too large"),
        (png_of_size(8_000, 8_000), "too large"),
        (png_of_size(60_000, 60_000), "too large"),  # pillow itself refuses this one
    ],
    ids=["empty", "text", "svg", "postscript", "cut off", "header only", "tiny", "long", "huge", "bomb"],
)
def test_bad_uploads(app, tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        app.read_upload(str(tmp_path / "a.png"), 8, 8, 3)


def test_no_upload(app, tmp_path):
    with pytest.raises(ValueError, match="Choose a picture first"):
        app.read_upload(None, 8, 8, 3)
    with pytest.raises(ValueError, match="no picture"):
        app.read_upload(str(tmp_path / "gone.png"), 8, 8, 3)


# Numbers


@pytest.mark.parametrize("value", [None, "3", True, [], math.nan, math.inf, -math.inf, -1, 11, 1e300, 10**400, 2.5])
def test_absurd_numbers(app, value):
    with pytest.raises(ValueError, match="Seed must be a whole number from 0 to 10"):
        app.number("Seed", value, 0, 10)


def test_numbers(app):
    assert app.number("Seed", 3.0, 0, 10) == 3 and isinstance(app.number("Seed", 3.0, 0, 10), int)
    assert app.number("Guidance", 2.5, 1.0, 10.0) == 2.5


# What the buttons do


def finals(shown):
    """The last (HTML, seed, picture) of a handler."""
    return list(shown)[-1]


def test_a_drawing_is_what_the_pipeline_streams(app, artist, tiny_pipeline):
    steps = list(artist.steps(class_labels=[2], generator=[seeded(7)], guidance_scale=2.0))
    codes = tiny_pipeline(2, generator=seeded(7), guidance_scale=2.0, output_type="codes").images
    expected = list(tiny_pipeline.stream(2, generator=[seeded(7)], guidance_scale=2.0, output_type="pt"))
    assert [step.codes for step in steps] == [codes[0, :n].tolist() for n in (4, 8, 12, 16)]
    assert all(torch.equal(step.images, output.images) for step, output in zip(steps, expected, strict=True))
    outputs = list(app.handler(app.draw, artist)(*SHARED, 2, 16))
    assert [output[1] for output in outputs] == [7] * 4
    assert outputs[-1][2].tobytes() == tiny_pipeline(2, generator=seeded(7), guidance_scale=2.0).images[0].tobytes()
    for index, (html, _, _) in enumerate(outputs):
        assert html.count("<li><img") == index + 1 and html.count('<li><span class="blank">') == 3 - index
        assert f"shark · step {index + 1} of 4 · {4 * (index + 1)} of 16 tokens" in html
        assert all(f"<span>{code}</span>" in html for code in steps[index].codes)


def test_fewer_tokens_end_early(app, artist):
    outputs = list(app.handler(app.draw, artist)(*SHARED, 1, 8))
    assert len(outputs) == 2 and isinstance(outputs[-1][2], Image.Image)


def test_another_seed_each_time(app, artist):
    draw = app.handler(app.draw, artist)
    seeds = {finals(draw(2.0, 7, True, 0.0, 1, 4))[1] for _ in range(3)}
    assert len(seeds) == 3 and all(0 <= seed <= app.MAX_SEED for seed in seeds)


def test_guidance_keeps_the_start_of_a_linear_scale(app, tiny_pipeline):
    tiny_pipeline.transformer.generation_config.guidance_scale = (1.1, 8.0)
    artist = app.Artist(tiny_pipeline)
    assert artist.guidance == 8.0 and artist.scale(5.0) == (1.1, 5.0)


def test_layout(app, artist, tiny_pipeline, tmp_path):
    path = saved(tmp_path / "a.png", picture())
    outputs = list(app.handler(app.lay_out, artist)(*SHARED, path, 5, [3, 1]))
    generators = [seeded(7), seeded(8)]
    call = {"layout_image": picture(), "layout_tokens": 5, "guidance_scale": 2.0}
    expected = tiny_pipeline([3, 1], generator=generators, **call).images
    assert outputs[-1][2].tobytes() == expected[0].tobytes()
    assert "ray, goldfish: 5 tokens of the reference" in outputs[-1][0] and "reference</figcaption>" in outputs[-1][0]


@pytest.mark.parametrize("classes", [None, [], [0] * 11, "shark", [99], [0.5]])
def test_layout_refuses_odd_classes(app, artist, tmp_path, classes):
    path = saved(tmp_path / "a.png", picture())
    with pytest.raises(gr.Error, match="class"):
        finals(app.handler(app.lay_out, artist)(*SHARED, path, 5, classes))


def test_image_to_image(app, artist, tiny_pipeline, tmp_path):
    path = saved(tmp_path / "a.png", picture())
    outputs = list(app.handler(app.vary, artist)(*SHARED, path, 1, 0.5))
    expected = tiny_pipeline(1, image=picture(), strength=0.5, generator=seeded(7), guidance_scale=2.0).images[0]
    assert len(outputs) == 2 and outputs[-1][2].tobytes() == expected.tobytes()


def test_reconstruct(app, artist, tiny_pipeline, tmp_path):
    outputs = list(app.handler(app.reconstruct, artist)(*SHARED, saved(tmp_path / "a.png", picture())))
    expected = tiny_pipeline.reconstruct(picture(), generator=seeded(7), output_type="pt").images
    assert len(outputs) == 4
    assert np.array_equal(np.asarray(outputs[-1][2]), (expected[0] * 255).round().byte().permute(1, 2, 0).numpy())
    error = (expected - (tensor_of(picture()) / 2 + 0.5)).square().mean()
    assert f"{-10 * math.log10(error):.1f} dB" in outputs[-1][0]


def test_explain(app, artist, tiny_pipeline, tmp_path):
    images = (picture(size=(12, 20)), Image.new("RGB", (8, 8), "white"))
    paths = [saved(tmp_path / f"{index}.png", image) for index, image in enumerate(images)]
    outputs = list(app.handler(app.explain, artist)(*SHARED, *paths))
    expected = list(swap_groups(tiny_pipeline, *images, generator=seeded(7)))
    assert len(outputs) == 4 and {seed for _, seed, _ in outputs} == {7}
    for index, (html, _, _) in enumerate(outputs):
        shown = html.partition("base64,")[2].partition('"')[0]
        image = Image.open(io.BytesIO(base64.b64decode(shown)))
        assert np.array_equal(np.asarray(image), np.asarray(draw_swaps(expected[index])))
        assert f"step {index + 1} of 4" in html
    for group, effect in enumerate(expected[-1].effects()):
        assert f"group {group + 1} (tokens {4 * group + 1} to {4 * group + 4}): {effect:.1%}" in outputs[-1][0]


def test_exchanging_groups_takes_turns_with_drawing(app, artist, tmp_path):
    path = saved(tmp_path / "a.png", picture())
    shown = app.handler(app.explain, artist)(*SHARED, path, path)
    next(shown)
    assert not artist._turn.locked() and len(list(app.handler(app.draw, artist)(*SHARED, 0, 16))) == 4
    assert len(list(shown)) == 3


def test_names_are_text_and_not_html(app, artist):
    artist.names[0] = "<script>alert(1)</script>"
    html = finals(app.handler(app.draw, artist)(*SHARED, 0, 4))[0]
    assert "<script>" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize(
    "shared, inputs, message",
    [
        ((math.nan, 7, False, 0.0), (0, 16), "Guidance must be"),
        ((1e9, 7, False, 0.0), (0, 16), "Guidance must be"),
        ((2.0, -1, False, 0.0), (0, 16), "Seed must be"),
        ((2.0, 10**30, False, 0.0), (0, 16), "Seed must be"),
        ((2.0, None, False, 0.0), (0, 16), "Seed must be"),
        ((2.0, 7, False, 1e6), (0, 16), "Seconds between previews must be"),
        (SHARED, (0, 0), "Tokens must be"),
        (SHARED, (0, 10**9), "Tokens must be"),
        (SHARED, (5, 16), "class must be"),
        (SHARED, (None, 16), "Choose a class first"),
    ],
)
def test_absurd_input_becomes_a_message(app, artist, shared, inputs, message):
    draw = app.handler(app.draw, artist)
    with pytest.raises(gr.Error, match=message):
        list(draw(*shared, *inputs))
    assert len(list(draw(*SHARED, 0, 16))) == 4  # and the next one works


# Of a pipeline that draws from text


@pytest.fixture
def text_artist(app, tiny_tokenizer):
    return app.Artist(make_text_pipeline(tiny_tokenizer))


def test_a_drawing_from_text(app, text_artist):
    outputs = list(app.handler(app.draw, text_artist)(*SHARED, "", "a <b>red</b>\n apple", 16))
    call = {"prompt": "a <b>red</b> apple", "guidance_scale": 2.0}
    expected = list(text_artist.pipe.stream(**call, generator=seeded(7), output_type="pil"))
    assert len(outputs) == 4 and outputs[-1][2].tobytes() == expected[-1].images[0].tobytes()
    for index, (html, seed, _) in enumerate(outputs):
        assert seed == 7 and f"a &lt;b&gt;red&lt;/b&gt; apple · step {index + 1} of 4" in html and "<b>" not in html


def test_a_negative_prompt(app, text_artist):
    plain, away = (
        finals(app.handler(app.draw, text_artist)(*SHARED, negative, "apple", 16))[2] for negative in ("", "book")
    )
    call = {"prompt": "apple", "negative_prompt": "book", "guidance_scale": 2.0}
    expected = text_artist.pipe(**call, generator=seeded(7)).images[0]
    assert away.tobytes() == expected.tobytes() != plain.tobytes()


def test_texts_with_images(app, text_artist, tmp_path):
    path = saved(tmp_path / "a.png", picture())
    call = {"generator": [seeded(7), seeded(8)], "guidance_scale": 2.0}
    outputs = list(app.handler(app.lay_out, text_artist)(*SHARED, "", path, 5, "red apple, big\n\n green book\n"))
    layout = {"prompt": ["red apple, big", "green book"], "layout_image": picture(), "layout_tokens": 5}
    expected = text_artist.pipe(**layout, **call).images
    assert outputs[-1][2].tobytes() == expected[0].tobytes()
    assert "red apple, big, green book: 5 tokens of the reference" in outputs[-1][0]
    outputs = list(app.handler(app.vary, text_artist)(*SHARED, "", path, "red apple", 0.5))
    call["generator"] = seeded(7)
    expected = text_artist.pipe(prompt="red apple", image=picture(), strength=0.5, **call).images
    assert len(outputs) == 2 and outputs[-1][2].tobytes() == expected[0].tobytes()
    outputs = list(app.handler(app.reconstruct, text_artist)(*SHARED, "", path))
    expected = text_artist.pipe.reconstruct(picture(), generator=seeded(7)).images
    assert len(outputs) == 4 and outputs[-1][2].tobytes() == expected[0].tobytes()
    assert len(list(app.handler(app.explain, text_artist)(*SHARED, "", path, path))) == 4


def components(page, endpoint):
    """Types and labels of what a button takes."""
    config = page.get_config_file()
    by_id = {component["id"]: component for component in config["components"]}
    (event,) = (event for event in config["dependencies"] if event["api_name"] == endpoint)
    return [(by_id[index]["type"], by_id[index]["props"]["label"]) for index in event["inputs"]]


def test_what_the_pages_ask_for(app, artist, text_artist):
    shared = [("slider", "Guidance"), ("number", "Seed"), ("checkbox", app.NEW_SEED), ("slider", app.PAUSE)]
    of_classes, of_text = app.build(artist), app.build(text_artist)
    assert components(of_classes, "draw") == [*shared, ("radio", "Class"), ("slider", "Tokens")]
    assert components(of_classes, "lay_out")[-1] == ("dropdown", "Classes")
    shared.append(("textbox", "Negative prompt"))
    assert components(of_text, "draw") == [*shared, ("textbox", "Prompt"), ("slider", "Tokens")]
    assert components(of_text, "lay_out")[-1] == ("textbox", "Prompts")
    app.warm_up(text_artist)


# Several visitors


def test_visitors_take_turns_and_do_not_mix(app, artist):
    draw = app.handler(app.draw, artist)
    alone = [[html for html, _, _ in draw(2.0, seed, False, 0.0, seed, 16)] for seed in (1, 2)]
    one, two = draw(2.0, 1, False, 0.0, 1, 16), draw(2.0, 2, False, 0.0, 2, 16)
    together = [(a[0], b[0]) for a, b in zip(one, two, strict=True)]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_who_leaves_in_the_middle_holds_nothing(app, artist):
    shown = app.handler(app.draw, artist)(*SHARED, 0, 16)
    next(shown)
    assert not artist._turn.locked()  # nobody waits for a visitor who looks at a step
    shown.close()
    assert len(list(app.handler(app.draw, artist)(*SHARED, 0, 16))) == 4


@pytest.fixture
def served(app, artist, monkeypatch):
    """The address of a running page, how many drawings have begun and ended, and the hosts that were contacted."""
    counts, steps = {"begun": 0, "ended": 0}, artist.steps
    contacted, connect = set(), socket.socket.connect

    def recorded(self, target):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            contacted.add(target[0])
        return connect(self, target)

    monkeypatch.setattr(socket.socket, "connect", recorded)

    def counted(**call):
        counts["begun"] += 1
        try:
            yield from steps(**call)
        finally:
            counts["ended"] += 1

    monkeypatch.setattr(artist, "steps", counted)
    page = app.build(artist)
    _, address, _ = app.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield address, counts, contacted
    page.close(verbose=False)


def test_a_served_page(app, served, tmp_path):
    from gradio_client import Client, handle_file

    address, counts, contacted = served
    one, two = (Client(address, verbose=False) for _ in range(2))
    jobs = [client.submit(2.0, seed, False, 0.1, seed, 16, api_name="/draw") for seed, client in enumerate((one, two))]
    for seed, job in enumerate(jobs):
        assert job.result(timeout=60)[1] == seed
        assert len({output[0] for output in job.outputs()}) == 4
    (tmp_path / "bad.png").write_bytes(b"nothing")
    for arguments, endpoint, message in (
        ((2.0, 1, False, 0.0, handle_file(tmp_path / "bad.png")), "/reconstruct", "no picture"),
        ((2.0, -5, False, 0.0, 1, 16), "/draw", "Seed must be a whole number from 0 to 4294967295, not -5"),
        ((2.0, 1, False, 0.0, 77, 16), "/draw", "The class must be a whole number from 0 to 4, not 77"),
    ):
        with pytest.raises(Exception, match=message):
            one.predict(*arguments, api_name=endpoint)
    # a visitor who leaves while the second of four steps is awaited, each for two seconds
    three = Client(address, verbose=False)
    job = three.submit(2.0, 1, False, 2.0, 1, 16, api_name="/draw")
    while not job.outputs():
        time.sleep(0.02)
    assert counts["ended"] == counts["begun"] - 1
    job.cancel()
    assert one.predict(2.0, 5, False, 0.0, 1, 16, api_name="/draw")[1] == 5
    deadline = time.monotonic() + 4
    while counts["ended"] < counts["begun"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert counts["ended"] == counts["begun"]
    assert not [thing for thing in gc.get_objects() if isinstance(thing, app.Step)]  # nor does a picture stay
    assert contacted <= {"127.0.0.1", "localhost", "0.0.0.0"}  # nothing goes out
