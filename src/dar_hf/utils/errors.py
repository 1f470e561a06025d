"""Errors as people read them."""


def one_line(error: BaseException) -> str:
    """An exception with its notes, on one line."""
    return " ".join([*str(error).split(), *" ".join(getattr(error, "__notes__", [])).split()])
