"""``shoal bench scale`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Shoal


def test_scale(shoal: Shoal, tmp_path: Path) -> None:
    sizes = ["--workers", "2,30", "--row-rates", "20", "--sample-rows", "200", "--rows", "5000"]
    done = shoal("bench", "scale", *sizes, "--output-json", "out.json")
    assert done.returncode == 0, done.stderr
    assert (
        "| rows/s of a worker | workers | rows/s | of what they could | driver busy | days for 5,000 rows |"
        in done.stdout
    )
    assert [line.split(",")[0] for line in done.stderr.splitlines()] == ["scale: 2 workers", "scale: 30 workers"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["costs"].keys() == {"2", "30"}
    assert len(found["clusters"]) == 2


def test_no_workers_are_one_line(shoal: Shoal) -> None:
    done = shoal("bench", "scale", "--workers", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'0' is not numbers from 1 to 100000 with commas between them" in done.stderr
