"""Which files are batch files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.server.store.batches import BatchError
from shoal.server.store.validation import MOST_ERRORS, check_rows

ENDPOINT = "/v1/completions"


def line(name: Any = "a", **fields: Any) -> bytes:
    row = {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": {"prompt": "x"}, **fields}
    return json.dumps({key: value for key, value in row.items() if value != "gone"}).encode() + b"\n"


def check(tmp_path: Path, data: bytes) -> tuple[int, list[BatchError]]:
    path = tmp_path / "input.jsonl"
    path.write_bytes(data)
    found = check_rows(path, ENDPOINT, tmp_path / "ids")
    assert not (tmp_path / "ids").exists()
    return found


def test_good_rows_are_counted(tmp_path: Path) -> None:
    assert check(tmp_path, line("a") + b"\n" + line("b") + line("c", body={"no_such_field": 1})) == (3, [])


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{nonsense\n", "invalid_json_line", None),
        (b"[]\n", "invalid_json_line", None),
        (line("gone"), "missing_required_parameter", "custom_id"),
        (line(method="gone"), "missing_required_parameter", "method"),
        (line(body="gone"), "missing_required_parameter", "body"),
        (b'{"prompt": "a plain row"}\n', "missing_required_parameter", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/chat/completions"), "invalid_url", "url"),
        (line(5), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line("first"), "duplicate_custom_id", "custom_id"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, code: str, param: str | None) -> None:
    rows, errors = check(tmp_path, line("first") + bad + line("last"))
    assert rows == 3
    assert [(error.code, error.param, error.line) for error in errors] == [(code, param, 2)]


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "empty_file"), (b"\n\n", "empty_file"), (b"PK\x03\x04....", "invalid_file"), (b"hello\n", "invalid_file")],
)
def test_files_of_other_kinds(tmp_path: Path, data: bytes, code: str) -> None:
    _, errors = check(tmp_path, data)
    assert [error.code for error in errors] == [code]
    assert str(tmp_path) not in errors[0].message


def test_there_are_not_more_errors_than_anybody_reads(tmp_path: Path) -> None:
    _, errors = check(tmp_path, line("same") * (MOST_ERRORS + 50))
    assert len(errors) == MOST_ERRORS
