"""``shoal bench soak`` as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.bench.serve.stub import Request, Stub, good, whole
from tests.cli.conftest import Shoal

SOAK = ["--minutes", "0.005", "--warmup-minutes", "0.005", "--interval", "0.1", "--pause", "0.05", "--concurrency", "2"]


def test_soak(shoal: Shoal, tmp_path: Path) -> None:
    def answer(request: Request) -> list[bytes]:
        return good(request) if request.method == "GET" else [whole({}, 500)]

    with Stub(answer) as stub:
        flags = ["--pid", str(os.getpid()), *SOAK, "--output-json", "out.json"]
        done = shoal("bench", "soak", "--base-url", stub.url, *flags)
    assert done.returncode == 1, done.stderr
    assert "\nNO: no failures\n" in f"{done.stdout}\n"
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["held"], found["no_failures"]) == (False, False)
    assert found["failed"] > 0


def test_a_soak_needs_a_process(shoal: Shoal) -> None:
    done = shoal("bench", "soak")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Missing option '--pid'" in done.stderr
