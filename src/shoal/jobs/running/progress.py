"""How far a job is: a display on stderr."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from shoal.jobs.durable.ledger import Totals
from shoal.system.progress import Bar
from shoal.system.streams import Forgiving

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Where a job is. ``totals`` are of all its runs, and durable; ``rows`` of the input, None if it cannot be known;
    ``seconds``, ``tokens`` and ``finished`` rows of this run; ``note``: a word of the engine half."""

    totals: Totals
    rows: int | None
    seconds: float
    tokens: int
    finished: int
    note: str = ""

    @property
    def behind(self) -> int:
        """Rows that have their record."""
        return self.totals.done + self.totals.failed

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second in this run."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this run; None if it cannot be known."""
        if self.rows is None or not self.finished:
            return None
        return self.seconds / self.finished * (self.rows - self.behind)

    def line(self) -> str:
        """For a log."""
        of = "" if self.rows is None else f" of {self.rows}"
        line = f"{self.behind}{of} rows, {self.totals.failed} failed, {self.tokens_per_second:.1f} tokens/s"
        left = self.seconds_left
        parts = [line, *([] if left is None else [f"about {left:.0f} s left"]), *([self.note] if self.note else [])]
        return ", ".join(parts)


class ProgressDisplay:
    """Shows a job on ``stream`` (None: nowhere) while it runs: a bar on a terminal, else a line every few seconds. A context
    manager."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = Forgiving(stream)
        self._last_line = time.monotonic()
        self._bar = Bar("rows", None, stream=stream, kept=True)

    def __enter__(self) -> ProgressDisplay:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__()

    def update(self, progress: JobProgress) -> None:
        """Show where the job is now."""
        if self._bar.shown:
            failed = "".join(f"{part}, " for part in (f"{progress.totals.failed} failed", progress.note) if part)
            self._bar.update(progress.behind, progress.rows, progress.tokens, progress.seconds, failed)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(progress.line(), file=self._stream, flush=True)
