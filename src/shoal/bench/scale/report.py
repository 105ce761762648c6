"""From measured costs to a cluster: throughput of each size, and what a job of so many rows needs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.bench.machine import cpu_name
from shoal.bench.markdown import table
from shoal.bench.scale.cluster import DriverCosts, Throughput, capacity, simulate
from shoal.bench.scale.costs import RowCosts, measure_costs
from shoal.version import __version__

_INDEX_BYTES = 28  # of a custom_id
_DAY = 86400.0
_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalePlan:
    """``sample_rows`` are measured for each number of ``workers``; ``row_rates`` are rows a second of one worker, ``rows`` those of the
    job. ``call_us`` and ``worker_us``: microseconds of Ray in the driver, for each call, and for each worker whenever it looks for
    answers."""

    rows: int = 1_000_000_000
    workers: Sequence[int] = (1, 10, 100, 1000)
    row_rates: Sequence[int] = (20, 200)
    sample_rows: int = 200_000
    call_us: int = 210
    worker_us: int = 3


@dataclass(frozen=True, slots=True)
class Cluster:
    """A simulated cluster: ``workers`` of ``rate`` rows a second each."""

    workers: int
    rate: int
    found: Throughput


@dataclass(frozen=True, slots=True)
class ScaleReport:
    """Costs by the number of workers, and what follows from them."""

    plan: ScalePlan
    costs: dict[int, RowCosts]
    clusters: Sequence[Cluster]

    def as_markdown(self) -> str:
        """Costs, clusters, and what the job of ``plan.rows`` leaves."""
        return "\n\n".join([self._head(), self._costs(), self._clusters(), self._needs()])

    def _head(self) -> str:
        ray = f"Ray: {self.plan.call_us} µs a call, {self.plan.worker_us} µs a worker and look"
        return f"shoal {__version__}, {cpu_name()}; {self.plan.sample_rows:,} rows measured for each number of workers. {ray}."

    def _costs(self) -> str:
        lines = [
            [workers, *(f"{figure * 1e6:.1f}" for figure in (costs.check, costs.work, costs.commit, costs.resume))]
            for workers, costs in self.costs.items()
        ]
        return table(["workers", "check µs a row", "work µs a row", "of it commits", "resume µs a row"], lines)

    def _clusters(self) -> str:
        lines = [
            [
                cluster.rate,
                cluster.workers,
                f"{cluster.found.rows:,.0f}",
                f"{100 * cluster.found.rows / (cluster.rate * cluster.workers):.0f} %",
                f"{100 * cluster.found.busy:.1f} %",
                f"{self.plan.rows / cluster.found.rows / _DAY:,.1f}",
            ]
            for cluster in self.clusters
        ]
        days = f"days for {self.plan.rows:,} rows"
        return table(["rows/s of a worker", "workers", "rows/s", "of what they could", "driver busy", days], lines)

    def _needs(self) -> str:
        """Where the driver has no time left, and what a job of all rows leaves."""
        largest = self.costs[max(self.costs)]
        limits = {rate: capacity(self._driver(largest), rate) for rate in self.plan.row_rates}
        ends = ", ".join(f"{limit / rate:,.0f} workers of {rate} rows/s" for rate, limit in limits.items())
        rows = self.plan.rows
        return (
            f"The driver has no time left with {ends}. {rows:,} rows: {rows * largest.check / _HOUR:.1f} h of checks before the first,"
            f" if their index ({rows * _INDEX_BYTES / 1e9:.0f} GB on disk, deleted afterwards) fits in memory;"
            f" {rows * largest.journal / 1e9:.1f} GB of journal, {rows / 8e6:,.1f} MB of memory for the set of finished rows,"
            f" {rows * largest.resume / _HOUR:.1f} h until a driver that is started again has looked through its results."
        )

    def _driver(self, costs: RowCosts) -> DriverCosts:
        return DriverCosts(costs.work, self.plan.call_us / 1e6, self.plan.worker_us / 1e6)

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""
        return {
            "version": __version__,
            "cpu": cpu_name(),
            "plan": asdict(self.plan),
            "costs": {str(workers): asdict(costs) for workers, costs in self.costs.items()},
            "clusters": [asdict(cluster) for cluster in self.clusters],
        }


def measure_scale(plan: ScalePlan, say: Callable[[str], None]) -> ScaleReport:
    """Measure what rows cost the driver here, and simulate the clusters of ``plan``; ``say`` hears how it goes.

    Files are written to the system's folder for temporary ones ($TMPDIR). Raises EngineError where a row is lost.
    """
    costs: dict[int, RowCosts] = {}
    for workers in plan.workers:
        with tempfile.TemporaryDirectory(prefix="shoal-scale-") as folder:
            costs[workers] = measure_costs(Path(folder), plan.sample_rows, workers)
        say(f"scale: {workers} workers, {costs[workers].work * 1e6:.1f} µs of the driver a row")
    report = ScaleReport(plan, costs, ())
    return ScaleReport(
        plan, costs, [_simulated(report, rate, size) for rate in plan.row_rates for size in plan.workers]
    )


def _simulated(report: ScaleReport, rate: int, workers: int) -> Cluster:
    return Cluster(workers, rate, simulate(report._driver(report.costs[workers]), workers, rate))
