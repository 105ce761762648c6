"""The output files of a job together with its journal: a row counts as finished once its line is durable in both.

A commit writes the waiting lines to the output files and syncs them, then their journal records, and syncs those. So a
crash leaves at most bytes in the output files that no record vouches for, or half a record at the end of the journal, and
both are cut off when the job goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from zlib import crc32

from shoal.errors import JobError
from shoal.jobs.durable import journal
from shoal.jobs.durable.file_systems import sync_folder
from shoal.jobs.durable.journal import ERRORS, NO_USAGE, RESULTS, Entry, Journal, Record, Recovered, Redo, Totals, Usage
from shoal.jobs.durable.rowset import RowSet
from shoal.jobs.durable.storage import AppendFile
from shoal.jobs.durable.waiting import Waiting
from shoal.system.streams import binary_stdout, open_above_standard

__all__ = ["NO_USAGE", "Ledger", "RowSet", "StreamLedger", "Totals", "Usage"]

_SHORTEST_INTERVAL = 1.0  # seconds between two commits
_INTERVAL_PER_COST = 100  # ... or so many times as long as the last one took: about 1 % of the time goes to commits
_MOST_WAITING = 4 << 20  # bytes of lines in memory that make a commit due whatever the time
_READ_AHEAD = 1 << 20
_ADVICE = "; put the file back as it was, or begin anew with --restart"


class Ledger:
    """Takes the lines of finished rows and makes them durable, many at once. A context manager.

    ``finished`` holds the rows that are durably done or failed. ``totals`` are the figures over all runs: rows and tokens
    are counted by commits, seconds and steps are for the job to add to, and are kept with the next commit. ``cut_off`` are
    the files with bytes that were not vouched for, and how many. After a failed commit, and after close, only ``close`` is
    left: what is on the disk is found out by opening the ledger anew.
    """

    def __init__(self, found: Recovered, outputs: Sequence[Path], clock: Callable[[], float]) -> None:
        self._state = found.state
        self._clock = clock
        self._waiting = Waiting(found.state)
        self._recorded = found.state.totals.work
        self._usable = True
        ends = list(zip(outputs, found.state.ends, strict=False))
        self.cut_off = dict(_surplus([*ends, (found.path, found.end)]))
        with ExitStack() as opened:
            self._outputs = [opened.enter_context(_Output(path, keep)) for path, keep in ends]
            self._outputs[RESULTS].open()
            self._journal = opened.enter_context(Journal(found))
            self._opened = opened.pop_all()
        self._due = clock() + _SHORTEST_INTERVAL

    @classmethod
    def open(
        cls,
        folder: Path,
        results: Path,
        errors: Path,
        *,
        restart: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> Ledger:
        """The ledger of the job in ``folder``, new or as the last run left it; bytes that are not vouched for are cut off.

        Failed rows go to ``errors``, which may be ``results``; else that file comes into being with the first of them.
        ``restart`` drops what is there: lines, journal and all. Raises JobError for files that hold something else than
        the journal says, and for files with something in them when there is no journal; OSError where the disk fails.
        """
        path = folder / "journal"
        folder.mkdir(exist_ok=True)
        if restart:
            journal.create(path)
        elif not path.exists():
            _check_empty(results, errors)
            journal.create(path)
        sync_folder(folder.absolute().parent)
        outputs = [results] if os.path.realpath(errors) == os.path.realpath(results) else [results, errors]
        found = journal.read(path, errors_apart=len(outputs) > 1)
        for file, output in enumerate(outputs):
            _check_lines(output, found.state.ends[file], found.lines(file))
        return cls(found, outputs, clock)

    @property
    def finished(self) -> RowSet:
        """The rows whose lines are durable."""
        return self._state.finished

    @property
    def totals(self) -> Totals:
        """The figures over all runs."""
        return self._state.totals

    def add(self, row: int, line: bytes, *, failed: bool, usage: Usage = NO_USAGE) -> None:
        """Take the ``line`` (without newline) of ``row``, which is finished; it is durable after the next commit."""
        self._check_usable()
        self._waiting.add(row, line, failed=failed, usage=usage)

    def commit_if_due(self) -> bool:
        """Commit if lines have waited long enough or are many; whether it did."""
        due = bool(self._waiting) and (self._clock() >= self._due or self._waiting.num_bytes >= _MOST_WAITING)
        if due:
            self.commit()
        return due

    def commit(self) -> None:
        """Make all waiting lines and the totals durable. After an error the ledger can only be closed."""
        work = self.totals.work
        if not self._waiting and work == self._recorded:
            return
        started = self._clock()
        with self._whole():
            for file, output in enumerate(self._outputs):
                output.write(b"".join(self._waiting.lines(file)))
            records: list[Record] = [work, *self._waiting.entries()]
            self._journal.append(records)
            for record in records:
                self._state.apply(record)
            self._waiting.clear()
            self._recorded = work
        ended = self._clock()
        self._due = ended + max(_SHORTEST_INTERVAL, _INTERVAL_PER_COST * (ended - started))

    def retry_errors(self) -> int:
        """Put all failed rows back and empty the file of errors; returns how many there were.

        Raises JobError where failed rows stand among the results, from which no line can be taken.
        """
        if len(self._outputs) == 1:
            raise JobError(
                f"{self._outputs[RESULTS].path}: the failed rows in it cannot be put back (--restart begins anew)"
            )
        self.commit()
        redo = Redo(len(self._state.failed))
        if redo.rows:
            with self._whole():
                self._journal.append([redo])  # from here on their lines are void, and cut off if this process dies
                self._outputs[ERRORS].empty()
                self._state.apply(redo)
        return redo.rows

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is begun here and not brought to its end leaves files that nobody knows: no more use of the ledger."""
        self._check_usable()
        self._usable = False
        yield
        self._usable = True

    def _check_usable(self) -> None:
        if not self._usable:
            raise JobError(
                f"{self._outputs[RESULTS].path}: closed, or a write failed before; start the job again to go on"
            )

    def close(self) -> None:
        """Close all files. Lines that wait are dropped: their rows are not finished."""
        self._usable = False
        self._opened.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Output:
    """An output file, cut to its first ``keep`` bytes. One that does not exist is created by the first write."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._file = AppendFile(path, keep) if path.exists() else None

    def open(self) -> AppendFile:
        if self._file is None:
            self._file = AppendFile(self.path)
        return self._file

    def write(self, data: bytes) -> None:
        """Append ``data``, durably."""
        if data:
            file = self.open()
            file.append(data)
            file.sync()

    def empty(self) -> None:
        """Drop all lines, durably."""
        self.open().cut(0)

    def __enter__(self) -> _Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()


def _check_empty(*outputs: Path) -> None:
    """What no journal vouches for is not a job's to cut off."""
    for path in outputs:
        if path.exists() and path.stat().st_size:
            raise JobError(
                f"{path}: holds {path.stat().st_size} bytes that are not of this job (--restart replaces them)"
            )


