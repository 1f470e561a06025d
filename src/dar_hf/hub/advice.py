"""A line of advice where the exceptions of the Hub's client say too little.

Its own messages (huggingface_hub 2.4) say what to do about a name that is not valid, a repository, revision or token
that is missing, permissions, gated repositories and too many requests: these stay as they are.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import httpx

_OFFLINE = "offline mode is on and the cache has no such files: unset HF_HUB_OFFLINE, or load once while online."
_UNREACHABLE = "the Hub cannot be reached, and the cache has no such files: check the network and HF_ENDPOINT."
_INCOMPLETE = "the repository is incomplete, or holds another kind of model: see its list of files."
_STATUS = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write there.",
    412: "somebody changed the repository meanwhile: nothing was uploaded; push again.",
}
_NOT_REACHED = (OfflineModeIsEnabled, httpx.TransportError, LocalEntryNotFoundError, RevisionResolutionError)
# the client's own exceptions, each of them an OSError, that libraries hide behind a plain OSError
_HIDDEN = (HfHubHTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled)


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and what caused it, the root cause last."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def advice_for(error: BaseException) -> str | None:
    """What to do about an exception of the Hub's client, or of a library that met one; None where that is clear."""
    chain = _chain(error)
    for cause in chain:
        if isinstance(cause, RepositoryNotFoundError):
            return None
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status in _STATUS:
                return _STATUS[status]
            if status >= 500:
                return "the Hub has a problem of its own: try again later."
    # after all answers of the Hub, since libraries raise exceptions of these kinds from them
    if any(isinstance(cause, _NOT_REACHED) for cause in chain):
        return _OFFLINE if is_offline_mode() else _UNREACHABLE
    if any(isinstance(cause, EntryNotFoundError) for cause in chain):
        return _INCOMPLETE
    return None


@contextmanager
def advice(name: str | Path) -> Iterator[None]:
    """Exceptions of the Hub pass through as they are, with a line about what to do as a note.

    Args:
        name: the repository or folder that is read or written.
    """
    try:
        yield
    except Exception as error:
        _add_note(error, name, advice_for(error))
        raise


def loading_error(error: Exception, name: str | Path) -> Exception:
    """What to raise where loading failed: the Hub's own exception where a library hid it, with a line of advice.

    Args:
        error: what the library raised. A plain `OSError` gives way to the exception of the Hub's client behind it.
        name: the repository or folder that was to be loaded.
    """
    own = error
    if type(error) is OSError:
        own = next((cause for cause in _chain(error) if isinstance(cause, _HIDDEN)), error)
    text = advice_for(own)
    missing = isinstance(own, OSError) and own.errno in (None, errno.ENOENT)  # not a full disk, say
    if text is None and missing and not isinstance(own, _HIDDEN) and not Path(str(name)).exists():
        text = _INCOMPLETE  # the Hub answered, and the library found something missing or unreadable
    _add_note(own, name, text)
    return own


def _add_note(error: BaseException, name: str | Path, text: str | None) -> None:
    if text is not None and not getattr(error, "__notes__", None):
        error.add_note(f"{name}: {text}")
