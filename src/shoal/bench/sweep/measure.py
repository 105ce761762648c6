"""``shoal bench sweep``: how speed depends on the number of sequences and the length of prompts, through the real engine.

A cell is one model, batch and prompt length, measured in a process of its own, so that its peak memory is its own too. Each finished
cell is written down at once; what was measured with the same file, machine, backend and version is not measured again.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from shoal.bench.factor import BatchingFactors, Factors, remember
from shoal.bench.machine import cpu_name
from shoal.bench.peers.measure import ROWS_PER_STEP, Case
from shoal.bench.rates import Speed
from shoal.bench.store import read_json, write_json
from shoal.bench.turns import Worker
from shoal.bench.workload import random_ids
from shoal.errors import ParameterError
from shoal.gguf.reader import GGUFFile
from shoal.jobs.durable.fingerprint import model_fingerprint
from shoal.kernels.load import load_backend
from shoal.models.config import ModelConfig
from shoal.version import __version__

RESULTS = "sweep.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """Which models, and for each which batches and prompt lengths; ``rounds`` turns a cell, of ``output_len`` decode steps."""

    models: tuple[Path, ...]
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prompt_lens: tuple[int, ...] = (1, 16, 128, 512)
    output_len: int = 32
    rounds: int = 3
    threads: int = 2
    seed: int = 0
    device: str = "cpu"
    skip_tokenizer_init: bool = False

    def cases(self) -> list[Case]:
        """What is measured of each model, in order."""
        return [Case(batch, length, self.output_len) for length, batch in product(self.prompt_lens, self.batches)]


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a cell's figures depend on: cells with equal setups are the same cell."""

    model: str
    fingerprint: str
    cpu: str
    backend: str
    version: str
    threads: int
    batch: int
    prompt_len: int
    output_len: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Cell:
    """What was measured: seconds and CPU seconds a round, seconds of every decode step of all rounds, peak memory in bytes."""

    setup: Setup
    date: str
    prefill_seconds: Sequence[float]
    decode_seconds: Sequence[float]
    step_seconds: Sequence[float]
    cpu_seconds: Sequence[float]
    peak_rss: int
    kv_bytes: int

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Cell:
        """What ``asdict`` made of a cell."""
        return cls(**{**found, "setup": Setup(**found["setup"])})

    @property
    def prefill(self) -> Speed:
        """Prompt tokens a second."""
        return Speed.of(self.setup.batch * self.setup.prompt_len, self.prefill_seconds)

    @property
    def decode(self) -> Speed:
        """Tokens a second of all sequences together."""
        return Speed.of(self.setup.batch * self.setup.output_len, self.decode_seconds)

    @property
    def step_median(self) -> float:
        """Seconds of a decode step."""
        return statistics.median(self.step_seconds)

    @property
    def step_p90(self) -> float:
        """Seconds that nine of ten decode steps do not exceed."""
        return float(np.percentile(self.step_seconds, 90))

    @property
    def cpu_share(self) -> float:
        """CPU time over time, of all threads: 1 where every thread ran all the time."""
        return sum(self.cpu_seconds) / (sum(self.prefill_seconds) + sum(self.decode_seconds)) / self.setup.threads


def sweep(plan: SweepPlan, folder: Path, say: Callable[[str], None]) -> list[Cell]:
    """Measure what is not yet in ``folder``; all cells of the plan. The throughput factors of batching are remembered.

    Raises ParameterError where two models have one name or the folder's results are not ours, EngineError where a cell fails;
    those before it are kept.
    """
    names = [path.name for path in plan.models]
    if len(set(names)) < len(names):
        raise ParameterError("models", names, "files with different names: they are told apart by it")
    backend = load_backend(plan.device, plan.threads)
    description = backend.describe()
    backend.close()
    results = _Results(folder / RESULTS)
    cells: list[Cell] = []
    for path in plan.models:
        measured = list(_Model(plan, path, description).cells(results, say))
        if factors := _factors(measured):
            found = BatchingFactors(max(cell.date for cell in measured), factors)
            try:
                remember(path, description, found)
            except OSError as error:
                say(f"throughput factors are not remembered ({error}); set SHOAL_BENCH_CACHE to a folder of yours")
        cells += measured
    return cells


