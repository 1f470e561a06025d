"""What all commands share: one line per error, exit codes, and checks before anything slow.

A mistake of the user's (2), and a disk, device or network that fails (1), end a command with one line on stderr. What
may be a fault of the program keeps its traceback. ``DAR_HF_DEBUG=1`` shows every traceback.
"""

import argparse
import errno
import functools
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from .errors import one_line
from .options import expand_path

USAGE, FAILURE = 2, 1  # exit codes: what was asked for cannot be done, or it went wrong
INTERRUPTED, PIPE_CLOSED = 130, 141  # as shells report SIGINT and SIGPIPE
DEBUG = "DAR_HF_DEBUG"

# Libraries whose exceptions are about files, data and the network, and this package, whose own say what to do.
_CLEAR_LIBRARIES = {
    "dar_hf", "datasets", "fsspec", "httpx", "httpx2", "huggingface_hub", "lzma", "_lzma", "_pickle", "pickle", "PIL",
    "pyarrow", "safetensors", "safetensors_rust", "tarfile", "yaml", "zipfile", "zlib",
}  # fmt: skip
_CLEAR_TYPES = (ValueError, OSError, ImportError, MemoryError, EOFError, torch.OutOfMemoryError)
# what torch says in plain RuntimeErrors and AssertionErrors about memory, devices, disks and files that do not fit
_CLEAR_TEXTS = (
    "out of memory", "not enough memory", "bad_alloc", "allocate memory", "No space left", "unexpected pos",
    "PytorchStream", "inline_container", "in loading state_dict", "No CUDA GPUs", "NVIDIA driver",
    "invalid device ordinal", "device of type", "Torch not compiled with", "start of device string",
    "file in archive is not in a subdirectory", "determine home directory",
)  # fmt: skip
_ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOMEM}


class CommandError(Exception):
    """Ends a command with its message as one line; ``code`` is the exit code, default the command's own."""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message)
        self.code = code


def command(name: str, code: int = USAGE) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """A decorator for a command's main function: errors end it with the line ``name: message`` and an exit code.

    Args:
        name: what the line begins with.
        code: exit code of mistakes. Failures of the machine end with 1, an interruption with 130.
    """

    def decorate(main: Callable[..., object]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                main(*args, **kwargs)
                sys.stdout.flush()  # a full disk or a closed pipe shows here, not when the interpreter ends
            except KeyboardInterrupt:
                _end(name, "interrupted.", INTERRUPTED)
            except BrokenPipeError as error:  # of `command | head`, unless it is a network's
                if _is_open(sys.stdout):
                    _end_with(name, error, code)
                sys.exit(PIPE_CLOSED)
            except Exception as error:
                _end_with(name, error, code)

        return run

    return decorate


def _end_with(name: str, error: Exception, code: int) -> NoReturn:
    text = explain(error)
    if text is None or os.environ.get(DEBUG):
        raise error
    _is_open(sys.stdout)
    _end(name, text, exit_code(error, code))


def _end(name: str, text: str, code: int) -> NoReturn:
    print(f"{name}: {text}", file=sys.stderr)
    sys.exit(code)


def _is_open(stream: Any) -> bool:
    """Whether a stream still takes what waits to be written; one that does not is led to nowhere."""
    try:
        stream.flush()
        return True
    except OSError:
        with suppress(OSError):  # of a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or the interpreter tries again as it ends
        return False


def explain(error: BaseException) -> str | None:
    """One line about an exception that files, data, options, devices, disks or the network cause.

    Returns:
        None for everything else, which may be a fault of the program.
    """
    text = one_line(error)
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, CommandError):
        return text
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"out of memory: {text or 'use a smaller batch or model'}"
    if isinstance(error, _CLEAR_TYPES) or libraries & _CLEAR_LIBRARIES:
        return text or type(error).__name__
    if isinstance(error, (RuntimeError, AssertionError)) and any(part in text for part in _CLEAR_TEXTS):
        return text
    return None


def exit_code(error: BaseException, code: int = USAGE) -> int:
    """The exit code that an exception asks for, ``code`` where it does not."""
    if isinstance(error, CommandError) and error.code is not None:
        return error.code
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, RuntimeError)):
        return FAILURE
    return FAILURE if isinstance(error, OSError) and error.errno in _ENVIRONMENT else code


@contextmanager
def ending_with(code: int, *, keep: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Inside, what ends a command ends it with this exit code; exceptions of ``keep`` with the command's own."""
    try:
        yield
    except keep:
        raise
    except Exception as error:
        text = explain(error)
        if text is None or isinstance(error, CommandError):
            raise
        raise CommandError(text, code) from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Inside, what cannot be written ends a command with code 1 and the name of ``path``.

    Libraries have exceptions of their own for a full disk, many of them without a file's name.
    """
    try:
        yield
    except Exception as error:
        text = explain(error)
        if text is None or isinstance(error, (CommandError, BrokenPipeError)):
            raise
        raise CommandError(f"cannot write {path}: {text}", FAILURE) from error


def check_output(path: str | Path, *, folder: bool = True) -> None:
    """Refuse a place that nothing can be written to, before the work that would be lost; nothing is left there.

    Args:
        path: a folder to write into or to make, or else a file to write.
        folder: which of both.

    Raises:
        CommandError: if it is of the other kind, or its disk is full or read-only.
    """
    path = Path(path)
    with writing(path):
        if not folder:
            if path.is_dir():
                raise CommandError(f"{path} is a folder: give the name of a file in it.")
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise CommandError(f"{path} is no regular file: choose another one.")
            path = path.parent
        path = _nearest(path)
        if not path.is_dir():
            raise CommandError(f"{path} is not a folder: choose another place to write to.")
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0" * 4096)
            file.flush()


def _nearest(path: Path) -> Path:
    """The path, or of the folders that would hold it the first that is there; other faults than that are raised."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(path.parent)
    return path


def device_option(name: str) -> torch.device:
    """A device by name, as the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: if there is none of this name here.
    """
    try:
        found = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name!r} is no device: give cpu, cuda or cuda:1.") from None
    if found.type == "cpu":
        return found
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is None or here.type != found.type:
        others = "cpu" if here is None else f"cpu or {here.type}"
        raise argparse.ArgumentTypeError(f"there is no device {name!r} here: give {others}.")
    if found.index is not None and found.index >= torch.accelerator.device_count():
        raise argparse.ArgumentTypeError(f"there is no device {name!r} here, only {torch.accelerator.device_count()}.")
    return found


def add_precision_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype`` and ``--device`` of a command that loads a pipeline."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_option, default=device)


def path_option(value: str) -> Path:
    """A file or folder, as the ``type`` of an option."""
    try:
        return Path(expand_path(value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive_option(value: str) -> int:
    """A whole number from 1 on, as the ``type`` of an option."""
    return _whole(value, 1, 2**31 - 1)


def seed_option(value: str) -> int:
    """A seed that torch's generators take, as the ``type`` of an option."""
    return _whole(value, -(2**62), 2**62)


def port_option(value: str) -> int:
    """A port to listen on, as the ``type`` of an option."""
    return _whole(value, 1, 65_535)


def _whole(value: str, least: int, most: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from {least} to {most}.")
    return number
