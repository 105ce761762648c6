"""The driver of a job as a process of its own, which may be killed.

    python -m tests.ray.driver FOLDER '{"address": "127.0.0.1:6379", ...}'

FOLDER holds the job's files; what is said is written to FOLDER/said, each line after the time.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from shoal.errors import ShoalError
from shoal.jobs.running.engine_half import Finished
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.launch import Host, run_here
from shoal.jobs.running.task import JobOptions, Task
from shoal.params import EngineConfig
from shoal.ray.fleet import Fleet
from shoal.ray.launch import Cluster, run_job
from shoal.ray.worker import Reply, load_llm
from tests.ray.fake import LoadFake

MAX_NUM_SEQS = 4


@dataclass(frozen=True)
class Orders:
    """What a driver is to do. ``address`` None: the job on this machine, without Ray. ``seconds_a_step`` None: with the real model."""

    model: str
    address: str | None = None
    workers: int = 1
    seconds_a_step: float | None = None
    stalled_after: float = 600.0
    spare: bool = False  # see Sparing

    def text(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


class Sparing(Fleet):
    """Workers that are given up are out of its reach until they have answered: what they say still arrives, and is said."""

    def __init__(self, *fleet: Any, **named: Any) -> None:
        super().__init__(*fleet, **named)
        self._late: dict[Any, Any] = {}  # answers that are under way, and who gives them

    def _drop(self, slot: Any) -> None:
        if slot.worker is not None:
            self._late |= dict.fromkeys(slot.worker.calls, slot.worker.actor)
        slot.worker = None

    def step(self) -> list[Finished]:
        """Hears the late ones too."""
        finished = super().step()
        if self._late:
            ready, _ = ray.wait(list(self._late), num_returns=len(self._late), timeout=0)
            for ref in ready:
                self._hear_late(self._late.pop(ref), ref)
        return finished

    def _hear_late(self, actor: Any, ref: Any) -> None:
        try:
            answer = ray.get(ref)
        except ray.exceptions.RayError:
            return
        assert isinstance(answer, Reply)
        if answer.finished:
            self._say(f"late: {[row.row for row in answer.finished]}")
        if actor not in self._late.values():
            ray.kill(actor)

    def close(self) -> None:
        """Now all are ended."""
        super().close()
        for actor in self._late.values():
            ray.kill(actor)
        self._late.clear()


def work(folder: Path, orders: Orders) -> None:
    """Run the job in ``folder``, or go on with it."""
    (folder / "log").mkdir(exist_ok=True)
    load = load_llm if orders.seconds_a_step is None else LoadFake(orders.seconds_a_step, folder / "log")
    files = JobFiles.named(folder / "in.jsonl", folder / "out.jsonl", None)
    options, config = JobOptions(), EngineConfig(device="cpu", max_num_seqs=MAX_NUM_SEQS, threads=1)
    with (folder / "said").open("a", encoding="utf-8", buffering=1) as said:

        def say(text: str) -> None:
            said.write(f"{time.time()} {text}\n")

        say("begin")
        if orders.address is None:
            files.check()
            task = Task.of(orders.model, files, options, config)
            run_here(task, Host(load, say, lambda progress: None))
            return
        fleet = Sparing if orders.spare else Fleet
        cluster = Cluster(address=orders.address, workers=orders.workers, stalled_after=orders.stalled_after)
        with patch("shoal.ray.launch.Fleet", fleet):
            run_job(orders.model, files, options, config, cluster, say=say, report=lambda progress: None, load=load)


if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), Orders(**json.loads(sys.argv[2])))
    except ShoalError as error:
        sys.exit(f"{type(error).__name__}: {error}")
