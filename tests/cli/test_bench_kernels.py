"""``shoal bench kernels`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shoal
from tests.support.haste import hurry


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def test_kernels(shoal: Shoal, tmp_path: Path) -> None:
    flags = ["--type", "q4_0", "--rows", "1,2", "--shape", "32x64", "--cached-shape", "32x32", "--rounds", "1"]
    done = shoal("bench", "kernels", *flags, "--threads", "1", "--device", "reference", "--output-json", "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| Q4_0 |") == 5
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(p["place"], p["rows"]) for p in found["products"]] == [(p, n) for p in ("memory", "cache") for n in (1, 2)]


def test_attention_and_sampling(shoal: Shoal, tmp_path: Path) -> None:
    flags = ["--op", "attention,sample", "--rows", "2", "--heads", "4x2x16", "--context", "8,20", "--vocab", "99"]
    done = shoal("bench", "kernels", *flags, "--rounds", "1", "--device", "reference", "--output-json", "out.json")
    assert done.returncode == 0, done.stderr
    assert "**Sampling from 99 logits" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["context"] for row in found["attention"]] == [8, 20]
    assert len(found["samples"]) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--op", "linear,add"], "linear, attention, sample"),
        (["--heads", "9x3"], "HEADSxKV_HEADSxSIZE"),
        (["--heads", "9x2x64"], "9 heads cannot share 2 KV heads"),
        (["--type", "q4_9"], "'Q4_9'"),
        (["--shape", "4096"], "ROWSxCOLUMNS"),
        (["--shape", "0x32"], "ROWSxCOLUMNS"),
        (["--rows", "0"], "numbers from 1 to 4096"),
    ],
)
def test_kernels_that_cannot_be_are_one_line(shoal: Shoal, flags: list[str], message: str) -> None:
    done = shoal("bench", "kernels", "--device", "reference", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
