"""The engine half of a job in an actor of its own, on whatever machine Ray puts it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shoal import hub
from shoal.jobs.durable.fingerprint import model_fingerprint
from shoal.jobs.input.rows import Line
from shoal.jobs.running.engine_half import EngineHalf, Finished, Steps, window
from shoal.jobs.running.launch import local_half
from shoal.jobs.running.task import Task
from shoal.kernels.load import find_device, load_probe
from shoal.llm import LLM
from shoal.version import __version__

Load = Callable[[Task], EngineHalf]

SECONDS_A_CALL = 0.5  # a worker says within this time and a step what it has
_SHARE_A_CALL = (
    6  # ... or as soon as this part of what it may hold is done: of two calls, what it holds beyond what runs at once
)


class Nature(NamedTuple):
    """What the answers of a worker depend on: all workers of a job are equal in this."""

    shoal: str
    model: str  # hash of the file
    processor: str  # "cpu" for all of them: their instruction sets give the same bits


@dataclass(frozen=True, slots=True)
class Begun:
    """A worker that has loaded its model in so many ``seconds``."""

    place: str  # for people: host and process
    nature: Nature
    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker has done since it was last asked. ``epoch`` is the one that it was asked in."""

    epoch: int
    finished: Sequence[Finished]
    steps: Steps


class Worker:
    """Loads by ``load`` what ``task`` needs, with its ``model`` as this machine knows it, and computes rows. Its calls come one after
    the other."""

    def __init__(self, model: str, task: Task, load: Load) -> None:
        self._model, self._task, self._load = model, task, load
        self._enough = max(1, window(task.config.max_num_seqs) // _SHARE_A_CALL)
        self._held = 0

    def begin(self) -> Begun:
        """Load the model. Raises what loading it raises."""
        start = time.monotonic()
        task = replace(self._task, path=hub.resolve(self._model))
        nature = nature_of(task)
        self._half = self._load(task)
        return Begun(f"{platform.node()}/{os.getpid()}", nature, time.monotonic() - start)

    def compute(self, epoch: int, lines: Sequence[Line]) -> Reply:
        """Take ``lines`` in, and work for a while. Raises EngineError where the engine is broken."""
        finished = [found for line in lines if (found := self._half.submit(line))]
        self._held += len(lines) - len(finished)
        until = time.monotonic() + SECONDS_A_CALL
        while self._held and len(finished) < self._enough and time.monotonic() < until:
            ended = self._half.step()
            self._held -= len(ended)
            finished += ended
        return Reply(epoch, finished, self._half.steps())


def load_llm(task: Task) -> EngineHalf:
    """The engine half on an LLM of this process."""
    return local_half(task, LLM(task.path, config=task.config))


def nature_of(task: Task) -> Nature:
    """What the answers to a task depend on here. Raises as ``model_fingerprint``."""
    processor = find_device(task.config.device)
    if processor == "cuda":
        found: dict[str, Any] = load_probe().describe()
        processor = str(found["name"])
    return Nature(__version__, str(model_fingerprint(task.path)["blake2b"]), processor)
