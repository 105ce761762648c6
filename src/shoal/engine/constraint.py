"""What the engine knows of a constraint: which tokens may come next, and that it takes in the one that came."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint32]  # [ceil(vocab / 32)]: token t is allowed where bit t % 32 of word t // 32 is set


class Constraint(Protocol):
    """What the output of one sequence may be, and how far it is. Used by one thread at a time."""

    def fill_mask(self, row: Mask) -> None:
        """Write into ``row`` which tokens may come next; the model's end tokens among them where the output may end.

        Changes nothing else, so it may be done again. Raises ConstraintError where that breaks a limit.
        """
        ...

    def advance(self, token: int) -> None:
        """Take in the next token. Raises ConstraintError where it is not allowed."""
        ...

    @property
    def is_accepting(self) -> bool:
        """Whether the output may end here."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end token may follow."""
        ...

    def copy(self) -> Constraint:
        """A constraint of its own that stands where this one does."""
        ...
