"""A line of advice beside the Hub's own exceptions."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import httpx

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there."
_OFFLINE = "offline mode is on and the cache has no such files: unset HF_HUB_OFFLINE, or load once while online."
_INCOMPLETE = "the repository is incomplete, or holds another kind of model: see its list of files."
_UNREACHABLE = "the Hub cannot be reached, and the cache has no such files: check the network and HF_ENDPOINT."

# What an exception says by its type, and by the status the Hub answered with. Libraries raise exceptions of their own
# from these; `_UNCLEAR` holds what comes after others, and counts only where nothing else does.
_CLEAR: list[tuple[type[BaseException], str]] = [
    (LocalTokenNotFoundError, _LOG_IN),
    (OfflineModeIsEnabled, _OFFLINE),
    (GatedRepoError, "ask for access on the repository's page, and log in with `hf auth login`."),
    (RevisionNotFoundError, "the repository has no such branch, tag or commit: see its page for those it has."),
    (RepositoryNotFoundError, "check the name; for a private repository, log in with `hf auth login`."),
    (HFValidationError, "a repository's name is name or owner/name, of letters, digits, '-', '_' and '.'."),
]
_STATUS = {
    401: _LOG_IN,
    403: "the token may not write there: use one with write access, or a repository under your own name.",
    412: "somebody changed the repository meanwhile: nothing was uploaded; push again.",
    429: "the Hub asks to slow down: try again in a few minutes.",
}
_UNCLEAR: list[tuple[type[BaseException], str]] = [
    (httpx.TransportError, _UNREACHABLE),
    (LocalEntryNotFoundError, _UNREACHABLE),
    (RevisionResolutionError, _UNREACHABLE),
    (EntryNotFoundError, _INCOMPLETE),
]
# the client's own exceptions, each of them an OSError, that libraries hide behind a plain OSError
_HIDDEN = (HfHubHTTPError, LocalEntryNotFoundError, LocalTokenNotFoundError, OfflineModeIsEnabled)


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and what caused it, the root cause last."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _by_type(chain: list[BaseException], table: list[tuple[type[BaseException], str]]) -> str | None:
    return next((text for cause in chain for kind, text in table if isinstance(cause, kind)), None)


def _by_status(chain: list[BaseException]) -> str | None:
    for cause in chain:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status in _STATUS:
                return _STATUS[status]
            if status >= 500:
                return "the Hub has a problem of its own: try again later."
    return None


def advice_for(error: BaseException) -> str | None:
    """What to do about an exception of the Hub's client, or of a library that met one; None where that is unknown."""
    chain = _chain(error)
    text = _by_type(chain, _CLEAR) or _by_status(chain) or _by_type(chain, _UNCLEAR)
    return _OFFLINE if text == _UNREACHABLE and is_offline_mode() else text


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
    if text is None and missing and not Path(str(name)).exists():
        text = _INCOMPLETE  # the Hub answered, and the library found something missing or unreadable
    _add_note(own, name, text)
    return own


def _add_note(error: BaseException, name: str | Path, text: str | None) -> None:
    if text is not None and not getattr(error, "__notes__", None):
        error.add_note(f"{name}: {text}")
