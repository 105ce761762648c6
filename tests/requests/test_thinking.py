"""Constraints wait while a model thinks, and thoughts have a limit."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.chat.formats import REASONING_FORMATS
from shoal.chat.reply import ReplyFormat
from shoal.engine.constraint import Constraint, Mask
from shoal.errors import ConstraintError
from shoal.requests.thinking import ThinkingConstraint, ThinkingMarks
from shoal.text.tokenizer import Tokenizer
from tests.chat.templates import CONTROL, write_tokenizer

VOCAB = 256 + len(CONTROL)
THINK, CLOSE = 256 + CONTROL.index("<think>"), 256 + CONTROL.index("</think>")
EOS = 258
ALL = set(range(VOCAB))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes.gguf")


class Word:
    """The constraint to one word, and then the end."""

    def __init__(self, word: bytes, place: int = 0) -> None:
        self.word = word
        self.place = place

    def fill_mask(self, row: Mask) -> None:
        row[:] = 0
        token = EOS if self.place == len(self.word) else self.word[self.place]
        row[token >> 5] |= np.uint32(1 << (token & 31))

    def advance(self, token: int) -> None:
        if token != self.word[self.place]:
            raise ConstraintError("not the word")
        self.place += 1

    @property
    def is_accepting(self) -> bool:
        return self.place == len(self.word)

    @property
    def is_complete(self) -> bool:
        return self.is_accepting

    def copy(self) -> Word:
        return Word(self.word, self.place)


def constraint(
    tokenizer: Tokenizer,
    *,
    word: bytes | None = b"ab",
    budget: int | None = None,
    form: str = "think",
    opened: bool = False,
    closed: bool = False,
) -> ThinkingConstraint:
    reasoning = REASONING_FORMATS[form]
    reply = ReplyFormat(reasoning=reasoning, opened=opened, closed=closed)
    inner = None if word is None else Word(word)
    return ThinkingConstraint(ThinkingMarks.of(reasoning, tokenizer), reply, inner, budget)


def allowed(found: Constraint) -> set[int]:
    row = np.full(-(-VOCAB // 32), 0x5A5A5A5A, np.uint32)  # whatever was there before
    found.fill_mask(row)
    return {token for token in range(VOCAB) if row[token >> 5] >> (token & 31) & 1}


def advance(found: Constraint, *tokens: int) -> None:
    for token in tokens:
        assert token in allowed(found)
        found.advance(token)


def test_a_reply_thinks_or_follows_the_constraint_at_once(tokenizer: Tokenizer) -> None:
    found = constraint(tokenizer)
    assert allowed(found) == {THINK, ord("a")}
    advance(found, *b"ab")
    assert allowed(found) == {EOS}
    assert (found.is_accepting, found.is_complete) == (True, True)


@pytest.mark.parametrize("opened", [False, True])
def test_the_constraint_sleeps_while_the_model_thinks(tokenizer: Tokenizer, opened: bool) -> None:
    found = constraint(tokenizer, opened=opened)
    if not opened:
        advance(found, THINK)
    advance(found, *b"zzz", THINK)
    assert allowed(found) == ALL - tokenizer.eog_ids
    assert not found.is_accepting
    advance(found, CLOSE)
    assert allowed(found) == {ord("a")}
    advance(found, *b"ab")
    assert found.is_complete
    with pytest.raises(ConstraintError, match="not the word"):
        constraint(tokenizer).advance(ord("b"))


def test_the_end_mark_may_be_spelled_in_pieces(tokenizer: Tokenizer) -> None:
    found = constraint(tokenizer, opened=True)
    advance(found, *b"x</think", *b"</think>")
    assert allowed(found) == {ord("a")}


def test_a_prompt_that_has_closed_the_thoughts_leaves_no_choice(tokenizer: Tokenizer) -> None:
    assert allowed(constraint(tokenizer, closed=True)) == {ord("a")}


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("word", [None, b"ab"])
def test_after_so_many_tokens_the_end_mark_is_forced(
    tokenizer: Tokenizer, budget: int, opened: bool, word: bytes | None
) -> None:
    found = constraint(tokenizer, word=word, budget=budget, opened=opened)
    if not opened:
        advance(found, THINK)
    advance(found, *b"z" * budget)
    assert allowed(found) == {CLOSE}
    assert not found.is_accepting, "no stop token of the request's own may come instead"
    with pytest.raises(ConstraintError, match="forced"):
        found.copy().advance(ord("z"))
    advance(found, CLOSE)
    assert allowed(found) == (ALL if word is None else {ord("a")})


def test_a_reply_may_be_nothing_where_the_constraint_allows_it(tokenizer: Tokenizer) -> None:
    found = constraint(tokenizer, word=b"")
    assert (allowed(found), found.is_accepting) == ({THINK, EOS}, True)
    advance(found, THINK)
    assert not found.is_accepting


def test_a_limit_alone_leaves_everything_else_free(tokenizer: Tokenizer) -> None:
    found = constraint(tokenizer, word=None, budget=2)
    assert allowed(found) == ALL
    assert (found.is_accepting, found.is_complete) == (True, False)
    advance(found, *b"No thoughts, </think> or <think>", THINK, *b"at all.")
    assert allowed(found) == ALL
    early = constraint(tokenizer, word=None, budget=9, opened=True)
    advance(early, ord("z"), CLOSE, *b"much more than nine")
    assert allowed(early) == ALL


def test_marks_of_several_tokens(tokenizer: Tokenizer) -> None:
    """gpt-oss's, spelled in bytes here; what is forced is more than the end mark."""
    form = REASONING_FORMATS["harmony"]
    found = constraint(tokenizer, form="harmony", budget=1)
    start = form.start.encode()
    assert allowed(found) == {start[0], ord("a")}
    advance(found, start[0])
    assert allowed(found) == {start[1]}
    advance(found, *start[1:], ord("z"), *form.forced_end.encode(), *b"ab")
    assert found.is_complete


def test_copies_go_their_own_way(tokenizer: Tokenizer) -> None:
    first = constraint(tokenizer, budget=2)
    advance(first, THINK, ord("z"))
    second = first.copy()
    advance(first, CLOSE, ord("a"))
    advance(second, ord("y"))
    assert (allowed(first), allowed(second)) == ({ord("b")}, {CLOSE})
    advance(second, CLOSE)
    assert allowed(second) == {ord("a")}
