"""One door to all inputs: the same rows, whatever they are kept in."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.jobs.input.rows import BadRow, EmbeddingRow, Line, Row, RowReader
from shoal.jobs.input.source import open_source
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
