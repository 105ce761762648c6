"""Compiling kernels side by side. Numba compiles one at a time in a process, so a start with an empty cache has helpers: processes
that compile one kernel after another into the store, from which this one loads them.

A helper is told names on its stdin, one a line, and answers with what it compiled. Whatever goes wrong with one (no permission to
start it, no shoal where it looks) costs time and nothing else: what is not in the store is compiled here.

    python -m shoal.kernels.cpu.together
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from shoal.kernels.cpu.jit import STORE, Lazy

_MOST_HELPERS = 7
_WORTH_IT = 4  # kernels; a helper needs as long as one of them to start
_GREETING = "shoal compiles\n"
_PATIENCE = 120.0  # seconds for a helper's last kernel
# What takes longest comes first, so that nobody has much to do when the others are done.
_LONGEST = ("sample", "linear_", "attention", "choose", "rope_store")


def compile_together(kernels: Iterable[Lazy], processes: int) -> None:
    """Have these ready, from the store if they are there; with up to ``processes`` at work, this one among them."""
    missing = [kernel for kernel in dict.fromkeys(kernels) if not kernel.is_at_hand]
    missing.sort(key=_rank)
    queue = deque(missing)
    helpers = _start_helpers(queue, min(_MOST_HELPERS, processes - 1)) if len(missing) >= _WORTH_IT else []
    patience = 0.0
    try:
        while queue:
            _take(queue)
        patience = _PATIENCE
    finally:
        for helper in helpers:
            helper.end(patience)
    for kernel in missing:
        kernel.get()


def _rank(kernel: Lazy) -> int:
    return next((i for i, name in enumerate(_LONGEST) if kernel.name.startswith(name)), len(_LONGEST))


def _take(queue: deque[Lazy]) -> None:
    try:
        kernel = queue.popleft()
    except IndexError:  # a helper was faster
        return
    kernel.get()


def _start_helpers(queue: deque[Lazy], most: int) -> list[_Helper]:
    """As many as can be started, and none where they would be of no use, or where what runs is no Python but a program made of one."""
    if not sys.executable or getattr(sys, "frozen", False) or not STORE.keeps:
        return []
    helpers = []
    for _ in range(min(most, len(queue) // 2)):
        with suppress(OSError):
            helpers.append(_Helper(queue))
    return helpers


class _Helper:
    """A process that compiles, and the thread that gives it kernels: none before it says that it is one."""

    def __init__(self, queue: deque[Lazy]) -> None:
        folders = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
        command = [sys.executable, "-P", "-m", __name__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self._at_work = False
        self._thread = Thread(target=self._feed, args=(queue,), daemon=True)
        self._thread.start()

    def _feed(self, queue: deque[Lazy]) -> None:
        """Let it compile until nothing is left, or until it ends."""
        told, says = self._process.stdin, self._process.stdout
        assert told is not None
        assert says is not None
        with says, suppress(OSError), told:  # it may have ended
            if says.readline() != _GREETING:
                return
            while queue:
                self._at_work = True
                try:
                    kernel = queue.popleft()
                except IndexError:
                    break
                told.write(f"{kernel.module} {kernel.name}\n")
                told.flush()
                if says.readline().split() != ["compiled", kernel.name]:
                    break
                if Lazy.on_compile is not None:
                    Lazy.on_compile(kernel.name)
            self._at_work = False

    def end(self, patience: float) -> None:
        """Wait so many seconds for what it is compiling, if it is; then it is not needed any more. It is not waited for in any other
        way: a process forked from this one meanwhile may hold the pipes open."""
        if self._at_work:
            self._thread.join(patience)
        self._process.kill()
        self._process.wait()


def main() -> None:
    """What a helper does."""
    print(_GREETING, end="", flush=True)
    for line in sys.stdin:
        module, name = line.split()
        import_module(module)
        Lazy.known[module, name].get()
        print("compiled", name, flush=True)


if __name__ == "__main__":
    main()
