"""Which worker gets which rows. Knows nothing of Ray: workers are names that come and go.

Each row that was taken in is at one of four places: in the backlog of a worker that it is meant for, held by a worker, returned by
one that was lost, or among the suspects. It leaves with the one result that its holder gives.

Rows whose prompts begin alike go to the same worker as long as that has room: there its prefix cache has them. A row that was held
by two workers when they were lost is a suspect: one worker, the ward, runs dry and then holds a suspect and nothing else. A row that
takes three workers with it so is condemned.
"""

from __future__ import annotations

import re
from bisect import bisect, insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heapify, heappop, heappush

from shoal.jobs.input.rows import Line

SUSPECT = 2  # workers that a row may lose in company
CONDEMNED = 3  # ... and alone

_PREFIX_BYTES = 256  # about 64 tokens, 4 pages: what is shared less is not worth a place
_PROMPT = re.compile(rb'"(?:messages|prompt|input|instructions)"\s*:')
_MOST_ENTRIES = 4  # of each worker in the heap of loads, before those that are past are thrown out
_POINTS = 64  # of each worker on the ring: then their shares differ by some ten percent


@dataclass(slots=True)
class Deaths:
    """How many workers were lost while they held a row, with others or ``alone``."""

    company: int = 0
    alone: int = 0


@dataclass(slots=True)
class Share:
    """What one worker has to do."""

    backlog: deque[Line] = field(default_factory=deque)
    held: dict[int, Line] = field(default_factory=dict)

    @property
    def load(self) -> int:
        """Rows."""
        return len(self.backlog) + len(self.held)


class RowLine:
    """Rows in line for workers, each of which is given ``window`` rows at most."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._shares: dict[str, Share] = {}
        self._roomy: set[str] = set()
        self._by_load: list[tuple[int, str]] = []  # a heap: of each roomy worker its load, and loads that are past
        self._ring = _Ring()
        self._returned: deque[Line] = deque()
        self._suspects: deque[Line] = deque()
        self._ward: str | None = None
        self._deaths: dict[int, Deaths] = {}
        self.num_returned = 0  # times that a row was put back in line

    @property
    def has_room(self) -> bool:
        """Whether a new row would find a worker."""
        return bool(self._roomy) and not self._returned

    @property
    def num_rows(self) -> int:
        """Rows that have no result yet."""
        return len(self._returned) + len(self._suspects) + sum(share.load for share in self._shares.values())

    def take(self, line: Line) -> None:
        """Put a new row in line."""
        assert self._roomy, "asked for before"
        home = self._ring.owner(_prefix(line))
        if home not in self._roomy:
            home = self._least_loaded()
        self._shares[home].backlog.append(line)
        self._look(home)

    def _least_loaded(self) -> str:
        """Of the workers with room the one that has the least to do."""
        while not self._is_current(self._by_load[0]):
            heappop(self._by_load)
        return self._by_load[0][1]

    def _is_current(self, entry: tuple[int, str]) -> bool:
        load, worker = entry
        return worker in self._roomy and self._shares[worker].load == load

    def join(self, worker: str) -> None:
        """A worker is there that holds nothing."""
        assert worker not in self._shares, f"{worker} is there"
        self._shares[worker] = Share()
        self._ring.add(worker)
        self._look(worker)
        self._choose_ward()

    def lose(self, worker: str) -> list[Line]:
        """A worker is gone: its rows go back in line. Returns the rows that no worker will get any more."""
        share = self._shares.pop(worker)
        self._ring.remove(worker)
        self._roomy.discard(worker)
        alone = worker == self._ward and len(share.held) == 1
        if worker == self._ward:
            self._ward = None
        condemned = [line for line in share.held.values() if self._blame(line, alone=alone)]
        self._returned.extendleft(reversed(share.backlog))
        self._choose_ward()
        return condemned

    def _blame(self, line: Line, *, alone: bool) -> bool:
        """Put back a row whose worker was lost, unless it is condemned."""
        deaths = self._deaths.setdefault(line.number, Deaths())
        deaths.alone += alone
        deaths.company += not alone
        if deaths.alone >= CONDEMNED:
            del self._deaths[line.number]
            return True
        self.num_returned += 1
        (self._suspects if deaths.company >= SUSPECT else self._returned).append(line)
        return False

    def _choose_ward(self) -> None:
        """The worker that holds the fewest rows takes the suspects; what it was meant to get goes to others."""
        if self._ward is not None or not self._suspects or not self._shares:
            return
        self._ward = min(self._shares, key=lambda name: len(self._shares[name].held))
        share = self._shares[self._ward]
        self._returned.extendleft(reversed(share.backlog))
        share.backlog.clear()
        self._look(self._ward)

    def give(self, worker: str) -> list[Line]:
        """The rows that a worker should be sent now. It holds them from here on."""
        share = self._shares[worker]
        lines = self._suspect(share) if worker == self._ward else list(self._next(share))
        share.held.update((line.number, line) for line in lines)
        self._look(worker)
        return lines

    def _suspect(self, share: Share) -> list[Line]:
        return [] if share.held or not self._suspects else [self._suspects.popleft()]

    def _next(self, share: Share) -> Iterator[Line]:
        for _ in range(self._window - len(share.held)):
            if self._returned:
                yield self._returned.popleft()
            elif share.backlog:
                yield share.backlog.popleft()
            else:
                return

    def take_back(self, worker: str, rows: Iterable[int]) -> set[int]:
        """Rows for which ``worker`` has results; those of them that it held, whose results count."""
        share = self._shares.get(worker)
        if share is None:
            return set()
        counted = {row for row in rows if share.held.pop(row, None) is not None}
        for row in counted:
            self._deaths.pop(row, None)
        if worker == self._ward and not self._suspects and not share.held:
            self._ward = None
        self._look(worker)
        return counted

    def held(self, worker: str) -> int:
        """How many rows a worker holds."""
        return len(self._shares[worker].held)

    def clear(self) -> None:
        """Drop all rows."""
        self._returned.clear()
        self._suspects.clear()
        self._deaths.clear()
        self._ward = None
        for worker, share in self._shares.items():
            share.backlog.clear()
            share.held.clear()
            self._look(worker)

    def _look(self, worker: str) -> None:
        """Note whether a worker has room."""
        load = self._shares[worker].load
        if worker == self._ward or load >= self._window:
            self._roomy.discard(worker)
            return
        self._roomy.add(worker)
        heappush(self._by_load, (load, worker))
        if len(self._by_load) > _MOST_ENTRIES * (len(self._shares) + 1):
            self._by_load = [(self._shares[name].load, name) for name in self._roomy]
            heapify(self._by_load)


class _Ring:
    """Consistent hashing: a worker that comes or goes moves only its own share of the prefixes."""

    def __init__(self) -> None:
        self._points: list[tuple[int, str]] = []

    def add(self, worker: str) -> None:
        for point in self._points_of(worker):
            insort(self._points, point)

    def remove(self, worker: str) -> None:
        self._points = [point for point in self._points if point[1] != worker]

    def owner(self, key: bytes) -> str:
        place = bisect(self._points, (_number(key), ""))
        return self._points[place % len(self._points)][1]

    @staticmethod
    def _points_of(worker: str) -> list[tuple[int, str]]:
        return [(_number(f"{worker}/{i}".encode()), worker) for i in range(_POINTS)]


def _number(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")


def _prefix(line: Line) -> bytes:
    """The first bytes of the prompt, as they stand in the JSON: nothing is decoded on the way to a worker."""
    data = line.data or b""
    found = _PROMPT.search(data)
    start = found.end() if found else 0
    return data[start : start + _PREFIX_BYTES]
