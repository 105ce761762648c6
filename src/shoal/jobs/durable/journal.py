"""The journal of a job: which rows are finished, and which bytes of the output files are their records.

The file is a header and records of one size, little-endian, appended by one process at a time:

    header      0           8         12    16
                |"shoaljnl" | version | crc |

    record      0      4        8         16       24         28             32              36                 40    44
    done row    |"DONE"| length | row     | offset | line crc | prompt tokens | cached tokens | generated tokens | crc |
    failed row  |"FAIL"| length | row     | offset | line crc | prompt tokens | cached tokens | generated tokens | crc |
    commit      |"WORK"| 0      | seconds | steps  | full steps               | row steps                        | crc |
    retry       |"REDO"| 0      | rows    | 0                                                                    | crc |

``offset`` and ``length`` are those of the row's line, its newline included, in the results file or the file of errors;
``seconds`` is a double. A commit record begins each commit and holds the figures of all runs so far. A retry record puts all
failed rows before it back: they are unfinished again and their lines void, the file of errors begins anew at 0.

A crc is the CRC-32 of the header or record up to there, begun with the crc of the record before it (that of the header
with 0), so that a record is good only where it stands. What a crash leaves half-written is the end of a journal: all up to
the first record with a wrong crc holds, nothing after it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple
from zlib import crc32

from shoal.errors import JobError
from shoal.jobs.durable.rowset import RowSet
from shoal.jobs.durable.storage import AppendFile, write_atomically

VERSION = 1
RESULTS, ERRORS = 0, 1  # the two output files

_HEADER = struct.Struct("<8sI")
_ROW = struct.Struct("<4sIQQIIII")
_WORK = struct.Struct("<4s4xdQQQ")
_REDO = struct.Struct("<4s4xQ24x")
_CRC = struct.Struct("<I")
_MAGIC = b"shoaljnl"
HEADER_SIZE = _HEADER.size + _CRC.size
RECORD_SIZE = _ROW.size + _CRC.size
_READ_AHEAD = 1 << 20


class Usage(NamedTuple):
    """The tokens of a row; ``cached_tokens`` are those of the prompt that were not computed again."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


NO_USAGE = Usage(0, 0, 0)


class Entry(NamedTuple):
    """A finished row: where its line stands, newline included, and the CRC-32 of it."""

    row: int
    failed: bool
    offset: int
    length: int
    crc: int
    usage: Usage


class Work(NamedTuple):
    """What all runs of the job took so far; the beginning of a commit."""

    seconds: float
    steps: int
    full_steps: int
    row_steps: int


class Redo(NamedTuple):
    """All failed rows before this are put back; ``rows`` counts them."""

    rows: int


Record = Entry | Work | Redo


@dataclass(slots=True)
class Totals:
    """The figures of a job over all its runs.

    ``done`` and ``failed`` count the rows that are finished, ``retried`` those that had failed and were put back. Tokens
    are those of every row that came to an end, put back later or not. ``full_steps`` are the steps of the engine with a
    full batch, ``row_steps`` the sum of rows over all steps. The journal does not hold ``draft_tokens`` and ``accepted_tokens``, which
    are those of this run.
    """

    done: int = 0
    failed: int = 0
    retried: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    full_steps: int = 0
    row_steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def work(self) -> Work:
        """The figures that no row holds."""
        return Work(self.seconds, self.steps, self.full_steps, self.row_steps)

    def resume(self, work: Work) -> None:
        """Go on from the figures of an earlier commit."""
        self.seconds, self.steps, self.full_steps, self.row_steps = work

    def count(self, usage: Usage, *, failed: bool) -> None:
        """Count one more finished row."""
        self.done += not failed
        self.failed += failed
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generated_tokens += usage.generated_tokens


class State:
    """What the records of a journal say, one after the other.

    ``ends`` are the lengths of the two output files as far as lines in them are vouched for. Unless ``errors_apart``, failed
    rows stand among the results.
    """

    def __init__(self, *, errors_apart: bool) -> None:
        self.finished = RowSet()
        self.failed = RowSet()
        self.totals = Totals()
        self.ends = [0, 0]
        self._errors_apart = errors_apart

    def file_of(self, *, failed: bool) -> int:
        """RESULTS or ERRORS: where the line of a row stands."""
        return ERRORS if failed and self._errors_apart else RESULTS

    def admits(self, record: Record) -> bool:
        """Whether ``record`` can follow: every row has one line, and lines leave no gap."""
        if not isinstance(record, Entry):
            return True
        return record.row not in self.finished and record.offset == self.ends[self.file_of(failed=record.failed)]

    def apply(self, record: Record) -> None:
        """Take in the next record."""
        if isinstance(record, Entry):
            self._finish(record)
        elif isinstance(record, Work):
            self.totals.resume(record)
        else:
            self._put_back(record)

    def _finish(self, entry: Entry) -> None:
        self.finished.add(entry.row)
        if entry.failed:
            self.failed.add(entry.row)
        self.ends[self.file_of(failed=entry.failed)] += entry.length
        self.totals.count(entry.usage, failed=entry.failed)

    def _put_back(self, redo: Redo) -> None:
        self.finished.remove_all(self.failed)
        self.failed = RowSet()
        self.ends[ERRORS] = 0
        self.totals.failed = 0
        self.totals.retried += redo.rows


