"""The ledger of a job: what it holds after a commit, after coming back, and after its files were tampered with."""

from __future__ import annotations

import errno
import io
import itertools
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.jobs.durable.ledger import Ledger, StreamLedger, Totals, Usage
from tests.jobs.disk import CALLS, Disk, FaultyCalls, Stopped, intercepted, no_waiting


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    with intercepted(no_waiting):
        yield


class Clock:
    """Goes on by ``step`` seconds whenever it is looked at: a commit looks as it begins and as it ends."""

    def __init__(self) -> None:
        self.now = 100.0
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def open_ledger(root: Path, *, errors: str = "errors", restart: bool = False, clock: Clock | None = None) -> Ledger:
    return Ledger.open(root / "job", root / "results", root / errors, restart=restart, clock=clock or Clock())


def finished(ledger: Ledger) -> set[int]:
    return {row for row in range(100) if row in ledger.finished}


def two_rows(root: Path) -> None:
    """Row 1 is done, row 2 failed."""
    with open_ledger(root) as ledger:
        ledger.add(1, b"one", failed=False, usage=Usage(10, 4, 2))
        ledger.add(2, b"two", failed=True, usage=Usage(3, 0, 0))
        ledger.totals.steps += 5
        ledger.totals.full_steps += 4
        ledger.totals.row_steps += 9
        ledger.totals.seconds += 2.5
        ledger.commit()


TWO_ROWS = Totals(1, 1, 0, 13, 4, 2, 2.5, 5, 4, 9)


