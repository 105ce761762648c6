"""Requests of any thread to the one engine, and what each step brings back to whoever waits for it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from shoal.engine.engine import Engine, Request
from shoal.errors import EngineError
from shoal.requests.fair_lock import FairLock
from shoal.requests.outputs import Generation, RequestOutput, Scoring
from shoal.requests.pooled import Pooled

_Item = TypeVar("_Item", Generation, Scoring, Pooled)


class Dispatcher:
    """Owns an engine and what is under way in it.

    Threads take turns, a step or a request each, so that the requests of all of them are in one batch: whoever has the turn moves
    everybody's on. What changed goes to the *sink* of its item, the list of the caller that waits for it.

    ``abort`` inside a turn of the same thread (while garbage is collected, in a signal handler) takes effect when the turn ends.
    After a fork the child has a copy of its own, which it cannot use if another thread was inside just then.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._active: dict[str, Generation | Scoring | Pooled] = {}
        self._turn = FairLock()
        self._aborted_inside: deque[str] = deque()
        self._pid = os.getpid()

    @property
    def has_work(self) -> bool:
        """Whether the engine has anything left to do or to report."""
        return self._engine.has_work

    def start(self, request: Request, item: Generation | Scoring | Pooled) -> None:
        """Put a request in line; ``item`` takes in what comes of it. Raises as ``Engine.add``."""
        with self._own_turn():
            self._engine.add(request)
            self._active[request.request_id] = item

    def step(self, sink: list[Generation]) -> list[RequestOutput]:
        """One step, then how far everything is that was in ``sink``, which is empty afterwards."""
        with self._own_turn():
            self._step()
            return [item.snapshot() for item in _emptied(sink)]

    def next_outputs(self, sink: list[Generation]) -> list[RequestOutput]:
        """As ``step``, but without a step where those of other threads have left something in ``sink``."""
        with self._own_turn():
            if not sink:
                self._step()
            return [item.snapshot() for item in _emptied(sink)]

    def next_changed(self, sink: list[_Item]) -> list[_Item]:
        """As ``next_outputs``, the items themselves: for who only waits for their end, as other threads may move them on."""
        with self._own_turn():
            if not sink:
                self._step()
            return _emptied(sink)

    def take(self, sink: list[_Item]) -> list[_Item]:
        """What steps of others have left in ``sink`` so far, which is empty afterwards."""
        with self._own_turn():
            return _emptied(sink)

    def abort(self, request_id: str) -> bool:
        """End a request and free its memory; its item says so and goes to its sink. False if there is none such."""
        if self._turn.mine:
            self._aborted_inside.append(request_id)
            return request_id in self._active
        with self._own_turn():
            return self._abort(request_id)

    def drop(self, items: Iterable[Generation | Scoring | Pooled]) -> None:
        """Abort what a caller no longer waits for; after a normal end there is nothing left to abort."""
        for item in items:
            if not item.finished:
                self.abort(item.request_id)

    def resize(self, sizes: Mapping[str, Any]) -> None:
        """Give the engine other sizes: fields of EngineConfig. Raises ParameterError for a wrong one, else as ``Engine.resize``."""
        with self._own_turn():
            self._engine.resize(replace(self._engine.config, **sizes))

    def close(self) -> None:
        """Abort everything, let go of the KV memory, refuse what comes later."""
        with self._own_turn():
            for request_id in list(self._active):
                self._abort(request_id)
            self._engine.close()

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        if os.getpid() != self._pid:
            if self._turn.held:
                raise EngineError(
                    "another thread was using this LLM when the process forked: load it again in the child"
                )
            self._pid = os.getpid()
        with self._turn:
            try:
                yield
            finally:
                while self._aborted_inside:
                    self._abort(self._aborted_inside.popleft())

    def _step(self) -> None:
        for output in self._engine.step():
            item = self._active.get(output.request_id)
            if item is None:  # aborted, or ended by a stop string
                continue
            if item.take(output):
                self._engine.abort(output.request_id, output.sample)
            if item.finished:
                del self._active[output.request_id]

    def _abort(self, request_id: str) -> bool:
        item = self._active.pop(request_id, None)
        if item is None:
            return False
        item.abort()
        return self._engine.abort(request_id)


def _emptied(sink: list[_Item]) -> list[_Item]:
    """Empty a sink: each item that was in it once."""
    changed = list(dict.fromkeys(sink))
    sink.clear()
    return changed