@dataclass(slots=True)
class Recovered:
    """A journal as it was found: good up to byte ``end``, where ``crc`` is that of the last record.

    The last commit begins at ``last_commit``. The failed rows of records before ``redone`` were put back.
    """

    path: Path
    state: State
    crc: int
    end: int = HEADER_SIZE
    last_commit: int = HEADER_SIZE
    redone: int = HEADER_SIZE

    def lines(self, file: int) -> Iterator[Entry]:
        """The entries of all lines that stand in RESULTS or ERRORS, in their order there."""
        position = HEADER_SIZE
        for record, _ in _records(self.path):
            position += RECORD_SIZE
            if not isinstance(record, Entry) or self.state.file_of(failed=record.failed) != file:
                continue
            if file == RESULTS or position > self.redone:
                yield record


class Journal:
    """A journal open for more records: cut to what is good of it, which is durable from here on. A context manager."""

    def __init__(self, found: Recovered) -> None:
        self._crc = found.crc
        self._file = AppendFile(found.path, found.end)
        try:
            self._file.write_again(found.last_commit)  # its sync may have failed in the run that wrote it
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Write ``records`` and return once they are durable."""
        self._file.append(b"".join(map(self._sealed, records)))
        self._file.sync()

    def _sealed(self, record: Record) -> bytes:
        data, self._crc = seal(record, self._crc)
        return data

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def create(path: Path) -> None:
    """Put an empty journal in the place of whatever is at ``path``, durably and at once."""
    header = _HEADER.pack(_MAGIC, VERSION)
    write_atomically(path, header + _CRC.pack(crc32(header)))


def read(path: Path, *, errors_apart: bool) -> Recovered:
    """What the journal at ``path`` says. In constant memory, but for a bit or two a row.

    Raises JobError for a file that is no journal, or one with sound records that contradict each other.
    """
    with open(path, "rb", _READ_AHEAD) as stream:
        found = Recovered(path, State(errors_apart=errors_apart), _read_header(stream, path))
    for record, crc in _records(path):
        if not found.state.admits(record):
            raise damaged(path, f"the record at byte {found.end} contradicts those before it")
        if isinstance(record, Redo):
            found.redone = found.end
        if not isinstance(record, Entry):
            found.last_commit = found.end
        found.state.apply(record)
        found.crc = crc
        found.end += RECORD_SIZE
    return found


def _records(path: Path) -> Iterator[tuple[Record, int]]:
    """All good records, each with its crc."""
    with open(path, "rb", _READ_AHEAD) as stream:
        crc = _read_header(stream, path)
        while len(data := stream.read(RECORD_SIZE)) == RECORD_SIZE:
            found = unseal(data, crc, path)
            if found is None:
                return
            yield found
            _, crc = found


def _read_header(stream: BinaryIO, path: Path) -> int:
    """Check the header and return its crc."""
    data = stream.read(HEADER_SIZE)
    if len(data) < HEADER_SIZE or not data.startswith(_MAGIC):
        raise damaged(path, "it does not begin like a journal")
    _, version = _HEADER.unpack_from(data)
    crc = crc32(data[: _HEADER.size])
    if data[_HEADER.size :] != _CRC.pack(crc):
        raise damaged(path, "the CRC of its header is wrong")
    if version != VERSION:
        raise damaged(path, f"its format has version {version}, this shoal reads version {VERSION}")
    return crc


def seal(record: Record, crc: int) -> tuple[bytes, int]:
    """The RECORD_SIZE bytes of a record that comes after one with ``crc``, and its own crc."""
    body = _encode(record)
    crc = crc32(body, crc)
    return body + _CRC.pack(crc), crc


def unseal(data: bytes, crc: int, place: object) -> tuple[Record, int] | None:
    """The record in RECORD_SIZE bytes, and its crc; None where it does not come after one with ``crc``, or is damaged.

    Raises JobError that names ``place`` for a record of another version.
    """
    body = data[: -_CRC.size]
    crc = crc32(body, crc)
    return (_decode(body, place), crc) if data[-_CRC.size :] == _CRC.pack(crc) else None


def damaged(place: object, reason: str) -> JobError:
    """What a journal that cannot be gone on with is refused with."""
    return JobError(f"{place}: {reason}; the job cannot go on from it (--restart begins anew)")


def _encode(record: Record) -> bytes:
    if isinstance(record, Entry):
        kind = b"FAIL" if record.failed else b"DONE"
        return _ROW.pack(kind, record.length, record.row, record.offset, record.crc, *record.usage)
    if isinstance(record, Work):
        return _WORK.pack(b"WORK", *record)
    return _REDO.pack(b"REDO", *record)


def _decode(body: bytes, place: object) -> Record:
    kind = body[:4]
    if kind in (b"DONE", b"FAIL"):
        _, length, row, offset, crc, *tokens = _ROW.unpack(body)
        return Entry(row, kind == b"FAIL", offset, length, crc, Usage(*tokens))
    if kind == b"WORK":
        return Work(*_WORK.unpack(body)[1:])
    if kind == b"REDO":
        return Redo(*_REDO.unpack(body)[1:])
    raise damaged(place, f"it has a record of an unknown kind, {kind!r}")
