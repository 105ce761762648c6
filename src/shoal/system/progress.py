"""A progress bar on a terminal, for whatever takes long: prompts in Python, rows of a job."""

from __future__ import annotations

import sys
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from shoal.system.streams import Forgiving

_BELOW_ONE = 1e-9


class Bar:
    """How many of ``total`` things are done (None: nobody knows how many there are), tokens a second, time left.

    A context manager. Shown on ``stream`` (None: nowhere) where that is a terminal; ``kept``: also when it has ended. What is printed
    to stdout meanwhile goes there, and only where that is a terminal through rich, which keeps it apart from the bar.
    """

    def __init__(
        self, things: str, total: int | None, *, stream: TextIO | None, show: bool = True, kept: bool = False
    ) -> None:
        console = Console(file=cast(TextIO, Forgiving(stream)))
        self.shown = show and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.fields[done]} " + things),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}{task.fields[rate]:.1f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=not kept,
            disable=not self.shown,
            redirect_stdout=Forgiving(sys.stdout).isatty(),
        )
        self._task = self._progress.add_task("", total=total, done="0", note="", rate=0.0)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int | None, tokens: int, seconds: float, note: str = "") -> None:
        """Where things are now; ``tokens`` in ``seconds`` give the rate."""
        if self.shown:
            of = str(done) if total is None else f"{done}/{total}"
            rate = tokens / max(seconds, _BELOW_ONE)
            self._progress.update(self._task, total=total, completed=done, done=of, note=note, rate=rate)
