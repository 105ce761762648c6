"""``shoal bench startup`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Shoal
from tests.support.tiny_model import write_tiny_model


def test_startup(shoal: Shoal, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    flags = ["--rounds", "1", "--device", "reference", "--output-json", "out.json"]
    done = shoal("bench", "startup", model, *flags)
    assert done.returncode == 0, done.stderr
    assert "| import shoal | " in done.stdout
    assert "| **to the first token** | " in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert 0 < found["import_shoal_seconds"] < found["warm_seconds"]


def test_a_model_that_is_not_there_is_one_line(shoal: Shoal) -> None:
    done = shoal("bench", "startup", "absent.gguf")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("shoal: absent.gguf: no such file")
    assert len(done.stderr.splitlines()) == 1
