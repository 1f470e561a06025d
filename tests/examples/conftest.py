"""Commands run in the tests' own process."""

import runpy
import sys
from pathlib import Path

import pytest
from scripts import load_script

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run a command in this process; returns what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(capsys):
    """What a command that ends with exit code 2 said; its first argument runs it."""

    def refuse(run, *command):
        with pytest.raises(SystemExit) as caught:
            run(*command)
        assert caught.value.code == 2
        return capsys.readouterr().err

    return refuse


@pytest.fixture(scope="module")
def app():
    """The page's module."""
    pytest.importorskip("gradio")
    return load_script("examples/app.py")
