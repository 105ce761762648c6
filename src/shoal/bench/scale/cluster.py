"""One driver and its workers, as a simulation: workers compute rows at their own pace, the driver serves what they send in turns.

A worker answers when a quarter of what it may hold is done, or half a second is over, and has two questions at a time, so it only
waits when the driver is more than one answer behind. The driver takes all answers that are there, one after the other, and asks
those workers again. All of that is how ``shoal.ray`` works; times come from measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

_QUESTIONS = 2
_SECONDS_A_CALL = 0.5
_ROWS_A_CALL = 24  # a quarter of the 96 rows that a worker holds which runs 64 at once
_WARM_UP, _ANSWERS = 20, 100  # of each worker: those that are not looked at, and those after them


@dataclass(frozen=True, slots=True)
class DriverCosts:
    """Seconds of the driver: for each ``row``, for each ``call`` of a worker and its answer, and for each ``worker`` whenever it looks
    for answers."""

    row: float
    call: float
    worker: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """``rows`` a second of all workers, and the share of its time that the driver is ``busy``."""

    rows: float
    busy: float


def rows_a_call(rate: float) -> float:
    """How many rows a worker of ``rate`` rows a second has done when it answers."""
    return min(_ROWS_A_CALL, rate * _SECONDS_A_CALL)


def capacity(costs: DriverCosts, rate: float) -> float:
    """The rows a second that a driver serves when all workers always have answers for it, by arithmetic."""
    rows = rows_a_call(rate)
    return rows / (rows * costs.row + costs.call + costs.worker / _QUESTIONS)


def simulate(costs: DriverCosts, workers: int, rate: float) -> Throughput:
    """What ``workers`` that compute ``rate`` rows a second each do with one driver. The same figures give the same answer."""
    driver = _Driver(costs, workers, rate)
    driver.serve(_WARM_UP * workers)
    begun, busy = driver.now, driver.busy
    answers = driver.serve(_ANSWERS * workers)
    seconds = driver.now - begun
    return Throughput(answers * rows_a_call(rate) / seconds, (driver.busy - busy) / seconds)


class _Driver:
    """Serves workers that begin one after the other. ``now``, ``busy``: seconds that have passed, and that it was at work."""

    def __init__(self, costs: DriverCosts, workers: int, rate: float) -> None:
        rows = rows_a_call(rate)
        self._span = rows / rate
        self._look = costs.worker * workers
        self._answer = costs.call + costs.row * rows
        starts = [self._span * worker / workers for worker in range(workers)]
        self._done = [start + self._span * _QUESTIONS for start in starts]  # when a worker has done all it was asked
        self._answers = [
            (start + self._span * (question + 1), worker)
            for worker, start in enumerate(starts)
            for question in range(_QUESTIONS)
        ]
        heapify(self._answers)
        self.now = self.busy = 0.0

    def serve(self, least: int) -> int:
        """Take at least so many answers, and ask their workers again; how many they were."""
        served = 0
        while served < least:
            served += self._take_all()
        return served

    def _take_all(self) -> int:
        """Take the answers that are there, or wait for the first."""
        looked = max(self.now, self._answers[0][0])
        there = []
        while self._answers and self._answers[0][0] <= looked:
            there.append(heappop(self._answers)[1])
        took = self._look + self._answer * len(there)
        self.now = looked + took
        self.busy += took
        for worker in there:
            self._done[worker] = max(self._done[worker], self.now) + self._span
            heappush(self._answers, (self._done[worker], worker))
        return len(there)
