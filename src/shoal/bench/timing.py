"""How long something short takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_LEAST_SECONDS = 0.02  # of a round: much more than the clock's and the scheduler's grain


def timings(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of one ``run``, a number a round; a round runs it as often as takes a while. The first run warms up."""
    run()
    times = max(1, math.ceil(_LEAST_SECONDS / max(seconds(run), 1e-9)))
    return [seconds(run, times) / times for _ in range(rounds)]


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Seconds that ``times`` runs take."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start
