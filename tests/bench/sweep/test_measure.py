"""``shoal bench sweep``: cells, their figures, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal.bench.factor import last_measured
from shoal.bench.sweep.measure import Cell, Setup, SweepPlan, sweep
from shoal.bench.sweep.report import as_markdown
from shoal.bench.turns import Worker
from shoal.errors import EngineError, ParameterError
from shoal.kernels.reference import ReferenceBackend
from tests.support.haste import hurry


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_BENCH_CACHE", str(tmp_path / "bench"))


def plan(*models: Path, **settings: Any) -> SweepPlan:
    small: dict[str, Any] = {
        "batches": (1, 3),
        "prompt_lens": (1, 5),
        "output_len": 2,
        "rounds": 2,
        "threads": 1,
        "device": "reference",
    }
    return SweepPlan(models=models, **(small | settings))


def silent(line: str) -> None:
    """For progress that no test reads."""


@dataclass(frozen=True)
class Whole:
    """The sweep of ``plan`` when nothing was measured before: in ``folder`` its results, in ``cache`` the factors."""

    folder: Path
    cells: list[Cell]
    said: list[str]

    @property
    def cache(self) -> Path:
        return self.folder / "cache"


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    found = Whole(tmp_path_factory.mktemp("whole"), [], [])
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setenv("SHOAL_BENCH_CACHE", str(found.cache))
        found.cells.extend(sweep(plan(tiny), found.folder, found.said.append))
    return found


def test_every_cell_is_measured(whole: Whole) -> None:
    cells, said = whole.cells, whole.said
    assert [(c.setup.prompt_len, c.setup.batch) for c in cells] == [(1, 1), (1, 3), (5, 1), (5, 3)]
    assert said[-1] == "tiny.gguf 4/4: 3 x 5 tokens"
    cell = cells[-1]
    assert len(cell.prefill_seconds) == len(cell.decode_seconds) == len(cell.cpu_seconds) == 2
    assert len(cell.step_seconds) == 4
    assert cell.peak_rss > cell.kv_bytes > 0
    assert cells[0].kv_bytes < cell.kv_bytes
    saved = json.loads((whole.folder / "sweep.json").read_text())["cells"]
    assert [Cell.from_json(found) for found in saved] == cells


def test_what_is_there_is_not_measured_again(
    tiny: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed has left whole cells, and perhaps a file that it was writing."""
    results = tmp_path / "sweep.json"
    saved = json.loads((whole.folder / "sweep.json").read_text())
    results.write_text(json.dumps({"cells": saved["cells"][:3]}))
    (tmp_path / "sweep.json.123.tmp").write_text('{"cells": [{"setu')
    asked = _count_turns(monkeypatch)
    said: list[str] = []
    again = sweep(plan(tiny), tmp_path, said.append)
    assert again[:3] == whole.cells[:3]
    assert [line.endswith("(measured before)") for line in said] == [True, True, True, False]
    assert len(asked) == 1 + 2  # one warms up
    assert len(json.loads(results.read_text())["cells"]) == 4


def _count_turns(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    asked: list[None] = []
    ask = Worker.ask

    def count(self: Worker, turn: Any) -> Any:
        asked.append(None)
        return ask(self, turn)

    monkeypatch.setattr(Worker, "ask", count)
    return asked


def test_another_setup_is_another_cell(tiny: Path, tmp_path: Path) -> None:
    one = {"batches": (1,), "prompt_lens": (1,), "rounds": 1}
    sweep(plan(tiny, **one), tmp_path, silent)
    said: list[str] = []
    sweep(plan(tiny, **(one | {"output_len": 3})), tmp_path, said.append)
    assert said == ["tiny.gguf 1/1: 1 x 1 tokens"]
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 2


def test_cells_before_one_that_fails_are_kept(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="max_model_len"):
        sweep(plan(tiny, batches=(1,), prompt_lens=(1, 600)), tmp_path, silent)  # the model's context is 512
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 1


def test_the_factors_are_remembered(tiny: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = whole.cells
    monkeypatch.setenv("SHOAL_BENCH_CACHE", str(whole.cache))
    found = last_measured(tiny, ReferenceBackend().describe())
    assert found is not None
    assert found.date == max(cell.date for cell in cells)
    rate = {(c.setup.prompt_len, c.setup.batch): c.decode.median for c in cells}
    assert found.factors == {n: {1: 1.0, 3: pytest.approx(rate[n, 3] / rate[n, 1])} for n in (1, 5)}


def test_without_one_sequence_alone_there_is_no_factor(tiny: Path, tmp_path: Path) -> None:
    sweep(plan(tiny, batches=(2,), prompt_lens=(1,), rounds=1), tmp_path, silent)
    assert last_measured(tiny, ReferenceBackend().describe()) is None


def test_two_models_with_one_name_are_refused(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / tiny.name
    other.parent.mkdir()
    shutil.copy(tiny, other)
    with pytest.raises(ParameterError, match="different names"):
        sweep(plan(tiny, other), tmp_path, silent)


@pytest.mark.parametrize("text", ["", "[1]", '{"cells": ['])
def test_results_of_something_else_are_left_alone(tiny: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ParameterError, match=r"sweep\.json.*move this file away"):
        sweep(plan(tiny), tmp_path, silent)
    assert (tmp_path / "sweep.json").read_text() == text


def cell(batch: int, seconds: float, prompt_len: int = 10, model: str = "m.gguf") -> Cell:
    """Two rounds of 20 steps, the second half as fast; 3 threads that are busy half the time."""
    setup = Setup(model, "f", "Some CPU", "cpu: kernels", "1.0", 3, batch, prompt_len, 20, 2)
    return Cell(
        setup=setup,
        date="2030",
        prefill_seconds=[1.0, 2.0],
        decode_seconds=[seconds, 2 * seconds],
        step_seconds=[seconds / 20] * 20 + [seconds / 10] * 20,
        cpu_seconds=[1.5 * (1 + seconds), 1.5 * (2 + 2 * seconds)],
        peak_rss=400_000_000,
        kv_bytes=100_000_000,
    )


def test_a_cells_figures() -> None:
    found = cell(4, 2.0)
    assert (found.prefill.median, found.prefill.low, found.prefill.high) == (30, 20, 40)
    assert (found.decode.median, found.decode.low, found.decode.high) == (30, 20, 40)
    assert found.step_median == pytest.approx(0.15)
    assert found.step_p90 == pytest.approx(0.2)
    assert found.cpu_share == pytest.approx(0.5)


def test_markdown_has_a_table_a_model() -> None:
    text = as_markdown([cell(1, 1.0), cell(4, 2.0), cell(4, 2.0, prompt_len=99), cell(1, 1.0, model="n.gguf")])
    assert text.startswith(
        "**m.gguf**, shoal 1.0, cpu: kernels, Some CPU; 20 decode steps, medians (min-max) of 2 rounds."
    )
    assert text.count("| prompt | sequences |") == 2
    assert "| 10 | 4 | 30 (20-40) | 30 (20-40) | 2.00 | 150.00 | 200.00 | 50% | 400 | 100 |" in text.splitlines()
    assert "| 99 | 4 | 297 (198-396) | 30 (20-40) |  | 150.00 | 200.00 | 50% | 400 | 100 |" in text.splitlines()
