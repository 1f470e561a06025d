"""Options of commands: dataclasses that transformers' HfArgumentParser reads."""

from dataclasses import field
from typing import Any


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help text."""
    return field(default=default, metadata={"help": text})
