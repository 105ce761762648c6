"""``shoal bench jobs`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Shoal
from tests.support.tiny_model import write_tiny_model


def test_jobs(shoal: Shoal, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    journal = ["--journal-rows", "3", "--prompt-len", "8", "--output-len", "2"]
    sizes = [*journal, "--prefix-rows", "3", "--system-len", "40", "--rounds", "1"]
    done = shoal("bench", "jobs", model, *sizes, "--device", "reference", "--output-json", "out.json")
    assert done.returncode == 0, done.stderr
    assert "**Journal**: 3 rows, 24 prompt and 6 generated tokens" in done.stdout
    assert "**Shared prefix**: 3 rows, " in done.stdout
    assert "**Memory**" not in done.stdout
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["journal 1/1", "prefix 1/1"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["journal"]["overhead_percent"] > -100
    assert found["prefix"]["ratio"] > 0


def test_what_cannot_be_measured_is_one_line(shoal: Shoal) -> None:
    done = shoal("bench", "jobs", "--what", "journal,speed")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "'journal,speed' is not some of journal, prefix, memory with commas between them" in done.stderr
