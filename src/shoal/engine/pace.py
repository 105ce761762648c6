"""How much of a prompt a step takes in, so that those that decode beside it get their tokens in time."""

from __future__ import annotations

from collections import deque
from statistics import median

TILE = 8  # rows of a prompt that attention computes at once: fewer in the last tile cost as much (docs/lab-log.md)
LEAST_ROWS = 2 * TILE - 1  # of prompts, however long a step takes: they always advance
_REMEMBERED = 65  # steps; the median of so many does not heed a few that were disturbed


class StepPacer:
    """Learns from the engine's steps what they cost, and says how many rows fit into one of ``target`` seconds.

    A sequence has one row at least; *further* rows are those of prompts: with its first, a prompt gets whole tiles. Steps without
    further rows tell what a step costs at least, those with them what each of them adds.
    """

    def __init__(self, target: float) -> None:
        self._target = target
        self._plain: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of steps
        self._added: deque[float] = deque(maxlen=_REMEMBERED)  # seconds of a further row

    @property
    def further_rows(self) -> int:
        """How many a step may have."""
        if not self._added:
            return LEAST_ROWS
        added = max(median(self._added), 1e-9)
        fitting = int((self._target - self._step) / added) + 1
        return max(LEAST_ROWS, (fitting + TILE // 2) // TILE * TILE - 1)

    def record(self, further_rows: int, seconds: float) -> None:
        """Take in what a step took."""
        if further_rows:
            self._added.append(max(0.0, seconds - self._step) / further_rows)
        else:
            self._plain.append(seconds)

    @property
    def _step(self) -> float:
        return median(self._plain) if self._plain else 0.0
