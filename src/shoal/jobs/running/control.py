"""Looking at a job from outside, and asking it to end."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shoal.errors import JobError
from shoal.jobs.durable.manifest import Manifest
from shoal.jobs.running.files import place_of
from shoal.jobs.running.place import Owner, Place
from shoal.jobs.running.summary import OVER, Summary


class JobStatus(Summary, frozen=True, kw_only=True):
    """A Summary so far, and the ``pid`` of the process that works on the job, None if there is none; its ``host``, None if that is this
    machine. A job that nobody works on and that has not come to its end is "interrupted"."""

    pid: int | None
    host: str | None = None

    def lines(self) -> list[str]:
        """For people."""
        at_work = [] if self.pid is None else [f"{Owner(self.pid, self.host)} works on it"]
        return [*super().lines(), *at_work]


def status(output: str | Path) -> JobStatus:
    """How the job that writes ``output`` stands, a file, folder or URL. Raises JobError where there is none."""
    place = _place(output)
    owner = place.owner()
    manifest = _manifest(place)
    state = "interrupted" if manifest.state == "running" and owner is None else manifest.state
    summary = Summary.of(
        place.totals(manifest),
        state=state,
        rows=manifest.rows,
        resumed=manifest.runs - 1,
        output=manifest.output,
        errors=manifest.errors,
    )
    return JobStatus(**msgspec.structs.asdict(summary), **({"pid": None} if owner is None else owner._asdict()))


def cancel(output: str | Path) -> int | None:
    """Ask the job that writes ``output`` to end: rows that are not finished get a record that says so.

    Returns the pid of the process that will do so within seconds, or None where none works on the job: then its next run does,
    at once. Raises JobError where there is no job, or nothing left of it to cancel.
    """
    owner = ask_to_end(output)
    return None if owner is None else owner.pid


def ask_to_end(output: str | Path) -> Owner | None:
    """As ``cancel``, but returns who will do so."""
    place = _place(output)
    manifest = _manifest(place)
    if manifest.state in OVER:
        raise JobError(f"{place.output}: this job is {manifest.state} already")
    place.ask_to_end()
    return place.owner()


def _place(output: str | Path) -> Place:
    place = place_of(output)
    if not place.has_journal:
        raise JobError(f"{output}: there is no job")
    return place


def _manifest(place: Place) -> Manifest:
    manifest = place.manifest()
    if manifest is None:
        raise JobError(f"{place.output}: there is no job")
    return manifest
