"""Malformed arguments of the Python API: each must end in one clear error, and nothing else."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from malformed_helpers import HUGE, INF, NAN, THING, check, short, unique
from pipeline_helpers import picture, seeded
from tiny_models import make_pipeline, make_tokenizer, make_transformer

from dar_hf import DARConfig, DARPipeline, FlowMatchAdamsBashforthScheduler
from dar_hf.data import ImageTransform, convert_channels

CODES = torch.zeros(1, 16, dtype=torch.long)
PIXELS = torch.zeros(1, 3, 8, 8)
CONDITION = torch.zeros(1, 4, 64)


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
        "timesteps": ["now", 0.5, torch.zeros(2), torch.zeros(1, 0), torch.full((1,), NAN), torch.full((1,), 1.5)],
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


def api_cases():
    for function, table in TABLE.items():
        for argument, values in table.items():
            for value in values:
                words = WORDS.get(argument, (argument,))
                yield f"{function.__name__}-{argument}-{short(value)}", function, {argument: value}, words
    for function, arguments, word in TOGETHER:
        name = ", ".join(f"{key}={short(value)}" for key, value in arguments.items())
        yield f"{function.__name__}-{name}", function, arguments, (word,)


API = list(unique(api_cases()))


@pytest.fixture(scope="module")
def parts():
    """One pipeline for all calls: what is refused changes nothing."""
    pipe = make_pipeline(make_tokenizer(), make_transformer())
    return SimpleNamespace(
        pipe=pipe, tokenizer=pipe.tokenizer, transformer=pipe.transformer, make_tokenizer=make_tokenizer
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function, arguments, words", API)
def test_arguments(function, arguments, words, parts):
    check(lambda: function(parts, **arguments), words)


def test_there_are_many_inputs():
    assert len(API) >= 200
