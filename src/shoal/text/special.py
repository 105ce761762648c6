"""Cutting special tokens out of text before it is merged, in llama.cpp's order: longest first, then leftmost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]

_PREFIX = 4
_SMALL_GROUP = 64
_ASCII_SPACE = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that text is cut at. ``control``: only where asked for.

    ``lstrip`` and ``rstrip``: it takes the white space before or after it along.
    """

    text: str
    id: int
    control: bool
    lstrip: bool = False
    rstrip: bool = False


class SpecialTokens:
    """All special tokens of a vocabulary. Immutable, so safe to use from several threads."""

    def __init__(self, tokens: Iterable[SpecialToken]) -> None:
        # Length counts in bytes, as in llama.cpp; equal lengths go by id.
        ordered = sorted(tokens, key=lambda token: (-len(token.text.encode()), token.id))
        self._all = _Finder(ordered)
        self._control = _Finder([token for token in ordered if token.control])
        self._user_defined = _Finder([token for token in ordered if not token.control])

    def cut(self, text: str, *, control: bool, user_spans: Sequence[Span] = ()) -> Iterator[str | int]:
        """The text between special tokens, and the tokens' ids, in order.

        Control tokens count only with ``control``, and not where they touch one of ``user_spans`` (start, end).
        """
        finder = self._all if control else self._user_defined
        present = finder.present_in(text)
        if not present:
            yield from [text] if text else []
            return
        taken = bytearray(len(text))
        written = _mask(len(text), user_spans)
        found: list[tuple[int, int, int]] = []
        for token in present:
            for start, end in _occurrences(text, token, [taken, written] if token.control else [taken]):
                taken[start:end] = b"\x01" * (end - start)
                found.append((start, end, token.id))
        position = 0
        for start, end, token_id in sorted(found):
            if start > position:
                yield text[position:start]
            yield token_id
            position = end
        if position < len(text):
            yield text[position:]

    def control_spans(self, text: str) -> list[Span]:
        """Where control tokens are spelled in ``text``, overlapping ones included."""
        spans = []
        for token in self._control.present_in(text):
            start = text.find(token.text)
            while start >= 0:
                spans.append((start, start + len(token.text)))
                start = text.find(token.text, start + 1)
        return spans


class _Finder:
    """Which of many tokens occur in a text at all, without looking for each of thousands in turn."""

    def __init__(self, tokens: Sequence[SpecialToken]) -> None:
        self._rank = {token.text: rank for rank, token in enumerate(tokens)}
        self._tokens = tokens
        self._groups: dict[str, list[str]] = {}
        for token in tokens:
            self._groups.setdefault(token.text[:_PREFIX], []).append(token.text)
        self._lengths = {prefix: {len(text) for text in group} for prefix, group in self._groups.items()}

    def present_in(self, text: str) -> list[SpecialToken]:
        """The tokens that occur, in the order in which they are to be cut."""
        ranks = {
            self._rank[token] for prefix in self._groups if prefix in text for token in self._members(prefix, text)
        }
        return [self._tokens[rank] for rank in sorted(ranks)]

    def _members(self, prefix: str, text: str) -> Iterable[str]:
        group = self._groups[prefix]
        if len(group) <= _SMALL_GROUP:
            return [token for token in group if token in text]
        seen: set[str] = set()
        start = text.find(prefix)
        while start >= 0:
            seen.update(text[start : start + length] for length in self._lengths[prefix])
            start = text.find(prefix, start + 1)
        return seen.intersection(group)


def _occurrences(text: str, token: SpecialToken, masks: Sequence[bytearray]) -> Iterator[Span]:
    """Where ``token`` stands on characters that no mask marks, from the left; the masks may change in between."""
    start = text.find(token.text)
    while start >= 0:
        end = start + len(token.text)
        blocked = [mask.find(1, start, end) for mask in masks]
        marked = max(blocked)
        if marked < 0:
            start = _before_spaces(text, start, masks[0]) if token.lstrip else start
            end = _past_spaces(text, end, masks[0]) if token.rstrip else end
            yield start, end
            start = text.find(token.text, end)
        else:
            free = masks[blocked.index(marked)].find(0, marked)
            start = text.find(token.text, free) if free >= 0 else -1


def _before_spaces(text: str, end: int, taken: bytearray) -> int:
    while end > 0 and text[end - 1] in _ASCII_SPACE and not taken[end - 1]:
        end -= 1
    return end


def _past_spaces(text: str, start: int, taken: bytearray) -> int:
    while start < len(text) and text[start] in _ASCII_SPACE and not taken[start]:
        start += 1
    return start


def _mask(length: int, spans: Iterable[Span]) -> bytearray:
    mask = bytearray(length)
    for start, end in spans:
        mask[start:end] = b"\x01" * (end - start)
    return mask
