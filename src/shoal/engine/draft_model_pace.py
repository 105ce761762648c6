"""How much to guess with a second model, whose own time counts: that of its steps, and that of reading a text before it can guess."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.engine.draft_pace import REMEMBERED, DraftPace, undisturbed
from shoal.engine.pace import LEAST_ROWS

_TRIAL = 1 / 100  # of the time of steps is there to see whether reading pays
_SAVED = 64  # plain steps: no more time than they take can be put aside


class ModelPace(DraftPace):
    """As DraftPace, for guesses of which one *round* brings one for every text that is still guessed on.

    Reading a text costs much at once, and pays, if at all, over many steps. So there is a balance, in seconds: reading is taken from
    it, steps with guesses add what they save, or take what they lose, and all steps add a little. No text is begun while it is
    below 0: where reading does not pay, next to nothing is read.
    """

    fade = 1 / 512  # a round always costs about the same; what was measured is hardly ever a hold-up

    def __init__(self, target: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(target, clock)
        self._balance = 0.0
        self._alone = 0.0  # what the last kind of step takes without guesses
        self._row_seconds = 0.0  # to read a token
        self._last_read: deque[float] = deque(maxlen=REMEMBERED)
        self._kept = self._rounds = 0  # of this step

    @property
    def may_begin(self) -> bool:
        """Whether a text may be read that has not been begun."""
        return self._balance >= 0

    def rows_to_read(self, most: int) -> int:
        """How many tokens may be read before this step."""
        if self._target is None:
            return most
        fitting = (self._target - self._alone) / max(self._row_seconds, 1e-9) if self._row_seconds else 0
        return min(most, max(LEAST_ROWS, int(fitting)))

    @contextmanager
    def reading(self, rows: int) -> Iterator[None]:
        """Inside, so many tokens are read."""
        start = self._clock()
        yield
        self._last_read.append((self._clock() - start) / rows)
        self._row_seconds = undisturbed(list(self._last_read))
        self._balance -= rows * self._row_seconds

    @contextmanager
    def rounds(self, count: int) -> Iterator[None]:
        """Inside, there are so many rounds."""
        with super().drafting(count):
            yield
        self._rounds = count

    @contextmanager
    def drafting(self, count: int) -> Iterator[None]:
        """The drafter itself says when it reads, and when it guesses."""
        yield

    def learned(self, chance: float, drafted: int, kept: int) -> float:
        """As DraftPace; a token that was kept has saved its share of a step."""
        self._kept += kept
        return super().learned(chance, drafted, kept)

    def record(self, sequences: int, rows: int, seconds: float) -> None:
        """As DraftPace; what the step has saved goes to the balance."""
        super().record(sequences, rows, seconds)
        alone = self._typical.get(sequences)
        if alone is not None:  # nothing is guessed otherwise
            self._alone = alone
            saved = self._kept * alone / sequences - max(0.0, self._typical[rows] - alone)
            saved += _TRIAL * alone - self._rounds * self._draft_seconds
            self._balance = min(self._balance + saved, _SAVED * alone)
        self._kept = self._rounds = 0

    def _draft_costs(self, owners: list[int]) -> Iterator[float]:
        lengths: dict[int, int] = {}
        rounds = 0
        for owner in owners:
            lengths[owner] = lengths.get(owner, 0) + 1
            rounds = max(rounds, lengths[owner])
            yield rounds * self._draft_seconds
