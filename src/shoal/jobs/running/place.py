"""Where the output of a job is, with all that is kept there: beside single files, or in a folder of parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from shoal.jobs.durable.ledger import Ledger, Totals
from shoal.jobs.durable.manifest import Manifest
from shoal.jobs.durable.parts import PartLedger
from shoal.jobs.input.inputs import Inputs


class Owner(NamedTuple):
    """The process that works on a job; ``pid`` 0 if that cannot be told, ``host`` None for this machine."""

    pid: int
    host: str | None = None

    def __str__(self) -> str:
        return f"process {self.pid or 'of unknown number'}{f' on {self.host}' if self.host else ''}"


class Place(Protocol):
    """A place by its name: it can be looked at, and a job in it asked to end, by any process."""

    @property
    def output(self) -> str:
        """Where answers go, as people call it."""

    @property
    def errors(self) -> str:
        """Where failures go; the same text if that is where answers go."""

    @property
    def error_file(self) -> str:
        """The same, as seen from the output: a part of what the job is."""

    @property
    def written(self) -> Mapping[str, Path | str]:
        """Files and folders that are written, paths or URLs, by what they are for the job."""

    @property
    def has_journal(self) -> bool:
        """Whether the output can be kept in step with a journal: not stdout, a pipe or a device."""

    @property
    def is_table(self) -> bool:
        """Whether the output is the input table with one more column."""

    def check(self) -> None:
        """Raise ParameterError or JobError for a place that cannot take the output of a job."""

    def check_source(self, source: Inputs, column: str) -> None:
        """Raise JobError for an input whose results cannot be written here; ``column`` is the one that a table would get."""

    def manifest(self) -> Manifest | None:
        """What is said of the job; None where there is none. Raises JobError for what cannot be read."""

    def totals(self, manifest: Manifest) -> Totals:
        """What the journal of that job says. Raises JobError for a damaged one."""

    def owner(self) -> Owner | None:
        """The process that works on the job now, None if there is none."""

    def ask_to_end(self) -> None:
        """Let whoever works on the job, or does so next, cancel what is left of it."""

    def held(self) -> AbstractContextManager[HeldPlace]:
        """The place for this process alone. Raises JobError naming the one that holds it already."""


class HeldPlace(Protocol):
    """A place that this process works in. ``scratch`` is a folder for files that nobody needs afterwards."""

    scratch: Path

    def save(self, manifest: Manifest) -> None:
        """Put a manifest in the place of the one before, in one step. Raises OSError."""

    def leftovers(self) -> list[tuple[str, int]]:
        """What of the output holds something, by name, and how many bytes."""

    def has_records(self) -> bool:
        """Whether any row may have its record."""

    def is_complete(self, manifest: Manifest) -> bool:
        """Whether the output of a job that has come to its end is there; False if it can be put together again.

        Raises JobError if it cannot.
        """

    def give_up(self) -> None:
        """A new job takes the place of what was here: nothing says any more that there was one."""

    def ledger(self, manifest: Manifest) -> Ledger | PartLedger:
        """The ledger of the job, begun anew if it had no run yet. A context manager."""

    def is_cancelled(self) -> bool:
        """Whether somebody has asked for an end, as of some seconds ago."""

    def withdraw_cancel(self) -> None:
        """The job is not asked to end any more."""

    def conclude(self, source: Inputs, column: str) -> None:
        """All rows have their records: put together what readers of the output need. ``source`` and ``column``: of a table."""
