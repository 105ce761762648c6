"""What Ray's dashboard and its Prometheus endpoint show of a job's workers."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

_BY_WORKER = ("worker",)


class FleetMetrics:
    """Counts rows and tokens by worker, and workers and rows that were lost. Ray adds ``ray_`` in front of the names."""

    def __init__(self, workers: int) -> None:
        self._rows = Counter("shoal_job_rows", "Rows that have come to their end.", _BY_WORKER)
        self._failed = Counter("shoal_job_rows_failed", "Rows that have failed.", _BY_WORKER)
        self._tokens = Counter("shoal_job_generated_tokens", "Generated tokens.", _BY_WORKER)
        self._held = Gauge("shoal_job_rows_running", "Rows that workers hold or are about to get.")
        self._lost = Gauge("shoal_job_workers_lost", "Workers that were lost.")
        self._returned = Gauge("shoal_job_rows_returned", "Times that a row was put back in line.")
        Gauge("shoal_job_workers", "Workers that there are to be.").set(workers)

    def count(self, worker: str, rows: int, failed: int, tokens: int) -> None:
        """Count what a worker has given back."""
        tags = {"worker": worker}
        for counter, value in ((self._rows, rows), (self._failed, failed), (self._tokens, tokens)):
            if value:
                counter.inc(value, tags)

    def show(self, running: int, lost: int, returned: int) -> None:
        """What is so now."""
        self._held.set(running)
        self._lost.set(lost)
        self._returned.set(returned)
