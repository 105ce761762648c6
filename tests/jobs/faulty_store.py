"""A store whose process dies at one of its requests, for tests."""

from __future__ import annotations

from typing import Any, Literal

from shoal.jobs.durable.store import Store

Moment = Literal["before", "after"]


class Died(BaseException):
    """The process ends here. Nothing catches it, and no request comes after it."""


class FaultyStore:
    """``store`` until its ``at``-th request (from 0), ``before`` or ``after`` which takes effect its process dies."""

    def __init__(self, store: Store, at: int, moment: Moment) -> None:
        self.died = False
        self.num_requests = 0
        self._store = store
        self._at = at
        self._moment = moment

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def request(*arguments: Any) -> Any:
            if self.died:
                raise Died
            self.died = self.num_requests == self._at
            self.num_requests += 1
            if self.died and self._moment == "before":
                raise Died
            answer = found(*arguments)
            if self.died:
                raise Died
            return answer

        return request
