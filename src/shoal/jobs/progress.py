"""How far a job is: counts, and a display of them on stderr."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(slots=True)
class JobCounts:
    """Rows and tokens so far. ``bytes_read`` of ``bytes_total`` of the input (None where it cannot be known)."""

    bytes_total: int | None = None
    bytes_read: int = 0
    rows_read: int = 0
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    interrupted: bool = False
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def share(self) -> float | None:
        """The part of the job that is behind us, from 0 to 1: bytes read, less the rows that still run."""
        if self.bytes_total is None or not self.rows_read:
            return None
        return min(1.0, self.bytes_read / self.bytes_total) * (self.done + self.failed) / self.rows_read

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second since the start."""
        return self.generated_tokens / max(self.seconds, 1e-9)

    def summary(self) -> str:
        """One line for the end."""
        state = "interrupted: " if self.interrupted else ""
        return (
            f"{state}{self.done} rows done, {self.failed} failed; {self.prompt_tokens} prompt and"
            f" {self.generated_tokens} generated tokens in {self.seconds:.1f} s ({self.tokens_per_second:.1f} tokens/s)"
        )


class JobProgress:
    """Shows counts while a job runs: a bar on a terminal, else a line every few seconds. A context manager."""

    def __init__(self, stream: TextIO) -> None:
        console = Console(file=stream)
        self._stream = stream
        self._last_line = time.monotonic()
        self._bar = _bar(console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=None, rows=0, failed=0, rate=0.0) if self._bar else None

    def __enter__(self) -> JobProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, counts: JobCounts) -> None:
        """Show where the job is now."""
        if self._bar is not None and self._task is not None:
            rows, rate = counts.done + counts.failed, counts.tokens_per_second
            total = None if counts.share is None else 1.0
            self._bar.update(
                self._task, total=total, completed=counts.share or 0.0, rows=rows, failed=counts.failed, rate=rate
            )
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(_line(counts), file=self._stream, flush=True)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.fields[rows]} rows"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[failed]} failed, {task.fields[rate]:.1f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


def _line(counts: JobCounts) -> str:
    line = f"{counts.done + counts.failed} rows, {counts.failed} failed, {counts.tokens_per_second:.1f} tokens/s"
    if not counts.share:
        return line
    remaining = counts.seconds * (1 - counts.share) / counts.share
    return f"{line}, {counts.share:.0%}, about {remaining:.0f} s left"