class _Results:
    """The cells in a folder, of this plan and of others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: list[dict[str, Any]] = read_json(path).get("cells", [])

    def find(self, setup: Setup) -> Cell | None:
        """The cell with this setup, if it is there."""
        wanted = asdict(setup)
        return next((Cell.from_json(cell) for cell in self._cells if cell["setup"] == wanted), None)

    def add(self, cell: Cell) -> None:
        """Keep a cell, on disk too."""
        self._cells.append(asdict(cell))
        write_json(self._path, {"cells": self._cells})


class _Model:
    """The cells of one file."""

    def __init__(self, plan: SweepPlan, path: Path, backend: str) -> None:
        self._plan, self._path, self._backend = plan, path, backend
        self._fingerprint, self._cpu = str(model_fingerprint(path)["blake2b"]), cpu_name()
        with GGUFFile.open(path) as file:
            self._vocab_size = ModelConfig.from_gguf(file).vocab_size

    def cells(self, results: _Results, say: Callable[[str], None]) -> Iterator[Cell]:
        """One by one, measured or found."""
        cases = self._plan.cases()
        for number, case in enumerate(cases, 1):
            setup = self._setup(case)
            cell = results.find(setup)
            known = "" if cell is None else " (measured before)"
            say(f"{self._path.name} {number}/{len(cases)}: {case.batch} x {case.prompt_len} tokens{known}")
            if cell is None:
                cell = self._measure(setup, case)
                results.add(cell)
            yield cell

    def _setup(self, case: Case) -> Setup:
        return Setup(
            model=self._path.name,
            fingerprint=self._fingerprint,
            cpu=self._cpu,
            backend=self._backend,
            version=__version__,
            threads=self._plan.threads,
            batch=case.batch,
            prompt_len=case.prompt_len,
            output_len=case.steps,
            rounds=self._plan.rounds,
        )

    def _measure(self, setup: Setup, case: Case) -> Cell:
        """A process that loads the model, one turn to warm up, then the rounds."""
        prompts = random_ids(case.batch, case.prompt_len, self._vocab_size, self._plan.seed)
        turn = {"prompts": prompts, "steps": case.steps}
        with Worker("shoal", self._command(case)) as worker:
            worker.ask(turn)
            turns = [worker.ask(turn) for _ in range(setup.rounds)]
            kv_bytes = worker.facts["kv_bytes"]
        return Cell(
            setup=setup,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            prefill_seconds=[answer["prefill_seconds"] for answer in turns],
            decode_seconds=[answer["decode_seconds"] for answer in turns],
            step_seconds=[seconds for answer in turns for seconds in answer["step_seconds"]],
            cpu_seconds=[sum(answer["cpu_seconds"]) for answer in turns],
            peak_rss=turns[-1]["peak_rss"],
            kv_bytes=kv_bytes,
        )

    def _command(self, case: Case) -> list[str]:
        settings = {
            "model": str(self._path),
            "threads": self._plan.threads,
            "device": self._plan.device,
            "max_num_seqs": case.batch,
            "max_num_batched_tokens": ROWS_PER_STEP,
            "max_model_len": case.context,
            "skip_tokenizer_init": self._plan.skip_tokenizer_init,
        }
        return [sys.executable, "-m", "shoal.bench.shoal_worker", json.dumps(settings)]


def _factors(cells: Sequence[Cell]) -> Factors:
    """Of the prompt lengths at which one sequence alone was measured too."""
    alone = {cell.setup.prompt_len: cell.decode.median for cell in cells if cell.setup.batch == 1}
    factors: dict[int, dict[int, float]] = {length: {} for length in alone}
    for cell in cells:
        length, batch = cell.setup.prompt_len, cell.setup.batch
        if length in alone:
            factors[length][batch] = cell.decode.median / alone[length]
    return factors
