"""Two real server processes for all tests of this folder: a tiny model for the form of answers, SmolLM2 where they must make sense."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.tiny_model import write_tiny_model

KEY = "sk-of-the-tests"


@dataclass(frozen=True)
class Served:
    """A server process: ``url`` without /v1, the ``model`` it serves (also as "alias"), the ``key`` that it asks for."""

    url: str
    model: str
    key: str = KEY

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        response = httpx.get(self.url + path, headers={"authorization": f"Bearer {self.key}"}, timeout=None)
        response.raise_for_status()
        return response.json()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it; a test that waits in vain is ended by the limit of all tests."""
    while not condition():
        time.sleep(0.01)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model of a token a byte, whose texts are noise. 512 tokens of context."""
    folder = tmp_path_factory.mktemp("tiny")
    path = write_tiny_model(folder / "tiny.gguf")
    with _served(path, "tiny", folder, "--device", "reference", "--max-num-seqs", "8", "--max-waiting", "32") as served:
        yield served


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """SmolLM2 135M, 2,048 tokens of context."""
    folder = tmp_path_factory.mktemp("smollm2")
    with _served(smollm2_path, "smollm2", folder, "--max-model-len", "2048", "--max-num-seqs", "8") as served:
        yield served


@contextlib.contextmanager
def _served(path: Path, name: str, folder: Path, *flags: str) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "shoal.cli.main",
        "serve",
        str(path),
        "--port",
        str(port),
        "--data-dir",
        str(folder),
    ]
    names = ("--served-model-name", name, "--served-model-name", "alias")
    log = folder / "stderr"
    environment = os.environ | {"SHOAL_API_KEY": KEY}
    with (
        log.open("wb") as stderr,
        subprocess.Popen([*command, *names, *flags], env=environment, stderr=stderr) as process,
    ):
        try:
            until(lambda: _is_well(f"http://127.0.0.1:{port}", process, log))
            yield Served(f"http://127.0.0.1:{port}", name)
        finally:
            process.terminate()
    assert process.returncode == 0, log.read_text()


def _is_well(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return httpx.get(f"{url}/health", timeout=None).is_success
    except httpx.TransportError:
        return False
