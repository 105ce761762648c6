"""Files of other kinds are named by what they begin with; a file that may have a good row is none of them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.jobs.input.kinds import HEAD_BYTES, refuse_foreign
from shoal.jobs.input.source import open_source
from tests.jobs.compress import COMPRESS
from tests.support.tiny_model import write_tiny_model

ROWS: list[dict[str, Any]] = [
    {"custom_id": f"q{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"Item {i}"}}
    for i in range(3)
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
TABLE = b"id,prompt\n1,Caf\xc3\xa9 is\n"


def refusal(head: bytes, table: str | None = None) -> str | None:
    """What is said of a file that begins so, if anything."""
    try:
        refuse_foreign(Path("in"), head[:HEAD_BYTES], table)
    except JobError as error:
        return str(error).removeprefix("in: ")
    return None


def tar(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("in.jsonl")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


def parquet(data: bytes) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"]}), file)
    return file.getvalue()


def feather(data: bytes) -> bytes:
    pa, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    file = io.BytesIO()
    feather.write_feather(pa.table({"prompt": ["a"]}), file)
    return file.getvalue()


BINARY: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "UTF-16": (lambda data: data.decode().encode("utf-16"), "text in UTF-16"),
    "UTF-16 big": (lambda data: "\ufeff".encode("utf-16-be") + data.decode().encode("utf-16-be"), "text in UTF-16"),
    "UTF-16 without mark": (lambda data: data.decode().encode("utf-16-le"), "text in UTF-16"),
    "UTF-16 big without mark": (lambda data: data.decode().encode("utf-16-be"), "text in UTF-16"),
    "UTF-32": (lambda data: data.decode().encode("utf-32"), "text in UTF-32"),
    "UTF-32 big without mark": (lambda data: data.decode().encode("utf-32-be"), "text in UTF-32"),
    "UTF-32 without mark": (lambda data: data.decode().encode("utf-32-le"), "text in UTF-32"),
    "gzip": (gzip.compress, "gzip data"),
    "zstd": (COMPRESS[".zst"], "Zstandard data"),
    "xz": (lzma.compress, "xz data"),
    "bz2": (bz2.compress, "bzip2 data"),
    "bz2 fast": (lambda data: bz2.compress(data, 1), "bzip2 data"),
    "lz4": (lambda data: b"\x04\x22\x4d\x18\x64\x40\xa7" + data, "lz4 data"),
    "tar": (tar, "a tar archive"),
    "zip": (lambda data: zipped("in.jsonl", data), "a zip file"),
    "xlsx": (lambda data: zipped("[Content_Types].xml", data), "an Excel or other Office file"),
    "xls": (lambda data: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "an old Office file"),
    "parquet": (parquet, "a Parquet file"),
    "feather": (feather, "an Arrow (Feather) file"),
    "avro": (lambda data: b"Obj\x01\x04\x14avro.codec", "an Avro file"),
    "PDF": (lambda data: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
    "HTML": (lambda data: b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "an HTML page"),
    "zeros": (lambda data: bytes(100_000), "binary data"),
}


@pytest.mark.parametrize("kind", BINARY)
@pytest.mark.parametrize("table", [None, "csv"])
def test_what_is_no_text_is_named(kind: str, table: str | None) -> None:
    make, what = BINARY[kind]
    said = refusal(make(LINES if table is None else TABLE), table)
    assert said is not None
    assert said.startswith(f"this is {what}")
    assert f", not {table.upper() if table else 'JSON lines'}: " in said


def test_an_sqlite_database_and_a_model_are_named(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("CREATE TABLE requests (prompt TEXT)")
    db.close()
    assert "an SQLite database" in str(refusal((tmp_path / "db").read_bytes()))
    model = write_tiny_model(tmp_path / "m.gguf").read_bytes()
    assert refusal(model) == "this is a GGUF model, not JSON lines: give it with --model"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (json.dumps(ROWS).encode(), "a JSON array"),
        (json.dumps(ROWS, indent=2).encode(), "a JSON array"),
        (b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(), "a JSON array"),
        (b"[\n" + b",\n".join(LINES.splitlines()) + b"\n]\n", "a JSON array"),
        (b"[" + b",\n".join(LINES.splitlines()) + b"]\n", "a JSON array"),
        (json.dumps(ROWS * 1000).encode(), "a JSON array"),
        (b"[]", "a JSON array"),
        (json.dumps(ROWS[0], indent=2).encode(), "JSON with an object over several lines"),
        (b"".join(json.dumps(row, indent="\t").encode() + b"\n" for row in ROWS), "JSON with an object over several"),
        (json.dumps({"data": ROWS * 1000}, indent=1).encode(), "JSON with an object over several lines"),
        (b'{\n"messages": [\n{"role": "user", "content": "x"}\n]\n}\n', "JSON with an object over several lines"),
        (TABLE, "a table, not JSON lines: name it .csv"),
        (b'"prompt";"n"\r\n"x";1\r\n', "a table"),
        (b"What is the capital of Italy?\nAnd of France?\n", "text whose first lines are no JSON objects"),
        (b"prompt: x\n", "text whose first lines are no JSON objects"),
        (b"null\n", "text whose first lines are no JSON objects"),
        (b"\x80\x04\x95\x00\x00\x01\x94.", "binary data"),
        (b"", "is empty"),
    ],
)
def test_text_without_a_row_is_named(text: bytes, what: str) -> None:
    assert what in str(refusal(text))


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        b"\xef\xbb\xbf" + LINES,
        b"\xef\xbb\xbf\xef\xbb\xbf\n",
        b" \n",
        b"\n \n" + LINES,
        b"{}",
        b'{"prompt": "x"}',
        b'{"prompt": "x", "n": 1\n{"prompt": "y"}\n',
        b'{"prompt": "' + b"x" * 100_000,
        b"not json\n" * 5 + LINES,
        b"not json\n" + LINES[:-1],
        b"[]\n" + LINES,
        b'[{"prompt": "x"}]\n' + LINES,
        b"\xff\xe9\n" + LINES,
        b'{"prompt": "\xff"}\n',
        b"a\x00b\n" + LINES,
        b"id,prompt\n" + LINES,
    ],
)
def test_a_file_that_may_have_a_good_row_is_read(text: bytes) -> None:
    assert refusal(text) is None


@given(st.binary(max_size=300), st.integers(0, 5))
def test_a_good_line_in_the_head_is_enough(before: bytes, after: int) -> None:
    """Unless the file has marks of its own: those of text in UTF-16 or binary data, the beginning of an array or an object."""
    before = b"x" + before.replace(b"\x00", b"") + b"\n"
    assert refusal(before + LINES * after) is None or after == 0


@pytest.mark.parametrize(
    "text", [TABLE, b"prompt\n", b"[1],prompt\n", b'"{",prompt\n', b"PAR1,prompt\n", b"a\x00b,prompt\n"]
)
def test_a_table_is_read(text: bytes) -> None:
    assert refusal(text, "csv") is None


@pytest.mark.parametrize("text", [LINES, json.dumps(ROWS, indent=2).encode()])
def test_json_is_no_table(text: bytes) -> None:
    assert str(refusal(text, "csv")).startswith("this is JSON, not CSV")


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("in.jsonl", gzip.compress, "this is gzip data, not JSON lines: name it .gz"),
        ("in.jsonl.gz", COMPRESS[".zst"], "this is Zstandard data, though its name ends in .gz: name it .zst"),
        ("in.jsonl.zst", bytes, "this is not compressed, though its name ends in .zst: leave .zst away"),
        ("in.jsonl.gz", lambda data: gzip.compress(lzma.compress(data)), "this is xz data"),
        ("in.csv.gz", lambda data: gzip.compress("id,prompt".encode("utf-16")), "this is text in UTF-16, not CSV"),
        ("in.jsonl", parquet, "this is a Parquet file, not JSON lines: name it .parquet"),
        ("in.csv", parquet, "this is a Parquet file, not CSV: name it .parquet"),
        ("in.parquet", bytes, "this is something else, not Parquet: such a file begins with PAR1"),
        (
            "in.parquet",
            lambda data: zipped("xl/workbook.xml", data),
            "this is an Excel or other Office file, not Parquet",
        ),
    ],
)
def test_a_name_that_lies_is_told_from_what_is_in_the_file(
    tmp_path: Path, name: str, make: Callable[[bytes], bytes], says: str
) -> None:
    (tmp_path / name).write_bytes(make(LINES))
    with pytest.raises(JobError) as caught, open_source(tmp_path / name):
        pass
    assert str(caught.value).startswith(f"{tmp_path / name}: {says}")
