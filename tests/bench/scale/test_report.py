"""Rows that are measured are those of a real job, and what is said follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.bench.scale.cluster import DriverCosts, simulate
from shoal.bench.scale.costs import measure_costs
from shoal.bench.scale.report import ScalePlan, measure_scale
from shoal.errors import EngineError
from shoal.jobs.durable.ledger import Ledger


def test_all_rows_are_run_and_committed(tmp_path: Path) -> None:
    costs = measure_costs(tmp_path, 300, 7)
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 300
    with Ledger.open(tmp_path / "out.shoal", tmp_path / "out.jsonl", tmp_path / "out.errors") as ledger:
        assert (ledger.totals.done, len(ledger.finished)) == (300, 300)
    assert 0 < costs.commit < costs.work
    assert min(costs.check, costs.resume) > 0
    assert 44 <= costs.journal < 50


def test_a_row_that_is_lost_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "commit", lambda ledger: None)
    with pytest.raises(EngineError, match="the job ended finished, with 0 of 30 rows"):
        measure_costs(tmp_path, 30, 2)


def test_what_is_simulated_is_what_was_measured() -> None:
    said: list[str] = []
    plan = ScalePlan(rows=1_000_000, workers=(2, 300), row_rates=(20,), sample_rows=100, call_us=200, worker_us=5)
    report = measure_scale(plan, said.append)
    assert [line.split(",")[0] for line in said] == ["scale: 2 workers", "scale: 300 workers"]
    assert [(cluster.workers, cluster.rate) for cluster in report.clusters] == [(2, 20), (300, 20)]
    for cluster in report.clusters:
        costs = DriverCosts(report.costs[cluster.workers].work, 200e-6, 5e-6)
        assert cluster.found == simulate(costs, cluster.workers, 20)
    text = report.as_markdown()
    assert "| 20 | 300 |" in text
    assert "days for 1,000,000 rows" in text
    assert "0.1 MB of memory for the set of finished rows" in text
    assert report.as_json()["plan"]["row_rates"] == (20,)
