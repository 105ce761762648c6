"""Answers by the number of their row, found in the results file through the journal."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shoal.jobs.durable import journal

_PLACE = struct.Struct("<QQ")  # offset and length of a row's line


class _Message(msgspec.Struct):
    content: str | None


class _Choice(msgspec.Struct):
    text: str | None = None
    message: _Message | None = None


class _Body(msgspec.Struct):
    choices: list[_Choice]


class _Response(msgspec.Struct):
    body: _Body


class _Answered(msgspec.Struct):
    response: _Response


@contextmanager
def answers(folder: Path, results: Path) -> Iterator[Callable[[int], str | None]]:
    """A function from the number of a row to the text of its answer, None for a row without one.

    ``folder`` holds the journal, which says where in ``results`` each row stands. That goes into a file of 16 bytes a row, so that
    memory does not grow with their number.
    """
    found = journal.read(folder / "journal", errors_apart=True)
    with tempfile.TemporaryFile(dir=folder) as places, open(results, "rb") as lines:
        for entry in found.lines(journal.RESULTS):
            os.pwrite(places.fileno(), _PLACE.pack(entry.offset, entry.length), _PLACE.size * entry.row)

        def answer(row: int) -> str | None:
            place = os.pread(places.fileno(), _PLACE.size, _PLACE.size * row)
            offset, length = _PLACE.unpack(place) if len(place) == _PLACE.size else (0, 0)
            return _text(os.pread(lines.fileno(), length, offset)) if length else None

        yield answer


def _text(line: bytes) -> str | None:
    choice = msgspec.json.decode(line, type=_Answered).response.body.choices[0]
    return choice.text if choice.message is None else choice.message.content
