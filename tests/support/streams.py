"""What may stand in the place of a standard stream."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, TextIO


class OnlyWrites:
    """What some notebooks and test runners put in the place of a stream."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


class Raises(OnlyWrites):
    """A stream that has gone wrong in every way: ``error`` comes from all it is asked."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def write(self, text: str) -> int:
        raise self._error

    def flush(self) -> None:
        raise self._error

    def isatty(self) -> bool:
        raise self._error

    def fileno(self) -> int:
        raise self._error


def closed() -> TextIO:
    stream = io.StringIO()
    stream.close()
    return stream


# Makers of streams that take nothing.
BROKEN: list[Callable[[], Any]] = [
    lambda: None,
    object,
    closed,
    lambda: Raises(BrokenPipeError()),
    lambda: Raises(ValueError("I/O operation on closed file")),
    lambda: Raises(RuntimeError("no kernel")),
]


def encoded(encoding: str) -> tuple[io.TextIOWrapper, io.BytesIO]:
    """A stream that is strict about its encoding, and what it writes to."""
    data = io.BytesIO()
    return io.TextIOWrapper(data, encoding=encoding, errors="strict", newline="\n"), data
