"""Run the command line as a user does, with a cache folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cli.main import main

Shoal = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder for models; empty."""
    return tmp_path / "models"


@pytest.fixture
def shoal(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shoal:
    """``shoal("list", "--json")`` is the command in ``tmp_path`` without network: what it returns and writes.

    It runs in the tests' own process, as importing takes longer than most commands; ``shoal_process`` is for the rest.
    """

    def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        with monkeypatch.context() as patch, tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            file.write(stdin)
            file.seek(0)
            patch.chdir(tmp_path)
            for name, value in environment(cache).items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", file)
            code = main(list(map(str, arguments)))
        return subprocess.CompletedProcess(arguments, code, *capfd.readouterr())

    return run


@pytest.fixture
def shoal_process(cache: Path, tmp_path: Path) -> Shoal:
    """The same in a process of its own."""

    def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shoal.cli.main", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(cache),
            timeout=120,
            check=False,
        )

    return run


def environment(cache: Path) -> dict[str, str]:
    """This process's environment, with models in ``cache``, and pip and PyPI out of reach."""
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "https_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    return {**os.environ, **offline, "SHOAL_CACHE": str(cache), "SHOAL_BENCH_CACHE": str(cache / "bench")}