def test_a_new_job_has_an_empty_results_file_and_no_errors(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        assert len(ledger.finished) == 0
        assert ledger.totals == Totals()
        assert (tmp_path / "results").read_bytes() == b""
        assert not (tmp_path / "errors").exists()


def test_the_folder_of_the_journal_lasts_wherever_the_outputs_are(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    outputs = tmp_path / "elsewhere"
    disk = Disk(tmp_path)
    with disk.running(1000), Ledger.open(tmp_path / "job", outputs / "results", outputs / "errors"):
        assert "job" in disk.durable_names(tmp_path)
        assert "journal" in disk.durable_names(tmp_path / "job")
        assert disk.durable_names(outputs) == {"results"}
    disk.close()


def test_rows_are_finished_with_the_commit(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.add(7, b"seven", failed=False, usage=Usage(1, 0, 1))
        ledger.add(8, b"eight", failed=True)
        assert finished(ledger) == set()
        assert ledger.totals == Totals()
        assert (tmp_path / "results").read_bytes() == b""
        ledger.commit()
        assert finished(ledger) == {7, 8}
        assert ledger.totals == Totals(done=1, failed=1, prompt_tokens=1, generated_tokens=1)
        assert (tmp_path / "results").read_bytes() == b"seven\n"
        assert (tmp_path / "errors").read_bytes() == b"eight\n"


def test_a_job_goes_on_where_it_was(tmp_path: Path) -> None:
    two_rows(tmp_path)
    with open_ledger(tmp_path) as ledger:
        assert finished(ledger) == {1, 2}
        assert ledger.totals == TWO_ROWS
        ledger.add(3, b"three", failed=False)
        ledger.commit()
    assert (tmp_path / "results").read_bytes() == b"one\nthree\n"
    assert (tmp_path / "errors").read_bytes() == b"two\n"


def test_closing_commits_nothing(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.add(1, b"one", failed=False)
    with open_ledger(tmp_path) as ledger:
        assert finished(ledger) == set()
    assert (tmp_path / "results").read_bytes() == b""


def test_bytes_that_are_not_vouched_for_are_cut_off(tmp_path: Path) -> None:
    two_rows(tmp_path)
    for name in ("results", "errors", "job/journal"):
        with open(tmp_path / name, "ab") as stream:
            stream.write(b'{"torn": ')
    with open_ledger(tmp_path) as ledger:
        assert finished(ledger) == {1, 2}
    assert (tmp_path / "results").read_bytes() == b"one\n"
    assert (tmp_path / "errors").read_bytes() == b"two\n"
    assert (tmp_path / "job" / "journal").stat().st_size == 16 + 3 * 44


def test_rows_of_a_torn_journal_run_again(tmp_path: Path) -> None:
    two_rows(tmp_path)
    journal = tmp_path / "job" / "journal"
    journal.write_bytes(journal.read_bytes()[:-1])
    with open_ledger(tmp_path) as ledger:
        assert finished(ledger) == {1}
        assert (tmp_path / "errors").read_bytes() == b""
        ledger.add(2, b"again", failed=False)
        ledger.commit()
    assert (tmp_path / "results").read_bytes() == b"one\nagain\n"


def test_errors_may_stand_among_the_results(tmp_path: Path) -> None:
    for first in (1, 4):
        with open_ledger(tmp_path, errors="../" + tmp_path.name + "/results") as ledger:
            for row in range(first, first + 3):
                ledger.add(row, b"row %d" % row, failed=row % 2 == 0)
            ledger.commit()
            with pytest.raises(JobError, match="results: the failed rows in it cannot be put back"):
                ledger.retry_errors()
    assert (tmp_path / "results").read_bytes() == b"".join(b"row %d\n" % row for row in range(1, 7))
    assert (ledger.totals.done, ledger.totals.failed) == (3, 3)


@pytest.mark.parametrize(("before", "after"), [("errors", "results"), ("results", "errors")])
def test_errors_cannot_move_into_or_out_of_the_results(tmp_path: Path, before: str, after: str) -> None:
    with open_ledger(tmp_path, errors=before) as ledger:
        ledger.add(1, b"one", failed=True)
        ledger.add(2, b"two", failed=False)
        ledger.commit()
    with pytest.raises(JobError, match="contradicts"):
        open_ledger(tmp_path, errors=after)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("results", b"one", r"results: ends at byte 3, the journal vouches for 4 bytes.*--restart"),
        ("results", None, r"results: ends at byte 0, the journal vouches for 4 bytes.*--restart"),
        ("results", b"One\n", r"results: the line of row 1 at byte 0 was changed.*--restart"),
        ("results", b"one!\n", r"results: the line of row 1 at byte 0 was changed.*--restart"),
        ("errors", b"", r"errors: ends at byte 0, the journal vouches for 4 bytes.*--restart"),
        ("errors", b"two ", r"errors: the line of row 2 at byte 0 was changed.*--restart"),
        ("job/journal", b"", r"journal: it does not begin like a journal.*--restart"),
    ],
)
def test_changed_files_are_refused_and_left_alone(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    two_rows(tmp_path)
    if data is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(JobError, match=message):
        open_ledger(tmp_path)
    assert contents(tmp_path) == before
    with open_ledger(tmp_path, restart=True) as ledger:
        assert finished(ledger) == set()


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["results", "errors"])
def test_what_no_journal_vouches_for_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(JobError, match=rf"{name}: holds 8 bytes that are not of this job"):
        open_ledger(tmp_path)
    assert (tmp_path / name).read_bytes() == b"precious"


def test_restart_drops_all(tmp_path: Path) -> None:
    two_rows(tmp_path)
    with open_ledger(tmp_path, restart=True) as ledger:
        assert finished(ledger) == set()
        assert ledger.totals == Totals()
        assert (tmp_path / "results").read_bytes() == b""
        assert (tmp_path / "errors").read_bytes() == b""


def test_a_restart_that_is_cut_short_leaves_the_old_job_or_a_new_one(tmp_path: Path) -> None:
    left = set()
    for at in itertools.count():
        root = tmp_path / str(at)
        root.mkdir()
        two_rows(root)
        stopped = stops_restarting(root, at)
        with open_ledger(root) as ledger:
            left.add(len(ledger.finished))
            assert (root / "results").read_bytes() == (b"one\n" if ledger.finished else b"")
        if not stopped:
            break
    assert left == {0, 2}
    assert len(ledger.finished) == 0


def stops_restarting(root: Path, at: int) -> bool:
    disk = Disk(root)
    try:
        with disk.running(at):
            open_ledger(root, restart=True).close()
    except Stopped:
        return True
    finally:
        disk.close()
    return False


def test_retried_errors_are_unfinished_again(tmp_path: Path) -> None:
    two_rows(tmp_path)
    with open_ledger(tmp_path) as ledger:
        assert ledger.retry_errors() == 1
        assert finished(ledger) == {1}
        assert (tmp_path / "errors").read_bytes() == b""
        assert (ledger.totals.done, ledger.totals.failed, ledger.totals.retried) == (1, 0, 1)
        assert ledger.retry_errors() == 0
    with open_ledger(tmp_path) as ledger:
        assert finished(ledger) == {1}
        ledger.add(3, b"other", failed=True)
        ledger.add(2, b"two", failed=False, usage=Usage(3, 0, 1))
        ledger.commit()
    with open_ledger(tmp_path) as ledger:
        assert finished(ledger) == {1, 2, 3}
        assert ledger.totals == Totals(2, 1, 1, 16, 4, 3, 2.5, 5, 4, 9)
    assert (tmp_path / "errors").read_bytes() == b"other\n"


def test_retrying_counts_rows_that_were_waiting(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.add(1, b"one", failed=True)
        assert ledger.retry_errors() == 1
        ledger.add(1, b"one", failed=False)
        ledger.commit()
    assert (tmp_path / "results").read_bytes() == b"one\n"


def test_errors_that_were_put_back_are_cut_off_when_that_was_cut_short(tmp_path: Path) -> None:
    two_rows(tmp_path)
    with open_ledger(tmp_path) as ledger:
        ledger.retry_errors()
    (tmp_path / "errors").write_bytes(b"two\n")
    with open_ledger(tmp_path) as ledger:
        assert finished(ledger) == {1}
    assert (tmp_path / "errors").read_bytes() == b""


def test_after_a_failed_commit_the_ledger_can_only_be_closed(tmp_path: Path) -> None:
    for at in itertools.count():
        root = tmp_path / str(at)
        root.mkdir()
        with open_ledger(root) as ledger:
            ledger.add(1, b"one", failed=False)
            ledger.add(2, b"two", failed=True)
            if commits(ledger, at):
                break
            assert finished(ledger) == set()
            for use in (ledger.commit, ledger.retry_errors, lambda: ledger.add(3, b"three", failed=False)):
                with pytest.raises(JobError, match="a write failed before; start the job again"):
                    use()
    assert at > 5


def commits(ledger: Ledger, failing: int) -> bool:
    """Commit with that call failing; whether it went well all the same."""
    try:
        with intercepted(FaultyCalls(CALLS, failing, errno.ENOSPC)):
            ledger.commit()
    except OSError:
        return False
    return True


def test_a_row_has_one_line(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.add(1, b"one", failed=False)
        with pytest.raises(AssertionError, match="row 1 has its line in memory"):
            ledger.add(1, b"one", failed=False)
        ledger.commit()
        with pytest.raises(AssertionError, match="row 1 has its line in a file"):
            ledger.add(1, b"one", failed=True)
        with pytest.raises(AssertionError, match="one line"):
            ledger.add(2, b"one\ntwo", failed=False)


def test_results_that_were_moved_away_stop_the_job(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.add(1, b"one", failed=False)
        (tmp_path / "results").rename(tmp_path / "moved")
        with pytest.raises(FileNotFoundError, match="results"):
            ledger.commit()


def test_a_commit_is_due_a_second_after_the_last(tmp_path: Path) -> None:
    clock = Clock()
    with open_ledger(tmp_path, clock=clock) as ledger:
        clock.now += 5
        assert not ledger.commit_if_due(), "nothing waits"
        ledger.add(1, b"one", failed=False)
        assert ledger.commit_if_due()
        ledger.add(2, b"two", failed=False)
        clock.now += 0.75
        assert not ledger.commit_if_due()
        clock.now += 0.25
        assert ledger.commit_if_due()
        assert finished(ledger) == {1, 2}


def test_slow_commits_come_less_often(tmp_path: Path) -> None:
    clock = Clock()
    with open_ledger(tmp_path, clock=clock) as ledger:
        clock.step = 0.5
        ledger.add(1, b"one", failed=False)
        ledger.commit()
        clock.step = 0.0
        ledger.add(2, b"two", failed=False)
        clock.now += 49
        assert not ledger.commit_if_due()
        clock.now += 1
        assert ledger.commit_if_due()


def test_many_waiting_bytes_are_due_at_any_time(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.add(1, b"x" * 4_000_000, failed=False)
        assert not ledger.commit_if_due()
        ledger.add(2, b"x" * 400_000, failed=False)
        assert ledger.commit_if_due()
        ledger.add(3, b"x" * 400_000, failed=False)
        assert not ledger.commit_if_due()


def test_a_commit_without_anything_new_writes_nothing(tmp_path: Path) -> None:
    two_rows(tmp_path)
    before = contents(tmp_path)
    with open_ledger(tmp_path) as ledger:
        ledger.commit()
    assert contents(tmp_path) == before


def test_figures_alone_are_kept_by_a_commit(tmp_path: Path) -> None:
    with open_ledger(tmp_path) as ledger:
        ledger.totals.seconds += 3.5
        assert not ledger.commit_if_due()
        ledger.commit()
    with open_ledger(tmp_path) as ledger:
        assert ledger.totals == Totals(seconds=3.5)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def add_rows(first: int, last: int) -> int:
        with open_ledger(tmp_path) as ledger:
            for row in range(first, last):
                ledger.add(row, b"x" * 50, failed=row % 2 == 0)
                if row % 100 == 0:
                    ledger.commit()
            ledger.commit()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return peak

    tracemalloc.start()
    try:
        add_rows(1, 500)
        few = add_rows(500, 1_000)
        many = add_rows(1_000, 10_000)
        reopened = add_rows(10_000, 10_001)
    finally:
        tracemalloc.stop()
    assert max(many, reopened) < few + 100_000


def test_a_stream_gets_its_lines_at_once() -> None:
    results, errors = io.BytesIO(), io.BytesIO()
    ledger = StreamLedger(results, errors)
    ledger.add(1, b"one", failed=False, usage=Usage(5, 1, 2))
    ledger.add(2, b"two", failed=True)
    assert results.getvalue() == b"one\n"
    assert errors.getvalue() == b"two\n"
    assert not ledger.commit_if_due()
    assert ledger.totals == Totals(done=1, failed=1, prompt_tokens=5, cached_tokens=1, generated_tokens=2)
    assert 1 not in ledger.finished
    with pytest.raises(JobError, match="only where results go to a file"):
        ledger.retry_errors()


def test_a_stream_may_be_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for errors in (Path("-"), tmp_path / "errors"):
        with StreamLedger.open(Path("-"), errors) as ledger:
            ledger.add(1, b"one", failed=False)
            ledger.add(2, b"two", failed=True)
    print("still open", flush=True)
    assert capfd.readouterr().out == "one\ntwo\none\nstill open\n"
    assert (tmp_path / "errors").read_bytes() == b"two\n"


def test_stdout_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(JobError, match="stdout is closed"):
        StreamLedger.open(Path("-"), Path("-"))
