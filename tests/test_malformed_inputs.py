"""Malformed inputs of the Python API, the page and image files: each must end in one clear error, and nothing else.

An error is clear if it is a ValueError, TypeError or OSError (on the page, gradio's message) of one line that names
the argument or file. Two other ends are faults: another exception, and an input that is accepted in silence. Inputs
that may be accepted do not belong here.
"""

import importlib.util
import io
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from pipeline_helpers import picture, seeded

from dar_hf import DARConfig, DARPipeline, FlowMatchAdamsBashforthScheduler
from dar_hf.data import ImageTransform, convert_channels, read_image

CLEAR, OTHER, ACCEPTED = "clear error", "other exception", "silently accepted"
COUNTS: Counter[str] = Counter()
NAN, INF, HUGE = math.nan, math.inf, 10**400
CODES = torch.zeros(1, 16, dtype=torch.long)
PIXELS = torch.zeros(1, 3, 8, 8)
CONDITION = torch.zeros(1, 4, 64)
THING = object()


ERRORS = (ValueError, TypeError, OSError, StrictDataclassFieldValidationError)


def end_of(call, words, errors=ERRORS):
    """How a call ends, and what it said."""
    try:
        call()
    except errors as error:
        text = str(error)
        if isinstance(error, StrictDataclassFieldValidationError):  # of transformers' configurations: two lines
            text = " ".join(text.split())
        clear = "\n" not in text and 15 <= len(text) <= 600 and any(word in text for word in words)
        return (CLEAR if clear else OTHER), f"{type(error).__name__}: {text}"
    except Exception as error:
        return OTHER, f"{type(error).__name__}: {error}"
    return ACCEPTED, ""


# What is called: functions of the parts of a tiny pipeline and the arguments


def called(parts, **arguments):
    return parts.pipe(**{"class_labels": 0, "num_inference_steps": 4} | arguments)


def streamed(parts, **arguments):
    return parts.pipe.stream(**{"class_labels": 0} | arguments)  # refused here, not at the first step


def reconstructed(parts, **arguments):
    return parts.pipe.reconstruct(**{"images": picture()} | arguments)


def encoded(parts, **arguments):
    return parts.tokenizer.encode(**{"pixel_values": PIXELS} | arguments)


def conditioned(parts, **arguments):
    return parts.tokenizer.condition(**{"codes": CODES} | arguments)


def decoded(parts, **arguments):
    return parts.tokenizer.decode(**{"codes": CODES} | arguments)


def decoded_stream(parts, **arguments):
    return list(parts.tokenizer.decode_stream(**{"groups": [CODES]} | arguments))


def velocity(parts, **arguments):
    return parts.tokenizer.velocity(**{"sample": PIXELS, "timestep": 0.5, "condition": CONDITION} | arguments)


def trained(parts, **arguments):
    return parts.tokenizer(**{"pixel_values": PIXELS} | arguments)


def codes_streamed(parts, **arguments):
    return list(parts.transformer.stream_codes(**{"class_labels": 0} | arguments))


def generated(parts, **arguments):
    return parts.transformer.generate(**{"inputs": torch.tensor([[32]]), "do_sample": True} | arguments)


def scheduler(parts, **arguments):
    return FlowMatchAdamsBashforthScheduler(**arguments)


def timesteps_set(parts, **arguments):
    return FlowMatchAdamsBashforthScheduler().set_timesteps(**arguments)


def stepped(parts, **arguments):
    solver = FlowMatchAdamsBashforthScheduler()
    solver.set_timesteps(4)
    return solver.step(**{"model_output": PIXELS, "timestep": 0.0, "sample": PIXELS} | arguments)


def configured(parts, **arguments):
    return DARConfig(**arguments)


def tokenizer_made(parts, **arguments):
    return parts.make_tokenizer(**arguments)


def pipeline_made(parts, **arguments):
    components = {"tokenizer": parts.tokenizer, "transformer": parts.transformer, "scheduler": parts.pipe.scheduler}
    return DARPipeline(**components | arguments)


