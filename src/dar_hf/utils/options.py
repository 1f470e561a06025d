"""Options of commands: dataclasses that transformers' HfArgumentParser reads, and files of options."""

import argparse
import functools
import logging
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArg

logger = logging.getLogger(__name__)

_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def renamed_option(former: str, **options: Any) -> Any:
    """transformers' `HfArg` for an option that was called ``former``, a name that is still taken, with a warning."""
    aliases = [f"--{former}", f"--{former.replace('_', '-')}"]
    return HfArg(aliases=aliases, metadata={"action": _RenamedOption}, **options)


class _RenamedOption(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given = (option_string or "").lstrip("-").replace("-", "_")
        if given != self.dest:
            _warn_renamed(given, self.dest)
        setattr(namespace, self.dest, values)


def current_names(options: Mapping[str, Any], options_class: type) -> dict[str, Any]:
    """Options of a preset or a file by the names they have now; a former name is taken with a warning."""
    current = dict(options)
    for part in fields(options_class):
        for alias in part.metadata.get("aliases", []):
            former = alias.lstrip("-")
            if former in current:
                _warn_renamed(former, part.name)
                current.setdefault(part.name, current.pop(former))
    return current


@functools.cache  # commands may read their options twice
def _warn_renamed(former: str, name: str) -> None:
    logger.warning("the option %s is now called %s; the next version takes the new name only.", former, name)


def expand_path(path: str) -> str:
    """A path with the home folder for ``~``, which shells replace neither in files nor after ``--option=``.

    Raises:
        ValueError: for an empty one, as of a variable that is not set: it would mean the folder one is in.
    """
    if not path:
        raise ValueError("a path is empty: name a file or folder, or . for this one.")
    return os.path.expanduser(path)


def reject_empty_texts(options: Any) -> None:
    """Reject options of a dataclass that are given and empty.

    Empty texts come from variables of a shell that are not set, and must not count as options that are not given.

    Raises:
        ValueError: naming the option.
    """
    for part in fields(options):
        if part.default is None and getattr(options, part.name) == "":
            raise ValueError(f"{part.name} is empty: leave it out, or give it a value.")


class _Loader(yaml.SafeLoader):
    """YAML's, which would take the last of several values of one name without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if twice := {str(name) for name in names if names.count(name) > 1}:
            raise ValueError(f"it gives {', '.join(sorted(twice))} more than once.")
        return super().construct_mapping(node, deep)


def read_options(path: str | Path, options_class: type) -> dict[str, Any]:
    """Options by name from a YAML file, each of the type that ``options_class`` says.

    An unquoted no, off or false is YAML's False; for an option that takes text it means "no".

    Raises:
        ValueError: for a file that is not there or no YAML, unknown options, and values of another type.
    """
    try:
        content = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path} with options.") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"cannot read options from {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options by name, not a {type(content).__name__}.")
    content = current_names(content, options_class)
    wanted = {part.name for part in fields(options_class)}
    unknown = sorted(str(name) for name in content if name not in wanted)
    if unknown:
        raise ValueError(f"unknown options in {path}: {', '.join(unknown)}.")
    hints = get_type_hints(options_class)
    try:
        return {name: _typed(name, value, hints[name]) for name, value in content.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value of an option as its type, or a ValueError that says what it takes."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is list:
        (kind,) = get_args(hint)
        if not isinstance(value, list):
            raise ValueError(f"{name} takes a list, as in [a, b], got {value!r}.")
        return [_typed(name, item, kind) for item in value]
    try:
        return _CONVERT[hint](value)
    except (ValueError, OverflowError):
        advice = f": put it in quotes, '{value}'" if hint is str and isinstance(value, (bool, int, float)) else ""
        raise ValueError(f"{name} takes {_KINDS[hint]}, got {value!r}{advice}.") from None


def _text(value: Any) -> str:
    if value is False:
        return "no"
    if not isinstance(value, str):
        raise ValueError
    return value


def _whole(value: Any) -> int:
    if isinstance(value, str):  # in quotes
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):  # YAML reads 1e-4 as text
        raise ValueError
    return float(value)


def _truth(value: Any) -> bool:
    named = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if not isinstance(value, (bool, int, str)) or str(value).lower() not in named:
        raise ValueError
    return named[str(value).lower()]


_CONVERT: dict[Any, Callable[[Any], Any]] = {str: _text, int: _whole, float: _number, bool: _truth}
