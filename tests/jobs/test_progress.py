"""How far a job is, as it is told."""

from __future__ import annotations

import io

import pytest

from shoal.jobs.progress import JobCounts, JobProgress


def test_the_share_is_that_of_the_bytes_without_the_rows_that_still_run() -> None:
    counts = JobCounts(bytes_total=1000, bytes_read=500, rows_read=10, done=7, failed=1)
    assert counts.share == pytest.approx(0.4)
    counts.bytes_read, counts.rows_read, counts.done = 1000, 20, 19
    assert counts.share == 1.0


def test_the_share_of_a_pipe_is_unknown() -> None:
    assert JobCounts(bytes_read=500, rows_read=10, done=7).share is None
    assert JobCounts(bytes_total=1000).share is None


def test_the_summary_names_rows_tokens_time_and_rate() -> None:
    counts = JobCounts(done=3, failed=1, prompt_tokens=40, generated_tokens=50, seconds=2.0)
    assert counts.summary() == "3 rows done, 1 failed; 40 prompt and 50 generated tokens in 2.0 s (25.0 tokens/s)"
    counts.interrupted = True
    assert counts.summary().startswith("interrupted: 3 rows done")


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    counts = JobCounts(bytes_total=100, bytes_read=50, rows_read=2, done=2, generated_tokens=30)
    with JobProgress(stream) as display:
        for now in (1.0, 4.0, 6.0, 7.0):
            counts.seconds = now
            display.update(counts)
    assert stream.getvalue() == "2 rows, 0 failed, 5.0 tokens/s, 50%, about 6 s left\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with JobProgress(stream) as display:
        display.update(JobCounts(bytes_total=4, bytes_read=4, rows_read=2, done=1, failed=0, seconds=1.0))
    assert "1 rows" in stream.getvalue()
    assert "50%" in stream.getvalue()