def labels_named(parts, **arguments):
    return parts.pipe.get_label_ids(**arguments)


def transform_made(parts, **arguments):
    return ImageTransform(**{"size": (8, 8)} | arguments)(picture())


def channels_converted(parts, **arguments):
    return convert_channels(**{"image": picture(), "channels": 3} | arguments)


# What they are called with

NOT_COUNTS = [0, -1, 2.5, True, "3", NAN, [1], 10**30, THING]
NOT_SCALES = [-1.0, NAN, INF, -INF, "high", True, HUGE, (1.0, 2.0, 3.0), (), (1.0, NAN), THING]
NOT_CODES = [
    "abc",
    3.5,
    [[1, None]],
    CODES.float(),
    CODES.bool(),
    CODES - 1,
    CODES + 32,
    CODES[0],
    CODES[None],
    CODES.repeat(1, 2),
    THING,
]
NOT_PIXELS = [
    "cat.png",
    3,
    [],
    [None],
    THING,
    b"bytes",
    np.zeros((8, 8, 3), dtype=np.uint8),
    np.zeros((8, 8)),
    np.zeros((8, 8, 4)),
    np.full((8, 8, 3), NAN),
    np.full((8, 8, 3), 1j),
    np.array(["a"]),
    np.full((8, 8, 3), 255.0),
    np.zeros((0, 8, 8, 3)),
    np.zeros((1, 1, 8, 8, 3)),
    torch.zeros(3, 8, 8, dtype=torch.uint8),
    torch.zeros(3, 8, 9),
    torch.zeros(1, 3, 8, 8, dtype=torch.complex64),
    torch.full((3, 8, 8), NAN),
    torch.full((3, 8, 8), -INF),
    torch.full((3, 8, 8), 2.0),
    torch.zeros(4, 8, 8),
    torch.zeros(8),
    torch.tensor(0.5),
    [torch.zeros(3, 8, 8), picture()],
    [torch.zeros(3, 8, 8), np.zeros((8, 8, 3))],
    PIL.Image.new("F", (8, 8)),
    PIL.Image.new("I", (8, 8)),
    PIL.Image.new("RGB", (0, 8)),
]
NOT_GENERATORS = [42, [42], [], "cpu", [seeded(), seeded()], (None,), THING]
NOT_NOISE = [
    "noise",
    3,
    np.zeros((1, 3, 8, 8)),
    PIXELS.long(),
    torch.zeros(1, 3, 4, 4),
    torch.zeros(2, 3, 8, 8),
    torch.zeros(3, 8, 8),
    torch.full((1, 3, 8, 8), NAN),
    torch.full((1, 3, 8, 8), INF),
]
NOT_LABELS = [-1, 5, 1.0, None, True, "whale", "", [], [0, 9], [None], [[]], b"\x01", torch.tensor([0.5]), NAN, THING]
# of a tokenizer's own methods, which take tensors alone
NOT_IMAGE_TENSORS = [
    "cat.png",
    None,
    picture(),
    np.zeros((1, 3, 8, 8)),
    [PIXELS],
    PIXELS.long(),
    PIXELS[0],
    torch.zeros(1, 1, 8, 8),
    torch.zeros(1, 3, 9, 9),
    torch.zeros(1, 3, 16, 16),
    torch.zeros(1, 3, 0, 0),
]
NOT_STEPS = NOT_COUNTS
SAMPLING = {
    "guidance_scale": NOT_SCALES,
    "temperature": [-1.0, NAN, INF, "hot", True, HUGE, (1.0,), THING],
    "top_k": [-1, 2.5, True, "3", NAN, None, [1], THING],
    "top_p": [0.0, 1.5, -0.1, NAN, True, None, "1", THING],
}
GENERATING = {
    "class_labels": NOT_LABELS,
    **SAMPLING,
    "num_inference_steps": NOT_STEPS,
    "num_tokens": [*NOT_COUNTS, 3, 17],
    "num_images_per_prompt": [*NOT_COUNTS[:7], None, THING],
    "prefix_codes": NOT_CODES,
    "generator": NOT_GENERATORS,
    "latents": NOT_NOISE,
    "output_type": ["jpeg", None, 3, "", ["pil"], THING],
    "callback_on_step_end": ["print", 3, [print]],
    "callback_on_step_end_tensor_inputs": ["codes", ["noise"], 3, [3]],
    "layout_tokens": [4],
    "strength": [0.5],
    "colour": ["red"],
}
TABLE = {
    called: GENERATING,
    streamed: GENERATING | {"return_dict": [False]},
    reconstructed: {
        "images": NOT_PIXELS,
        "num_inference_steps": NOT_STEPS,
        "num_tokens": [*NOT_COUNTS, 3, 17],
        "height": [*NOT_COUNTS[1:], 9, 16],
        "width": [*NOT_COUNTS[1:], 9, 16],
        "generator": NOT_GENERATORS,
        "latents": NOT_NOISE,
        "output_type": ["jpeg", None, 3],
    },
    encoded: {
        "pixel_values": [*NOT_IMAGE_TENSORS, PIXELS + NAN, PIXELS + INF, PIXELS + 2, PIXELS - 2],
    },
    conditioned: {"codes": [*NOT_CODES, None, CODES[:, :0]]},
    decoded: {
        "codes": [*NOT_CODES, None, CODES[:, :0], CODES[:, :3]],
        "num_inference_steps": NOT_STEPS,
        "generator": NOT_GENERATORS,
        "noise": NOT_NOISE,
        "height": [*NOT_COUNTS, 9, 16],
        "width": [*NOT_COUNTS, 9, 16],
        "scheduler": ["euler", 3, THING],
    },
    decoded_stream: {
        "groups": [3, None, "abc", [None], [CODES[:, :4], CODES[:, :4].repeat(2, 1)], [CODES.float()]],
        "start_step": [-1, 4, 2.5, True, "1", None],
    },
    velocity: {
        "sample": NOT_IMAGE_TENSORS,
        "timestep": ["now", None, NAN, -0.5, 1.5, HUGE, PIXELS[0, 0, 0, :1] + 2, torch.zeros(2), torch.zeros(1, 1)],
        "condition": ["c", None, CONDITION[0], CONDITION[..., :3], CONDITION.repeat(2, 1, 1)],
    },
    trained: {
        "pixel_values": NOT_IMAGE_TENSORS,
        "timesteps": ["now", 0.5, torch.zeros(2), torch.zeros(1, 1), torch.full((1,), NAN), torch.full((1,), 1.5)],
        "noise": ["noise", 3, np.zeros((1, 3, 8, 8)), torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 8, 8)],
        "generator": [42, "cpu", THING, [seeded()]],
        "hide_group": ["yes", True, torch.zeros(2, dtype=torch.bool), torch.zeros(1)],
        "output_repa": [True],
    },
    codes_streamed: {
        "class_labels": [-1, 5, 1.0, None, True, "whale", [], [0, 9], [None], torch.tensor([0.5]), THING],
        **SAMPLING,
        "generator": NOT_GENERATORS,
        "prefix_codes": NOT_CODES,
        "num_tokens": [*NOT_COUNTS, 17],
        "group_size": NOT_COUNTS[:7],
    },
    generated: {"guidance_scale": NOT_SCALES, "generator": NOT_GENERATORS[:5]},
    scheduler: {"shift": [0, -1.0, NAN, INF, HUGE, "2", None, True], "solver_order": [0, 3, "2", None, 1.5, True]},
    timesteps_set: {"num_inference_steps": [*NOT_COUNTS, None]},
    stepped: {
        "timestep": [0.1, NAN, -1.0, "now", "0.0", None, HUGE, torch.zeros(2)],
        "model_output": [None, "v", torch.zeros(1, 3, 4, 4)],
        "sample": [None, "x", torch.zeros(1, 3, 4, 4)],
    },
    configured: {
        **{name: [0, -1, 2.5, "3", None] for name in ("codebook_size", "num_classes", "num_image_tokens")},
        "tokens_per_group": [0, -1, 2.5, "3", None],
        **{name: [-0.1, 1.0, NAN, "0.1", None] for name in ("resid_dropout", "ffn_dropout", "token_dropout")},
        "class_dropout": [-0.1, 1.1, NAN, "0.1", None],
        "tie_word_embeddings": [True],
    },
    tokenizer_made: {
        "sample_size": [0, -8, 9, "8", None, (8,), (8, 8, 8), 8.0],
        **{name: [0, -1, 1.5, "4", None] for name in ("in_channels", "codebook_size", "num_tokens", "num_groups")},
        **{name: [0, -1, 1.5, "4", None] for name in ("encoder_dim", "decoder_dim", "diffusion_dim")},
        **{name: [0, -1, 1.5, "4"] for name in ("encoder_patch_size", "diffusion_patch_size", "attention_head_dim")},
        **{name: [0, -1.0, NAN, INF, HUGE, "1", None] for name in ("data_std", "time_shift")},
        "num_inference_steps": [0, -1, 2.5, "4"],
        "repa_layer": [-1, 2, "1", 0.5],
        "tokens_per_group": [0, -1, 17, "4"],
        "condition_dim": [1, "64"],
    },
    pipeline_made: {
        "tokenizer": [None, "tokenizer", THING],
        "transformer": [None, "transformer", THING],
        "scheduler": ["euler", THING],
        "id2label": ["cat", {"a": "cat"}, {99: "cat"}, {"-1": "cat"}, {0.5: "cat"}, {True: "cat"}, {0: None}, 3],
    },
    labels_named: {
        "names": ["whale", "", ["shark", "whale"], b"shark", [["shark"]], 3, [3], None, [None], ["tench", ""]]
    },
    transform_made: {
        "crop": ["middle", None, 3],
        "noise": [-0.1, NAN, "much"],
        "channels": [0, 2, 4, "3", None],
        "size": [(0, 8), (8, -8), 8, "8", (8,), (8.5, 8), None],
    },
    channels_converted: {"channels": [0, 2, 4, "3", None, True], "image": ["cat.png", None, np.zeros((8, 8, 3)), 3]},
}
# by what an error may call an argument, other than its name
WORDS = {
    "class_labels": ("class label", "class name", "class_labels"),
    "guidance_scale": ("guidance scale", "guidance_scale"),
    "codes": ("codes", "sequence"),
    "groups": ("codes", "sequence", "groups"),
    "pixel_values": ("pixel_values", "image size"),
    "sample": ("sample", "pixel_values", "image size"),
    "height": ("height", "image size", "image must have", "pixels"),
    "width": ("width", "image size", "image must have", "pixels"),
    "noise": ("noise", "pixel_values", "image size"),
    "names": ("class name", "names"),
    "channels": ("channels",),
    "images": ("images", "image size"),
    "prefix_codes": ("prefix",),
    "output_repa": ("REPA",),
    "encoder_patch_size": ("patch_size", "patch size"),
    "diffusion_patch_size": ("patch_size", "patch size"),
    "layout_tokens": ("layout_image",),
}
TOGETHER = [
    (called, {"layout_image": picture(), "layout_tokens": 4, "image": picture(), "strength": 0.5}, "exclude"),
    (called, {"prefix_codes": CODES[:, :4], "image": picture(), "strength": 0.5}, "exclude"),
    (called, {"prefix_codes": CODES[:, :4], "layout_image": picture(), "layout_tokens": 2}, "exclude"),
    (called, {"image": picture(), "strength": 0.5, "latents": PIXELS}, "exclude"),
    (called, {"class_labels": [0, 1], "image": [picture()] * 3, "strength": 0.5}, "3 images for 2 labels"),
    (decoded, {"noise": PIXELS, "height": 16, "width": 16}, "noise"),
    (decoded, {"codes": CODES.repeat(2, 1), "noise": PIXELS}, "noise"),
    (decoded, {"noise": PIXELS, "generator": 42}, "generator"),
    (decoded_stream, {"groups": [CODES.float()], "check_codes": False}, "codes"),
    (decoded_stream, {"groups": [None], "check_codes": False}, "codes"),
]
for _layout in ([-1, 2.5, True, "4", None, 17], [4]):
    _images = [picture()] if len(_layout) > 1 else NOT_PIXELS
    for _tokens in _layout:
        TOGETHER += [(called, {"layout_image": _image, "layout_tokens": _tokens}, "layout_") for _image in _images]
