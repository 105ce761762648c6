"""What the journal of a job costs: the same rows with it and without, in turns on one loaded model."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from shoal.bench.markdown import span, table
from shoal.bench.rates import Speed
from shoal.errors import EngineError
from shoal.jobs.durable.ledger import Ledger, StreamLedger, Totals
from shoal.jobs.input.rows import RowReader
from shoal.jobs.input.source import open_source
from shoal.jobs.running.engine_half import LocalHalf
from shoal.jobs.running.job import AnyLedger, Job
from shoal.llm import LLM

_NOWHERE = Path(os.devnull)


@dataclass(frozen=True, slots=True)
class JournalRound:
    """Seconds with a journal and ``without``; the journal's ``commits``, their seconds, and all fsyncs."""

    journal: float
    without: float
    commits: int
    commit_seconds: float
    fsyncs: int


@dataclass(frozen=True, slots=True)
class JournalCost:
    """All rounds of a batch file of so many rows."""

    rows: int
    prompt_tokens: int
    generated_tokens: int
    rounds: Sequence[JournalRound]

    @property
    def overheads(self) -> list[float]:
        """By how many percent a round takes longer with a journal."""
        return [100 * (found.journal / found.without - 1) for found in self.rounds]

    @property
    def commit_shares(self) -> list[float]:
        """How many percent of a round are commits."""
        return [100 * found.commit_seconds / found.journal for found in self.rounds]

    def as_markdown(self) -> str:
        """Both sides, and what lies between them."""
        sides = {
            "with a journal": [found.journal for found in self.rounds],
            "without": [found.without for found in self.rounds],
        }
        lines = [[name, span(times, 2), Speed.of(self.generated_tokens, times)] for name, times in sides.items()]
        counts = [
            f"{name} {span([getattr(found, name) for found in self.rounds], 0)}" for name in ("commits", "fsyncs")
        ]
        return "\n\n".join(
            [
                f"**Journal**: {self.rows} rows, {self.prompt_tokens} prompt and {self.generated_tokens} generated tokens",
                table(["", "seconds", "generated tokens/s"], lines),
                f"Overhead {span(self.overheads, 2)} %; {', '.join(counts)};"
                f" {span([found.commit_seconds for found in self.rounds], 3)} s in commits, {span(self.commit_shares, 2)} %.",
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """All rounds, and the medians that matter."""
        medians = {
            "overhead_percent": statistics.median(self.overheads),
            "commit_percent": statistics.median(self.commit_shares),
        }
        return medians | asdict(self)


def measure_journal(llm: LLM, source: Path, folder: Path, rounds: int, say: Callable[[str], None]) -> JournalCost:
    """Run the rows of ``source`` with a journal in ``folder`` and without; ``say`` hears how it goes.

    Both sides are the loop of a real job, and differ in the ledger alone. Which is first changes from round to round.
    Raises EngineError where a row fails.
    """
    totals, _ = _run(llm, source, _stream)  # warms up
    found: list[JournalRound] = []
    for number in range(1, rounds + 1):
        found.append(_round(llm, source, folder / f"{number}.jsonl", journal_first=number % 2 == 0))
        say(f"journal {number}/{rounds}: {found[-1].journal:.2f} s, without {found[-1].without:.2f} s")
    return JournalCost(totals.done, totals.prompt_tokens, totals.generated_tokens, found)


def _round(llm: LLM, source: Path, output: Path, *, journal_first: bool) -> JournalRound:
    sides: dict[str, Callable[[], AnyLedger]] = {
        "journal": lambda: Ledger.open(output.with_suffix(".shoal"), output, output.with_suffix(".errors")),
        "without": _stream,
    }
    order = list(sides) if journal_first else list(sides)[::-1]
    with mock.patch("os.fsync", wraps=os.fsync) as fsync, _timed_commits() as commits:
        seconds = {name: _run(llm, source, sides[name])[1] for name in order}
    return JournalRound(**seconds, commits=len(commits), commit_seconds=sum(commits), fsyncs=fsync.call_count)


@contextmanager
def _timed_commits() -> Iterator[list[float]]:
    """Takes the seconds of each commit of a Ledger."""
    seconds: list[float] = []
    commit = Ledger.commit

    def timed(ledger: Ledger) -> None:
        start = time.perf_counter()
        commit(ledger)
        seconds.append(time.perf_counter() - start)

    with mock.patch.object(Ledger, "commit", timed):
        yield seconds


def _stream() -> StreamLedger:
    return StreamLedger.open(_NOWHERE, _NOWHERE)


def _run(llm: LLM, source: Path, open_ledger: Callable[[], AnyLedger]) -> tuple[Totals, float]:
    """Run all rows; the totals, and seconds from opening the ledger to having closed it."""
    reader = RowReader(())
    start = time.perf_counter()
    with open_source(source) as lines, open_ledger() as ledger:
        half = LocalHalf(llm, reader, (llm.path.name,))
        state = Job(half, reader, ledger).run(iter(lines), None, lambda progress: None)
    seconds = time.perf_counter() - start
    if state != "finished" or ledger.totals.failed:
        raise EngineError(f"the job ended {state}, and {ledger.totals.failed} of its rows failed")
    return ledger.totals, seconds
