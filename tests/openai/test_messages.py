"""Conversations of bodies as chat templates take them: what OpenAI's API takes is used, or refused with what shoal lacks."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.openai.convert import parse_chat
from shoal.openai.schema import APIError

USER = [{"role": "user", "content": "hi"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def taken(*messages: Any) -> Any:
    prompt = parse_chat({"messages": list(messages)}).prompt
    assert isinstance(prompt, dict)
    return prompt["messages"]


def refused(messages: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        parse_chat({"messages": messages})
    assert caught.value.status == 400
    assert str(caught.value).startswith(f"{caught.value.param}: ")
    return caught.value


def test_messages_become_what_templates_take() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert taken(
        {"role": "developer", "content": "rule"},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": parts},
        {"role": "system", "content": ""},
    ) == [
        {"role": "system", "content": "rule"},
        {"role": "user", "content": "one\ntwo", "name": "Ann"},
        {"role": "assistant", "content": "one\ntwo"},
        {"role": "system", "content": ""},
    ]


@pytest.mark.parametrize(
    "nothing", [None, "", [], {}, [None], {"id": None}, {"name": "", "arguments": None}, [{}]], ids=str
)
@pytest.mark.parametrize(
    "field", ["name", "refusal", "tool_calls", "function_call", "tool_call_id", "audio", "annotations", "made_up"]
)
def test_what_a_message_does_not_have_may_be_null_or_empty(field: str, nothing: Any) -> None:
    assert taken({"role": "assistant", "content": "yes", field: nothing}) == [{"role": "assistant", "content": "yes"}]


def test_a_row_of_a_table_has_null_for_what_other_rows_have() -> None:
    """As pyarrow gives a struct of which each row fills some fields."""
    part = {
        "type": "text",
        "text": "hi",
        "image_url": {"url": None, "detail": None},
        "input_audio": None,
        "refusal": None,
    }
    message = {"role": "user", "content": [part], "name": None, "tool_calls": None, "audio": {"id": None}}
    assert taken(message) == USER


def test_calls_results_and_thoughts_stay_as_they_are() -> None:
    messages: list[Any] = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "assistant", "content": "y", "reasoning_content": "hm"},
    ]
    assert taken(*messages) == messages
    assert taken({"role": "assistant", "tool_calls": [CALL]})[0]["content"] is None
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert taken({"role": "tool", "content": parts, "tool_call_id": "1"})[0]["content"] == "a\nb"


def test_a_refusal_is_what_the_assistant_said() -> None:
    said = [{"role": "assistant", "content": "I cannot."}]
    assert taken({"role": "assistant", "content": None, "refusal": "I cannot."}) == said
    assert taken({"role": "assistant", "content": "", "refusal": "I cannot."}) == said
    assert taken({"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}) == said


def test_what_says_nothing_about_the_text_is_ignored() -> None:
    citation = {"type": "url_citation", "url_citation": {"url": "http://x"}}
    part = {"type": "text", "text": "hi", "prompt_cache_breakpoint": {"mode": "explicit"}}
    assert taken({"role": "user", "content": [part], "annotations": [citation]}) == USER


@pytest.mark.parametrize(
    ("messages", "param", "says"),
    [
        (None, "messages", "required"),
        ("hi", "messages", "Expected array"),
        ([], "messages", "is empty"),
        (["hi"], "messages[0]", "an object"),
        ([None], "messages[0]", "an object"),
        ([*USER, {"role": "user"}], "messages[1].content", "required"),
        ([*USER, {"content": "x"}], "messages[1].role", "required"),
        ([{"role": None, "content": "x"}], "messages[0].role", "required"),
        ([{"role": "user", "content": None}], "messages[0].content", "required"),
        ([{"role": "user", "content": 5}], "messages[0].content", "got int"),
        ([{"role": "user", "content": []}], "messages[0].content", "no parts"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "must be"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0]", "must be"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name", "got int"),
        ([{"role": "usr", "content": "x"}], "messages[0].role", "did you mean user?"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role", "must be one of"),
        ([{"role": "function", "content": "x", "name": "f"}], "messages[0].role", "called as tools"),
        ([{"role": "assistant", "function_call": {"name": "f"}}], "messages[0].function_call", "called as tools"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages[0].tool_calls", "of the assistant"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0]", "function"),
        ([{"role": "tool", "content": "x", "tool_call_id": 1}], "messages[0].tool_call_id", "a text"),
        ([{"role": "tool", "content": None, "tool_call_id": "1"}], "messages[0].content", "required"),
        ([{"role": "assistant", "audio": {"id": "1"}}], "messages[0].audio", "text alone"),
        ([{"role": "user", "content": "x", "nmae": "y"}], "messages[0].nmae", "did you mean name?"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "required"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text", "got int"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}], "messages[0].content[0].b", "no such"),
        ([{"role": "user", "content": [{"type": "txt", "text": "a"}]}], "messages[0].content[0].type", "mean text?"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
            "messages[0].content[0].type",
            "models read text alone",
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type", "text alone"),
        ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "messages[0].content[0].type", "text alone"),
        ([{"role": "user", "content": "\ud800"}], "messages", "surrogate"),
    ],
)
def test_messages_that_are_refused(messages: Any, param: str, says: str) -> None:
    error = refused(messages)
    assert error.param == param
    assert says in str(error)


def test_nesting_without_end_is_refused() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(APIError, match="nested too deeply"):
        parse_chat({"messages": [{"role": "user", "content": "x", "name": deep}]})
