"""``shoal bench constraints`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Shoal
from tests.support.tiny_model import write_tiny_model


def test_constraints(shoal: Shoal, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    flags = ["--rows", "2", "--steps", "2", "--rounds", "1", "--device", "reference", "--output-json", "out.json"]
    done = shoal("bench", "constraints", model, *flags)
    assert done.returncode == 0, done.stderr
    assert "2 rows each under its own: " in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == 2
