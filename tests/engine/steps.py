"""A constraint for the engine's tests: one set of tokens after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from shoal.engine.constraint import Constraint, Mask
from shoal.errors import ConstraintError
from tests.engine.toy import VOCAB

END = 2
WORDS = -(-VOCAB // 32)


@dataclass
class Steps:
    """Allows one set of tokens after the other. ``accepting``: after how many tokens the output may end, with ``end``; ``broken_at``:
    after how many it breaks a limit."""

    sets: tuple[tuple[int, ...], ...]
    accepting: frozenset[int] = frozenset()
    end: int = END
    broken_at: int | None = None
    place: int = 0
    filled: list[int] = field(default_factory=list)

    def fill_mask(self, row: Mask) -> None:
        self.filled.append(self.place)
        if self.place == self.broken_at:
            raise ConstraintError("too many items")
        allowed = set(self.sets[self.place]) if self.place < len(self.sets) else set()
        row[:] = mask_of(allowed | ({self.end} if self.is_accepting else set()))

    def advance(self, token: int) -> None:
        if token not in self.sets[self.place]:
            raise ConstraintError(f"token {token} is not allowed")
        self.place += 1

    @property
    def is_accepting(self) -> bool:
        return self.is_complete or self.place in self.accepting

    @property
    def is_complete(self) -> bool:
        return self.place == len(self.sets)

    def copy(self) -> Constraint:
        return replace(self, filled=[])


def mask_of(allowed: set[int]) -> Mask:
    """These tokens as a mask."""
    bits = np.zeros(32 * WORDS, np.uint8)
    bits[sorted(allowed)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
