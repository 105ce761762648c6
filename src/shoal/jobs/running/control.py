"""Looking at a job from outside, and asking it to end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shoal.errors import JobError
from shoal.jobs.durable import journal, lock
from shoal.jobs.durable import manifest as manifests
from shoal.jobs.durable.ledger import Totals
from shoal.jobs.durable.manifest import Manifest
from shoal.jobs.input.streams import STANDARD_STREAM
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.summary import OVER, Summary


class JobStatus(Summary, frozen=True, kw_only=True):
    """A Summary so far, and the ``pid`` of the process that works on the job, None if there is none. A job that nobody works on and
    that has not come to its end is "interrupted"."""

    pid: int | None

    def lines(self) -> list[str]:
        """For people."""
        at_work = [] if self.pid is None else [f"process {self.pid} works on it"]
        return [*super().lines(), *at_work]


def status(output: Path) -> JobStatus:
    """How the job that writes ``output`` stands. Raises JobError where there is none."""
    folder = _folder(output)
    pid = lock.owner(folder)
    manifest, totals = _read(folder)
    state = "interrupted" if manifest.state == "running" and pid is None else manifest.state
    summary = Summary.of(
        totals,
        state=state,
        rows=manifest.rows,
        resumed=manifest.runs - 1,
        output=manifest.output,
        errors=manifest.errors,
    )
    return JobStatus(**msgspec.structs.asdict(summary), pid=pid)


def cancel(output: Path) -> int | None:
    """Ask the job that writes ``output`` to end: rows that are not finished get a record that says so.

    Returns the pid of the process that will do so within seconds, or None where none works on the job: then its next run does,
    at once. Raises JobError where there is no job, or nothing left of it to cancel.
    """
    folder = _folder(output)
    manifest, _ = _read(folder)
    if manifest.state in OVER:
        raise JobError(f"{output}: this job is {manifest.state} already")
    (folder / "cancel").touch()
    return lock.owner(folder)


def _folder(output: Path) -> Path:
    if not output.name:  # "." or "/"
        raise JobError(f"{output}: there is no job")
    return JobFiles.named(STANDARD_STREAM, output).folder


def _read(folder: Path) -> tuple[Manifest, Totals]:
    manifest = manifests.load(folder)
    if manifest is None:
        raise JobError(f"{folder}: there is no job")
    path = folder / "journal"
    if not path.exists():  # begun a moment ago
        return manifest, Totals()
    return manifest, journal.read(path, errors_apart=manifest.errors != manifest.output).state.totals
