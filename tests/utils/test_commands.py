"""What all commands share: lines, exit codes, and checks before anything slow."""

import argparse
import errno
import json
import os
import sys
import zipfile
from pathlib import Path

import huggingface_hub.errors
import pytest
import torch
import yaml
from safetensors import SafetensorError

from dar_hf.data import DataError
from dar_hf.evaluation import ReconstructionArguments
from dar_hf.training import TokenizerArguments
from dar_hf.training.extraction import ExtractArguments
from dar_hf.utils import commands
from dar_hf.utils.commands import CommandError, check_output, command, device_option, ending_with, exit_code, explain


def ended(error, code=2, capsys=None):
    """Exit code and line of a command that raises this."""

    @command("x.py", code)
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err


def json_error():
    try:
        json.loads("{")
    except ValueError as error:
        return error


def unicode_error():
    try:
        b"\xff".decode()
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("a\n  b"), 2, "a b"),
        (CommandError("wrong"), 2, "wrong"),
        (CommandError("wrong", 7), 7, "wrong"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "'/x'"),
        (OSError(errno.EROFS, "Read-only file system"), 1, "Read-only"),
        (ImportError("pip install this"), 2, "pip install"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "allocate"),
        (RuntimeError("Error(s) in loading state_dict for X:\n\tsize mismatch"), 1, "size mismatch"),
        (RuntimeError("std::bad_alloc"), 1, "bad_alloc"),
        (RuntimeError("Could not determine home directory."), 1, "home directory"),
        (RuntimeError("Expected one of cpu device type at start of device string: x"), 1, "device string"),
        (AssertionError("Torch not compiled with CUDA enabled"), 2, "CUDA"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 1, "failed writing"),
        (SafetensorError("HeaderTooLarge"), 2, "HeaderTooLarge"),
        (zipfile.BadZipFile("File is not a zip file"), 2, "not a zip file"),
        (yaml.YAMLError("mapping values"), 2, "mapping values"),
        (huggingface_hub.errors.RevisionResolutionError("no such branch"), 2, "no such branch"),
        (huggingface_hub.errors.HFValidationError("bad id"), 2, "bad id"),
        (huggingface_hub.utils.httpx.ConnectError("no network"), 2, "no network"),
        (DataError("no image can be read"), 1, "no image"),
        (EOFError(), 2, "EOFError"),
        (json_error(), 2, "Expecting property name"),
        (unicode_error(), 2, "can't decode"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_known_errors_are_one_line(capsys, error, code, text):
    found, said = ended(error, 2, capsys)
    assert found == code and said.startswith("x.py: ") and text in said
    assert said.count("\n") == 1 and said.endswith("\n")


def test_the_code_of_mistakes_is_the_command_s_own(capsys):
    assert ended(ValueError("x"), 1, capsys)[0] == 1
    assert exit_code(CommandError("x"), 1) == 1


@pytest.mark.parametrize(
    "error",
    [KeyError("name"), TypeError("x"), AttributeError("x"), IndexError("x"), AssertionError("x"), RuntimeError("x")],
)
def test_faults_of_the_program_keep_their_traceback(error):
    assert explain(error) is None

    @command("x.py")
    def main():
        raise error

    with pytest.raises(type(error)) as caught:
        main()
    assert caught.value is error


def test_tracebacks_on_request(monkeypatch):
    monkeypatch.setenv("DAR_HF_DEBUG", "1")

    @command("x.py")
    def main():
        raise ValueError("x")

    with pytest.raises(ValueError):
        main()


def test_an_interruption_is_one_line(capsys):
    assert ended(KeyboardInterrupt(), 2, capsys) == (130, "x.py: interrupted.\n")


def test_arguments_and_exits_pass_through():
    @command("x.py")
    def main(argv):
        sys.exit(argv)

    with pytest.raises(SystemExit) as caught:
        main(5)
    assert caught.value.code == 5 and main.__name__ == "main"


def test_a_pipe_that_was_closed_ends_in_silence(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)

    @command("x.py")
    def main():
        print("x")

    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 141 and capsys.readouterr().err == ""


def test_a_full_disk_under_the_output_is_one_line(monkeypatch, capsys):
    @command("x.py")
    def main():
        print("x")

    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 1 and "No space left" in capsys.readouterr().err


def test_a_network_s_broken_pipe_is_said(capsys):
    code, said = ended(BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, capsys)
    assert code == 2 and "Broken pipe" in said


def test_parts_of_a_command_have_their_own_code():
    with pytest.raises(CommandError) as caught, ending_with(1):
        raise ValueError("x")
    assert exit_code(caught.value) == 1
    for error in (KeyError("x"), CommandError("x", 3), ValueError("kept")):
        with pytest.raises(type(error)) as caught, ending_with(1, keep=(ValueError,)):
            raise error
        assert caught.value is error


def test_what_cannot_be_written_is_named():
    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error"), ValueError("x")):
        with pytest.raises(CommandError, match="cannot write out: ") as caught, commands.writing("out"):
            raise error
        assert caught.value.code == 1
    with pytest.raises(KeyError), commands.writing("out"):
        raise KeyError


def test_places_to_write_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for path in (tmp_path, tmp_path / "new", tmp_path / "new" / "newer"):
        check_output(path)
    for path in (tmp_path / "file", tmp_path / "new" / "file"):
        check_output(path, folder=False)
    monkeypatch.chdir(tmp_path)
    check_output("new")
    check_output("new.png", folder=False)
    for path in ("file", "file/x", "file/x/y", "link", "link/x"):
        with pytest.raises(CommandError, match="not a folder"):
            check_output(path)
    for path, message in ((tmp_path, "is a folder"), ("/dev/full", "no regular file"), ("file/x", "not a folder")):
        with pytest.raises(CommandError, match=message):
            check_output(path, folder=False)
    for path in ("n" * 300, "n" * 300 + "/x"):
        with pytest.raises(CommandError, match="File name too long"):
            check_output(path)
    with pytest.raises(CommandError, match="cannot write /proc/x"):
        check_output("/proc/x")
    assert sorted(tmp_path.iterdir()) == before

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commands.tempfile, "TemporaryFile", full)
    with pytest.raises(CommandError, match="cannot write new: .*No space left") as caught:
        check_output("new")
    assert caught.value.code == 1


