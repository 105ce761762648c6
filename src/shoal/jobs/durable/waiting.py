"""Lines of finished rows that wait in memory for the next commit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

from shoal.jobs.durable.journal import Entry, State, Usage


class Waiting:
    """The lines that come after those of ``state``. ``num_bytes``: how much they take."""

    def __init__(self, state: State) -> None:
        self.num_bytes = 0
        self._state = state
        self._lines: dict[int, _Line] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, row: int, line: bytes, *, failed: bool, usage: Usage) -> None:
        """Take the ``line`` (without newline) of ``row``."""
        assert row not in self._state.finished, f"row {row} has its line in a file"
        assert row not in self._lines, f"row {row} has its line in memory"
        assert b"\n" not in line, f"the record of row {row} is one line"
        self._lines[row] = _Line(line + b"\n", failed, usage)
        self.num_bytes += len(line)

    def lines(self, file: int) -> list[bytes]:
        """Those for the RESULTS or ERRORS, with their newlines, in the order in which they came."""
        return [line.text for line in self._lines.values() if self._state.file_of(failed=line.failed) == file]

    def entries(self) -> Iterator[Entry]:
        """The journal's entries of all of them, in the same order."""
        ends = list(self._state.ends)
        for row, (text, failed, usage) in self._lines.items():
            file = self._state.file_of(failed=failed)
            yield Entry(row, failed, ends[file], len(text), crc32(text), usage)
            ends[file] += len(text)

    def clear(self) -> None:
        """They are committed."""
        self._lines.clear()
        self.num_bytes = 0


class _Line(NamedTuple):
    text: bytes  # with its newline
    failed: bool
    usage: Usage