def _surplus(ends: Iterable[tuple[Path, int]]) -> Iterator[tuple[Path, int]]:
    """Files that are longer than they should be, and by how many bytes."""
    for path, end in ends:
        if path.exists() and (size := path.stat().st_size) > end:
            yield path, size - end


def _check_lines(path: Path, end: int, lines: Iterable[Entry]) -> None:
    """Raise JobError unless the first ``end`` bytes of the file are the very ``lines`` of the journal."""
    size = path.stat().st_size if path.exists() else 0
    if size < end:
        raise JobError(f"{path}: ends at byte {size}, the journal vouches for {end} bytes{_ADVICE}")
    if not end:
        return
    with open(path, "rb", _READ_AHEAD) as stream:
        for entry in lines:
            if crc32(stream.read(entry.length)) != entry.crc:
                raise JobError(f"{path}: the line of row {entry.row} at byte {entry.offset} was changed{_ADVICE}")


class StreamLedger:
    """Stands in for a Ledger where results go to something that keeps nothing, a pipe say: lines leave as they come."""

    def __init__(self, results: BinaryIO, errors: BinaryIO) -> None:
        self.finished = RowSet()
        self.totals = Totals()
        self._results = results
        self._errors = errors

    @classmethod
    def open(cls, results: Path, errors: Path) -> StreamLedger:
        """Write to ``results`` and ``errors``, which may be the same; ``-`` is stdout."""
        stream = _open_stream(results)
        return cls(stream, stream if errors == results else _open_stream(errors))

    def add(self, row: int, line: bytes, *, failed: bool, usage: Usage = NO_USAGE) -> None:
        """Write the ``line`` (without newline) of a finished row."""
        stream = self._errors if failed else self._results
        stream.write(line + b"\n")
        stream.flush()
        self.totals.count(usage, failed=failed)

    def commit_if_due(self) -> bool:
        """There is nothing to commit."""
        return False

    def commit(self) -> None:
        """There is nothing to commit."""

    def retry_errors(self) -> int:
        """Raises JobError: nothing is known of an earlier run."""
        raise JobError("failed rows can be put back only where results go to a file")

    def close(self) -> None:
        """Close the streams, but not stdout itself."""
        try:
            self._results.close()
        finally:  # what is left in it may find a disk full
            self._errors.close()

    def __enter__(self) -> StreamLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_stream(path: Path) -> BinaryIO:
    if path != Path("-"):
        return open(path, "wb", opener=open_above_standard)
    stream = binary_stdout()
    if stream is None:
        raise JobError("-: stdout is closed")
    return stream
