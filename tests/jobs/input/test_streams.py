"""Input files as bytes: every way they are compressed, every place where they can be cut, bounded memory."""

from __future__ import annotations

import io
import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.jobs.input.rows import MAX_LINE_BYTES, LineReader
from shoal.jobs.input.streams import compression_of, is_known, open_stream, table_format
from tests.jobs.compress import COMPRESS

TEXT = b"".join(b"line %d\n" % number for number in range(2000))


def contents(path: Path) -> bytes:
    with open_stream(path) as stream:
        data = b"".join(iter(lambda: stream.readline(1000), b""))
        assert stream.bytes_read == path.stat().st_size
    return data


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_is_decompressed_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in.jsonl{suffix.upper()}"
    path.write_bytes(COMPRESS[suffix](TEXT))
    assert contents(path) == TEXT


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_streams_one_after_the_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    path.write_bytes(b"".join(COMPRESS[suffix](part) for part in (TEXT[:7], b"", TEXT[7:9000], TEXT[9000:])))
    assert contents(path) == TEXT


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@given(data=st.data())
def test_compressed_data_that_is_cut_is_named_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    whole = COMPRESS[suffix](TEXT)
    path = tmp_path_factory.mktemp("cut") / f"in{suffix}"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(JobError, match=rf"in\{suffix}: (cannot be read on at about byte \d+|is empty|this is)"):
        contents(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_data_and_data_of_another_kind_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESS[suffix](TEXT)
    path = tmp_path / f"in{suffix}"
    for damaged in (whole + b"rubbish", whole[:5] + b"\xff" * 20 + whole[25:]):
        path.write_bytes(damaged)
        with pytest.raises(JobError, match="cannot be read on at about byte"):
            contents(path)
    other = {".gz": ".zst", ".zst": ".gz"}[suffix]
    for foreign, says in (
        (TEXT, f"not compressed, though its name ends in {suffix}"),
        (COMPRESS[other](TEXT), f"name it {other}"),
    ):
        path.write_bytes(foreign)
        with pytest.raises(JobError, match=says):
            contents(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_head_stays_to_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    path.write_bytes(COMPRESS[suffix](TEXT))
    with open_stream(path) as stream:
        head = stream.head()
        assert len(head) > 1000
        assert TEXT.startswith(head)
        assert stream.head() == head
        assert stream.readline(100) == b"line 0\n"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_line_that_expands_to_more_than_the_limit_is_not_held(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(
        COMPRESS[suffix](b"{}\n") + COMPRESS[suffix](b"x" * MAX_LINE_BYTES) * 8 + COMPRESS[suffix](b"\n[]\n")
    )
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        with open_stream(path) as stream:
            lines = list(LineReader(stream))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(line.number, line.data) for line in lines] == [(1, b"{}\n"), (2, None), (3, b"[]\n")]
    assert peak < 3 * MAX_LINE_BYTES


def test_a_pipe_has_no_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "wb") as end:
        end.write(b"a\nb")
        end.close()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        with open_stream(Path("-")) as stream:
            assert (stream.readline(100), stream.readline(100), stream.bytes_read) == (b"a\n", b"b", 0)


def test_stdin_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(JobError, match="stdin is closed"), open_stream(Path("-")):
        pass


def test_stdin_from_a_file_has_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"a\nb\n")
    with open(tmp_path / "in", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with open_stream(Path("-")) as stream:
            assert (stream.readline(100), stream.bytes_read) == (b"a\n", 2)


@pytest.mark.parametrize(
    ("name", "table", "compression"),
    [
        ("a.jsonl", None, ""),
        ("a", None, ""),
        ("-", None, ""),
        ("a.csv", "csv", ""),
        ("A.CSV.GZ", "csv", ".gz"),
        ("a.csv.zst", "csv", ".zst"),
        ("a.csv.jsonl", None, ""),
        ("a.b.parquet", "parquet", ""),
        ("a.gz", None, ".gz"),
        ("folder.csv/a", None, ""),
    ],
)
def test_names_say_what_files_are(name: str, table: str | None, compression: str) -> None:
    assert (table_format(Path(name)), compression_of(Path(name))) == (table, compression)


def test_parquet_in_another_compression_is_refused() -> None:
    with pytest.raises(JobError, match=r"a\.parquet\.gz: Parquet is compressed inside"):
        table_format(Path("a.parquet.gz"))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("a.jsonl", True),
        ("a.JSONL.GZ", True),
        ("a.ndjson.zst", True),
        ("a.json", True),
        ("a.b.csv", True),
        ("part-0.parquet", True),
        (".a.jsonl", False),
        ("_SUCCESS", False),
        ("a.txt", False),
        ("a.jsonl.tmp", False),
        ("a.zst", False),
    ],
)
def test_which_files_of_a_folder_are_inputs(name: str, known: bool) -> None:
    assert is_known(name) is known
