"""Rows of both kinds: split off one at a time, named, completed by defaults, and every kind of bad one refused alone."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.jobs.input.rows import (
    MAX_CUSTOM_ID,
    AnyRow,
    BadRow,
    ChatSettings,
    Line,
    LineReader,
    Row,
    RowReader,
    custom_id_of,
)
from shoal.openai.schema import APIError

GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"}}


def line(value: Any = None, **changes: Any) -> bytes:
    """A line with some keys of a good one changed; None leaves a key out."""
    fields = {name: item for name, item in {**GOOD, **changes}.items() if item is not None}
    return json.dumps(fields if value is None else value).encode()


def read(data: bytes | None, reader: RowReader | None = None) -> AnyRow:
    return (reader or RowReader(["tiny"])).read(Line(3, data))


def accepted(data: bytes, reader: RowReader | None = None) -> Row:
    row = read(data, reader)
    assert isinstance(row, Row), row
    return row


def refused(data: bytes | None, reader: RowReader | None = None) -> BadRow:
    row = read(data, reader)
    assert isinstance(row, BadRow), row
    assert row.line == 3
    return row


def plain(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


TALK = [{"role": "user", "content": "x"}]


# Lines ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")), max_size=12), st.booleans())
def test_lines_are_those_of_the_file_in_order(lines: list[bytes], ends: bool) -> None:
    limit = 12
    data = b"\n".join(lines) + b"\n" * ends
    expected = []
    for number, text in enumerate(data.split(b"\n"), start=1):
        text = text.removeprefix(b"\xef\xbb\xbf") if len(text) <= limit else text
        if len(text) > limit:
            expected.append(Line(number, None, "the line is longer than 12 bytes"))
        elif text.strip():
            expected.append(Line(number, text))
    reader = LineReader(io.BytesIO(data), limit=limit)
    assert [Line(item.number, item.data and item.data.removesuffix(b"\n"), item.error) for item in reader] == expected


def test_the_limit_is_the_length_of_a_line_without_its_end() -> None:
    for data in (b"x" * 10, b"x" * 10 + b"\n"):
        assert [item.data for item in LineReader(io.BytesIO(data), limit=10)] == [data]
    for data in (b"x" * 11, b"x" * 11 + b"\n", b"x" * 5000 + b"\n"):
        assert [item.data for item in LineReader(io.BytesIO(data + b"\n"), limit=10)] == [None]


def test_byte_order_mark_line_ends_and_blank_lines_are_passed_over() -> None:
    lines = list(LineReader(io.BytesIO(b"\xef\xbb\xbf1\r\n\n \t\r\n2")))
    assert lines == [Line(1, b"1\r\n"), Line(4, b"2")]


def test_files_with_byte_order_marks_may_be_joined() -> None:
    mark = b"\xef\xbb\xbf"
    lines = list(LineReader(io.BytesIO(mark + b"1\n2\n" + mark + b"3\n" + mark + b"\n" + mark)))
    assert lines == [Line(1, b"1\n"), Line(2, b"2\n"), Line(3, b"3\n")]


# Rows -----------------------------------------------------------------------------------------------------------------


def test_a_good_row() -> None:
    row = accepted(line())
    assert (row.line, row.custom_id, row.call.prompt) == (3, "a", "hi")
    assert accepted(line(url="/v1/chat/completions", body={"messages": TALK})).call.kind == "chat"


def test_a_line_without_data_is_refused_with_the_reason() -> None:
    row = RowReader(["tiny"]).read(Line(5, None, "the line is longer than 10 bytes"))
    assert isinstance(row, BadRow)
    assert (row.line, row.custom_id, str(row.error)) == (5, None, "the line is longer than 10 bytes")


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
        (line(url="/v1/responses"), "a", "url"),
        (line(url=["/v1/completions"]), "a", "url"),
        (line(body=None), "a", None),
        (line(body=[]), "a", None),
        (line(body="x"), "a", None),
        (line(body={}), "a", "prompt"),
        (b'{"custom_id": "a", "prompt": "\xff"}', "a", None),
        (plain(custom_id="a"), "a", "method"),
        (plain(custom_id="a", prompt="x", url="/v1/completions"), "a", "prompt"),
        (plain(prompt="x", body={}), None, "custom_id"),
        (plain(custom_id=5, prompt="x"), None, "custom_id"),
        (plain(prompt=None), "row-3", "prompt"),
        (plain(prompt=""), "row-3", "prompt"),
        (plain(prompt="x", messages=TALK), "row-3", "prompt"),
        (plain(messages=[]), "row-3", "messages"),
        (plain(prompt="x", nonsense=1), "row-3", "nonsense"),
        (line(body={"prompt": "x", "n": 17}), "a", "n"),
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


@pytest.mark.parametrize("depth", [100, 400, 900, 2000, 5000, 50_000])
@pytest.mark.parametrize("field", ["messages", "prompt", "tools", "user", "made_up"])
def test_nesting_of_any_depth_is_one_refusal(field: str, depth: int) -> None:
    deep = '{"a":' * depth + "[]" + "}" * depth
    for data in (f'{{"prompt": "x", "{field}": {deep}}}', f'{{"messages": [{{"role": "user", "{field}": {deep}}}]}}'):
        row = read(data.encode())
        assert isinstance(row, BadRow) or (field == "user" and depth < 1000)


def test_a_key_that_is_null_is_not_there() -> None:
    """As a table of both kinds of rows is written line by line."""
    empty = {"prompt": None, "messages": None, "method": None, "url": None, "body": None, "max_tokens": None}
    assert accepted(json.dumps({**empty, **GOOD}).encode()).call == accepted(line()).call
    assert accepted(plain(**{**empty, "prompt": "hi"})).call == accepted(plain(prompt="hi")).call
    assert accepted(plain(**{**empty, "messages": TALK, "custom_id": None})).custom_id == "row-3"
    assert custom_id_of(Line(3, plain(**empty))) == "row-3"
    assert refused(plain(**empty)).error.param == "prompt"


def test_of_prompt_and_messages_one_may_be_empty() -> None:
    assert accepted(plain(prompt="hi", messages=[])).call.prompt == "hi"
    assert accepted(plain(prompt="", messages=TALK)).call.prompt == {"messages": TALK}
    chat = RowReader([], chat=ChatSettings())
    assert accepted(plain(prompt="x", messages=[]), chat).call.prompt == {"messages": TALK}
    assert accepted(plain(prompt="", messages=TALK), chat).call.prompt == {"messages": TALK}


def test_an_empty_custom_id_of_a_plain_row_is_none() -> None:
    assert accepted(plain(prompt="hi", custom_id="")).custom_id == "row-3"


def test_a_default_is_for_what_is_null_or_empty() -> None:
    reader = RowReader([], {"max_tokens": 5, "stop": ["x"]})
    params = accepted(plain(prompt="hi", max_tokens=None, stop=""), reader).call.params
    assert (params.max_tokens, params.stop) == (5, ("x",))
    assert accepted(plain(prompt="hi", max_tokens=7.0), reader).call.params.max_tokens == 7


def test_defaults_of_texts_are_not_for_chats() -> None:
    reader = RowReader([], {"parse_special": True, "add_special_tokens": False, "max_tokens": 5})
    options = {"prompt": "hi", "parse_special": True, "add_special_tokens": False}
    assert accepted(plain(prompt="hi"), reader).call.prompt == options
    assert accepted(line(), RowReader([], {"parse_special": True})).call.prompt == {
        **options,
        "add_special_tokens": True,
    }
    assert accepted(plain(prompt="hi", parse_special=False, add_special_tokens=True), reader).call.prompt == "hi"
    chat = accepted(plain(messages=TALK), reader).call
    assert (chat.prompt, chat.params.max_tokens) == ({"messages": TALK}, 5)


def test_a_misspelt_key_of_a_line_is_named_with_the_right_one() -> None:
    assert "did you mean custom_id?" in str(refused(line(customid="x")).error)


# Plain rows -----------------------------------------------------------------------------------------------------------


def test_a_plain_row_is_the_body_itself() -> None:
    row = accepted(plain(prompt="hi", max_tokens=3, model="tiny"))
    assert (row.custom_id, row.call.kind, row.call.prompt, row.call.params.max_tokens) == (
        "row-3",
        "completion",
        "hi",
        3,
    )
    chat = accepted(plain(custom_id="mine", messages=TALK, prompt=None, seed=7))
    assert (chat.custom_id, chat.call.kind, chat.call.prompt) == ("mine", "chat", {"messages": TALK})
    assert chat.call.params.seed == 7
    assert accepted(plain(custom_id=None, prompt=[1, 2])).custom_id == "row-3"
    assert refused(plain(prompt="x", model="other")).error.status == 404


def test_text_prompts_of_plain_rows_can_be_said_in_a_chat() -> None:
    reader = RowReader(["tiny"], chat=ChatSettings("Be brief."))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    row = accepted(plain(prompt="hi", max_tokens=3), reader)
    assert (row.call.kind, row.call.prompt, row.call.params.max_tokens) == ("chat", {"messages": said}, 3)
    assert accepted(plain(prompt="hi"), RowReader([], chat=ChatSettings())).call.prompt == {"messages": said[1:]}
    assert accepted(plain(messages=TALK), reader).call.prompt == {"messages": TALK}
    assert accepted(line(), reader).call.kind == "completion"


@pytest.mark.parametrize("prompt", [None, "", [1, 2], ["hi"], 5])
def test_only_a_text_can_be_said_in_a_chat(prompt: Any) -> None:
    row = refused(plain(prompt=prompt, messages=None), RowReader(["tiny"], chat=ChatSettings("Be brief.")))
    assert (row.custom_id, row.error.param) == ("row-3", "prompt")


# Defaults -------------------------------------------------------------------------------------------------------------


def test_defaults_are_for_fields_that_a_body_does_not_set() -> None:
    reader = RowReader(["tiny"], {"max_tokens": 5, "temperature": 0.5})
    for data in (plain(prompt="x"), line(), plain(messages=TALK), plain(prompt="x", max_tokens=None)):
        params = accepted(data, reader).call.params
        assert (params.max_tokens, params.temperature) == (5, 0.5)
    for data in (
        plain(prompt="x", max_tokens=9, temperature=0),
        line(body={"prompt": "x", "max_tokens": 9, "temperature": 0}),
    ):
        params = accepted(data, reader).call.params
        assert (params.max_tokens, params.temperature) == (9, 0)
    assert accepted(plain(messages=TALK, max_completion_tokens=7), reader).call.params.max_tokens == 7
    assert refused(line(body="x"), reader).custom_id == "a"


# Names ----------------------------------------------------------------------------------------------------------------

_NAMES = st.none() | st.integers() | st.sampled_from(["", "a", "\ud800", "x" * (MAX_CUSTOM_ID + 1)])
_VALUES: st.SearchStrategy[Any] = st.sampled_from([None, "x", "\ud800", float("nan"), [], {"a": [1e300]}, 10**5000])
_OBJECTS = st.fixed_dictionaries(
    {}, optional={"custom_id": _NAMES, **dict.fromkeys(("method", "url", "body", "prompt", "messages", "z"), _VALUES)}
)


def _dump(fields: dict[str, Any]) -> bytes:
    sys.set_int_max_str_digits(6000)
    try:
        return json.dumps(fields).encode()
    finally:
        sys.set_int_max_str_digits(4300)


@given(_OBJECTS.map(_dump), st.booleans())
def test_the_name_of_a_row_is_the_same_by_both_ways(data: bytes, damaged: bool) -> None:
    data = data.replace(b'"x"', b'"\xff"') if damaged else data
    assert custom_id_of(Line(3, data)) == read(data).custom_id


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (line(), "a"),
        (plain(prompt="x"), "row-3"),
        (plain(messages=TALK, custom_id="b"), "b"),
        (b'{"custom_id": "a", "body": NaN}', "a"),
        (b'{"custom_id": "a", "body": "\xff"}', "a"),
        (b'{"custom_id": "a", "custom_id": "b"}', "b"),
        (b'{"custom_id": "a"', None),
        (b'{"custom_id": "a", "body": ' + b"[" * 100_000, None),
        (b'{"prompt": NaN}', "row-3"),
        (b"[]", None),
        (None, None),
    ],
)
def test_the_name_of_a_row_is_found_without_the_rest(data: bytes | None, name: str | None) -> None:
    assert custom_id_of(Line(3, data, "unreadable")) == name


# Anything -------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=80) | _OBJECTS.map(_dump), st.none() | st.just(ChatSettings("s")))
def test_any_line_is_a_row_or_a_refusal(data: bytes, chat: ChatSettings | None) -> None:
    row = read(data, RowReader(["tiny"], {"max_tokens": 5}, chat))
    assert not isinstance(row, BadRow) or isinstance(row.error, APIError)
