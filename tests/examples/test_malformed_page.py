"""Malformed image files, for `read_image` and as uploads, and inputs of the page: each must end in one clear error."""

import io

import numpy as np
import PIL.Image
import pytest
from malformed_helpers import HUGE, INF, NAN, check, short, unique
from pipeline_helpers import picture
from tiny_models import make_text_pipeline

from dar_hf.data import read_image
from dar_hf.utils.untrusted import uploaded


def content(file_format, image=None, **options):
    buffer = io.BytesIO()
    (image or picture(size=(24, 24))).save(buffer, file_format, **options)
    return buffer.getvalue()


def file_cases():
    """Names and contents of files that are no readable image."""
    for file_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        whole = content(file_format)
        for share in (0.02, 0.3, 0.6, 0.9):
            yield f"{file_format} cut at {share:.0%}", whole[: int(len(whole) * share)]
        yield f"{file_format} without its first byte", whole[1:]
        yield f"{file_format} of zeros after its header", whole[:16] + bytes(len(whole))
        yield f"text before {file_format}", b"HTTP/1.1 200 OK\r\n\r\n" + whole
    yield "empty", b""
    yield "text", b"not an image at all"
    yield "html", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield "pdf", b"%PDF-1.7\n"
    yield "zip", b"PK\x03\x04" + bytes(40)
    yield "gzip", b"\x1f\x8b\x08" + bytes(40)
    yield "git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    yield "numpy", b"\x93NUMPY\x01\x00" + bytes(100)
    yield "pickle", b"\x80\x04\x95\x00."
    for name, values in (
        ("float", np.linspace(0, 1, 64, dtype=np.float32)),
        ("float NaN", np.full(64, NAN, dtype=np.float32)),
        ("int32", np.arange(64, dtype=np.int32)),
        ("int32 large", np.arange(64, dtype=np.int32) << 24),
        ("int16", np.arange(-32, 32, dtype=np.int16)),
    ):
        yield f"{name} TIFF", content("TIFF", PIL.Image.fromarray(values.reshape(8, 8)))
    bomb = bytearray(content("BMP"))
    bomb[18:26] = (60_000).to_bytes(4, "little") * 2
    yield "BMP of 60000x60000", bytes(bomb)


