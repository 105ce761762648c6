"""Bodies of chats with tools, reasoning and messages that are continued, and what comes back for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.chat.choice import ToolChoice
from shoal.chat.formats import REASONING_FORMATS, TOOL_FORMATS
from shoal.chat.reply import ReplyFormat
from shoal.llm import CompletionOutput, RequestOutput
from shoal.openai.convert import Call, answer, parse_chat, parse_completion
from shoal.openai.schema import APIError
from shoal.text.tokenizer import Tokenizer
from tests.chat.templates import write_tokenizer

USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "default": None}}}
NAMED = {"type": "function", "function": {"name": "f"}}
FORMAT = ReplyFormat(REASONING_FORMATS["think"], TOOL_FORMATS["hermes"], tools={"f": {"x": {}}}, key="k")
CALL_TEXT = '<tool_call>{"name": "f", "arguments": {"x": "\u00e9}"}}</tool_call>'


def chat(**fields: Any) -> Call:
    return parse_chat({"messages": USER, **fields})


def conversation(**fields: Any) -> dict[str, Any]:
    prompt = chat(**fields).prompt
    assert isinstance(prompt, dict)
    return {name: value for name, value in prompt.items() if name != "messages"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes.gguf")


def body_of(
    tokenizer: Tokenizer, text: str, reason: str = "stop", form: ReplyFormat | None = FORMAT, **fields: Any
) -> Any:
    given = CompletionOutput(0, text, [104, 105], finish_reason=reason, reply_format=form)
    output = RequestOutput("r", None, [1, 2], [given], finished=True)
    made = answer(chat(**fields), output, response_id="1", model="m", tokenizer=tokenizer)
    return json.loads(msgspec.json.encode(made))


def choice_of(tokenizer: Tokenizer, text: str, reason: str = "stop", **fields: Any) -> Any:
    return body_of(tokenizer, text, reason, **fields)["choices"][0]


def test_what_is_said_about_the_conversation_arrives() -> None:
    assert conversation() == {}
    fields: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": NAMED,
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": False, "x": 4.0},
        "reasoning_effort": "low",
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    expected = {**fields, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}
    assert conversation(**fields) == expected
    assert repr(conversation(**fields)["chat_template_kwargs"]["x"]) == "4.0"


@pytest.mark.parametrize(
    "nothing",
    [
        {"tools": None, "tool_choice": None},
        {"tools": [], "tool_choice": {}},
        {"tools": [{}], "tool_choice": {"type": None, "function": {"name": None}}},
        {"parallel_tool_calls": None, "add_generation_prompt": None, "continue_final_message": False},
        {"chat_template_kwargs": {}, "reasoning_effort": ""},
        {"include_reasoning": True, "echo": False, "return_token_ids": False},
    ],
)
def test_what_says_nothing(nothing: dict[str, Any]) -> None:
    assert chat(**nothing) == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "f"}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "custom"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
        ({"chat_template": "x"}, "chat_template"),
    ],
)
def test_what_is_wrong_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(APIError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_thoughts_may_be_limited() -> None:
    assert chat(thinking_token_budget=5).params.thinking_token_budget == 5
    for wrong in (-1, 1.5, "x"):
        with pytest.raises(APIError) as caught:
            chat(thinking_token_budget=wrong)
        assert caught.value.param == "thinking_token_budget"


def test_an_answer_with_calls(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer, f"<think>\nhm\n</think>\n\n{CALL_TEXT}")
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    call = message["tool_calls"][0]
    assert call == {
        "id": FORMAT.call_id(0),
        "type": "function",
        "function": {"name": "f", "arguments": '{"x": "\u00e9}"}'},
    }
    assert json.loads(call["function"]["arguments"]) == {"x": "\u00e9}"}
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == (None, "hm", "hm")


def test_a_call_that_breaks_off_is_a_matter_of_length(tokenizer: Tokenizer) -> None:
    start = CALL_TEXT.index('{"x"')
    choice = choice_of(tokenizer, CALL_TEXT[: start + 7], "length")
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"x": "'


def test_an_answer_without_any_of_it_looks_as_before(tokenizer: Tokenizer) -> None:
    plain = {"content": "Hello", "role": "assistant", "refusal": None}
    assert choice_of(tokenizer, "Hello")["message"] == plain
    assert choice_of(tokenizer, "Hello", form=None)["message"] == plain
    assert choice_of(tokenizer, "")["message"]["content"] == ""
    body = body_of(tokenizer, "Hello")
    assert "prompt_token_ids" not in body
    assert "token_ids" not in body["choices"][0]


def test_reasoning_may_be_left_out(tokenizer: Tokenizer) -> None:
    message = choice_of(tokenizer, "<think>hm</think>ok", include_reasoning=False)["message"]
    assert message == {"content": "ok", "role": "assistant", "refusal": None}
    assert choice_of(tokenizer, "<think>hm", "length")["message"]["content"] is None


def test_a_forced_call(tokenizer: Tokenizer) -> None:
    form = replace(FORMAT, choice=ToolChoice("named", "f"))
    choice = choice_of(tokenizer, '{"x": 1}', form=form, tools=[TOOL], tool_choice=NAMED)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}


def test_token_ids_come_back(tokenizer: Tokenizer) -> None:
    body = body_of(tokenizer, "hi", return_token_ids=True)
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == ([1, 2], [104, 105])
    output = RequestOutput(
        "r", "x", [1, 2], [CompletionOutput(0, "hi", [104, 105], finish_reason="stop")], finished=True
    )
    call = parse_completion({"prompt": "x", "return_token_ids": True})
    made = json.loads(msgspec.json.encode(answer(call, output, response_id="1", model="m", tokenizer=tokenizer)))
    assert (made["choices"][0]["prompt_token_ids"], made["choices"][0]["token_ids"]) == ([1, 2], [104, 105])


def test_a_message_that_is_continued(tokenizer: Tokenizer) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well"}]
    continued: dict[str, Any] = {"messages": messages, "continue_final_message": True}
    assert choice_of(tokenizer, ", yes", **continued)["message"]["content"] == ", yes"
    assert choice_of(tokenizer, ", yes", **continued, echo=True)["message"]["content"] == "Well, yes"
    assert choice_of(tokenizer, "yes", messages=messages, echo=True)["message"]["content"] == "Wellyes"
    user = choice_of(tokenizer, "!", continue_final_message=True, echo=True)["message"]
    assert (user["role"], user["content"]) == ("user", "hi!")
    assert choice_of(tokenizer, "!", echo=True)["message"]["content"] == "!"


def test_the_template_of_a_job_is_told_the_time_and_the_row_wins(tmp_path: Path) -> None:
    from datetime import datetime

    from shoal.jobs.input.rows import Line, Row, RowReader

    now = datetime(2026, 1, 2)
    line = {"messages": USER, "chat_template_kwargs": {"enable_thinking": False}}
    row = RowReader((), now=now).read(Line(1, json.dumps(line).encode()))
    assert isinstance(row, Row)
    assert isinstance(row.call.prompt, dict)
    assert row.call.prompt["chat_template_kwargs"] == {"strftime_now": now, "enable_thinking": False}
