"""Following what users wrote through a template that may trim, cut, join or repeat it.

Characters of user text are replaced by stand-ins, private-use characters that occur nowhere else, before the
template is rendered; in the output they are found again and turned back. Lengths do not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from shoal.errors import RequestError
from shoal.text.special import Span

_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_NOT_SPACE = re.compile(r"\S+")

# Roles that templates write into control tokens and compare with; any other role is the user's text.
_TRUSTED_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a structure of mappings and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_in(item)


def all_words(text: str) -> list[Span]:
    """All of a text but its white space, which templates trim and split at."""
    return [match.span() for match in _NOT_SPACE.finditer(text)]


class Marker:
    """Puts stand-ins into user text, and finds them in what the template made of it."""

    def __init__(self, used: Iterable[str]) -> None:
        """``used``: all strings that the template can see, none of whose characters may be a stand-in.

        Raises RequestError where they leave too few stand-ins (there are 131,068 in all).
        """
        characters: set[str] = set()
        for text in used:
            characters.update(text)
        unused = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in characters)
        free = list(islice(unused, len(characters)))
        if len(free) < len(characters):
            raise RequestError(
                f"{len(characters)} different characters, only {len(free)} can be told apart", "messages"
            )
        self._stand_ins = {ord(char): stand_in for char, stand_in in zip(sorted(characters), free, strict=True)}
        self._originals = {ord(stand_in): chr(code) for code, stand_in in self._stand_ins.items()}

    def marked(self, value: Any, spans_of: Callable[[str], list[Span]], keys_of: Callable[[str], list[Span]]) -> Any:
        """A copy of ``value`` in which stand-ins are at ``spans_of`` each string, and at ``keys_of`` each key."""
        if isinstance(value, str):
            return self._mark(value, spans_of(value))
        if isinstance(value, Mapping):
            return {
                self._mark(key, keys_of(key)): item
                if key == "role" and item in _TRUSTED_ROLES
                else self.marked(item, spans_of, keys_of)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.marked(item, spans_of, keys_of) for item in value]
        return value

    def unmarked(self, rendered: str) -> tuple[str, list[Span]]:
        """The text as it would be without marks, and the (start, end) of what was marked."""
        if not self._originals:
            return rendered, []
        # A private-use character that the template itself holds in between counts as marked too, which does no harm.
        low, high = chr(min(self._originals)), chr(max(self._originals))
        runs = re.finditer(f"[{low}-{high}]+", rendered)
        return rendered.translate(self._originals), [run.span() for run in runs]

    def _mark(self, text: str, spans: Iterable[Span]) -> str:
        parts: list[str] = []
        position = 0
        for start, end in sorted(spans):
            start = max(start, position)
            if start < end:
                parts += text[position:start], text[start:end].translate(self._stand_ins)
                position = end
        return "".join(parts) + text[position:]
