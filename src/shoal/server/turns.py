"""Whose turn is next: each owner of an API key gets its share, counted in tokens."""

from __future__ import annotations


class Turns:
    """Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996): a request's turn is the number of tokens that its owner was given
    before it, but not less than that of the request that began last, so that nobody saves up turns while he asks for nothing.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._now = 0
        self._next: dict[str, int] = {}

    def take(self, owner: str, tokens: int) -> int:
        """The turn of a request that may take so many tokens."""
        turn = max(self._now, self._next.get(owner, 0))
        self._next[owner] = turn + tokens
        return turn

    def begun(self, turn: int) -> None:
        """A request with this turn runs now. Owners who are behind it are as good as new."""
        if turn > self._now:
            self._now = turn
            self._next = {owner: following for owner, following in self._next.items() if following > turn}

    def give_back(self, owner: str, tokens: int) -> None:
        """A request has ended with so many tokens less than it might have taken."""
        if owner in self._next:
            self._next[owner] = max(self._now, self._next[owner] - tokens)
