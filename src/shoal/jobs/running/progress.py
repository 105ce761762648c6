"""How far a job is: a display on stderr."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from shoal.jobs.durable.ledger import Totals

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Where a job is. ``totals`` are of all its runs, and durable; ``rows`` of the input, None if it cannot be known;
    ``seconds``, ``tokens`` and ``finished`` rows of this run."""

    totals: Totals
    rows: int | None
    seconds: float
    tokens: int
    finished: int

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
        return line if left is None else f"{line}, about {left:.0f} s left"


class ProgressDisplay:
    """Shows a job while it runs: a bar on a terminal, else a line every few seconds. A context manager."""

    def __init__(self, stream: TextIO) -> None:
        console = Console(file=stream)
        self._stream = stream
        self._last_line = time.monotonic()
        self._bar = _bar(console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=None, rows="0", failed=0, rate=0.0) if self._bar else None

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: JobProgress) -> None:
        """Show where the job is now."""
        if self._bar is not None and self._task is not None:
            failed, rate = progress.totals.failed, progress.tokens_per_second
            rows = str(progress.behind) if progress.rows is None else f"{progress.behind}/{progress.rows}"
            self._bar.update(
                self._task, total=progress.rows, completed=progress.behind, rows=rows, failed=failed, rate=rate
            )
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(progress.line(), file=self._stream, flush=True)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.fields[rows]} rows"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[failed]} failed, {task.fields[rate]:.1f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )
