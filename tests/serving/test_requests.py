"""What a request of the server may hold."""

import json

import pytest

from dar_hf.serving.requests import MAX_PARTIAL_IMAGES, ImageRequest, ModelInfo, RequestError, read_request
from dar_hf.utils.untrusted import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED

CLASSES = ModelInfo(
    name="tiny",
    created=0,
    from_text=False,
    num_classes=5,
    labels={"tench": 0, "shark": 2, "7": 3},
    shared_names={"crane": [1, 4]},
    height=8,
    width=16,
    prompt_tokens=1,
    image_tokens=16,
    max_images=4,
    max_guidance=MAX_GUIDANCE,
)
TEXTS = ModelInfo(**{**vars(CLASSES), "from_text": True})


def read(info=CLASSES, **fields):
    return read_request(json.dumps(fields).encode(), info)


@pytest.mark.parametrize(("prompt", "label"), [("shark", 2), (" shark ", 2), ("1", 1), (4, 4), ("7", 3)])
def test_a_class_is_given_by_name_or_id(prompt, label):
    assert read(prompt=prompt, seed=3) == ImageRequest(label, seed=3)


def test_a_text_is_one_line():
    assert read(TEXTS, prompt="a red\napple", seed=3).subject == "a red apple"


def test_fields_of_openai():
    request = read(
        prompt="shark",
        model="tiny",
        size="16x8",
        n=2,
        seed=9,
        guidance_scale=1.5,
        response_format="b64_json",
        output_format="png",
        background="auto",
        user="me",
        quality="high",
        stream=False,
        partial_images=None,
    )
    assert request == ImageRequest(2, seed=9, n=2, guidance_scale=1.5)
    assert read(prompt="shark", seed=1, stream=True, partial_images=2) == ImageRequest(
        2, seed=1, stream=True, partial_images=2
    )


def test_a_seed_is_drawn_where_none_is_given():
    seeds = {read(prompt="shark").seed for _ in range(5)}
    assert len(seeds) > 1 and all(0 <= seed <= MAX_SEED for seed in seeds)


def test_each_image_has_a_seed_that_can_be_asked_for():
    last = MAX_SEED - 1
    assert read(prompt="shark", n=2, seed=last).seed == last
    with pytest.raises(RequestError, match="seed must be a whole number from 0 to"):
        read(prompt="shark", n=2, seed=MAX_SEED)


WRONG = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "  "}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["shark"]}, "prompt"),
    ({"prompt": True}, "prompt"),
    ({"prompt": "whale"}, "prompt"),
    ({"prompt": "crane"}, "prompt"),
    ({"prompt": "5"}, "prompt"),
    ({"prompt": "-1"}, "prompt"),
    ({"prompt": "9" * 200}, "prompt"),
    ({"prompt": "x" * (MAX_PROMPT + 1)}, "prompt"),
    ({"prompt": "../../etc/passwd"}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"n": 10**400}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": MAX_SEED + 1}, "seed"),
    ({"guidance_scale": 0}, "guidance_scale"),
    ({"guidance_scale": MAX_GUIDANCE + 1}, "guidance_scale"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": [1, 2]}, "guidance_scale"),
    ({"size": "1024x1024"}, "size"),
    ({"size": [8, 8]}, "size"),
    ({"response_format": "url"}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"output_format": "jpeg"}, "output_format"),
    ({"background": "transparent"}, "background"),
    ({"model": "other"}, "model"),
    ({"model": {"a": 1}}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "n": 2}, "n"),
    ({"partial_images": 1}, "partial_images"),
    ({"stream": True, "partial_images": MAX_PARTIAL_IMAGES + 1}, "partial_images"),
    ({"stream": True, "partial_images": -1}, "partial_images"),
    ({"image": "/etc/passwd"}, "image"),
    ({"layout_image": "https://example.org/a.png"}, "layout_image"),
    ({"num_inference_steps": 10_000}, "num_inference_steps"),
    ({"x" * 5000: 1}, "x" * 40),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: repr(value)[:40])
def test_what_is_wrong_is_named(fields, param):
    fields = {"prompt": "shark"} | fields if fields else fields
    with pytest.raises(RequestError) as caught:
        read(**fields)
    error = caught.value
    assert error.param == param and error.status == (404 if param == "model" else 400)
    assert error.body()["error"]["type"] == "invalid_request_error"
    assert len(error.message) < 1000


def test_an_unknown_class_is_told_the_classes():
    with pytest.raises(RequestError, match="known names: tench, shark, 7; similar: shark"):
        read(prompt="sharc")
    with pytest.raises(RequestError, match="shared by the classes 1, 4"):
        read(prompt="crane")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff\xfe", b"[" * 60_000, b"9" * 6000, b'"prompt"'])
def test_nonsense_is_an_error(body):
    with pytest.raises(RequestError) as caught:
        read_request(body, CLASSES)
    assert caught.value.code == "invalid_json" and caught.value.status == 400
