"""These tests need s3fs and moto's server, which the README's command does not install."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.jobs.stores.s3 import S3

_INSTALLED = all(importlib.util.find_spec(name) for name in ("s3fs", "moto", "flask"))
collect_ignore_glob = [] if _INSTALLED else ["test_*.py"]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    from tests.jobs.stores.s3 import S3

    with S3() as server:
        yield server


@pytest.fixture
def _at_s3(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds it where others find Amazon's."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)
