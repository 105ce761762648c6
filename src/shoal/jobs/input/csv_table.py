"""CSV tables: their records one at a time, and the same table with one more column.

Read as RFC 4180 has it: the first record is the header; cells in quotes may hold delimiters, line ends and doubled quotes. A byte
order mark at the beginning of a record is passed over. The delimiter is the one of comma, semicolon, tab and bar that splits the
header into most cells.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from shoal.errors import JobError
from shoal.jobs.input.kinds import refuse_foreign
from shoal.jobs.input.rows import MAX_LINE_BYTES, Line
from shoal.jobs.input.streams import InputFile, LineStream, open_stream

if TYPE_CHECKING:
    from _csv import Reader

DELIMITERS = ",;\t|"

_CHUNK = 1 << 20


class CsvTable:
    """An open table: its ``header``, then by iteration its records. Blank lines are passed over.

    A record is the list of its cells, or a csv.Error that says what is wrong with it. Raises JobError for a table
    whose header cannot be read.
    """

    def __init__(self, path: InputFile, stream: LineStream, delimiter: str, *, limit: int = MAX_LINE_BYTES) -> None:
        self.path = path
        self._lines = _RecordLines(stream, limit)
        self._reader = _csv_reader(self._lines, delimiter, strict=True)
        header = self._next()
        if not isinstance(header, list):
            raise JobError(f"{path}: the header of the table cannot be read: {header or 'there is none'}")
        self.header = header

    def __iter__(self) -> Iterator[list[str] | csv.Error]:
        while (record := self._next()) is not None:
            if isinstance(record, list) and len(record) != len(self.header):
                record = csv.Error(f"the record has {len(record)} cells, the header {len(self.header)}")
            yield record

    def lines(self, column: str) -> Iterator[Line]:
        """The records as plain rows with the prompts of ``column``. JobError at once if there is no such column."""
        if self.header.count(column) != 1:
            times = "more than once" if column in self.header else "not"
            raise JobError(f"{self.path}: the prompt column {column!r} is {times} in the header: {self.header!r:.500}")
        cell = self.header.index(column)
        return (_line(number, record, cell) for number, record in enumerate(self, start=1))

    def _next(self) -> list[str] | csv.Error | None:
        """The next record that is not a blank line; None at the end."""
        record: list[str] = []
        while not record:
            self._lines.begin_record()
            try:
                record = next(self._reader)
            except StopIteration:
                return None
            except csv.Error as error:
                return error
        return self._lines.encoding_error or record


def _line(number: int, record: list[str] | csv.Error, cell: int) -> Line:
    if isinstance(record, csv.Error):
        return Line(number, None, str(record))
    return Line(number, msgspec.json.encode({"prompt": record[cell]}))


class _RecordLines:
    """The physical lines of ``stream`` as csv.reader asks for them, no more than ``limit`` bytes for one record.

    What is not UTF-8 is handed on in disguise and kept in ``encoding_error``, so that the record still ends where it
    should. A record that is too long is passed over, up to the line end that an even number of quotes precedes.
    """

    def __init__(self, stream: LineStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self.begin_record()

    def begin_record(self) -> None:
        """What is read from now on belongs to another record."""
        self.encoding_error: csv.Error | None = None
        self._size = 0
        self._quotes = 0
        self._encoding = "utf-8-sig"  # files with a byte order mark each may have been joined

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        data = self._read(self._limit + 1 - self._size)
        if not data:
            raise StopIteration
        if self._size > self._limit:
            self._skip_rest(data)
            raise csv.Error(f"the record is longer than {self._limit} bytes; is a closing quote missing?")
        text = self._decoded(data)
        self._encoding = "utf-8"
        return text

    def _read(self, size: int) -> bytes:
        data = self._stream.readline(size)
        self._size += len(data)
        self._quotes += data.count(b'"')
        return data

    def _skip_rest(self, data: bytes) -> None:
        while data and not (data.endswith(b"\n") and self._quotes % 2 == 0):
            data = self._read(_CHUNK)

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode(self._encoding)
        except UnicodeDecodeError as error:
            place = self._size - len(data) + error.start
            self.encoding_error = csv.Error(f"the record is not valid UTF-8 at its byte {place}")
            return data.decode(self._encoding, "surrogateescape")


@contextmanager
def open_csv(path: InputFile) -> Iterator[CsvTable]:
    """The table in a file. Raises JobError for one that is none, as its first bytes show, or whose header cannot be read."""
    with open_stream(path) as stream:
        refuse_foreign(path, stream.head(), "csv")
        yield CsvTable(path, stream, csv_delimiter(path))


def csv_delimiter(path: InputFile) -> str:
    """The delimiter of a table."""
    with open_stream(path) as stream:
        lines = iter(lambda: stream.readline(MAX_LINE_BYTES), b"")
        first = next((line for line in lines if line.strip()), b"")
    header = first.decode("utf-8-sig", "replace").replace("\r", "")
    return max(DELIMITERS, key=lambda delimiter: len(next(_csv_reader([header], delimiter, strict=False))))


def _csv_reader(lines: Iterable[str], delimiter: str, *, strict: bool) -> Reader:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))  # of the whole process: raised, never lowered
    return csv.reader(lines, delimiter=delimiter, strict=strict)


def write_extended_csv(path: InputFile, results: Callable[[int], str | None], target: BinaryIO, column: str) -> None:
    """Write the table to ``target`` as it is, byte by byte, with a cell of ``column`` put at the end of each record.

    ``results`` gives the text for a record by its number, from 1; the cell stays empty where it gives None.
    """
    delimiter = csv_delimiter(path)
    with open_stream(path) as stream:
        copy = _Copy(stream, target)
        table = CsvTable(path, copy, delimiter)
        copy.add(delimiter, column)
        for number, _ in enumerate(table, start=1):
            copy.add(delimiter, results(number))
        copy.finish()


class _Copy:
    """Copies to ``target`` what is read of ``stream``. The last line end is held back: more cells may come before it."""

    def __init__(self, stream: LineStream, target: BinaryIO) -> None:
        self._stream = stream
        self._target = target
        self._line_end = b""

    def readline(self, size: int, /) -> bytes:
        """As that of ``stream``."""
        data = self._stream.readline(size)
        seen = self._line_end + data
        self._line_end = next((end for end in (b"\r\n", b"\n", b"\r") if seen.endswith(end)), b"")
        self._target.write(seen.removesuffix(self._line_end))
        return data

    def add(self, delimiter: str, text: str | None) -> None:
        """Put a cell at the end of the line that was read last."""
        self._target.write((delimiter + _cell(text, delimiter)).encode())

    def finish(self) -> None:
        """Write what is held back."""
        self._target.write(self._line_end)


def _cell(text: str | None, delimiter: str) -> str:
    """A cell in quotes if it needs them; an empty text has them, no text has not."""
    if text is None:
        return ""
    if text and not any(character in text for character in ('"', "\r", "\n", delimiter)):
        return text
    return '"' + text.replace('"', '""') + '"'
