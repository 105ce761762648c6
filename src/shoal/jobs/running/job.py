"""The half of a job that keeps: gives rows to the engine half while it has room, and brings one record of each into the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from shoal.errors import EngineError, JobError
from shoal.jobs.durable.ledger import Ledger, StreamLedger, Totals
from shoal.jobs.durable.manifest import State
from shoal.jobs.durable.parts import PartLedger
from shoal.jobs.input.rows import BadRow, Line, RowReader
from shoal.jobs.running.engine_half import EngineHalf, Finished, Steps, refusal_of
from shoal.jobs.running.interrupts import Interrupts
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.records import FailureCode, failed

Rows = Iterator[Line | BadRow]
AnyLedger = Ledger | PartLedger | StreamLedger
Report = Callable[[JobProgress], None]

_SECONDS_BETWEEN_LOOKS = 1.0  # at the clock, and at whether the job is cancelled

# What becomes of rows that were not finished when the job was brought to its end.
CLOSING: dict[str, tuple[FailureCode, str]] = {
    "expired": ("batch_expired", "the job's deadline has passed"),
    "cancelled": ("batch_cancelled", "the job was cancelled"),
}


@dataclass(frozen=True, slots=True)
class JobLimits:
    """When to give up.

    ``deadline``: the moment (Unix time) at which all that is not finished expires. ``max_errors``: the job stops when more rows than
    this have failed. ``cancelled`` is asked about once a second, ``interrupted`` before each step: it is a signal's twin for jobs that
    no signal reaches.
    """

    deadline: float | None = None
    max_errors: int | None = None
    cancelled: Callable[[], bool] = lambda: False
    interrupted: Callable[[], bool] = lambda: False

    def reached(self) -> Literal["cancelled", "expired"] | None:
        """Whether the job has to be brought to its end now, and as what."""
        if self.cancelled():
            return "cancelled"
        return "expired" if self.deadline is not None and time.time() >= self.deadline else None


class Job:
    """Works through rows on ``engine``. ``reader`` says what rows are called that the job ends without having run them."""

    def __init__(
        self, engine: EngineHalf, reader: RowReader, ledger: AnyLedger, limits: JobLimits | None = None
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._ledger = ledger
        self._limits = limits or JobLimits()
        self._running: dict[int, Line] = {}
        self._interrupts = Interrupts()
        self._failed = ledger.totals.failed
        self._pace = _Pace(time.monotonic(), ledger.totals.generated_tokens, ledger.totals.done + self._failed)
        self._next_look = 0.0

    def run(self, rows: Rows, total: int | None, report: Report) -> State:
        """Bring a record for each of ``rows`` into the ledger; ``report`` hears how far it is. ``total``: rows of the whole input.

        Returns "finished"; "interrupted" after a signal or "stopped" after too many failures, where the rest can be taken up
        again; "expired" or "cancelled", where the rest has been recorded as that. Raises EngineError where the engine itself is
        broken. What was finished is durable then, but for a second signal, which does not wait for that.
        """
        try:
            with self._interrupts.watched():
                state = self._work(rows, total, report)
        except KeyboardInterrupt:
            return "interrupted"
        except EngineError:
            self._ledger.commit()
            raise
        finally:
            self._abort_running()
        self._ledger.commit()
        return state

    def _work(self, rows: Rows, total: int | None, report: Report) -> State:
        more, now = True, time.monotonic()
        while more or self._running:
            state = self._reason_to_end()
            if state in CLOSING:
                self._close(rows, state)
            if state is not None:
                return state
            if more and self._engine.has_room:
                more = self._take_next(rows)
            else:
                self._step()
            before, now = now, time.monotonic()
            self._ledger.totals.seconds += now - before
            self._ledger.commit_if_due()
            report(self._pace.progress(self._ledger.totals, total, self._engine.note()))
        return "finished"

    def _reason_to_end(self) -> State | None:
        if self._interrupts.requested or self._limits.interrupted():
            return "interrupted"
        if self._limits.max_errors is not None and self._failed > self._limits.max_errors:
            return "stopped"
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + _SECONDS_BETWEEN_LOOKS
        return self._limits.reached()

    def _take_next(self, rows: Rows) -> bool:
        """Take one row in; False at the end of the input."""
        try:
            with self._interrupts.at_once():
                row = next(rows, None)
        except KeyboardInterrupt:  # while it waited for input
            self._interrupts.requested = True
            return True
        except JobError:  # the input cannot be read on: what is finished is not lost with it
            self._ledger.commit()
            raise
        if isinstance(row, BadRow):
            self._record(refusal_of(row))
        elif row is not None:
            self._running[row.number] = row
            finished = self._engine.submit(row)
            self._record_all([] if finished is None else [finished])
        return row is not None

    def _step(self) -> None:
        finished = self._engine.step()
        self._count(self._engine.steps())
        self._record_all(finished)

    def _count(self, steps: Steps) -> None:
        totals = self._ledger.totals
        totals.steps += steps.run
        totals.full_steps += steps.full
        totals.row_steps += steps.rows
        totals.draft_tokens += steps.drafted
        totals.accepted_tokens += steps.accepted

    def _record_all(self, finished: Iterable[Finished]) -> None:
        for row in finished:
            del self._running[row.row]
            self._record(row)

    def _record(self, row: Finished) -> None:
        self._failed += row.failed
        self._ledger.add(row.row, row.line, failed=row.failed, usage=row.usage)

    def _close(self, rows: Rows, state: str) -> None:
        """Record all that is not finished as expired or cancelled."""
        running = list(self._running.values())
        self._abort_running()
        close(iter(running), self._reader, self._ledger, state)
        close(rows, self._reader, self._ledger, state)

    def _abort_running(self) -> None:
        self._engine.abort()
        self._running.clear()


@dataclass(frozen=True, slots=True)
class _Pace:
    """Where a run began: on the clock, and in tokens and rows."""

    started: float
    tokens: int
    rows: int

    def progress(self, totals: Totals, total: int | None, note: str) -> JobProgress:
        seconds = time.monotonic() - self.started
        finished = totals.done + totals.failed - self.rows
        return JobProgress(totals, total, seconds, totals.generated_tokens - self.tokens, finished, note)


def close(rows: Rows, reader: RowReader, ledger: AnyLedger, state: str) -> None:
    """Record all of ``rows`` as ``state`` ("expired" or "cancelled"); those that are wrong in themselves as that."""
    code, message = CLOSING[state]
    for given in rows:
        row, place = (reader.read(given), given.place) if isinstance(given, Line) else (given, "")
        if isinstance(row, BadRow):
            ledger.add(row.line, refusal_of(row, place).line, failed=True)
        else:
            ledger.add(row.line, failed(row.custom_id, code, message).line(), failed=True)
        ledger.commit_if_due()
