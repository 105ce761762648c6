"""Workers that answer with an echo: what becomes of rows does not need a model."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import EngineError, MemoryLimitError
from shoal.jobs.running.engine_half import Finished, LocalHalf
from shoal.jobs.running.task import Task
from shoal.params import SamplingParams
from tests.jobs.fake import FakeLLM

SECONDS_A_STEP = 0.002


class Deadly(FakeLLM):
    """Says a prompt and its seed. A prompt that begins with "poison" ends the process in the step that has it."""

    def __init__(self, max_num_seqs: int, seed: int, seconds_a_step: float) -> None:
        super().__init__(max_num_seqs=max_num_seqs, seed=seed, on_step=self._on_each_step, remember=False)
        self._seconds_a_step = seconds_a_step

    def submit(
        self, prompt: Any, params: SamplingParams, *, request_id: str, priority: int, timeout: float | None
    ) -> str:
        super().submit(prompt, params, request_id=request_id, priority=priority, timeout=timeout)
        text, steps = self._left[request_id]
        self._left[request_id] = f"{text} {params.seed}", steps
        return request_id

    def _on_each_step(self) -> None:
        time.sleep(self._seconds_a_step)
        if any(text.startswith("poison") for text, _ in self._left.values()):
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """There is nothing to close."""


class LoggingHalf(LocalHalf):
    """Writes down each row that it finishes: a line of its number and the time, in ``folder``/PID."""

    def __init__(self, *half: Any, folder: Path) -> None:
        super().__init__(*half)
        self._log = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(self) -> list[Finished]:
        finished = super().step()
        if finished:
            os.write(self._log, "".join(f"{row.row} {time.time()}\n" for row in finished).encode())
        return finished


@dataclass(frozen=True)
class LoadFake:
    """Loads the engine half of a worker. ``log``: a folder for what its rows' LoggingHalf writes."""

    seconds_a_step: float = SECONDS_A_STEP
    log: Path | None = None

    def __call__(self, task: Task) -> LocalHalf:
        half = half_of(task, self.seconds_a_step)
        return LocalHalf(*half) if self.log is None else LoggingHalf(*half, folder=self.log)


load_fake = LoadFake()


class BrokenHalf(LocalHalf):
    """An engine that breaks in the step that has a row whose custom_id begins so."""

    def __init__(self, *half: Any, prefix: str) -> None:
        super().__init__(*half)
        self._prefix = prefix

    def step(self) -> list[Finished]:
        if any(row.custom_id.startswith(self._prefix) for row in self._running.values()):
            raise EngineError("the engine failed: out of luck")
        return super().step()


@dataclass(frozen=True)
class LoadBroken:
    """Engines that break of rows whose custom_id begins with ``prefix``."""

    prefix: str = ""

    def __call__(self, task: Task) -> LocalHalf:
        return BrokenHalf(*half_of(task, SECONDS_A_STEP), prefix=self.prefix)


@dataclass(frozen=True)
class LoadStuck:
    """The first engine of all does not come back from its first step; ``mark`` is a file that it leaves."""

    mark: Path

    def __call__(self, task: Task) -> LocalHalf:
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return load_fake(task)
        return LocalHalf(*half_of(task, 10_000))


def load_nothing(task: Task) -> LocalHalf:
    """A worker that cannot start."""
    raise MemoryLimitError("needs 7 GiB, 1 GiB is there")


def half_of(task: Task, seconds_a_step: float) -> tuple[Any, ...]:
    """What a LocalHalf is made of."""
    model = Deadly(task.config.max_num_seqs, task.config.seed, seconds_a_step).as_llm
    return model, task.reader(), task.served, task.options.timeout
