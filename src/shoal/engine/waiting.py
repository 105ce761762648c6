"""Sequences in line: the lowest priority number first, then in the order of arrival."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from shoal.engine.sequence import Order, Sequence, Status

_SLACK = 64


class WaitingQueue:
    """Any number of sequences whose status is WAITING; to put one in, take the first or drop any costs O(log n).

    One that is dropped stays in the heap until it is first, or until more than half of the heap are such.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Order, Sequence]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no order."""
        return (seq for _, seq in self._heap if seq.status is Status.WAITING)

    @property
    def first(self) -> Sequence:
        """Whose turn is next; there must be one."""
        while self._heap[0][1].status is not Status.WAITING:
            heappop(self._heap)
        return self._heap[0][1]

    def push(self, seq: Sequence) -> None:
        """Put one in line, wherever it belongs."""
        seq.status = Status.WAITING
        heappush(self._heap, (seq.order, seq))
        self._count += 1

    def pop(self) -> Sequence:
        """Take the first out; its status is the caller's to change, at once."""
        first = self.first
        heappop(self._heap)
        self._count -= 1
        return first

    def drop(self, seq: Sequence) -> None:
        """Let go of one that has ended."""
        seq.status = Status.FINISHED
        self._count -= 1
        if len(self._heap) > 2 * self._count + _SLACK:
            self._heap = [entry for entry in self._heap if entry[1].status is Status.WAITING]
            heapify(self._heap)