TOGETHER += [(called, {"image": _image, "strength": 0.5}, "image") for _image in NOT_PIXELS]
TOGETHER += [
    (streamed, {"image": picture(), "strength": _strength}, "strength")
    for _strength in (-0.1, 1.1, NAN, INF, "0.5", True, [0.5], None, THING)
]


def short(value):
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind = "nan" if value.dtype != np.dtype("<U1") and not np.isfinite(value).all() else ""
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{kind}"
    if isinstance(value, PIL.Image.Image):
        return f"image {value.mode} {value.size}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(short(item) for item in value)})"
    return "an object" if value is THING else "10**400" if value is HUGE else repr(value)[:24]


def api_cases():
    for function, table in TABLE.items():
        for argument, values in table.items():
            for value in values:
                words = WORDS.get(argument, (argument,))
                yield f"{function.__name__}-{argument}-{short(value)}", function, {argument: value}, words
    for function, arguments, word in TOGETHER:
        name = ", ".join(f"{key}={short(value)}" for key, value in arguments.items())
        yield f"{function.__name__}-{name}", function, arguments, (word,)


def unique(cases):
    """Cases as parameters, with names that differ."""
    seen: Counter[str] = Counter()
    for name, *rest in cases:
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name} ({seen[name]})"
        yield pytest.param(*rest, id=name)


