"""One door to all inputs: the same rows, whatever they are kept in."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.rows import BadRow, EmbeddingRow, Line, Row, RowReader
from shoal.jobs.input.source import open_inputs, open_source
from tests.jobs.compress import COMPRESS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PROMPTS = ["Hello", 'two\n"lines", \u00e9', "", "last"]


def inputs() -> Iterator[tuple[str, bytes]]:
    """The same prompts in every kind of file."""
    jsonl = b"".join(json.dumps({"prompt": prompt}).encode() + b"\n" for prompt in PROMPTS)
    text, table = io.StringIO(), io.BytesIO()
    csv.writer(text).writerows([["id", "prompt"], *([i, prompt] for i, prompt in enumerate(PROMPTS))])
    pq.write_table(pa.table({"prompt": PROMPTS}), table)
    yield "in.parquet", table.getvalue()
    for name, data in (("in.jsonl", jsonl), ("in.csv", text.getvalue().encode())):
        yield from ((name + suffix, compress(data)) for suffix, compress in COMPRESS.items())


def read(path: Path, column: str | None = None) -> list[Line]:
    with open_source(path, column) as source:
        return list(source)


@pytest.mark.parametrize(("name", "data"), list(inputs()), ids=lambda item: item if isinstance(item, str) else "")
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    lines = read(tmp_path / name)
    assert [json.loads(line.data or b"") for line in lines] == [{"prompt": prompt} for prompt in PROMPTS]
    rows = [RowReader([]).read(line) for line in lines]
    assert [row.custom_id for row in rows] == ["row-1", "row-2", "row-3", "row-4"]
    found = [
        row.call.prompt if isinstance(row, Row) else row.error.param
        for row in rows
        if not isinstance(row, EmbeddingRow)
    ]
    assert found == [
        *PROMPTS[:2],
        "prompt",
        "last",
    ]
    assert read(tmp_path / name) == lines


def test_the_prompt_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("question;answer\nWhy?;So\n")
    pq.write_table(pa.table({"question": ["Why?"]}), tmp_path / "in.parquet")
    for name in ("in.csv", "in.parquet"):
        assert read(tmp_path / name, "question") == [Line(1, b'{"prompt":"Why?"}')]
        with pytest.raises(JobError, match=r"'prompt'|'messages'"), open_source(tmp_path / name):
            pass
    (tmp_path / "in.jsonl").write_text("{}\n")
    with (
        pytest.raises(JobError, match=r"only .csv and .parquet files are tables"),
        open_source(tmp_path / "in.jsonl", "x"),
    ):
        pass


def test_bad_records_of_a_table_become_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"id,prompt\n1,good\n2\n3,\xff\n4,\n5,also good\n")
    rows = [RowReader([]).read(line) for line in read(tmp_path / "in.csv")]
    assert [(row.line, isinstance(row, BadRow)) for row in rows] == [
        (1, False),
        (2, True),
        (3, True),
        (4, True),
        (5, False),
    ]


def test_damage_is_found_while_it_is_read(tmp_path: Path) -> None:
    data = b"".join(b'{"prompt": "%d"}\n' % number for number in range(50_000))
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(data)[:-20_000])
    numbers: list[int] = []
    with (
        pytest.raises(JobError, match=r"in\.jsonl\.gz: cannot be read on at about byte"),
        open_source(tmp_path / "in.jsonl.gz") as source,
    ):
        numbers.extend(line.number for line in source)
    assert len(numbers) > 1000


# Several files --------------------------------------------------------------------------------------------------------


def write_kinds(folder: Path) -> None:
    """The same prompts in every kind of file; between them files without rows."""
    for name, data in inputs():
        (folder / name).write_bytes(data)
    for name in ("in.json", "in2.csv", "z.ndjson"):
        (folder / name).write_bytes(b"")
    (folder / "blank.jsonl").write_bytes(b"\n\n")


def test_rows_of_several_files_are_numbered_on(tmp_path: Path) -> None:
    write_kinds(tmp_path)
    each = [read(path) for path in sorted(tmp_path.iterdir()) if path.suffix != ".ndjson" and path.stat().st_size]
    with open_inputs(Inputs.of(tmp_path)) as source:
        lines = list(source)
    assert [line.number for line in lines] == list(range(1, 4 * 7 + 1))
    assert [line.data for line in lines] == [line.data for lines in each for line in lines]
    assert [RowReader([]).read(line).custom_id for line in lines[-2:]] == ["row-27", "row-28"]


def test_the_place_of_a_row_is_its_file_and_its_line_there(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, data in {"a": b"{}\n{}\n\n", "b": b"", "c": b"\n{}\n\n{}", "sub/d": b"{}\n"}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(data)
    with open_inputs(Inputs.of(tmp_path / "**" / "*.jsonl")) as source:
        places = [(line.number, source.place(line.number)) for line in source]
        again = [(number, source.place(number)) for number, _ in places]
    assert places == again
    assert places == [
        (1, "a.jsonl, line 1"),
        (2, "a.jsonl, line 2"),
        (4, "c.jsonl, line 2"),
        (6, "c.jsonl, line 4"),
        (7, "sub/d.jsonl, line 1"),
    ]


def test_one_file_has_no_places(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    with open_inputs(Inputs.of(tmp_path)) as source:
        assert [(line.number, source.place(line.number)) for line in source] == [(1, "")]
        assert source.ends is None


def test_files_that_were_counted_end_there_and_keep_their_numbers(tmp_path: Path) -> None:
    for name, data in {"a": b"{}\n\n{}\n\n", "b": b"", "c": b"{}\n{}\n{}\n", "d": b"{}\n"}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(data)
    with open_inputs(Inputs.of(tmp_path)) as source:
        before = [(line.number, line.data) for line in source]
    assert source.ends == [3, 3, 6, 7]
    for name in "abd":
        with (tmp_path / f"{name}.jsonl").open("ab") as file:
            file.write(b"{}\n{}\n")
    (tmp_path / "c.jsonl").write_bytes(b"{}\n")
    with open_inputs(Inputs.of(tmp_path), counted=source.ends) as again:
        lines = list(again)
    assert [(line.number, line.data) for line in lines] == [pair for pair in before if pair[0] not in (5, 6)]
    assert again.place(7) == lines[-1].place == "d.jsonl, line 1"
    assert again.ends == source.ends


@pytest.mark.parametrize("data", [b"", b"PAR1"])
def test_a_broken_table_among_others_is_named(tmp_path: Path, data: bytes) -> None:
    write_kinds(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(data)
    with open_inputs(Inputs.of(tmp_path)) as source, pytest.raises(JobError, match=r"broken\.parquet: "):
        list(source)


def test_one_file_is_open_at_a_time(tmp_path: Path) -> None:
    """More files than a process may open; those that were read to their end, or given up, are closed."""
    for number in range(3000):
        (tmp_path / f"{number:04}.jsonl").write_bytes(b"{}\n" * 2)
    tracemalloc.start()
    try:
        with open_inputs(Inputs.of(tmp_path)) as source:
            assert sum(1 for _ in source) == 6000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6
    assert open_files(tmp_path) == 0


def open_files(folder: Path) -> int:
    """Those of this process that are in a folder."""
    entries = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
    return sum(entry.startswith(f"{folder}/") for entry in entries)


def test_a_source_that_is_given_up_leaves_no_file_open(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(b"{}\n" * 2)
    with open_inputs(Inputs.of(tmp_path)) as source:
        lines = iter(source)
        numbers = [next(lines).number for _ in range(3)]
        assert open_files(tmp_path) == 1
    assert open_files(tmp_path) == 0
    assert numbers == [1, 2, 3]
