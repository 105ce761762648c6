"""Whatever fails, and wherever a process or the power ends: every row has one whole line, and none is lost again."""

from __future__ import annotations

import errno
import itertools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.jobs.durable.ledger import Ledger, Usage
from tests.jobs.disk import CALLS, Disk, FaultyCalls, Stopped, intercepted, no_waiting

ROWS = range(1, 11)
FAILING = (3, 4, 8)
ROWS_PER_COMMIT = 4


@dataclass
class Job:
    """A job of a few rows on ``root``; some fail unless they are ``repaired``, which also puts failed ones back.

    ``promised`` are the rows that were finished once: a later run must find them so.
    """

    root: Path
    repaired: bool = False
    restart: bool = False
    text: bytes = b""
    promised: set[int] = field(default_factory=set)
    steps: int = 0

    @property
    def results(self) -> Path:
        return self.root / "out.jsonl"

    @property
    def errors(self) -> Path:
        return self.root / "out.jsonl.errors.jsonl"

    def open(self) -> Ledger:
        return Ledger.open(self.root / "out.jsonl.shoal", self.results, self.errors, restart=self.restart)

    def run(self) -> None:
        with self.open() as ledger:
            self.restart = False
            if self.repaired:
                ledger.retry_errors()
            self._keep_promises(ledger)
            for row in ROWS:
                if row not in ledger.finished:
                    self._finish(ledger, row)
            ledger.commit()
            self._keep_promises(ledger)

    def _finish(self, ledger: Ledger, row: int) -> None:
        failed = row in FAILING and not self.repaired
        ledger.totals.steps += 1
        ledger.add(row, self.line(row, failed), failed=failed, usage=Usage(row, 0, 1))
        if row % ROWS_PER_COMMIT == 0:
            ledger.commit()
            self._keep_promises(ledger)

    def _keep_promises(self, ledger: Ledger) -> None:
        finished = {row for row in ROWS if row in ledger.finished}
        assert self.promised <= finished, "rows that were finished are not any more"
        assert ledger.totals.steps >= self.steps
        self.promised, self.steps = finished, ledger.totals.steps

    def line(self, row: int, failed: bool) -> bytes:
        return b'{"row": %d, "failed": %d, "text": "%s"}' % (row, failed, self.text + b"x" * row * 7)

    def check(self) -> None:
        """Exactly one whole line a row, in the right file; the journal agrees, and so do its figures."""
        failing = [] if self.repaired else FAILING
        assert lines(self.results) == sorted(self.line(row, False) + b"\n" for row in ROWS if row not in failing)
        assert lines(self.errors) == sorted(self.line(row, True) + b"\n" for row in failing)
        with self.open() as ledger:
            totals = ledger.totals
        twice = FAILING if self.repaired else ()
        assert (totals.done, totals.failed, totals.retried) == (len(ROWS) - len(failing), len(failing), len(twice))
        assert (totals.prompt_tokens, totals.generated_tokens) == (sum(ROWS) + sum(twice), len(ROWS) + len(twice))
        assert totals.steps >= len(ROWS)


def lines(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines(keepends=True)) if path.exists() else []


def new_job(root: Path) -> Job:
    return Job(root)


def job_with_retried_errors(root: Path) -> Job:
    finish(Job(root))
    return Job(root, repaired=True)


def job_begun_anew(root: Path) -> Job:
    finish(Job(root))
    return Job(root, restart=True, text=b"other")


MakeJob = Callable[[Path], Job]
JOBS: list[MakeJob] = [new_job, job_with_retried_errors, job_begun_anew]


def finish(job: Job) -> None:
    """Run the job, to its end this time."""
    with intercepted(no_waiting):
        job.run()
        job.check()


@dataclass(frozen=True)
class Fault:
    """See FaultyCalls."""

    names: Sequence[str]
    error: int
    part: float = 0.0


FAULTS = {
    "disk full": Fault(["write", "ftruncate"], errno.ENOSPC),
    "disk full after a part": Fault(["write"], errno.ENOSPC, part=0.5),
    "part written, then the rest": Fault(["write"], 0, part=0.3),
    "input/output error": Fault(CALLS, errno.EIO),
}


@pytest.mark.parametrize("make", JOBS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_call_fails_once(tmp_path: Path, make: MakeJob, fault: Fault) -> None:
    for at in itertools.count():
        root = tmp_path / str(at)
        root.mkdir()
        job = make(root)
        calls = FaultyCalls(fault.names, at, fault.error, fault.part)
        with intercepted(calls):
            error = error_of(job)
        assert (error.errno if error else 0) == (fault.error if calls.reached else 0)
        assert error is None or error.filename, "the user hears which file it was"
        finish(job)
        if not calls.reached:
            break
    assert at > 5


def error_of(job: Job) -> OSError | None:
    try:
        job.run()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("make", JOBS)
def test_power_fails_at_each_call(tmp_path: Path, make: MakeJob) -> None:
    for at in itertools.count():
        for seed in range(3):
            root = tmp_path / f"{at}-{seed}"
            root.mkdir()
            job = make(root)
            ended = run_until([End("power", at)], job, Random(seed))
            finish(job)
        if not ended:
            break
    assert at > 20


@dataclass(frozen=True)
class End:
    """How a run ends, and at which call. "fault": the call fails; "kill": the process dies; "power": the machine does."""

    how: str
    at: int


ENDS = st.builds(End, st.sampled_from(["fault", "kill", "power"]), st.integers(0, 50))


@given(st.sampled_from(JOBS), st.lists(ENDS, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_faults_kills_and_power_failures_one_after_the_other(make: MakeJob, ends: list[End], random: Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = make(Path(folder))
        run_until(ends, job, random)
        finish(job)


def run_until(ends: list[End], job: Job, random: Random) -> int:
    """Run the job once for each end. Returns how many of them came before the end of the job."""
    disk, early = Disk(job.root), 0
    for end in ends:
        with disk.running(end.at, failing=end.how == "fault"):
            early += ends_early(job)
        if end.how == "power":
            disk.power_failure(random)
            disk.close()
            disk = Disk(job.root)
    disk.close()
    return early


def ends_early(job: Job) -> bool:
    with suppress(Stopped, OSError):
        job.run()
        return False
    return True
