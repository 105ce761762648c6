"""What holds while a model thinks: no constraint, and at most so many tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from shoal.chat.reasoning import ReasoningFormat
from shoal.chat.reply import ReplyFormat
from shoal.engine.constraint import Constraint, Mask
from shoal.errors import ConstraintError
from shoal.text.tokenizer import Tokenizer

_ALL = np.uint32(0xFFFFFFFF)


class _Stage(Enum):
    BEGINNING = "beginning"  # nothing yet, or a piece of the start mark
    THINKING = "thinking"
    ENDING = "ending"  # the end mark is forced
    ANSWERING = "answering"


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """The marks around a model's thoughts, in its tokens. ``end``: its text; ``forced``: what ends the thoughts for the model."""

    start: tuple[int, ...]
    end: bytes
    forced: tuple[int, ...]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, form: ReasoningFormat, tokenizer: Tokenizer) -> ThinkingMarks:
        """Those of a format."""

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special=False, parse_special=True))

        return cls(ids(form.start), form.end.encode(), ids(form.forced_end), tokenizer)

    def bytes_of(self, token: int) -> bytes:
        """The text of a token, none for a row that no token has."""
        return self.tokenizer.token_bytes(token) if token < self.tokenizer.vocab_size else b""


class ThinkingConstraint:
    """A constraint that sleeps while the model thinks. See ``shoal.engine.constraint.Constraint``.

    The reply may begin with thoughts, or with what ``inner`` allows; it begins inside of them if the prompt has opened them
    (``reply``). Behind the end mark ``inner`` applies, if there is one. After ``budget`` tokens of thought that mark is forced.
    """

    def __init__(self, marks: ThinkingMarks, reply: ReplyFormat, inner: Constraint | None, budget: int | None) -> None:
        self._marks = marks
        self._inner = inner
        self._budget = budget
        self._stage = _Stage.THINKING if reply.opened else _Stage.BEGINNING
        if reply.closed:
            self._stage = _Stage.ANSWERING
        self._place = 0  # in the mark that is being written
        self._count = 0  # tokens of thought
        self._tail = b""  # of the thoughts, which may be the beginning of the end mark
        self._end_if_exhausted()

    def fill_mask(self, row: Mask) -> None:
        """Which tokens may come next. Raises ConstraintError as ``inner`` does."""
        if self._stage is _Stage.ENDING:
            row[:] = 0
            _set(row, self._marks.forced[self._place])
        elif self._inner is None:
            row[:] = _ALL
        elif self._stage is _Stage.THINKING:  # an output that ends in its thoughts follows no constraint
            row[:] = _ALL
            _clear(row, self._marks.tokenizer.eog_ids)
        elif self._stage is _Stage.ANSWERING:
            self._inner.fill_mask(row)
        else:
            self._fill_at_beginning(row, self._inner)

    def advance(self, token: int) -> None:
        """Take in the next token. Raises ConstraintError where it is not allowed."""
        if self._stage is _Stage.BEGINNING:
            self._begin(token)
        elif self._stage is _Stage.THINKING:
            self._think(token)
        elif self._stage is _Stage.ENDING:
            self._end(token)
        elif self._inner is not None:
            self._inner.advance(token)

    @property
    def is_accepting(self) -> bool:
        """Whether the output may end here: with a constraint, not before that says so."""
        if self._stage is _Stage.ENDING or (self._stage is _Stage.BEGINNING and self._place):
            return False
        return self._inner is None or (self._stage is not _Stage.THINKING and self._inner.is_accepting)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but an end token may follow."""
        return self._inner is not None and self._stage is _Stage.ANSWERING and self._inner.is_complete

    def copy(self) -> ThinkingConstraint:
        """A constraint of its own that stands where this one does."""
        twin = object.__new__(ThinkingConstraint)
        twin.__dict__.update(self.__dict__)
        twin._inner = None if self._inner is None else self._inner.copy()
        return twin

    def _fill_at_beginning(self, row: Mask, inner: Constraint) -> None:
        """The start mark, or what the constraint allows; a start mark that has been begun is gone on with."""
        if self._place:
            row[:] = 0
        else:
            inner.fill_mask(row)
        _set(row, self._marks.start[self._place])

    def _begin(self, token: int) -> None:
        start = self._marks.start
        if token != start[self._place]:
            self._stage = _Stage.ANSWERING
            if self._inner is not None:
                self._inner.advance(token)
            return
        self._place += 1
        if self._place == len(start):
            self._stage = _Stage.THINKING
            self._end_if_exhausted()

    def _think(self, token: int) -> None:
        self._count += 1
        text = self._tail + self._marks.bytes_of(token)
        if self._marks.end in text:
            self._stage = _Stage.ANSWERING
            return
        self._tail = text[-len(self._marks.end) :]
        self._end_if_exhausted()

    def _end_if_exhausted(self) -> None:
        if self._stage is _Stage.THINKING and self._budget is not None and self._count >= self._budget:
            self._stage, self._place = _Stage.ENDING, 0

    def _end(self, token: int) -> None:
        forced = self._marks.forced
        if token != forced[self._place]:
            raise ConstraintError(f"token {token} is not the end of the model's reasoning, which is forced")
        self._place += 1
        if self._place == len(forced):
            self._stage = _Stage.ANSWERING


def _clear(row: Mask, tokens: Iterable[int]) -> None:
    for token in tokens:
        if token >> 5 < len(row):
            row[token >> 5] &= ~np.uint32(1 << (token & 31))


def _set(row: Mask, token: int) -> None:
    if token >> 5 < len(row):
        row[token >> 5] |= np.uint32(1 << (token & 31))
