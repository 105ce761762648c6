"""Looking at a job from outside, and asking it to end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shoal.errors import JobError
from shoal.jobs import journal, lock
from shoal.jobs import manifest as manifests
from shoal.jobs.files import JobFiles
from shoal.jobs.ledger import Totals
from shoal.jobs.manifest import Manifest
from shoal.jobs.summary import OVER


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a job stands: ``state`` as in Summary, where one that no process works on any more is "interrupted"; ``pid`` of the
    process that does; durable ``done`` and ``failed`` rows, of ``rows`` in the input (None: not known)."""

    state: str
    pid: int | None
    rows: int | None
    done: int
    failed: int
    retried: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    seconds: float
    runs: int
    output: str
    errors: str

    def line(self) -> str:
        """For people."""
        at_work = "" if self.pid is None else f" (process {self.pid})"
        of = "" if self.rows is None else f" of {self.rows}"
        return (
            f"{self.state}{at_work}: {self.done} rows done, {self.failed} failed{of}; {self.prompt_tokens} prompt and"
            f" {self.generated_tokens} generated tokens in {self.seconds:.1f} s; runs: {self.runs}"
        )


def status(output: Path) -> JobStatus:
    """How the job that writes ``output`` stands. Raises JobError where there is none."""
    folder = _folder(output)
    pid = lock.owner(folder)
    manifest, totals = _read(folder)
    state = "interrupted" if manifest.state == "running" and pid is None else manifest.state
    return JobStatus(
        state=state,
        pid=pid,
        rows=manifest.rows,
        done=totals.done,
        failed=totals.failed,
        retried=totals.retried,
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=totals.cached_tokens,
        generated_tokens=totals.generated_tokens,
        seconds=round(totals.seconds, 3),
        runs=manifest.runs,
        output=manifest.output,
        errors=manifest.errors,
    )


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
    return JobFiles.named(Path(), output).folder


def _read(folder: Path) -> tuple[Manifest, Totals]:
    manifest = manifests.load(folder)
    if manifest is None:
        raise JobError(f"{folder}: there is no job")
    path = folder / "journal"
    if not path.exists():  # begun a moment ago
        return manifest, Totals()
    return manifest, journal.read(path, errors_apart=manifest.errors != manifest.output).state.totals
