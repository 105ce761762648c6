"""A journal tells all that it was told, and never more, whatever became of its bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.jobs.durable import journal
from shoal.jobs.durable.journal import (
    ERRORS,
    HEADER_SIZE,
    RECORD_SIZE,
    RESULTS,
    Entry,
    Journal,
    Record,
    Recovered,
    Redo,
    Totals,
    Usage,
    Work,
)
from tests.jobs.disk import intercepted, no_waiting

# Rows 3 and 5 fail, are put back, and fail again or are done.
COMMITS: list[list[Record]] = [
    [
        Work(0.5, 1, 0, 3),
        Entry(1, False, 0, 10, 111, Usage(5, 0, 2)),
        Entry(3, True, 0, 20, 333, Usage(6, 1, 0)),
        Entry(2, False, 10, 30, 222, Usage(7, 0, 2**32 - 1)),
    ],
    [Work(1.5, 2, 1, 7), Entry(5, True, 20, 40, 2**32 - 1, Usage(0, 0, 0)), Entry(4, False, 40, 5, 0, Usage(8, 8, 8))],
    [Redo(2)],
    [Work(2.5, 3, 2, 9), Entry(3, False, 45, 7, 34, Usage(1, 0, 1)), Entry(5, True, 0, 9, 56, Usage(1, 0, 1))],
    [Work(3.0, 4, 2, 10)],
]
RECORDS = [record for commit in COMMITS for record in commit]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a journal with COMMITS."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    return write(path, COMMITS)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / "journal"


def write(path: Path, commits: Sequence[Sequence[Record]]) -> bytes:
    with intercepted(no_waiting):
        journal.create(path)
        for commit in commits:
            with Journal(read(path)) as opened:
                opened.append(commit)
    return path.read_bytes()


def read(path: Path) -> Recovered:
    return journal.read(path, errors_apart=True)


def said(found: Recovered) -> tuple[object, ...]:
    """All that a journal says, in a form that can be compared."""
    state = found.state
    finished = {row: row in state.failed for row in range(100) if row in state.finished}
    lines = [list(found.lines(file)) for file in (RESULTS, ERRORS)]
    return finished, state.totals, state.ends, lines, found.end, found.redone, found.last_commit


def expected(records: int) -> tuple[object, ...]:
    """What the first ``records`` of RECORDS say, found in the simplest way."""
    taken = RECORDS[:records]
    redone = max((place for place, record in enumerate(taken) if isinstance(record, Redo)), default=0)
    begins = max((place for place, record in enumerate(taken) if not isinstance(record, Entry)), default=0)
    entries = [record for record in taken if isinstance(record, Entry)]
    standing = [
        record
        for place, record in enumerate(taken)
        if isinstance(record, Entry) and not (record.failed and place < redone)
    ]
    work = next((record for record in reversed(taken) if isinstance(record, Work)), Work(0, 0, 0, 0))
    prompt, cached, generated = (sum(entry.usage[kind] for entry in entries) for kind in range(3))
    failed, void = sum(entry.failed for entry in standing), len(entries) - len(standing)
    totals = Totals(len(standing) - failed, failed, void, prompt, cached, generated, *work)
    lines = [[entry for entry in standing if entry.failed == file] for file in (RESULTS, ERRORS)]
    ends = [sum(entry.length for entry in kept) for kept in lines]
    position = [HEADER_SIZE + place * RECORD_SIZE for place in (records, redone, begins)]
    return {entry.row: entry.failed for entry in standing}, totals, ends, lines, *position


def test_all_that_was_written_is_read(written: bytes, scratch: Path) -> None:
    scratch.write_bytes(written)
    assert said(read(scratch)) == expected(len(RECORDS))
    assert len(written) == HEADER_SIZE + len(RECORDS) * RECORD_SIZE


def test_every_truncation_leaves_the_records_that_are_whole(written: bytes, scratch: Path) -> None:
    for length in range(len(written)):
        scratch.write_bytes(written[:length])
        if length < HEADER_SIZE:
            with pytest.raises(JobError, match="does not begin like a journal"):
                read(scratch)
        else:
            assert said(read(scratch)) == expected((length - HEADER_SIZE) // RECORD_SIZE)


@pytest.mark.parametrize("change", [0x01, 0xFF])
def test_every_changed_byte_ends_the_journal_before_it(written: bytes, scratch: Path, change: int) -> None:
    for place in range(len(written)):
        damaged = bytearray(written)
        damaged[place] ^= change
        scratch.write_bytes(damaged)
        if place < HEADER_SIZE:
            with pytest.raises(JobError, match=r"--restart"):
                read(scratch)
        else:
            assert said(read(scratch)) == expected((place - HEADER_SIZE) // RECORD_SIZE)


@given(st.binary(max_size=3 * RECORD_SIZE), st.integers(0, len(RECORDS)))
def test_nothing_is_read_from_a_tail_of_other_bytes(written: bytes, scratch: Path, tail: bytes, records: int) -> None:
    scratch.write_bytes(written[: HEADER_SIZE + records * RECORD_SIZE] + tail)
    if not written[HEADER_SIZE + records * RECORD_SIZE :].startswith(tail[:RECORD_SIZE]):
        assert said(read(scratch)) == expected(records)


@given(st.permutations(range(len(RECORDS))), st.integers(0, len(RECORDS)))
def test_records_are_good_only_where_they_stand(written: bytes, scratch: Path, order: list[int], count: int) -> None:
    scratch.write_bytes(written[:HEADER_SIZE] + b"".join(nth_record(written, place) for place in order[:count]))
    in_place = next((place for place, was in enumerate(order[:count]) if place != was), count)
    assert said(read(scratch)) == expected(in_place)


def nth_record(written: bytes, place: int) -> bytes:
    return written[HEADER_SIZE + place * RECORD_SIZE :][:RECORD_SIZE]


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_other_files_are_no_journals(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    with pytest.raises(JobError, match="does not begin like a journal"):
        read(scratch)


def test_what_is_appended_after_a_torn_record_is_read(written: bytes, scratch: Path) -> None:
    for torn in range(1, RECORD_SIZE):
        first = sum(map(len, COMMITS[:2]))
        scratch.write_bytes(written[: HEADER_SIZE + first * RECORD_SIZE + torn])
        with intercepted(no_waiting):
            for commit in COMMITS[2:]:
                with Journal(read(scratch)) as opened:
                    opened.append(commit)
        assert scratch.read_bytes() == written


def sealed(*bodies: bytes, version: int = 1) -> bytes:
    """A journal of these bodies, written as the diagram in the module says."""
    header = b"shoaljnl" + struct.pack("<I", version)
    crc = crc32(header)
    data = header + struct.pack("<I", crc)
    for body in bodies:
        crc = crc32(body, crc)
        data += body + struct.pack("<I", crc)
    return data


def row_body(kind: bytes, *fields: int) -> bytes:
    return struct.pack("<4sIQQIIII", kind, *fields)


def test_the_format_is_as_documented(scratch: Path) -> None:
    bodies = [
        struct.pack("<4sIdQQQ", b"WORK", 0, 1.5, 10, 5, 70),
        row_body(b"DONE", 100, 1, 0, 42, 7, 3, 4),
        row_body(b"FAIL", 50, 2, 0, 43, 1, 0, 0),
        struct.pack("<4sIQQQQ", b"REDO", 0, 1, 0, 0, 0),
    ]
    scratch.write_bytes(sealed(*bodies))
    done, failed = Entry(1, False, 0, 100, 42, Usage(7, 3, 4)), Entry(2, True, 0, 50, 43, Usage(1, 0, 0))
    assert write(scratch.with_name("same"), [[Work(1.5, 10, 5, 70), done, failed, Redo(1)]]) == scratch.read_bytes()
    found = read(scratch)
    assert list(found.lines(RESULTS)) == [done]
    assert list(found.lines(ERRORS)) == []
    assert (1 in found.state.finished, 2 in found.state.finished) == (True, False)


@pytest.mark.parametrize(
    ("bodies", "reason"),
    [
        ([row_body(b"DONE", 10, 1, 0, 0, 0, 0, 0)] * 2, "byte 60 contradicts"),
        ([row_body(b"DONE", 10, 1, 1, 0, 0, 0, 0)], "byte 16 contradicts"),
        ([row_body(b"DONE", 10, 1, 0, 0, 0, 0, 0), row_body(b"FAIL", 10, 1, 0, 0, 0, 0, 0)], "byte 60 contradicts"),
        ([row_body(b"DONE", 10, 1, 0, 0, 0, 0, 0), row_body(b"FAIL", 10, 2, 10, 0, 0, 0, 0)], "byte 60 contradicts"),
        ([row_body(b"MORE", 10, 1, 0, 0, 0, 0, 0)], "unknown kind, b'MORE'"),
    ],
    ids=["row twice", "gap", "row done and failed", "errors with the results", "kind"],
)
def test_sound_records_that_make_no_sense_are_refused(scratch: Path, bodies: list[bytes], reason: str) -> None:
    scratch.write_bytes(sealed(*bodies))
    with pytest.raises(JobError, match=reason):
        read(scratch)


def test_another_version_is_refused(scratch: Path) -> None:
    scratch.write_bytes(sealed(version=2))
    with pytest.raises(JobError, match="version 2, this shoal reads version 1"):
        read(scratch)


def test_creating_replaces_what_is_there(written: bytes, scratch: Path) -> None:
    scratch.write_bytes(written)
    with intercepted(no_waiting):
        journal.create(scratch)
    assert scratch.read_bytes() == sealed()
    assert said(read(scratch)) == expected(0)
