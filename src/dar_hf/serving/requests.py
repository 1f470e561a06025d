"""What a request may ask for, in the form of OpenAI's images API: every field is checked before any model runs.

A request holds plain values only: nothing in it names a file, an address or a model to load.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..labels_dar import known_names
from ..utils.labels import ids_and_names
from ..utils.untrusted import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED, number, text

MAX_BODY = 64 * 2**10  # bytes
MAX_IMAGES = 10  # per request, as in OpenAI's API
MAX_PARTIAL_IMAGES = 64

# fields of OpenAI's API that have one meaning here, and the values that mean it
FIXED = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "background": ("auto", "opaque"),
}
# fields of OpenAI's API that clients send by habit and that change nothing here
IGNORED = ("user", "quality", "style", "moderation", "safety_identifier", "output_compression")


class RequestError(Exception):
    """An answer in OpenAI's form of errors.

    Attributes:
        message: what is wrong, for people.
        param: the field that is wrong.
        code, status: OpenAI's code for it, and the HTTP status.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = "invalid_value",
        status: int = 400,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(self.retry_after)}


@dataclass(frozen=True)
class Facts:
    """What has to be known of a pipeline to check a request without it.

    Attributes:
        name: the model's name in the API.
        created: when it was loaded, in seconds since 1970.
        from_text: whether it draws from text; otherwise from classes.
        num_classes: how many classes there are.
        labels, shared_names: class ids by name, and the classes that share a name.
        height, width: of its images.
        prompt_tokens, image_tokens: how many tokens a prompt and an image have.
        max_images: per request.
        max_guidance: the largest guidance scale that is taken.
    """

    name: str
    created: int
    from_text: bool
    num_classes: int
    labels: dict[str, int]
    shared_names: dict[str, list[int]]
    height: int
    width: int
    prompt_tokens: int
    image_tokens: int
    max_images: int
    max_guidance: float = MAX_GUIDANCE

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class ImageRequest:
    """A request that is right.

    Attributes:
        subject: a class id, or a text.
        n: how many images; image i is drawn with ``seed + i``.
        guidance_scale: None for the pipeline's own.
        stream: whether the answer is a stream of events.
        partial_images: how many previews it has before the final image.
    """

    subject: int | str
    seed: int
    n: int = 1
    guidance_scale: float | None = None
    stream: bool = False
    partial_images: int = 0


def read_request(body: bytes, facts: Facts) -> ImageRequest:
    """The request that a body holds; a field that is null counts as left out.

    Raises:
        RequestError: that says which field is wrong, and what is accepted.
    """
    fields = _read_json(body)
    fields = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
    model = fields.pop("model", facts.name)
    if model != facts.name:
        raise no_such_model(model)
    for name, accepted in FIXED.items():
        if fields.pop(name, accepted[0]) not in accepted:
            raise RequestError(f"{name} must be {' or '.join(accepted)} here, or left out.", name)
    if fields.pop("size", "auto") not in ("auto", facts.size):
        raise RequestError(f"size must be auto or {facts.size}, the size of this model's images.", "size")
    if "prompt" not in fields:
        raise RequestError("prompt is missing: say what to draw.", "prompt", "missing_required_parameter")
    subject = _checked("prompt", _subject, fields.pop("prompt"), facts)
    stream = fields.pop("stream", False)
    if not isinstance(stream, bool):
        raise RequestError("stream must be true or false.", "stream")
    n = int(_checked("n", _number, fields.pop("n", 1), 1, facts.max_images))
    if stream and n > 1:
        raise RequestError("n must be 1 where stream is true: events do not say to which image they belong.", "n")
    partial_images = fields.pop("partial_images", 0)
    partial_images = int(_checked("partial_images", _number, partial_images, 0, MAX_PARTIAL_IMAGES))
    if partial_images and not stream:
        raise RequestError("partial_images needs stream: true.", "partial_images")
    seed = fields.pop("seed", None)
    if seed is None:
        seed = random.randrange(MAX_SEED + 1)
    seed = int(_checked("seed", _number, seed, 0, MAX_SEED))
    guidance = fields.pop("guidance_scale", None)
    if guidance is not None:
        guidance = _checked("guidance_scale", _number, guidance, 1.0, facts.max_guidance)
    if fields:
        name = next(iter(fields))[:40]
        raise RequestError(f"Unknown parameter: {name!r}.", name, "unknown_parameter")
    return ImageRequest(subject, seed, n, guidance, stream, partial_images)


def no_such_model(name: Any) -> RequestError:
    """The answer to a request for another model."""
    return RequestError(
        f"The model {repr(name)[:60]} does not exist: see /v1/models.", "model", "model_not_found", 404
    )


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("The body must be JSON.", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    return fields


def _checked(name: str, check: Callable[..., Any], *values: Any) -> Any:
    """What a check returns for a field; what it says is wrong becomes an answer."""
    try:
        return check(name, *values)
    except (ValueError, OverflowError) as error:
        raise RequestError(str(error), name) from error


def _number(name: str, value: Any, low: float, high: float) -> float:
    return number(name, value, low, high)


def _subject(name: str, value: Any, facts: Facts) -> int | str:
    """A text, or the id of a class by name or id.

    Raises:
        ValueError: if there is none.
    """
    if not facts.from_text and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    words = text(name, value, MAX_PROMPT)
    if not words:
        raise ValueError("prompt is empty: say what to draw.")
    if facts.from_text:
        return words
    (label,) = ids_and_names([words], facts.labels)
    if isinstance(label, int):
        return int(number("the class id in prompt", label, 0, facts.num_classes - 1))
    if label in facts.shared_names:
        ids = ", ".join(map(str, facts.shared_names[label]))
        raise ValueError(f"the class name {label!r} is shared by the classes {ids}: give the id.")
    if label not in facts.labels:
        shown = repr(label)[:60]
        raise ValueError(f"prompt must be a class, by name or id, not {shown}; {known_names(facts.labels, label)}.")
    return facts.labels[label]
