"""Many requests of one call: answered together, one by one as they come, or as they grow."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from shoal.engine.engine import Engine
from shoal.requests.dispatch import Dispatcher
from shoal.requests.outputs import Generation, RequestOutput
from shoal.requests.submission import Asked, Submitter
from shoal.system.progress import Bar

_Started = Generation | RequestOutput  # under way, or refused

_WINDOW = 8  # times max_num_seqs: prompts of an iterator from the oldest without an answer on


class Answers:
    """Waits for what one call has asked for. Whatever ends the wait aborts what is not finished. Any thread may call any method."""

    def __init__(self, submitter: Submitter, dispatcher: Dispatcher, engine: Engine) -> None:
        self._submitter, self._dispatcher, self._engine = submitter, dispatcher, engine

    def together(self, requests: list[Asked], show: bool) -> list[RequestOutput]:
        """All of them, in their order. ``show``: a progress bar."""
        sink: list[Generation] = []
        started: list[_Started] = []
        try:
            started.extend(self._submitter.start(*request, sink) for request in requests)  # one by one: see ``finally``
            with counting(len(started), show) as count:
                waiting = {item for item in started if isinstance(item, Generation)}
                count(len(started) - len(waiting))
                while waiting:
                    changed = self._dispatcher.next_changed(sink)
                    waiting -= {item for item in changed if item.finished}
                    count(len(started) - len(waiting), len(changed))
        finally:
            self._submitter.drop(started)
        return [_output(item) for item in started]

    def as_they_come(self, requests: Iterator[Asked], show: bool) -> Generator[RequestOutput, None, None]:
        """One by one, in their order; requests are taken when there is room for them."""
        sink: list[Generation] = []
        starting = (self._submitter.start(*request, sink) for request in requests)
        window: deque[_Started] = deque()
        try:
            answered = 0
            with counting(None, show) as count:
                while _refill(window, starting, self._engine.config.max_num_seqs):
                    if not window[0].finished:
                        count(answered, len(self._dispatcher.next_changed(sink)))
                    while window and window[0].finished:
                        answered += 1
                        yield _output(window.popleft())
        finally:
            self._submitter.drop(window)

    def growing(self, requests: list[Asked]) -> Iterator[RequestOutput]:
        """Each whenever it has grown."""
        sink: list[Generation] = []
        started: list[_Started] = []
        try:
            started.extend(self._submitter.start(*request, sink) for request in requests)
            yield from [item for item in started if isinstance(item, RequestOutput)]
            waiting = {item.request_id for item in started if isinstance(item, Generation)}
            while waiting:
                for output in self._dispatcher.next_outputs(sink):
                    if output.finished:
                        waiting.remove(output.request_id)
                    yield output
        finally:
            self._submitter.drop(started)


def _output(item: _Started) -> RequestOutput:
    return item.snapshot() if isinstance(item, Generation) else item


def _refill(window: deque[_Started], starting: Iterator[_Started], most: int) -> bool:
    """Start prompts until ``most`` of them run, or the window is full. False if nothing is left to wait for."""
    running = sum(not item.finished for item in window)
    while running < most and len(window) < _WINDOW * most:
        item = next(starting, None)
        if item is None:
            break
        window.append(item)
        running += not item.finished
    return bool(window)


@contextmanager
def counting(total: int | None, show: bool) -> Iterator[Callable[..., None]]:
    """A function for the progress bar: it hears how many requests are finished, and how many tokens a step has brought."""
    tokens, start = 0, time.monotonic()

    def count(finished: int, new_tokens: int = 0) -> None:
        nonlocal tokens
        tokens += new_tokens
        bar.update(finished, total, tokens, time.monotonic() - start)

    with Bar("requests", total, stream=sys.stderr, show=show) as bar:
        yield count
