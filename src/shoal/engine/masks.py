"""The masks of a step's constrained rows, filled by threads of their own while the layers run."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterable
from queue import Empty, SimpleQueue

import numpy as np

from shoal.engine.constraint import Constraint, Mask
from shoal.engine.sequence import Sequence
from shoal.errors import ConstraintError

MASK_SECONDS = 1.5  # how long a step waits for a mask once its layers are done
_MOST_THREADS = 8

Masks = list[Mask | None]  # one for each sequence that gets a token


class MaskFiller:
    """Fills masks for an engine. Its threads start with the first constrained sequence.

    What a constraint raises, and a mask that is not ready ``MASK_SECONDS`` after the layers, becomes the ``constraint_error`` of
    its sequence. The thread that still works on such a mask is left to itself, and others take its place.
    """

    def __init__(self, vocab_size: int, max_seqs: int) -> None:
        self._shape = (max_seqs, -(-vocab_size // 32))
        self._rows: list[Mask] = []
        self._crew: _Crew | None = None
        self._shares: list[_Share] = []  # what is being filled

    def start(self, sequences: list[Sequence]) -> None:
        """Begin with the masks of those ``sequences`` that have a constraint."""
        self._finish()  # of a step that was interrupted
        constrained = [(seq, seq.constraint) for seq in sequences if seq.constraint is not None]
        if constrained:
            self._share_out(constrained)

    def wait(self, sequences: list[Sequence]) -> Masks | None:
        """The masks of the same sequences, None for those without; None as a whole if that is all of them. Valid until ``start``."""
        if not self._shares:
            return None
        filled = dict(self._finish())
        return [filled.get(seq) for seq in sequences]

    def close(self) -> None:
        """Let the threads go."""
        if self._crew is not None:
            self._crew.dismiss()
            self._crew = None

    def _share_out(self, constrained: list[tuple[Sequence, Constraint]]) -> None:
        if self._crew is None or self._crew.pid != os.getpid():  # a fork leaves the threads behind
            self._crew = _Crew()
        if not self._rows:
            self._rows = list(np.zeros(self._shape, np.uint32))
        assert len(constrained) <= len(self._rows), "a row is left without a mask"
        todo = [(seq, constraint, row) for (seq, constraint), row in zip(constrained, self._rows, strict=False)]
        count = min(self._crew.size, len(todo))
        self._shares = [_Share(todo[first::count]) for first in range(count)]
        self._crew.work_on(self._shares)

    def _finish(self) -> list[tuple[Sequence, Mask]]:
        """Wait for what is being filled. Rows behind one that takes too long are given to other threads."""
        filled: list[tuple[Sequence, Mask]] = []
        while self._shares:
            assert self._crew is not None, "it works on the shares"
            in_time = self._crew.wait_for(len(self._shares), MASK_SECONDS)
            shares, self._shares = self._shares, []
            if in_time:
                filled += [(seq, row) for share in shares for seq, _, row in share.rows]
            else:
                filled += self._replace_crew(shares)
        return filled

    def _replace_crew(self, shares: list[_Share]) -> list[tuple[Sequence, Mask]]:
        """Leave late rows, and the memory they are written to, to the threads that hold them."""
        self.close()
        self._rows = []
        left: list[tuple[Sequence, Constraint]] = []
        filled: list[tuple[Sequence, Mask]] = []
        for share in shares:
            done, begun = share.abandon()
            filled += [(seq, row) for seq, _, row in share.rows[:done]]
            for seq, _, _ in share.rows[done:begun]:
                seq.constraint_error = f"the constraint took more than {MASK_SECONDS:g} s for one token"
            left += [(seq, constraint) for seq, constraint, _ in share.rows[begun:]]
        if left:
            self._share_out(left)
        return filled


class _Share:
    """Rows that one thread fills in turn."""

    def __init__(self, rows: list[tuple[Sequence, Constraint, Mask]]) -> None:
        self.rows = rows
        self._lock = threading.Lock()
        self._begun = self._filled = 0
        self._abandoned = False

    def fill(self) -> None:
        """Fill the rows, as long as somebody waits for them."""
        for seq, constraint, row in self.rows:
            with self._lock:
                if self._abandoned:
                    return
                self._begun += 1
            error = _fill(seq, constraint, row)
            with self._lock:
                if self._abandoned:
                    return
                seq.constraint_error = error
                self._filled += 1

    def abandon(self) -> tuple[int, int]:
        """Wait no longer; how many rows are filled, and how many were begun: that is one more, or the same."""
        with self._lock:
            self._abandoned = True
            return self._filled, self._begun


class _Crew:
    """Threads that fill shares. They hold no reference to it, and end with it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.size = max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 4))
        self._tasks: SimpleQueue[_Share | None] = SimpleQueue()
        self._done: SimpleQueue[_Share] = SimpleQueue()
        for _ in range(self.size):
            threading.Thread(target=_work, args=(self._tasks, self._done), name="shoal-mask", daemon=True).start()
        self.dismiss = weakref.finalize(self, _dismiss, self._tasks, self.size)

    def work_on(self, shares: Iterable[_Share]) -> None:
        """Have them filled."""
        for share in shares:
            self._tasks.put(share)

    def wait_for(self, count: int, seconds: float) -> bool:
        """Wait until so many shares are filled; False where that takes too long."""
        end = time.monotonic() + seconds
        try:
            for _ in range(count):
                self._done.get(timeout=max(0.0, end - time.monotonic()))
        except Empty:
            return False
        return True


def _work(tasks: SimpleQueue[_Share | None], done: SimpleQueue[_Share]) -> None:
    while (share := tasks.get()) is not None:
        share.fill()
        done.put(share)
        del share


def _dismiss(tasks: SimpleQueue[_Share | None], count: int) -> None:
    for _ in range(count):
        tasks.put(None)


def _fill(seq: Sequence, constraint: Constraint, row: Mask) -> str | None:
    """Fill a sequence's mask; why that cannot be done."""
    try:
        constraint.fill_mask(row)
        _place_ends(seq, constraint, row)
    except ConstraintError as error:
        return str(error)
    except Exception as error:  # a fault of this constraint must not harm other requests
        return f"the constraint failed: {type(error).__name__}: {error}"
    return None


def _place_ends(seq: Sequence, constraint: Constraint, row: Mask) -> None:
    """Where the output may end is up to the constraint alone, as far as it leaves a choice.

    ``ignore_eos`` and ``min_tokens`` take the model's end tokens away unless those are all that is left. The request's own stop
    tokens are allowed where the output may end, and nowhere else.
    """
    too_short, params = seq.is_too_short, seq.request.params
    if params.ignore_eos or too_short:
        ends = [token for token in seq.request.eos_ids if _bit(row, token)]
        _clear(row, ends)
        if not row.any():
            _set(row, ends)
    own = seq.stop_ids - seq.request.eos_ids
    if own and constraint.is_accepting and not too_short:
        _set(row, own)
    elif own:
        _clear(row, own)
        if not row.any():
            raise ConstraintError("the constraint leaves no token but those of stop_token_ids, and may not end yet")


def _bit(row: Mask, token: int) -> bool:
    return token >> 5 < len(row) and bool(row[token >> 5] >> (token & 31) & 1)


def _set(row: Mask, tokens: Iterable[int]) -> None:
    for token in tokens:
        if token >> 5 < len(row):
            row[token >> 5] |= np.uint32(1 << (token & 31))


def _clear(row: Mask, tokens: Iterable[int]) -> None:
    for token in tokens:
        if token >> 5 < len(row):
            row[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)
