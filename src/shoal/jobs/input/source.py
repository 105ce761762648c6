"""The input of a job as Lines, whatever the file is: JSONL, CSV or Parquet, compressed or not, or stdin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from shoal.errors import JobError
from shoal.jobs.input.csv_table import open_csv
from shoal.jobs.input.kinds import refuse_foreign
from shoal.jobs.input.parquet_table import ParquetTable
from shoal.jobs.input.rows import Line, LineReader
from shoal.jobs.input.streams import open_stream, table_format

DEFAULT_PROMPT_COLUMN = "prompt"


@contextmanager
def open_source(path: Path, prompt_column: str | None = None) -> Iterator[Iterable[Line]]:
    """The input for reading, from its start: ``-`` is stdin with JSONL, else the suffix says what it is.

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
