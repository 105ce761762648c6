"""Jobs whose output is a table: that of the input with the answers as one more column."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from shoal.errors import JobError
from shoal.jobs.durable.file_systems import sync, sync_folder
from shoal.jobs.input.csv_table import open_csv, write_extended_csv
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.parquet_table import ParquetTable
from shoal.jobs.input.streams import InputFile, compression_of, table_format
from shoal.system.streams import open_above_standard


def check_target(inputs: Inputs, target: Path, column: str) -> None:
    """Raise JobError, before any work, for a ``target`` that the results of ``inputs`` cannot be written to.

    Results are never compressed. A table (``table_format(target)``) needs an input that is one table of the same kind,
    in which the name of ``column`` is free; any input may have its results in a JSONL file.
    """
    if compression_of(target):
        raise JobError(f"{target}: results are appended uncompressed; leave {compression_of(target)} away")
    if table_format(target) is None:
        return
    source = inputs.files[0]
    if len(inputs.files) > 1 or table_format(source) != table_format(target):
        raise JobError(f"{target}: only a .{table_format(target)} input can become this table, not {inputs}")
    if column in _columns(source):
        raise JobError(f"{source}: has a column {column!r} already; the output column needs another name")


def _columns(source: InputFile) -> list[str]:
    if table_format(source) == "parquet":
        with closing(ParquetTable(source)) as table:
            return table.columns
    with open_csv(source) as csv:
        return csv.header


def assemble(source: InputFile, results: Callable[[int], str | None], target: Path, column: str) -> None:
    """Write the table ``source`` with ``column`` at its end to ``target``, durably: all of it, or ``target`` stays.

    ``results`` is asked for the text of each row, by its number from 1, in order; None is an empty cell, or null.
    Memory does not grow with the table.
    """
    with _replacing(target) as file:
        if table_format(source) == "parquet":
            with closing(ParquetTable(source)) as table:
                table.write_extended(results, file, column)
        else:
            write_extended_csv(source, results, file, column)


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``target``, durably, once all is written. A crash may leave NAME.tmp beside it."""
    target = Path(os.path.realpath(target))
    temporary = target.with_name(target.name + ".tmp")
    try:
        with open(temporary, "wb", opener=open_above_standard) as file:
            yield file
            file.flush()
            sync(file.fileno(), temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs its bytes back
        raise
    sync_folder(target.parent)
