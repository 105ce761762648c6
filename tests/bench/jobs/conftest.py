"""A vocabulary for models that are made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.text import tiny


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    return tiny.byte_level(tmp_path / "vocabulary.gguf")
