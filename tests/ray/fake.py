"""Workers that answer with an echo: what becomes of rows does not need a model."""

from __future__ import annotations

import os
import signal
import time

from shoal.jobs.running.engine_half import LocalHalf
from shoal.jobs.running.launch import local_half
from shoal.jobs.running.task import Task
from tests.jobs.fake import FakeLLM

SECONDS_A_STEP = 0.002


class Deadly(FakeLLM):
    """A prompt that begins with "poison" ends the process in the step that has it."""

    def __init__(self, max_num_seqs: int, seed: int) -> None:
        super().__init__(max_num_seqs=max_num_seqs, seed=seed, on_step=self._on_each_step, remember=False)

    def _on_each_step(self) -> None:
        time.sleep(SECONDS_A_STEP)
        if any(text.startswith("poison") for text, _ in self._left.values()):
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """There is nothing to close."""


def load_fake(task: Task) -> LocalHalf:
    """The engine half of a worker."""
    return local_half(task, Deadly(task.config.max_num_seqs, task.config.seed).as_llm)