def test_devices(monkeypatch):
    assert device_option("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    for name in ("cuda", "cuda:0", "mps", "meta"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"there is no device '{name}' here: give cpu"):
            device_option(name)
    for name in ("gpu", "", "0", "cuda:-1", "cuda:x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no device"):
            device_option(name)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert device_option("cuda:0") == torch.device("cuda:0")
    with pytest.raises(argparse.ArgumentTypeError, match="only 1"):
        device_option("cuda:1")
    with pytest.raises(argparse.ArgumentTypeError, match="cpu or cuda"):
        device_option("mps")


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert [commands.path_option(path) for path in ("~/x", "x/~", ".")] == [
        Path("/home/ada/x"),
        Path("x/~"),
        Path("."),
    ]
    with pytest.raises(argparse.ArgumentTypeError, match="a path is empty"):
        commands.path_option("")


@pytest.mark.parametrize(
    "arguments_class, options",
    [
        (TokenizerArguments, {}),
        (ReconstructionArguments, {"pipeline": "x", "dataset_name": "digits"}),
        (ExtractArguments, {"tokenizer": "x", "dataset_name": "digits"}),
    ],
)
def test_the_home_folder_in_options_that_no_shell_read(arguments_class, options, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert arguments_class(output_dir="~/run", **options).output_dir == "/home/ada/run"
    with pytest.raises(ValueError, match="a path is empty"):
        arguments_class(output_dir="", **options)


def test_numbers():
    assert [commands.positive_option("3"), commands.seed_option("-3"), commands.port_option("80")] == [3, -3, 80]
    for kind, values in (
        (commands.positive_option, ("0", "-1", "x", "1.5", "")),
        (commands.seed_option, ("x", "1.5", str(2**64))),
        (commands.port_option, ("0", "65536", "-1")),
    ):
        for value in values:
            with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
                kind(value)
