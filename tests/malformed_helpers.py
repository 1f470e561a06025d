"""What the tests of malformed inputs share: how a call ended, and names for cases.

An error is clear if it is a ValueError, TypeError or OSError (on the page, gradio's message) of one line that names
the argument or file. Two other ends are faults: another exception, and an input that is accepted in silence. Inputs
that may be accepted do not belong here.
"""

import math
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

CLEAR, OTHER, ACCEPTED = "clear error", "other exception", "silently accepted"
NAN, INF, HUGE = math.nan, math.inf, 10**400
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


def check(call, words, *errors):
    end, said = end_of(call, words, *errors)
    assert end == CLEAR, f"{end}: {said}"


def short(value):
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind = "nan" if value.dtype != np.dtype("<U1") and not np.isfinite(value).all() else ""
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{kind}"
    if isinstance(value, PIL.Image.Image):
        return f"image {value.mode} {value.size}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(short(item) for item in value)})"
    return "an object" if value is THING else "10**400" if value is HUGE else repr(value)[:24]


def unique(cases):
    """Cases as parameters, with names that differ."""
    seen: Counter[str] = Counter()
    for name, *rest in cases:
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name} ({seen[name]})"
        yield pytest.param(*rest, id=name)
