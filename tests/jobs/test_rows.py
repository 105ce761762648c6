"""Lines of a batch file: split one at a time, and every kind of bad one refused alone."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.jobs.rows import MAX_CUSTOM_ID, BadRow, Line, LineReader, Row, RowReader
from shoal.openai.schema import APIError

GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"}}


def line(value: Any = None, **changes: Any) -> bytes:
    """A line with some keys of a good one changed; None leaves a key out."""
    fields = {name: item for name, item in {**GOOD, **changes}.items() if item is not None}
    return json.dumps(fields if value is None else value).encode()


def read(data: bytes | None, reader: RowReader | None = None) -> Row | BadRow:
    return (reader or RowReader(["tiny"])).read(Line(3, data))


def refused(data: bytes | None) -> BadRow:
    row = read(data)
    assert isinstance(row, BadRow)
    assert row.line == 3
    return row


# Lines ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")), max_size=12), st.booleans())
def test_lines_are_those_of_the_file_in_order(lines: list[bytes], ends: bool) -> None:
    limit = 12
    data = b"\n".join(lines) + b"\n" * ends
    expected = []
    for number, text in enumerate(data.split(b"\n"), start=1):
        text = text.removeprefix(b"\xef\xbb\xbf") if number == 1 and len(text) <= limit else text
        if len(text) > limit:
            expected.append(Line(number, None))
        elif text.strip():
            expected.append(Line(number, text))
    reader = LineReader(io.BytesIO(data), limit=limit)
    found = [Line(item.number, item.data and item.data.removesuffix(b"\n")) for item in reader]
    assert found == expected
    assert reader.bytes_read == len(data)


def test_the_limit_is_the_length_of_a_line_without_its_end() -> None:
    for data in (b"x" * 10, b"x" * 10 + b"\n"):
        assert [item.data for item in LineReader(io.BytesIO(data), limit=10)] == [data]
    for data in (b"x" * 11, b"x" * 11 + b"\n", b"x" * 5000 + b"\n"):
        assert [item.data for item in LineReader(io.BytesIO(data + b"\n"), limit=10)] == [None]


def test_byte_order_mark_line_ends_and_blank_lines_are_passed_over() -> None:
    lines = list(LineReader(io.BytesIO(b"\xef\xbb\xbf1\r\n\n \t\r\n2")))
    assert lines == [Line(1, b"1\r\n"), Line(4, b"2")]


# Rows -----------------------------------------------------------------------------------------------------------------


def test_a_good_row() -> None:
    row = read(line())
    assert isinstance(row, Row)
    assert (row.line, row.custom_id, row.call.prompt) == (3, "a", "hi")
    chat = read(line(url="/v1/chat/completions", body={"messages": [{"role": "user", "content": "x"}]}))
    assert isinstance(chat, Row)
    assert chat.call.kind == "chat"


@pytest.mark.parametrize(
    ("data", "custom_id", "param"),
    [
        (None, None, None),
        (b"not json", None, None),
        (b'{"custom_id": "a"', None, None),
        (b"\xff\xfe", None, None),
        (b"[" * 100_000, None, None),
        (line([]), None, None),
        (line("text"), None, None),
        (line(custom_id=None), None, "custom_id"),
        (line(custom_id=5), None, "custom_id"),
        (line(custom_id=""), None, "custom_id"),
        (line(custom_id="x" * (MAX_CUSTOM_ID + 1)), None, "custom_id"),
        (line(custom_id="\ud800"), None, "custom_id"),
        (line(method=None), "a", "method"),
        (line(method="GET"), "a", "method"),
        (line(url=None), "a", "url"),
        (line(url="/v1/embeddings"), "a", "url"),
        (line(url=["/v1/completions"]), "a", "url"),
        (line(body=None), "a", None),
        (line(body=[]), "a", None),
        (line(body="x"), "a", None),
        (line(body={}), "a", "prompt"),
        (line(body={"prompt": "x", "n": 2}), "a", "n"),
        (line(body={"prompt": "x", "temperature": float("nan")}), "a", "temperature"),
        (line(extra=1), "a", "extra"),
    ],
)
def test_a_bad_row_is_refused_with_what_is_known_of_it(
    data: bytes | None, custom_id: str | None, param: str | None
) -> None:
    row = refused(data)
    assert (row.custom_id, row.error.param, row.error.status) == (custom_id, param, 400)


def test_a_model_that_is_not_served() -> None:
    assert isinstance(read(line(body={"prompt": "x", "model": "tiny"})), Row)
    assert refused(line(body={"prompt": "x", "model": "other"})).error.status == 404


def test_a_custom_id_may_occur_once() -> None:
    reader = RowReader(["tiny"])
    assert isinstance(read(line(), reader), Row)
    assert isinstance(read(line(custom_id="b"), reader), Row)
    again = read(line(), reader)
    assert isinstance(again, BadRow)
    assert (again.custom_id, again.error.param) == ("a", "custom_id")


@given(st.binary(max_size=80) | st.dictionaries(st.sampled_from(sorted(GOOD)), st.text() | st.none()).map(line))
def test_any_line_is_a_row_or_a_refusal(data: bytes) -> None:
    row = read(data)
    assert isinstance(row, Row) or isinstance(row.error, APIError)
