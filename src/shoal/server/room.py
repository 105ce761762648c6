"""The waiting room: how many requests the server takes on, and who is told to come back later."""

from __future__ import annotations

import math
from collections import Counter

from shoal.openai.schema import APIError

_LONGEST_ADVICE = 60  # seconds
_OWNERS = 64  # at most so many more than there is room for: each with nothing else in the room


class TooManyWaitingError(APIError):
    """429, with the seconds after which it is worth to ask again."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, status=429, kind="rate_limit_error", code="rate_limit_exceeded")
        self.retry_after = retry_after


class WaitingRoom:
    """Bounds what is under way: ``running`` requests may run and ``max_waiting`` wait, with at most ``max_tokens`` tokens of prompts
    among those that have not begun. Of an owner who has nothing here one request is let in though the room is full: nobody can
    take all places.

    For one thread (the event loop's).
    """

    def __init__(self, running: int, max_waiting: int, max_tokens: int) -> None:
        self._running, self._max_waiting, self._max_tokens = running, max_waiting, max_tokens
        self._owners: Counter[str] = Counter()
        self._requests = 0
        self.waiting_tokens = 0
        self._seconds = 1.0  # that a request takes, lately
        self.rejected = 0

    def enter(self, owner: str) -> None:
        """Take a place, before anything is computed. Raises TooManyWaitingError."""
        most = self._running + self._max_waiting
        if self._requests >= most and (self._owners[owner] or self._requests >= most + _OWNERS):
            self._refuse(
                f"{self._requests} requests are under way; at most {self._running} run and {self._max_waiting} wait"
            )
        self._requests += 1
        self._owners[owner] += 1

    def wait(self, tokens: int) -> None:
        """Add the tokens of a prompt to those that have not begun. Raises TooManyWaitingError, unless nothing else waits."""
        if self.waiting_tokens and self.waiting_tokens + tokens > self._max_tokens:
            self._refuse(
                f"prompts of {self.waiting_tokens} tokens wait; with {tokens} more the limit of {self._max_tokens} is passed"
            )
        self.waiting_tokens += tokens

    def begin(self, tokens: int) -> None:
        """A request whose prompt has so many tokens has begun, or ended without."""
        self.waiting_tokens -= tokens

    def leave(self, owner: str, seconds: float) -> None:
        """Give a place back, so long after it was taken."""
        self._requests -= 1
        self._owners[owner] -= 1
        if not self._owners[owner]:
            del self._owners[owner]
        self._seconds += (min(seconds, _LONGEST_ADVICE) - self._seconds) / 8

    @property
    def retry_after(self) -> int:
        """When a place will be free, guessed from what requests took lately: seconds."""
        ahead = max(0, self._requests - self._running) + 1
        return min(_LONGEST_ADVICE, max(1, math.ceil(ahead * self._seconds / self._running)))

    def _refuse(self, why: str) -> None:
        self.rejected += 1
        raise TooManyWaitingError(f"too many requests: {why}", self.retry_after)
