"""The input of a job as Lines, whatever its files are: JSONL, CSV or Parquet, compressed or not, or stdin."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from shoal.errors import JobError
from shoal.jobs.input.csv_table import open_csv
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.kinds import EmptyInputError, refuse_foreign
from shoal.jobs.input.parquet_table import ParquetTable
from shoal.jobs.input.rows import Line, LineReader
from shoal.jobs.input.streams import InputFile, open_stream, table_format

DEFAULT_PROMPT_COLUMN = "prompt"


class Source:
    """The open input of a job: gives by iteration, once, the Lines of all files. Their numbers go on from one file to the next, as if
    the files were one. ``lines`` are those of the only file, if there is only one. ``counted``: as ``open_inputs``."""

    def __init__(
        self,
        inputs: Inputs,
        prompt_column: str | None,
        lines: Iterable[Line] | None = None,
        counted: Sequence[int] | None = None,
    ) -> None:
        self._inputs = inputs
        self._prompt_column = prompt_column
        self._is_one = lines is not None
        self._counted = counted
        self._names = inputs.names()
        self._ends: list[int] = []
        self._lines = self._all_lines() if lines is None else lines

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines)

    @property
    def ends(self) -> list[int] | None:
        """The number of the last row of each file that is behind; None if there is only one file."""
        return None if self._is_one else self._ends

    def close(self) -> None:
        """Close the file that is open of several."""
        if isinstance(self._lines, Generator):
            self._lines.close()

    def place(self, number: int) -> str:
        """The ``place`` of the Line with this number, which has been read; "" if there is only one file."""
        if self._is_one:
            return ""
        index = bisect_left(self._ends, number)
        before = self._ends[index - 1] if index else 0
        return _place(self._names[index], number - before)

    def _all_lines(self) -> Generator[Line, None, None]:
        number = 0
        ends: Sequence[int | None] = self._counted or [None] * len(self._names)
        for name, file, end in zip(self._names, self._inputs.files, ends, strict=True):
            before = number
            with _opened(file, self._prompt_column) as lines:
                for line in lines if end is None else _up_to(end - before, lines):
                    number = before + line.number
                    yield Line(number, line.data, line.error, _place(name, line.number))
            number = number if end is None else end
            self._ends.append(number)


def _up_to(last: int, lines: Iterable[Line]) -> Iterator[Line]:
    """Those with numbers to ``last``, and nothing is read behind that one."""
    for line in lines:
        if line.number <= last:
            yield line
        if line.number >= last:
            return


def _place(name: str, number: int) -> str:
    return f"{name}, line {number}"


@contextmanager
def open_inputs(
    inputs: Inputs, prompt_column: str | None = None, counted: Sequence[int] | None = None
) -> Iterator[Source]:
    """The input for reading, from its start. Of one file everything as of ``open_source``; of several each is opened when its turn
    comes, and one that is empty has no rows.

    ``counted``: ``Source.ends`` of several files as they were read before. Each ends there, and the numbers of the next one go on from
    there, whatever was written behind it or taken away since.
    """
    if len(inputs.files) > 1:
        with closing(Source(inputs, prompt_column, counted=counted)) as source:
            yield source
        return
    with open_source(inputs.files[0], prompt_column) as lines:
        yield Source(inputs, prompt_column, lines)


@contextmanager
def _opened(file: InputFile, prompt_column: str | None) -> Iterator[Iterable[Line]]:
    """One of several files; one that is empty has no lines."""
    with ExitStack() as stack:
        try:
            lines = stack.enter_context(open_source(file, prompt_column))
        except EmptyInputError:
            if table_format(file) == "parquet":  # even without rows such a file holds something
                raise
            lines = ()
        yield lines


@contextmanager
def open_source(path: InputFile, prompt_column: str | None = None) -> Iterator[Iterable[Line]]:
    """One file for reading, from its start: ``-`` is stdin with JSONL, else the suffix says what it is.

    ``.gz`` and ``.zst`` are decompressed; below that, ``.csv`` and ``.parquet`` are tables, whose prompts are in
    ``prompt_column`` (default ``prompt``; in Parquet also ``messages``), and all else is JSONL. Raises JobError for a
    table that cannot be read or has no such column, and for a file that its first bytes show to be of another kind.

    Gives each Line once, and holds no more than one of them (of a Parquet table: some megabytes). Iteration raises JobError, naming
    file and place, for compressed data or Parquet that is damaged or cut short.
    """
    match table_format(path):
        case "csv":
            with open_csv(path) as table:
                yield table.lines(prompt_column or DEFAULT_PROMPT_COLUMN)
        case "parquet":
            with closing(ParquetTable(path)) as parquet:
                yield parquet.lines(prompt_column)
        case None if prompt_column is not None:
            raise JobError(f"{path}: has no column {prompt_column!r}: only .csv and .parquet files are tables")
        case None:
            with open_stream(path) as stream:
                refuse_foreign(path, stream.head(), None)
                yield LineReader(stream)