API = list(unique(api_cases()))


@pytest.fixture
def parts(tiny_pipeline, make_tokenizer):
    pipe = tiny_pipeline
    return SimpleNamespace(
        pipe=pipe, tokenizer=pipe.tokenizer, transformer=pipe.transformer, make_tokenizer=make_tokenizer
    )


def check(call, words, *errors):
    end, said = end_of(call, words, *errors)
    COUNTS[end] += 1
    assert end == CLEAR, f"{end}: {said}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function, arguments, words", API)
def test_arguments(function, arguments, words, parts):
    check(lambda: function(parts, **arguments), words)


# Image files


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


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location("dar_app_malformed", Path(__file__).parents[1] / "examples/app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["dar_app_malformed"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["dar_app_malformed"]


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
    check(lambda: app.uploaded(str(tmp_path / name), tmp_path), ("not uploaded",))


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
}


def page_cases():
    for name, (word, values) in PAGE_SETTINGS.items():
        for value in values:
            yield f"setting {name}-{short(value)}", "draw", SETTINGS | {name: value}, {}, word
    for (button, place), (word, values) in PAGE_INPUTS.items():
        for value in values:
            yield f"{button}-{place}-{short(value)}", button, SETTINGS, {place: value}, word


@pytest.mark.parametrize("button, settings, changes, word", unique(page_cases()))
def test_page(button, settings, changes, word, app, tiny_pipeline, tmp_path):
    path = str(tmp_path / "upload.png")
    picture().save(path)
    inputs = {"draw": [0, 16], "lay_out": [path, 4, [0]], "vary": [path, 0, 0.5], "reconstruct": [path]}[button]
    for place, value in changes.items():
        inputs[place] = value
    press = app.handler(getattr(app, button), app.Artist(tiny_pipeline))
    check(lambda: list(press(*settings.values(), *inputs)), (word,), app.gr.Error)


def test_there_are_many_inputs(capsys):
    """Runs last, after the others have been counted (each process counts its own)."""
    total = len(API) + 2 * len(FILES) + len(list(page_cases()))
    with capsys.disabled():
        print(f"\n{total} malformed inputs; here: {dict(COUNTS)}")
    assert total >= 200