FILES = list(unique((name, data) for name, data in file_cases()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", FILES)
def test_files(data, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(data)
    check(lambda: read_image(path), ("cat.png",))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", FILES)
def test_uploads(data, app, tmp_path):
    path = tmp_path / "upload"
    path.write_bytes(data)
    check(lambda: app.read_upload(str(path), 8, 8, 3), ("picture",))


@pytest.mark.parametrize("name", ["gone.png", ".", "a" * 300, "a\0b", "gone/../cat.png"])
def test_paths(name, app, tmp_path):
    check(lambda: read_image(tmp_path / name), (str(tmp_path),))
    check(lambda: app.read_upload(str(tmp_path / name), 8, 8, 3), ("picture",))
    check(lambda: uploaded(str(tmp_path / name), tmp_path), ("not uploaded",))


# The page

SETTINGS = {"guidance": 2.0, "seed": 7, "new_seed": False, "pause": 0.0}
NOT_NUMBERS = [None, "3", True, [], {}, NAN, INF, -INF, -1, 1e300, HUGE]
PAGE_SETTINGS = {
    "guidance": ("Guidance", [*NOT_NUMBERS, 0.5]),
    "seed": ("Seed", [*NOT_NUMBERS, 2.5, 2**32]),
    "new_seed": ("Another seed", [None, "no", 0, 1, [], {}, NAN]),
    "pause": ("Seconds", [*NOT_NUMBERS, 2.5]),
}
PAGE_INPUTS = {
    ("draw", 0): ("lass", [*NOT_NUMBERS, 5, 0.5, "shark"]),
    ("draw", 1): ("Tokens", [*NOT_NUMBERS, 0, 3, 17, 4.5]),
    ("lay_out", 0): ("picture", [None, ""]),
    ("lay_out", 1): ("Tokens", [*NOT_NUMBERS, 17, 4.5]),
    ("lay_out", 2): ("lass", [*NOT_NUMBERS, "shark", [0] * 11, [5], [None], [[0]], [0.5]]),
    ("vary", 0): ("picture", [None, ""]),
    ("vary", 1): ("lass", [*NOT_NUMBERS, 5, 0.5, "shark"]),
    ("vary", 2): ("Strength", [*NOT_NUMBERS, 1.1, -0.1]),
    ("reconstruct", 0): ("picture", [None, ""]),
    ("explain", 0): ("picture", [None, ""]),
    ("explain", 1): ("picture", [None, ""]),
}


def page_cases():
    for name, (word, values) in PAGE_SETTINGS.items():
        for value in values:
            yield f"setting {name}-{short(value)}", "draw", SETTINGS | {name: value}, {}, word
            if name != "guidance":  # which exchanging groups does not use
                yield f"setting {name}-{short(value)}", "explain", SETTINGS | {name: value}, {}, word
    for (button, place), (word, values) in PAGE_INPUTS.items():
        for value in values:
            yield f"{button}-{place}-{short(value)}", button, SETTINGS, {place: value}, word


@pytest.mark.parametrize("button, settings, changes, word", unique(page_cases()))
def test_page(button, settings, changes, word, app, tiny_pipeline, tmp_path):
    path = str(tmp_path / "upload.png")
    picture().save(path)
    inputs = {
        "draw": [0, 16],
        "lay_out": [path, 4, [0]],
        "vary": [path, 0, 0.5],
        "reconstruct": [path],
        "explain": [path, path],
    }[button]
    for place, value in changes.items():
        inputs[place] = value
    press = app.handler(getattr(app, button), app.Artist(tiny_pipeline))
    check(lambda: list(press(*settings.values(), *inputs)), (word,), app.gr.Error)


# The page of a pipeline that draws from text

NOT_PROMPTS = [None, 3, 2.5, True, [], ["a"], {}, {"path": "/etc/passwd"}, b"a", NAN, "a" * 301]
TEXT_PAGE_INPUTS = {
    ("draw", 0): ("negative prompt", NOT_PROMPTS),
    ("draw", 1): ("The prompt", [*NOT_PROMPTS, "", " \n\t"]),
    ("draw", 2): ("Tokens", [*NOT_NUMBERS, 0, 17]),
    ("lay_out", 0): ("negative prompt", NOT_PROMPTS),
    ("lay_out", 3): (
        "rompt",
        [*NOT_PROMPTS, "", "\n \n", "a\n" * 11, ["a", 3], ["a", ""], [["a"]], "a\n" + "b" * 301],
    ),
    ("vary", 0): ("negative prompt", NOT_PROMPTS),
    ("vary", 2): ("The prompt", [*NOT_PROMPTS, ""]),
    ("reconstruct", 0): ("negative prompt", NOT_PROMPTS),
}


def text_page_cases():
    for (button, place), (word, values) in TEXT_PAGE_INPUTS.items():
        for value in values:
            if (button, place, value) != ("lay_out", 3, ["a"]):  # prompts as a list are taken
                yield f"{button}-{place}-{short(value)}", button, {place: value}, word


@pytest.fixture(scope="module")
def text_artist(app, make_tokenizer):
    return app.Artist(make_text_pipeline(make_tokenizer()))


@pytest.mark.parametrize("button, changes, word", unique(text_page_cases()))
def test_text_page(button, changes, word, app, text_artist, tmp_path):
    path = str(tmp_path / "upload.png")
    picture().save(path)
    inputs = {
        "draw": ["", "a red apple", 16],
        "lay_out": ["", path, 4, "a red apple"],
        "vary": ["", path, "a red apple", 0.5],
        "reconstruct": ["", path],
    }[button]
    for place, value in changes.items():
        inputs[place] = value
    press = app.handler(getattr(app, button), text_artist)
    check(lambda: list(press(*SETTINGS.values(), *inputs)), (word,), app.gr.Error)


def test_there_are_many_inputs():
    assert 2 * len(FILES) + len(list(page_cases())) >= 200
