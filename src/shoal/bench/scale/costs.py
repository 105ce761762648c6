"""What a job costs its driver, a row: the real reader, line of rows, job loop and ledger, with workers that answer at once."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from shoal.bench.jobs.batch_files import write_batch
from shoal.errors import EngineError
from shoal.jobs.durable.ledger import Ledger, Usage
from shoal.jobs.input.check import check_input
from shoal.jobs.input.ids import IdIndex
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.rows import Line, RowReader
from shoal.jobs.input.source import open_inputs
from shoal.jobs.running.engine_half import EngineHalf, Finished, Steps, window
from shoal.jobs.running.job import Job
from shoal.ray.row_line import RowLine

MAX_NUM_SEQS = 64  # of each worker
ROW_BYTES = 500  # of a line of the input, about
RECORD_BYTES = 1000  # of the line of its answer, about

_USAGE = Usage(100, 0, 100)


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Seconds of the driver for one row. ``check``: before the job, its line read and its custom_id looked for among all others.
    ``work``: the line read, put in line, pickled, its answer unpickled, and committed, which is ``commit`` of it. ``resume``: of one
    that is finished, when the job goes on. Then the bytes of ``journal`` that it leaves."""

    check: float
    work: float
    commit: float
    resume: float
    journal: float


def measure_costs(folder: Path, rows: int, workers: int) -> RowCosts:
    """What each of ``rows`` costs with so many ``workers``; files of about 2 kB a row are written to ``folder``.

    Raises EngineError where a row is lost.
    """
    source = write_batch(folder / "in.jsonl", ({"prompt": f"{row} " + "x" * (ROW_BYTES - 100)} for row in range(rows)))
    check = _check(Inputs.of(source), folder / "ids.sqlite")
    fleet, commits = _InstantFleet(workers), list[float]()
    with mock.patch.object(Ledger, "commit", _timed(commits)), open_inputs(Inputs.of(source)) as lines:
        start = time.perf_counter()
        with _ledger(folder) as ledger:
            state = Job(fleet, RowReader(()), ledger).run(iter(lines), rows, lambda progress: None)
        work = time.perf_counter() - start - fleet.elsewhere
    start = time.perf_counter()
    with _ledger(folder) as ledger:
        finished = len(ledger.finished)
    resume = time.perf_counter() - start
    if (state, finished) != ("finished", rows):
        raise EngineError(f"the job ended {state}, with {finished} of {rows} rows")
    journal = (folder / "out.shoal" / "journal").stat().st_size
    return RowCosts(*(figure / rows for figure in (check, work, sum(commits), resume, journal)))


def _ledger(folder: Path) -> Ledger:
    return Ledger.open(folder / "out.shoal", folder / "out.jsonl", folder / "out.errors")


def _check(inputs: Inputs, path: Path) -> float:
    """Seconds that the look at the whole input takes."""
    start = time.perf_counter()
    with IdIndex(path) as index, open_inputs(inputs) as source:
        check_input(source, index)
    return time.perf_counter() - start


def _timed(seconds: list[float]) -> object:
    commit = Ledger.commit

    def timed(ledger: Ledger) -> None:
        start = time.perf_counter()
        commit(ledger)
        seconds.append(time.perf_counter() - start)

    return timed


class _InstantFleet(EngineHalf):
    """Workers that have done what they are given; what they and the way to them take is spent ``elsewhere``."""

    def __init__(self, workers: int) -> None:
        self._names: Sequence[str] = [f"worker {number}" for number in range(workers)]
        self._line = RowLine(window(MAX_NUM_SEQS))
        for name in self._names:
            self._line.join(name)
        self.elsewhere = 0.0

    @property
    def has_room(self) -> bool:
        return self._line.has_room

    def submit(self, line: Line) -> Finished | None:
        self._line.take(line)
        return None

    def step(self) -> list[Finished]:
        return [row for name in self._names if (lines := self._line.give(name)) for row in self._answers(name, lines)]

    def _answers(self, name: str, lines: list[Line]) -> list[Finished]:
        reply: list[Finished] = pickle.loads(self._sent(pickle.dumps(lines, protocol=5)))
        counted = self._line.take_back(name, (row.row for row in reply))
        return [row for row in reply if row.row in counted]

    def _sent(self, question: bytes) -> bytes:
        start = time.perf_counter()
        record = b'{"custom_id":"' + b"x" * (RECORD_BYTES - 16) + b'"}'
        answer = pickle.dumps([Finished(line.number, record, False, _USAGE) for line in pickle.loads(question)])
        self.elsewhere += time.perf_counter() - start
        return answer

    def steps(self) -> Steps:
        return Steps()

    def note(self) -> str:
        return ""

    def abort(self) -> None:
        self._line.clear()

    def close(self) -> None:
        pass
