"""A lock for threads that each want many short turns: whoever has waited longest is next."""

from __future__ import annotations

import threading
from collections import deque

from shoal.errors import EngineError


class FairLock:
    """A mutex, given in the order in which it was asked for. A context manager.

    An ordinary lock goes to whoever is quickest, which is the thread that has just let go of it. A thread that asks for what it
    holds itself (in a signal handler, a callback, or while garbage is collected) gets EngineError, where an ordinary lock
    would wait for ever.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[_Ticket] = deque()
        self._owner: int | None = None  # the id of a thread

    @property
    def held(self) -> bool:
        """Whether any thread holds it."""
        return self._owner is not None

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds it."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> FairLock:
        me = threading.get_ident()
        if self._owner == me:
            raise EngineError("this LLM was called from inside one of its own calls, by the same thread")
        with self._guard:
            if self._owner is None:
                self._owner = me
                return self
            ticket = _Ticket(me)
            self._waiting.append(ticket)
        try:
            ticket.called.acquire()
        except BaseException:  # an interrupt
            self._give_up(ticket)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with self._guard:
            self._pass_on()

    def _give_up(self, ticket: _Ticket) -> None:
        with self._guard:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            else:  # called meanwhile
                self._pass_on()

    def _pass_on(self) -> None:
        if not self._waiting:
            self._owner = None
            return
        ticket = self._waiting.popleft()
        self._owner = ticket.thread
        ticket.called.release()


class _Ticket:
    """A thread that waits."""

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.called = threading.Lock()
        self.called.acquire()
