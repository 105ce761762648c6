"""How many tokens are worth a guess: what further rows cost a step, as its steps have shown, against the tokens they may bring."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter

REMEMBERED = 7  # steps of so many rows
_KEPT, _DOUBTFUL = (
    512,
    128,
)  # steps; what was measured before them may no longer be true, less so if it was measured once or twice
_PLAIN_EVERY = 32  # steps of as many sequences: one of them has no drafts, to see what it takes without
_FEW = 4  # further rows: the first may cost more than those that come with it
_SUPPOSED = 1 / 8  # of a row's share of the step: what a further row costs, where nothing is known
_GAIN = 1.02  # what a draft must promise; less is lost in what nobody measures
_WEIGHT = 0.25  # of the last guess in a sequence's chance
_FADE = 1 / 32  # of what drafts cost is forgotten at each step without any: what was dear once is tried again
_HOPE, _DRIFT = 0.5, 1 / 128  # a sequence whose guesses fail is tried again, now and then


class DraftPace:
    """Learns from the engine's steps what they take. ``target``: the seconds that a step should take, if that matters.

    A further row costs next to nothing as long as a step waits for weights from memory, and as much as any other once it waits for
    arithmetic. Both are seen in the time of steps by their number of rows.
    """

    fade = _FADE

    def __init__(self, target: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._target, self._clock = target, clock
        self._steps = 0
        self._seconds: dict[int, deque[tuple[int, float]]] = {}  # by rows: number and seconds of the last steps
        self._typical: dict[int, float] = {}  # what they take if nothing disturbs them
        self._rows: list[int] = []  # the keys, in order
        self._since_plain: dict[int, int] = {}  # by sequences: drafted steps since one without drafts
        self._draft_seconds = 0.0  # what a drafted token costs before the step, if nothing disturbs it
        self._last_drafts: deque[float] = deque(maxlen=REMEMBERED)

    def record(self, sequences: int, rows: int, seconds: float) -> None:
        """Take in a step in which every sequence decodes."""
        self._steps += 1
        if rows not in self._seconds:
            self._seconds[rows] = deque(maxlen=REMEMBERED)
            self._rows = sorted(self._seconds)
        self._seconds[rows].append((self._steps, seconds))
        self._typical[rows] = undisturbed([spent for _, spent in self._seconds[rows]])
        if rows == sequences:
            self._draft_seconds *= 1 - self.fade
        self._since_plain[sequences] = 0 if rows == sequences else self._since_plain.get(sequences, 0) + 1
        if self._steps % _DOUBTFUL == 0:
            self._drop_old()

    @contextmanager
    def drafting(self, count: int) -> Iterator[None]:
        """Inside, so many tokens are drafted."""
        start = self._clock()
        yield
        self._last_drafts.append((self._clock() - start) / count)
        self._draft_seconds = undisturbed(list(self._last_drafts))

    def counts(self, chances: list[float], most: list[int], room: int) -> list[int]:
        """How many tokens to draft for each of the sequences that all decode. ``most``: that make sense for it."""
        plain = len(chances)
        if plain not in self._seconds or self._since_plain.get(plain, _PLAIN_EVERY) >= _PLAIN_EVERY:
            return [0] * plain
        values = sorted(_values(chances, most), key=itemgetter(0), reverse=True)[: min(room, self._unknown(plain))]
        worth = values[: self._best(plain, values)]
        counts = [0] * plain
        for _, index in worth:
            counts[index] += 1
        return counts

    def learned(self, chance: float, drafted: int, kept: int) -> float:
        """The chance of a sequence of whose drafted tokens the first ``kept`` were right."""
        for _ in range(kept):
            chance += (1 - chance) * _WEIGHT
        return chance if kept == drafted else chance * (1 - _WEIGHT)

    def forgotten(self, chance: float) -> float:
        """The chance of a sequence after a step in which nothing was drafted for it."""
        return chance + (_HOPE - chance) * _DRIFT

    def _unknown(self, plain: int) -> int:
        """How many further rows may be tried: no more than twice of what was ever seen, and a few."""
        return 2 * max(0, self._rows[-1] - plain) + _FEW

    def _best(self, plain: int, values: list[tuple[float, int]]) -> int:
        """How many of the best guesses are worth their rows: the number with the most tokens a second."""
        alone, further = self._typical[plain], self._slope(plain)
        best, most = 0, plain / max(alone, 1e-9) * _GAIN
        tokens = float(plain)
        costs = self._draft_costs([owner for _, owner in values])
        for count, ((value, _), cost) in enumerate(zip(values, costs, strict=True), 1):
            tokens += value
            seconds = max(alone, self._time(plain + count, further)) + cost
            if self._target is not None and seconds > max(self._target, alone):
                break
            rate = tokens / max(seconds, 1e-9)
            if rate > most:
                best, most = count, rate
        return best

    def _draft_costs(self, owners: list[int]) -> Iterator[float]:
        """Seconds before the step for the first guess, the first two and so on, by whose they are."""
        return (count * self._draft_seconds for count in range(1, len(owners) + 1))

    def _time(self, rows: int, further: float) -> float:
        """What a step of so many rows takes: what it took, or what lies between its neighbours, or ``further`` for each row more."""
        place = bisect_left(self._rows, rows)
        if place == len(self._rows):
            last = self._rows[-1]
            return self._typical[last] + (rows - last) * further
        high = self._rows[place]
        if high == rows or place == 0:
            return self._typical[high]
        low = self._rows[place - 1]
        share = (rows - low) / (high - low)
        return self._typical[low] + share * (self._typical[high] - self._typical[low])

    def _slope(self, plain: int) -> float:
        """What a row costs beyond all that was seen."""
        last, supposed = self._rows[-1], self._typical[plain] / plain * _SUPPOSED
        if last == plain:
            return supposed
        seen = max(0.0, self._typical[last] - self._typical[plain]) / (last - plain)
        return min(seen, supposed) if last < plain + _FEW else seen

    def _drop_old(self) -> None:
        for rows, found in list(self._seconds.items()):
            if found[-1][0] <= self._steps - (_KEPT if len(found) > 2 else _DOUBTFUL):
                del self._seconds[rows], self._typical[rows]
        self._rows = sorted(self._seconds)


def undisturbed(seconds: list[float]) -> float:
    """The lower quartile: what disturbs a step makes it longer."""
    return sorted(seconds)[len(seconds) // 4]


def _values(chances: list[float], most: list[int]) -> Iterator[tuple[float, int]]:
    """How likely each token of each draft is to be kept, and whose it is: first the first ones of all, then the second."""
    kept = list(chances)
    for place in range(max(most, default=0)):
        for index, (chance, count) in enumerate(zip(chances, most, strict=True)):
            if place < count:
                yield kept[index], index
                kept[index] *= chance
