"""JSON that is hostile, and the error object."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.openai.schema import APIError, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_what_python_writes_is_read_as_it_was(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_one_refusal(data: bytes) -> None:
    try:
        value = parse_json(data)
    except APIError:
        return
    assert repr(value) == repr(json.loads(data.decode()))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "Expecting value at character 0"),
        (b'{"a": 1', "at character 7"),
        (b"{} {}", "Extra data at character 3"),
        (b'{"a": \xff}', "not valid UTF-8 at byte 6"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"1" * 10_000, "thousands of digits"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(APIError) as caught:
        parse_json(data)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 100


def test_numbers_and_text_that_json_cannot_hold_pass_for_the_field_check() -> None:
    value = parse_json(b'{"a": NaN, "b": -Infinity, "c": 1e999, "d": "\\ud800"}')
    assert repr(value) == r"{'a': nan, 'b': -inf, 'c': inf, 'd': '\ud800'}"


def test_the_error_object() -> None:
    error = APIError("seed: no", "seed")
    body = json.loads(msgspec.json.encode(error.body()))
    assert body == {"error": {"message": "seed: no", "type": "invalid_request_error", "param": "seed", "code": None}}
    assert json.loads(msgspec.json.encode(error.body(line=7)))["error"]["line"] == 7


def test_an_error_that_quotes_its_cause_can_always_be_sent() -> None:
    error = APIError("\ud800" * 1000, "\udfff")
    body = json.loads(msgspec.json.encode(error.body()))["error"]
    assert body["param"] == "\\udfff"
    assert len(body["message"]) == 500
