"""The engine's Constraint, by llguidance."""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from shoal.constrain.grammar import reason_of
from shoal.errors import ConstraintError


class MatcherConstraint:
    """One text on its way through a grammar. See ``shoal.engine.constraint.Constraint``.

    ``vocab_size``: the model's tokens that are in masks; those from ``allowed`` on are never allowed, whatever the model has there.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, allowed: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._allowed = allowed

    def fill_mask(self, row: NDArray[np.uint32]) -> None:
        """Which tokens may come next. Raises ConstraintError where that breaks a limit."""
        words = -(-self._vocab_size // 32)
        mask = row[:words] if len(row) >= words else np.zeros(words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ConstraintError(f"structured_outputs: {reason_of(self._matcher)}")
        if len(row) < words:
            row[:] = mask[: len(row)]
        row[words:] = 0
        if self._allowed < self._vocab_size:  # an end token that the model does not have
            word, bit = divmod(self._allowed, 32)
            row[word : word + 1] &= np.uint32((1 << bit) - 1)

    def advance(self, token: int) -> None:
        """Take in the next token. Raises ConstraintError where it is not allowed, or breaks a limit."""
        if not self._matcher.consume_token(token):
            reason = reason_of(self._matcher) or f"token {token} is not allowed"
            raise ConstraintError(f"structured_outputs: {reason}")

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end token may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> MatcherConstraint:
        """A constraint of its own that stands where this one does."""
        return MatcherConstraint(self._matcher.deep_copy(), self._vocab_size, self._allowed)
