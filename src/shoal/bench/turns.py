"""The other end of a worker: a process that holds a model, measures when asked to, and sleeps on its pipe otherwise."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import psutil

from shoal.errors import EngineError

Turn = Mapping[str, Any]  # the arguments of the worker's ``measure``
Answer = dict[str, Any]

_CLOSE_SECONDS = 10
_SETTLE_SECONDS = 0.1  # threads of the side that was measured last stop spinning


class Worker:
    """A worker process as a context manager; ``facts`` is what it said of itself once its model was loaded.

    Raises EngineError with the last thing it wrote to stderr where it ends before it answers.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see close
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, turn: Turn) -> Answer:
        """Have it measure one turn; its answer."""
        assert self._process.stdin is not None, "opened with a pipe"
        try:
            self._process.stdin.write(json.dumps(turn) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: _answer says why
        return self._answer()

    def cpu_seconds(self) -> float:
        """CPU time it has used so far, all threads."""
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def close(self) -> None:
        """End the process; closing twice does nothing."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            try:
                self._process.communicate(timeout=_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None, "opened with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"the {self.name} worker ended: {self._last_words()}")
        answer: Answer = json.loads(line)
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else f"exit status {status}"


class OtherLoad:
    """How much of the machine anything but the side being measured has used, over all turns."""

    def __init__(self) -> None:
        self._others = 0.0
        self._total = 0.0

    @property
    def share(self) -> float:
        """From 0 (each side was alone in its turns) to 1."""
        return max(0.0, self._others / self._total) if self._total else 0.0

    def watch(self, worker: Worker, turn: Turn) -> Answer:
        """Let ``worker`` take a turn and see what else runs meanwhile."""
        time.sleep(_SETTLE_SECONDS)
        busy, total, own = *_machine_seconds(), worker.cpu_seconds()
        answer = worker.ask(turn)
        busy_after, total_after, own_after = *_machine_seconds(), worker.cpu_seconds()
        self._others += (busy_after - busy) - (own_after - own)
        self._total += total_after - total
        return answer


def _machine_seconds() -> tuple[float, float]:
    """CPU time of all cores since boot: busy, and in all. What a hypervisor takes away counts as busy."""
    times = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # both are also in user
    return total - times.idle - getattr(times, "iowait", 0.0), total
