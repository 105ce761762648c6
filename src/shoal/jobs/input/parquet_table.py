"""Parquet tables: their rows one at a time, and the same table with one more column. Needs pyarrow (``shoal[parquet]``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from shoal.errors import JobError
from shoal.jobs.input.kinds import HEAD_BYTES, refuse_foreign
from shoal.jobs.input.rows import MAX_LINE_BYTES, Line
from shoal.jobs.input.streams import InputFile, open_stored

_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 256
_GROUP_BYTES = 32 << 20
_READ_BUFFER = 1 << 20


class ParquetTable:
    """An open table. Raises JobError, naming file and row, for what is no Parquet file or is damaged.

    It is read in batches of some megabytes, whatever the size of its row groups.
    """

    def __init__(self, path: InputFile) -> None:
        self.path = path
        self._pyarrow, self._parquet = _pyarrow()
        self._rows_read = 0
        with self._reading():
            with open_stored(path) as file:
                refuse_foreign(path, file.read(HEAD_BYTES), "parquet")
            self._remote = None if isinstance(path, Path) else open_stored(path)
            # Buffered and not ahead: else a whole row group is held.
            whole = path if self._remote is None else self._remote
            self._file = self._parquet.ParquetFile(whole, buffer_size=_READ_BUFFER, pre_buffer=False)
            self._schema = self._file.schema_arrow

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._remote is not None:
            self._remote.close()

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self._schema.names)

    def lines(self, column: str | None) -> Iterator[Line]:
        """The rows as plain rows with the prompts, or the messages, of ``column``.

        None is the column ``prompt``, or ``messages`` if there is no such. JobError at once for a column that is not
        there, or holds neither texts nor lists of structs with role and content.
        """
        name = column or ("prompt" if "prompt" in self.columns else "messages")
        if self.columns.count(name) != 1:
            times = "more than once" if name in self.columns else "not"
            raise JobError(f"{self.path}: the prompt column {name!r} is {times} in the table: {self.columns!r:.500}")
        field = self._field_of(name)
        return (_line(number, field, value) for number, value in enumerate(self._values(name), start=1))

    def _field_of(self, name: str) -> str:
        """The field of a plain row that the values of a column belong in."""
        kind = self._schema.field(name).type
        if self._is_text(kind):
            return "prompt"
        if self._is_conversation(kind):
            return "messages"
        raise JobError(f"{self.path}: the prompt column {name!r} holds {kind}; it must be texts or messages")

    def _is_text(self, kind: Any) -> bool:
        types = self._pyarrow.types
        if types.is_dictionary(kind):
            kind = kind.value_type
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))

    def _is_conversation(self, kind: Any) -> bool:
        types = self._pyarrow.types
        if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
            return False
        message = kind.value_type
        return types.is_struct(message) and {"role", "content"} <= {field.name for field in message}

    def _values(self, column: str) -> Iterator[Any]:
        """The scalars of a column."""
        for batch in self._batches([column]):
            for value in batch.column(0):
                self._rows_read += 1
                yield value

    def _batches(self, columns: list[str] | None = None) -> Iterator[Any]:
        """Record batches of all columns, or of some."""
        metadata = self._file.metadata
        size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        rows = min(_BATCH_ROWS, _BATCH_BYTES * metadata.num_rows // max(1, size))
        with self._reading():
            yield from self._file.iter_batches(batch_size=max(1, rows), columns=columns, use_threads=False)

    def write_extended(self, results: Callable[[int], str | None], target: BinaryIO, column: str) -> None:
        """Write the table to ``target`` with a text ``column`` at its end; schema, types and metadata stay.

        ``results`` gives the text for a row by its number, from 1, or None for null.
        """
        schema = self._schema.append(self._pyarrow.field(column, self._pyarrow.string()))
        with self._parquet.ParquetWriter(target, schema) as writer:
            for group in self._groups(results, schema):
                writer.write_table(group)

    def _groups(self, results: Callable[[int], str | None], schema: Any) -> Iterator[Any]:
        """Tables with the texts as their last column, each to be a row group."""
        group: list[Any] = []
        row = 1
        for batch in self._batches():
            texts = [results(number) for number in range(row, row + batch.num_rows)]
            row += batch.num_rows
            columns = [*batch.columns, self._pyarrow.array(texts, self._pyarrow.string())]
            group.append(self._pyarrow.record_batch(columns, schema=schema))
            if sum(part.nbytes for part in group) >= _GROUP_BYTES:
                yield self._pyarrow.Table.from_batches(group)
                group = []
        if group:
            yield self._pyarrow.Table.from_batches(group)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (self._pyarrow.ArrowException, OSError) as error:
            raise JobError(f"{self.path}: Parquet cannot be read after row {self._rows_read}: {error}") from error


def _pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise JobError("Parquet files need pyarrow: pip install 'shoal[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _line(number: int, field: str, value: Any) -> Line:
    try:
        data = msgspec.json.encode({field: value.as_py()})
    except (ValueError, TypeError, msgspec.MsgspecError) as error:  # among them: bytes that are not UTF-8
        return Line(number, None, f"the cell cannot be read: {error}")
    if len(data) > MAX_LINE_BYTES:
        return Line(number, None, f"the row is longer than {MAX_LINE_BYTES} bytes")
    return Line(number, data)
