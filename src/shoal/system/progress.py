"""A progress bar on a terminal, for whatever takes long: prompts in Python, rows of a job."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO, cast

from shoal.system.streams import Forgiving

if TYPE_CHECKING:
    from rich.progress import Progress

_BELOW_ONE = 1e-9


class Bar:
    """How many of ``total`` things are done (None: nobody knows how many there are), tokens a second, time left.

    A context manager. Shown on ``stream`` (None: nowhere) where that is a terminal; ``kept``: also when it has ended. What is printed
    to stdout meanwhile goes there, and only where that is a terminal through rich, which keeps it apart from the bar.
    """

    def __init__(
        self, things: str, total: int | None, *, stream: TextIO | None, show: bool = True, kept: bool = False
    ) -> None:
        self._progress = _on_terminal(things, stream, kept) if show else None
        self.shown = self._progress is not None
        if self._progress is not None:
            self._task = self._progress.add_task("", total=total, done="0", note="", rate=0.0)

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, done: int, total: int | None, tokens: int, seconds: float, note: str = "") -> None:
        """Where things are now; ``tokens`` in ``seconds`` give the rate."""
        if self._progress is not None:
            of = str(done) if total is None else f"{done}/{total}"
            rate = tokens / max(seconds, _BELOW_ONE)
            self._progress.update(self._task, total=total, completed=done, done=of, note=note, rate=rate)


def _on_terminal(things: str, stream: TextIO | None, kept: bool) -> Progress | None:
    """rich's bar, None where ``stream`` is no terminal."""
    from rich.console import Console  # slow to import: only where a bar may be shown
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(file=cast(TextIO, Forgiving(stream)))
    if not console.is_terminal:
        return None
    return Progress(
        TextColumn("{task.fields[done]} " + things),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}{task.fields[rate]:.1f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        transient=not kept,
        redirect_stdout=Forgiving(sys.stdout).isatty(),
    )
