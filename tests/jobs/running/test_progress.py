"""How far a job is, as it is told."""

from __future__ import annotations

import io

import pytest

from shoal.jobs.durable.ledger import Totals
from shoal.jobs.running.progress import JobProgress, ProgressDisplay


def progress(
    *, done: int = 2, failed: int = 0, rows: int | None = 4, seconds: float = 6.0, finished: int = 2
) -> JobProgress:
    return JobProgress(Totals(done=done, failed=failed), rows, seconds, tokens=30, finished=finished)


def test_time_left_is_told_at_the_pace_of_this_run() -> None:
    assert progress(done=6, rows=10, seconds=4.0, finished=2).seconds_left == pytest.approx(8.0)
    assert progress(rows=None).seconds_left is None
    assert progress(finished=0).seconds_left is None


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    with ProgressDisplay(stream) as display:
        for now in (1.0, 4.0, 6.0, 7.0):
            display.update(progress(failed=1, seconds=now))
    assert stream.getvalue() == "3 of 4 rows, 1 failed, 5.0 tokens/s, about 3 s left\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ProgressDisplay(stream) as display:
        display.update(progress())
    assert "2/4 rows" in stream.getvalue()
    assert "50%" in stream.getvalue()
