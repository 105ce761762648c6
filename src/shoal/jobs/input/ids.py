"""The custom_ids of a job: which row has which, kept on disk so that memory does not grow with their number."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from types import TracebackType

from shoal.errors import JobError

_BATCH = 32768
_CACHE_KIB = 8192

# What is lost in a crash is made again: nothing is journalled, synced or, as long as the index is open, committed.
_SETUP = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -{cache_kib};
CREATE TABLE ids (key BLOB PRIMARY KEY, row INTEGER NOT NULL) WITHOUT ROWID;
BEGIN;
"""
_INSERT = "INSERT OR IGNORE INTO ids VALUES (?, ?)"
_SELECT = "SELECT row FROM ids WHERE key = ?"


class DuplicateIdError(JobError):
    """Two rows of a job have the same custom_id; ``places`` say where they stand if the input is several files."""

    def __init__(self, custom_id: str, first_row: int, second_row: int, places: tuple[str, str] = ("", "")) -> None:
        where = " and ".join(places) if all(places) else f"rows {first_row} and {second_row}"
        super().__init__(f"custom_id {custom_id!r} is in {where}, must be in one")
        self.custom_id = custom_id
        self.first_row = first_row
        self.second_row = second_row
        self.places = places

    def __reduce__(self) -> tuple[type[DuplicateIdError], tuple[str, int, int, tuple[str, str]]]:
        return (type(self), (self.custom_id, self.first_row, self.second_row, self.places))


class IdIndex:
    """A set of custom_ids, each with the row it is in. A context manager.

    It starts empty, whatever ``path`` held, and its file (about 30 bytes an id) is deleted with ``close``. An id is known
    by a hash of 128 bits. Its methods raise JobError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.unlink(missing_ok=True)
        with self._storing():
            # Nobody else opens it, and some file systems have no locks.
            self._db = sqlite3.connect(f"{path.absolute().as_uri()}?nolock=1", isolation_level=None, uri=True)
            self._db.executescript(_SETUP.format(cache_kib=_CACHE_KIB))

    def add_all(self, pairs: Iterable[tuple[str, int]]) -> None:
        """Add custom_ids with their rows, in ascending order of rows.

        Raises DuplicateIdError for the first row whose id an earlier one has.
        """
        left = iter(pairs)
        while batch := list(islice(left, _BATCH)):
            self._add_batch(batch)

    def add(self, custom_id: str, row: int) -> int | None:
        """Add one, unless it is there: then return the row that has it."""
        key = _key(custom_id)
        with self._storing():
            added = self._db.execute(_INSERT, (key, row)).rowcount
        return None if added else self._row_of(key)

    def close(self) -> None:
        """Delete the index."""
        self._db.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> IdIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_batch(self, batch: list[tuple[str, int]]) -> None:
        # In order of the keys, each page of the tree is visited once a batch, not once an id.
        entries = sorted((_key(custom_id), row) for custom_id, row in batch)
        with self._storing():
            added = self._db.executemany(_INSERT, entries).rowcount
        if added < len(batch):
            raise self._first_duplicate(batch)

    def _first_duplicate(self, batch: list[tuple[str, int]]) -> DuplicateIdError:
        for custom_id, row in batch:
            holder = self._row_of(_key(custom_id))
            if holder != row:
                return DuplicateIdError(custom_id, holder, row)
        raise AssertionError("an id that was not added has an earlier row")

    def _row_of(self, key: bytes) -> int:
        with self._storing():
            return int(self._db.execute(_SELECT, (key,)).fetchone()[0])

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise JobError(f"{self._path}: cannot keep the index of custom_ids: {error}") from error


def _key(custom_id: str) -> bytes:
    return blake2b(custom_id.encode(), digest_size=16).digest()
