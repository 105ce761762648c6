"""Run the command line as a user does: in a process of its own, with a cache folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Shoal = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder for models; empty."""
    return tmp_path / "models"


@pytest.fixture
def shoal(cache: Path, tmp_path: Path) -> Shoal:
    """``shoal("list", "--json")`` runs the command in ``tmp_path`` without network and gives the finished process."""

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
