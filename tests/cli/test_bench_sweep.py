"""``shoal bench sweep`` as a user runs it, and what ``shoal inspect`` makes of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shoal
from tests.support.haste import hurry
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


SWEEP = ("--batch", "1,2", "--prompt-len", "3", "--output-len", "2", "--rounds", "1", "--device", "reference")


def test_sweep_and_what_inspect_says_of_it(shoal: Shoal, tiny: Path, tmp_path: Path) -> None:
    before = shoal("inspect", tiny, "--device", "reference")
    assert f"`shoal bench sweep {tiny}` measures it" in before.stdout
    done = shoal("bench", "sweep", tiny, *SWEEP, "-o", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "out" / "sweep.md").read_text()
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["cells"]) == 2
    plotted = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "out" / "tiny.png").exists() == plotted
    assert ("pip install 'shoal[bench]'" in done.stderr) != plotted
    after = shoal("inspect", tiny, "--device", "reference")
    assert "  prompts of 3  1: 1.00  2: " in after.stdout
    again = shoal("bench", "sweep", tiny, *SWEEP, "-o", "out")
    assert again.stderr.count("(measured before)") == 2
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["absent.gguf"], "absent.gguf: no such file"),
        (["absent.gguf", "--batch", "0"], "numbers from 1 to 256"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(shoal: Shoal, arguments: list[str], message: str) -> None:
    done = shoal("bench", "sweep", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
