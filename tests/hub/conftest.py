"""A Hub on loopback: pushes run in this process, loads in fresh ones with an empty cache."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import datasets
import pytest
from fakehub import FakeHub
from huggingface_hub import constants

SOURCE = Path(__file__).resolve().parents[2] / "src"


class HubUnderTest(FakeHub):
    """A Hub, and processes that talk to it."""

    def __init__(self, home: Path, **options):
        super().__init__(**options)
        self.home = home

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Environment of a process whose Hub this is; None takes a variable away."""
        wanted = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1" if self.lfs else None,
            "HF_HUB_OFFLINE": None,
            "HF_TOKEN": None,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": str(SOURCE),
            "OMP_NUM_THREADS": "1",
        } | changes
        environment = {name: value for name, value in os.environ.items() if name not in wanted}
        return environment | {name: value for name, value in wanted.items() if value is not None}

    def python(self, code: str, *arguments, package: bool = True, **changes) -> subprocess.CompletedProcess:
        """Run code in a fresh process; without the package where ``package`` is False."""
        command = [sys.executable]
        if not package:  # no site module: the installed packages, but not what .pth files add
            command.append("-S")
            changes["PYTHONPATH"] = sysconfig.get_paths()["purelib"]
        return subprocess.run(
            [*command, "-c", code, *map(str, arguments)],
            env=self.environment(**changes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )


def use(hub: FakeHub, cache: Path, monkeypatch) -> None:
    """Point this process's client at a Hub; it reads its settings once, at import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", hub.lfs)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that takes weights and pictures through LFS."""
    with HubUnderTest(tmp_path / "home") as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def hub_without_lfs(tmp_path, monkeypatch):
    """A Hub that takes every file inline, so that Xet can be on."""
    with HubUnderTest(tmp_path / "home", lfs=False) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub
