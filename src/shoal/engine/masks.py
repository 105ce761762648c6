"""The masks of a step's constrained rows, filled by threads of their own while the layers run."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterable
from itertools import islice
from queue import Empty, SimpleQueue

import numpy as np

from shoal.engine.constraint import Constraint, Mask
from shoal.engine.sequence import Sequence
from shoal.errors import ConstraintError

MASK_SECONDS = 1.5  # how long a step waits for a mask once its layers are done
_MOST_THREADS = 8

Masks = list[Mask | None]  # one for each token that is sampled


class MaskFiller:
    """Fills masks for an engine. Its threads start with the first constrained sequence.

    What a constraint raises, and a mask that is not ready ``MASK_SECONDS`` after the layers, becomes the ``constraint_error`` of
    its sequence. The thread that still works on such a mask is left to itself, and others take its place.

    A draft needs a mask behind each of its tokens. It is cut where the constraint does not go along with it, or where such a mask is
    not ready in time: that is no error, as nothing else than a token less may come of it.
    """

    def __init__(self, vocab_size: int, most: int) -> None:
        self._shape = (most, -(-vocab_size // 32))
        self._rows: list[Mask] = []
        self._crew: _Crew | None = None
        self._shares: list[_Share] = []  # what is being filled

    def start(self, sequences: list[Sequence]) -> None:
        """Begin with the masks of those ``sequences`` that have a constraint."""
        self._finish()  # of a step that was interrupted
        constrained = [seq for seq in sequences if seq.constraint is not None]
        if constrained:
            self._share_out(constrained)

    def wait(self, sequences: list[Sequence]) -> Masks | None:
        """The masks of the same sequences, for each as many as it has tokens to be sampled, None for those without a constraint; None
        as a whole if that is all of them. Valid until ``start``."""
        if not self._shares:
            return None
        filled = self._finish()
        masks: Masks = []
        for seq in sequences:
            masks += filled[seq] if seq in filled else [None] * (1 + len(seq.draft))
        return masks

    def close(self) -> None:
        """Let the threads go."""
        if self._crew is not None:
            self._crew.dismiss()
            self._crew = None

    def _share_out(self, constrained: list[Sequence]) -> None:
        if self._crew is None or self._crew.pid != os.getpid():  # a fork leaves the threads behind
            self._crew = _Crew()
        if not self._rows:
            self._rows = list(np.zeros(self._shape, np.uint32))
        rows = iter(self._rows)
        todo = [_Todo(seq, list(islice(rows, 1 + len(seq.draft)))) for seq in constrained]
        count = min(self._crew.size, len(todo))
        self._shares = [_Share(todo[first::count]) for first in range(count)]
        self._crew.work_on(self._shares)

    def _finish(self) -> dict[Sequence, Masks]:
        """Wait for what is being filled. Rows behind one that takes too long are given to other threads. Cuts drafts."""
        filled: dict[Sequence, Masks] = {}
        while self._shares:
            assert self._crew is not None, "it works on the shares"
            in_time = self._crew.wait_for(len(self._shares), MASK_SECONDS)
            shares, self._shares = self._shares, []
            if in_time:
                for share in shares:
                    filled |= {todo.seq: todo.taken() for todo in share.todo}
            else:
                filled |= self._replace_crew(shares)
        return filled

    def _replace_crew(self, shares: list[_Share]) -> dict[Sequence, Masks]:
        """Leave late rows, and the memory they are written to, to the threads that hold them."""
        self.close()
        self._rows = []
        filled: dict[Sequence, Masks] = {}
        left: list[Sequence] = []
        for share in shares:
            done, begun = share.abandon()
            filled |= {todo.seq: todo.taken() for todo in share.todo[:done]}
            for todo in share.todo[done:]:
                todo.cut_draft(0)
            for todo in share.todo[done:begun]:
                todo.seq.constraint_error = f"the constraint took more than {MASK_SECONDS:g} s for one token"
            left += [todo.seq for todo in share.todo[begun:]]
        if left:
            self._share_out(left)
        return filled


class _Todo:
    """A sequence, and rows for the masks of its next token and of what follows each token of its draft."""

    def __init__(self, seq: Sequence, rows: list[Mask]) -> None:
        assert len(rows) == 1 + len(seq.draft), "a token is left without a mask"
        assert seq.constraint is not None
        self.seq, self.rows = seq, rows
        self.constraint, self.draft = seq.constraint, seq.draft
        self.ahead = seq.constraint.copy() if seq.draft else None  # here: nobody moves the constraint on meanwhile
        self.num_ahead = 0  # masks that are filled behind tokens of the draft

    def fill(self) -> str | None:
        """Fill the mask of the next token; why that cannot be done."""
        try:
            _fill(self.seq, self.constraint, self.rows[0])
        except ConstraintError as error:
            return str(error)
        except Exception as error:  # a fault of this constraint must not harm other requests
            return f"the constraint failed: {type(error).__name__}: {error}"
        return None

    def fill_ahead(self) -> None:
        """Follow the draft as far as it is allowed and the output goes on."""
        if self.ahead is None:
            return
        try:
            for place, token in enumerate(self.draft, 1):
                self.ahead.advance(token)
                if self.ahead.is_complete:
                    return
                _fill(self.seq, self.ahead, self.rows[place], place)
                self.num_ahead = place
        except Exception:  # should it come to that, the same is raised for the next token of the sequence
            return

    def cut_draft(self, count: int) -> None:
        """Leave so much of the draft; after an interrupted step the sequence may have another one by now."""
        if count < len(self.draft) and self.seq.draft is self.draft:
            self.seq.draft = self.draft[:count]

    def taken(self) -> Masks:
        """The masks that are filled; the draft is cut to them."""
        count = self.num_ahead
        self.cut_draft(count)
        return [*self.rows[: 1 + count]]


class _Share:
    """Rows that one thread fills in turn: those of the next tokens first."""

    def __init__(self, todo: list[_Todo]) -> None:
        self.todo = todo
        self._lock = threading.Lock()
        self._begun = self._filled = 0
        self._abandoned = False

    def fill(self) -> None:
        """Fill the rows, as long as somebody waits for them."""
        for todo in self.todo:
            with self._lock:
                if self._abandoned:
                    return
                self._begun += 1
            error = todo.fill()
            with self._lock:
                if self._abandoned:
                    return
                todo.seq.constraint_error = error
                self._filled += 1
        for todo in self.todo:
            if self._abandoned:
                return
            todo.fill_ahead()

    def abandon(self) -> tuple[int, int]:
        """Wait no longer; for how many sequences the next token's mask is filled, and for how many it was begun: that is one more,
        or the same."""
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


def _fill(seq: Sequence, constraint: Constraint, row: Mask, ahead: int = 0) -> None:
    """Fill the mask behind so many tokens of a sequence's draft."""
    constraint.fill_mask(row)
    _place_ends(seq, constraint, row, ahead)


def _place_ends(seq: Sequence, constraint: Constraint, row: Mask, ahead: int) -> None:
    """Where the output may end is up to the constraint alone, as far as it leaves a choice.

    ``ignore_eos`` and ``min_tokens`` take the model's end tokens away unless those are all that is left. The request's own stop
    tokens are allowed where the output may end, and nowhere else.
    """
    too_short, params = seq.is_too_short(ahead), seq.request.params
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
