"""Reading a text that arrives in pieces, by routines that are written as if all of it were there.

A routine is a generator. Where it needs more text it yields None and is resumed when there is more; all that it decides
depends on the text alone, never on where its pieces end.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.chat.events import Event, Parsing, Reading, Said, Thought


class Reader:
    """The text so far, and a place in it. ``ended``: nothing will be added."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def peek(self) -> Reading[str]:
        """The next character, "" at the end."""
        while self.at == len(self.text) and not self.ended:
            yield None
        return self.text[self.at : self.at + 1]

    def spaces(self) -> Reading[str]:
        """Go past white space, and return the character behind it, "" at the end."""
        while (char := (yield from self.peek())).isspace():
            self.at += 1
        return char

    def literal(self, wanted: str) -> Reading[bool]:
        """Go past ``wanted`` if the text goes on with it."""
        while True:
            there = self.text[self.at : self.at + len(wanted)]
            if there == wanted:
                self.at += len(wanted)
                return True
            if self.ended or not wanted.startswith(there):
                return False
            yield None

    def closing(self, mark: str) -> Reading[None]:
        """Go past white space and an end mark, if it is there, or what there is of it where the text breaks off."""
        start = self.at
        yield from self.spaces()
        if (yield from self.literal(mark)):
            return
        broken_off = self.ended and mark.startswith(self.text[self.at :])
        self.at = len(self.text) if broken_off else start

    def run(self, belongs: Callable[[str], bool]) -> Reading[str]:
        """The characters up to the first one that does not belong."""
        start = self.at
        while (char := (yield from self.peek())) and belongs(char):
            self.at += 1
        return self.text[start : self.at]

    def before(self, mark: str) -> Reading[str | None]:
        """The text up to ``mark``; goes past it. None, and nothing is passed, if the text ends without one."""
        while (place := self.text.find(mark, self.at)) < 0:
            if self.ended:
                return None
            yield None
        start, self.at = self.at, place + len(mark)
        return self.text[start:place]

    def until(self, marks: tuple[str, ...], channel: type[Said] | type[Thought] = Said) -> Parsing[str | None]:
        """Give out the text up to the first of ``marks`` (none the beginning of another), go past it and return it.

        None if the text ends without one. What may be the beginning of a mark is held back until that is known.
        """
        while True:
            places = [(place, mark) for mark in marks if (place := self.text.find(mark, self.at)) >= 0]
            place, found = min(places) if places else (len(self.text), None)
            shown = place if found or self.ended else place - _begun(self.text[self.at :], marks)
            if shown > self.at:
                yield channel(self.text[self.at : shown])
            self.at = shown
            if found is not None:
                self.at += len(found)
                return found
            if self.ended:
                return None
            yield None


class Parser:
    """Runs a routine over a text that is pushed in pieces."""

    def __init__(self, routine: Callable[[Reader], Parsing[object]]) -> None:
        self._reader = Reader()
        self._steps = routine(self._reader)

    def push(self, text: str) -> list[Event]:
        """Take in a piece; what is certain now."""
        self._reader.text += text
        return self._advance()

    def flush(self) -> list[Event]:
        """What is left, once it is known that nothing follows."""
        self._reader.ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        events = []
        while (event := next(self._steps, None)) is not None:
            events.append(event)
        return events


def _begun(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a mark."""
    longest = min(len(text), max(map(len, marks), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
