"""Parquet: prompts of every text type and conversations, read in bounded memory; schemas that stay as they were."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import JobError
from shoal.jobs.input.parquet_table import ParquetTable

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]


def write(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    pq.write_table(pa.table(columns), path, **how)
    return path


def rows(path: Path, column: str | None = None) -> list[Any]:
    """The decoded rows; of a bad one, what is said of it."""
    lines = list(ParquetTable(path).lines(column))
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    return [line.error if line.data is None else json.loads(line.data) for line in lines]


def texts(kind: Any, values: Sequence[str | None] = ("a", "\u00e9\0\n", "", None)) -> Any:
    return pa.array(values, kind)


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_prompts_of_every_text_type(tmp_path: Path, kind: Any) -> None:
    path = write(tmp_path / "in.parquet", {"id": [1, 2, 3, 4], "prompt": texts(pa.string()).cast(kind)})
    assert rows(path) == [{"prompt": "a"}, {"prompt": "\u00e9\0\n"}, {"prompt": ""}, {"prompt": None}]


def test_conversations_are_used_where_there_is_no_prompt(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    column = pa.array([TALK, [], None], pa.list_(message))
    path = write(tmp_path / "in.parquet", {"messages": column})
    named = [{**message, "name": None} for message in TALK]
    assert rows(path) == [{"messages": named}, {"messages": []}, {"messages": None}]
    both = write(tmp_path / "both.parquet", {"messages": column, "prompt": ["a", "b", "c"], "text": ["d", "e", "f"]})
    assert rows(both) == [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    assert rows(both, "text") == [{"prompt": "d"}, {"prompt": "e"}, {"prompt": "f"}]
    assert rows(both, "messages") == rows(path)


def test_a_cell_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff", b"also good"], pa.binary()).view(pa.string())
    found = rows(write(tmp_path / "in.parquet", {"prompt": column}))
    assert found[::2] == [{"prompt": "good"}, {"prompt": "also good"}]
    assert found[1].startswith("the cell cannot be read: 'utf-8' codec can't decode byte 0xff")


def test_a_row_above_the_limit_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.input.parquet_table.MAX_LINE_BYTES", 30)
    path = write(tmp_path / "in.parquet", {"prompt": ["x" * 17, "x" * 18, "a"]})
    assert rows(path) == [{"prompt": "x" * 17}, "the row is longer than 30 bytes", {"prompt": "a"}]


@pytest.mark.parametrize(
    ("columns", "column", "says"),
    [
        ({"text": ["a"]}, None, "the prompt column 'messages' is not in the table: .'text'."),
        ({"prompt": ["a"]}, "text", "the prompt column 'text' is not in the table"),
        ({"prompt": [1]}, None, "the prompt column 'prompt' holds int64; it must be texts or messages"),
        ({"messages": [["a"]]}, None, "the prompt column 'messages' holds list<.*>; it must be"),
        ({"messages": [[{"role": "user"}]]}, None, "the prompt column 'messages' holds list<.*>; it must be"),
    ],
)
def test_a_column_that_cannot_hold_prompts_is_refused(
    tmp_path: Path, columns: dict[str, Any], column: str | None, says: str
) -> None:
    path = write(tmp_path / "in.parquet", columns)
    with pytest.raises(JobError, match=r"in\.parquet: " + says):
        ParquetTable(path).lines(column)


def test_what_is_no_parquet_or_damaged_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", {"prompt": [f"{number} " * 50 for number in range(5000)]}, compression="gzip")
    whole = path.read_bytes()
    for data in (b"PAR1", whole[:-9], whole[:200]):
        path.write_bytes(data)
        with pytest.raises(JobError, match=r"in\.parquet: Parquet cannot be read after row 0: "):
            ParquetTable(path)
    for data, says in (
        (b"", "is empty"),
        (b"prompt\na\n", "something else, not Parquet: such"),
        (gzip.compress(whole), "gzip data, not Parquet"),
    ):
        path.write_bytes(data)
        with pytest.raises(JobError, match=says):
            ParquetTable(path)
    for data in (whole[:1000] + b"\xff" * 1000 + whole[2000:], b"PAR1" + whole[len(whole) // 2 :]):
        path.write_bytes(data)
        with pytest.raises(JobError, match=r"in\.parquet: Parquet cannot be read after row \d+: "):
            rows(path)


def test_pyarrow_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.parquet", {"prompt": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(JobError, match=r"pip install 'shoal\[parquet\]'"):
        ParquetTable(path)


def test_a_row_group_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    prompts = [f"{number} ".ljust(20_000, "x") for number in range(4000)]
    write(path, {"prompt": prompts}, use_dictionary=False, row_group_size=4000)
    before = pa.total_allocated_bytes()
    table = ParquetTable(path)
    most = 0
    for line in table.lines(None):
        assert line.data is not None
        assert json.loads(line.data)["prompt"] == prompts[line.number - 1]
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 30e6 < 4000 * 20_000


# One column more ------------------------------------------------------------------------------------------------------


def extended(path: Path, answers: dict[int, str]) -> Any:
    target = io.BytesIO()
    ParquetTable(path).write_extended(answers.get, target, "output")
    return pq.read_table(io.BytesIO(target.getvalue()))


def test_an_extended_table_keeps_schema_types_and_metadata(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": texts(pa.dictionary(pa.int32(), pa.string()), ["a", "b", "a", None]),
            "when": pa.array([1, 2, None, 4], pa.timestamp("ns", "UTC")),
            "talk": pa.array([TALK, None, [], TALK]),
            "price": pa.array([1, 2, 3, 4]).cast(pa.decimal128(30, 2)),
            "data": pa.array([b"\0", b"\xff", None, b""], pa.large_binary()),
        }
    ).replace_schema_metadata({b"made": b"by hand"})
    path = tmp_path / "in.parquet"
    pq.write_table(table, path, row_group_size=3)
    found = extended(path, {1: "one", 3: ""})
    assert found.column("output").to_pylist() == ["one", None, "", None]
    assert found.drop_columns(["output"]).equals(table.combine_chunks())
    assert found.schema.remove(5).equals(pq.read_schema(path), check_metadata=True)


def test_an_extended_table_has_row_groups_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.input.parquet_table._GROUP_BYTES", 100_000)
    path = write(tmp_path / "in.parquet", {"prompt": ["x" * 100] * 3000})
    target = io.BytesIO()
    ParquetTable(path).write_extended(str, target, "output")
    file = pq.ParquetFile(io.BytesIO(target.getvalue()))
    assert file.read().column("output").to_pylist() == [str(number) for number in range(1, 3001)]
    assert 3 <= file.num_row_groups <= 6


def test_an_empty_table_stays_one(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", {"prompt": pa.array([], pa.string())})
    assert rows(path) == []
    found = extended(path, {})
    assert (found.num_rows, found.column_names) == (0, ["prompt", "output"])
