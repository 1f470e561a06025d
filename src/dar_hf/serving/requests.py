"""What a request may ask for, in the form of OpenAI's images API: every field is checked before any model runs.

A request holds plain values only: nothing in it names a file, an address or a model to load.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..labels_dar import class_id
from ..utils.labels import ids_and_names
from ..utils.untrusted import MAX_PROMPT, MAX_SEED, number, text

MAX_BODY = 64 * 2**10  # bytes
MAX_IMAGES = 10  # per request, as in OpenAI's API
MAX_PARTIAL_IMAGES = 64

# fields of OpenAI's API that have one meaning here, and the values that mean it
FIXED: dict[str, tuple[str, ...]] = {
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
class ModelInfo:
    """What the API has to know about a pipeline that runs in another process.

    Attributes:
        name: the model's name in the API.
        created: when it was loaded, in seconds since 1970.
        from_text: whether it draws from text; otherwise from classes.
        num_classes: number of classes.
        labels, shared_names: class ids by name, and the classes that share a name.
        height, width: of its images.
        prompt_tokens, image_tokens: number of tokens of a prompt and of an image.
        max_images: largest number of images per request.
        max_guidance: largest guidance scale.
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
    max_guidance: float

    @property
    def size(self) -> str:
        """Width and height as the API writes them."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class ImageRequest:
    """A request whose fields have been checked.

    Attributes:
        subject: a class id, or a text.
        seed: image i is drawn with ``seed + i``.
        n: number of images.
        guidance_scale: None for the pipeline's own.
        stream: whether the answer is a stream of events.
        partial_images: number of previews before the final image, as far as there are enough steps.
    """

    subject: int | str
    seed: int
    n: int = 1
    guidance_scale: float | None = None
    stream: bool = False
    partial_images: int = 0


def read_request(body: bytes, model: ModelInfo) -> ImageRequest:
    """The request in a body; a field that is null counts as left out.

    Raises:
        RequestError: that says which field is wrong, and what is accepted.
    """
    fields = _read_json(body)
    fields = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
    name = fields.pop("model", model.name)
    if name != model.name:
        raise no_such_model(name)
    _check_fixed(fields, model.size)
    if "prompt" not in fields:
        raise RequestError("prompt is missing: say what to draw.", "prompt", "missing_required_parameter")
    subject = _checked(_subject, "prompt", fields.pop("prompt"), model)
    n = int(_checked(number, "n", fields.pop("n", 1), 1, model.max_images))
    highest = MAX_SEED + 1 - n  # the last image's seed is one that can be asked for, too
    seed = int(_checked(number, "seed", fields.pop("seed", random.randint(0, highest)), 0, highest))
    guidance = fields.pop("guidance_scale", None)
    if guidance is not None:
        guidance = _checked(number, "guidance_scale", guidance, 1.0, model.max_guidance)
    stream = fields.pop("stream", False)
    if not isinstance(stream, bool):
        raise RequestError("stream must be true or false.", "stream")
    if stream and n > 1:
        raise RequestError("n must be 1 where stream is true: events do not say to which image they belong.", "n")
    partial_images = fields.pop("partial_images", 0)
    partial_images = int(_checked(number, "partial_images", partial_images, 0, MAX_PARTIAL_IMAGES))
    if partial_images and not stream:
        raise RequestError("partial_images needs stream: true.", "partial_images")
    if fields:
        unknown = next(iter(fields))[:40]
        raise RequestError(f"Unknown parameter: {unknown!r}.", unknown, "unknown_parameter")
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


def _check_fixed(fields: dict[str, Any], size: str) -> None:
    """Take the fields that have one meaning here out of ``fields``.

    Raises:
        RequestError: for another value.
    """
    for name, accepted in (FIXED | {"size": ("auto", size)}).items():
        if fields.pop(name, accepted[0]) not in accepted:
            raise RequestError(f"{name} must be {' or '.join(accepted)} here, or left out.", name)


def _checked(check: Callable[..., Any], name: str, *values: Any) -> Any:
    """The field as ``check`` returns it; the ValueError of a wrong one becomes an answer."""
    try:
        return check(name, *values)
    except (ValueError, OverflowError) as error:
        raise RequestError(str(error), name) from error


def _subject(name: str, value: Any, model: ModelInfo) -> int | str:
    """A text, or the id of a class given by name or id.

    Raises:
        ValueError: if it is empty, or there is no such class.
    """
    if not model.from_text and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    prompt = text(name, value, MAX_PROMPT)
    if not prompt:
        raise ValueError(f"{name} is empty: say what to draw.")
    if model.from_text:
        return prompt
    (label,) = ids_and_names([prompt], model.labels)
    if isinstance(label, str):
        return class_id(label, model.labels, model.shared_names)
    return int(number("the class id", label, 0, model.num_classes - 1))
