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
from importlib import import_module
from pathlib import Path
from threading import Thread

from shoal.kernels.cpu.jit import STORE, Lazy

_MOST_HELPERS = 7
_WORTH_IT = 4  # kernels; a helper needs as long as one of them to start
# What takes longest comes first, so that nobody has much to do when the others are done.
_LONGEST = ("sample", "linear_", "attention", "choose", "rope_store")


def compile_together(kernels: Iterable[Lazy], processes: int) -> None:
    """Have these ready, from the store if they are there; with up to ``processes`` at work, this one among them."""
    missing = [kernel for kernel in dict.fromkeys(kernels) if not kernel.is_at_hand]
    missing.sort(key=_rank)
    queue = deque(missing)
    helpers = min(_MOST_HELPERS, processes - 1, len(missing) // 2)
    if len(missing) < _WORTH_IT or not sys.executable or not STORE.keeps:
        helpers = 0
    threads = [Thread(target=_feed, args=(queue,), daemon=True) for _ in range(helpers)]
    for thread in threads:
        thread.start()
    while queue:
        _take(queue)
    for thread in threads:
        thread.join()
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


def _feed(queue: deque[Lazy]) -> None:
    """Let one helper compile until nothing is left, or until it ends."""
    folders = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    command = [sys.executable, "-P", "-m", __name__]
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True
        ) as helper:
            assert helper.stdin is not None
            assert helper.stdout is not None
            while queue:
                kernel = queue.popleft()
                helper.stdin.write(f"{kernel.module} {kernel.name}\n")
                helper.stdin.flush()
                if helper.stdout.readline().split() != ["compiled", kernel.name]:
                    return
                if Lazy.on_compile is not None:
                    Lazy.on_compile(kernel.name)
    except (OSError, IndexError):  # it could not start, or ended; or the others have taken the last one
        return


def main() -> None:
    """What a helper does."""
    for line in sys.stdin:
        module, name = line.split()
        import_module(module)
        Lazy.known[module, name].get()
        print("compiled", name, flush=True)


if __name__ == "__main__":
    main()
