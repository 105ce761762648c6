"""``shoal bench jobs``: what durability costs a job, what its prefix cache gains, and whether its memory grows with its input."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.bench.jobs.batch_files import RandomTexts, write_batch
from shoal.bench.jobs.journal import JournalCost, measure_journal
from shoal.bench.jobs.memory import JobMemory, measure_memory
from shoal.bench.jobs.prefix import PrefixGain, measure_prefix
from shoal.bench.machine import cpu_name
from shoal.llm import LLM
from shoal.system.machine_limits import usable_cores
from shoal.version import __version__

_QUESTION_LEN = _ANSWER_LEN = 16  # tokens after a shared prefix

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobsPlan:
    """What to measure of ``model``, and the sizes.

    "journal": ``journal_rows`` of ``prompt_len`` and ``output_len`` tokens. "prefix": ``prefix_rows`` behind a system prompt of
    ``system_len`` tokens. Both in so many ``rounds``. "memory": jobs of so many ``rows``, on a network of its own.
    """

    model: Path
    what: Sequence[str] = ("journal", "prefix")
    rounds: int = 3
    journal_rows: int = 400
    prompt_len: int = 32
    output_len: int = 32
    prefix_rows: int = 200
    system_len: int = 500
    rows: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000)
    threads: int | None = None
    device: str = "cpu"

    @property
    def engine(self) -> dict[str, Any]:
        """Fields of EngineConfig."""
        return {"threads": self.threads, "device": self.device}


@dataclass(frozen=True, slots=True)
class JobsReport:
    """What was measured, by name."""

    model: str
    cpu: str
    threads: int
    rounds: int
    found: dict[str, JournalCost | PrefixGain | JobMemory]

    def as_markdown(self) -> str:
        """A heading, then what was measured."""
        head = (
            f"{self.model}, shoal {__version__}, {self.cpu}, {self.threads} threads; medians (min-max) of {self.rounds}"
            " alternating rounds."
        )
        return "\n\n".join([head, *(part.as_markdown() for part in self.found.values())])

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""
        parts = {name: part.as_json() for name, part in self.found.items()}
        setup = {"model": self.model, "cpu": self.cpu, "threads": self.threads, "rounds": self.rounds}
        return {"version": __version__, **setup, **parts}


def measure_jobs(plan: JobsPlan, say: Say) -> JobsReport:
    """Take the measurements of ``plan``; ``say`` hears how it goes.

    Files are written to the system's folder for temporary ones ($TMPDIR). Raises EngineError where a job does not end as it should.
    """
    found: dict[str, JournalCost | PrefixGain | JobMemory] = {}
    for name in plan.what:
        with tempfile.TemporaryDirectory(prefix=f"shoal-{name}-") as folder:
            found[name] = _MEASURES[name](plan, Path(folder), say)
    return JobsReport(plan.model.name, cpu_name(), plan.threads or usable_cores(), plan.rounds, found)


def _journal(plan: JobsPlan, folder: Path, say: Say) -> JournalCost:
    bodies = RandomTexts(plan.model).completions(plan.journal_rows, plan.prompt_len, plan.output_len)
    source = write_batch(folder / "in.jsonl", bodies)
    with LLM(plan.model, enable_prefix_caching=False, **plan.engine) as llm:
        return measure_journal(llm, source, folder, plan.rounds, say)


def _prefix(plan: JobsPlan, folder: Path, say: Say) -> PrefixGain:
    bodies = RandomTexts(plan.model).chats(plan.prefix_rows, plan.system_len, _QUESTION_LEN, _ANSWER_LEN)
    source = write_batch(folder / "in.jsonl", bodies)
    return measure_prefix(plan.model, source, folder, plan.rounds, say, **plan.engine)


def _memory(plan: JobsPlan, folder: Path, say: Say) -> JobMemory:
    return measure_memory(plan.model, folder, plan.rows, say)


_MEASURES: dict[str, Callable[[JobsPlan, Path, Say], JournalCost | PrefixGain | JobMemory]] = {
    "journal": _journal,
    "prefix": _prefix,
    "memory": _memory,
}
