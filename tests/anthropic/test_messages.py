"""/v1/messages: bodies as chats, and answers as Anthropic's client reads them."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from shoal.anthropic.messages import (
    MESSAGES,
    PING,
    MessageEvents,
    error_body,
    message,
    parse_counted,
    parse_message,
)
from shoal.chat.reply import Delta
from shoal.errors import RequestError
from shoal.openai.convert import Call, refusal
from shoal.openai.schema import APIError, FinishReason, PromptTokensDetails, Usage
from tests.support.dialects import CALLS, EVERYTHING, USAGE, client, completion, deltas, plain, served

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
USER = [{"role": "user", "content": "hi"}]
ASKED = {"model": "tiny", "max_tokens": 9, "messages": USER}


def parsed(**body: Any) -> Call:
    return parse_message(ASKED | body)


def prompt(**body: Any) -> dict[str, Any]:
    given = parsed(**body).prompt
    assert isinstance(given, dict)
    return given


def refused(body: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        parse_message(body)
    assert caught.value.status == 400
    return caught.value


# Bodies ---------------------------------------------------------------------------------------------------------------


def test_system_and_messages_become_those_of_a_chat() -> None:
    cached = {"type": "text", "text": "Rhyme.", "cache_control": {"type": "ephemeral"}}
    assert prompt(system="Rhyme.")["messages"] == [{"role": "system", "content": "Rhyme."}, *USER]
    assert prompt(system=[cached, {"type": "text", "text": "Now."}])["messages"][0]["content"] == "Rhyme.\nNow."


def test_messages_of_one_role_are_one() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    assert prompt(messages=said)["messages"] == [{"role": "user", "content": "a\nb"}]


def test_an_answer_and_its_results_come_back() -> None:
    """As a client sends them: the content of a message, and the results of its calls."""
    content = plain(message(completion(EVERYTHING, "tool_calls"), message_id="1"))["content"]
    results = [
        {"type": "tool_result", "tool_use_id": content[2]["id"], "content": "3"},
        {
            "type": "tool_result",
            "tool_use_id": content[3]["id"],
            "content": [{"type": "text", "text": "x"}],
            "is_error": True,
        },
        {"type": "text", "text": "And?"},
    ]
    conversation = [*USER, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
    user, assistant, first, second, more = prompt(messages=conversation)["messages"]
    assert [user] == USER
    assert (assistant["content"], assistant["reasoning"]) == ("I will add.", "One and two.")
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "add", "arguments": '{"a": 1, "b": null}'},
        {"name": "look", "arguments": "{}"},
    ]
    assert first == {"role": "tool", "content": "3", "tool_call_id": content[2]["id"]}
    assert second == {"role": "tool", "content": "x", "tool_call_id": content[3]["id"]}
    assert more == {"role": "user", "content": "And?"}


def test_a_call_alone_has_no_content_and_a_result_may_say_nothing() -> None:
    call = {"type": "tool_use", "id": "1", "name": "add", "input": {"a": None}}
    hidden = {"type": "redacted_thinking", "data": "x"}
    result = {"type": "tool_result", "tool_use_id": "1"}
    conversation = [
        *USER,
        {"role": "assistant", "content": [hidden, call, call | {"id": "2"}]},
        {"role": "user", "content": [result, result | {"tool_use_id": "2", "is_error": True}]},
    ]
    _, assistant, first, second = prompt(messages=conversation)["messages"]
    assert assistant["content"] is None
    assert assistant["tool_calls"][0]["function"]["arguments"] == '{"a": null}'
    assert (first["content"], second["content"]) == ("", "error")


def test_a_last_message_of_the_assistant_is_gone_on_with() -> None:
    begun = prompt(messages=[*USER, {"role": "assistant", "content": "Once"}])
    assert begun["continue_final_message"] is True
    assert begun["messages"][-1] == {"role": "assistant", "content": "Once"}
    assert "continue_final_message" not in prompt()


def test_what_is_asked_for_reaches_the_parameters() -> None:
    call = parsed(
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        stop_sequences=["x"],
        seed=7,
        min_p=0.1,
        metadata={"user_id": "me"},
        service_tier="auto",
        cache_control={"type": "ephemeral"},
        stream=True,
    )
    params = call.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (9, 0.5, 0.9, 3)
    assert (params.seed, params.min_p, list(params.stop or ())) == (7, 0.1, ["x"])
    assert parsed(stop_sequences=[]).params.stop == parsed().params.stop


def test_thinking() -> None:
    enabled = {"type": "enabled", "budget_tokens": 1024}
    call = parsed(thinking=enabled)
    assert isinstance(call.prompt, dict)
    assert call.prompt["chat_template_kwargs"] == {"enable_thinking": True}
    assert (call.params.thinking_token_budget, call.include_reasoning) == (1024, True)
    assert parsed(thinking=enabled | {"display": "omitted"}).include_reasoning is False
    assert prompt(thinking={"type": "adaptive"})["chat_template_kwargs"] == {"enable_thinking": True}
    off = parsed(thinking={"type": "disabled"}, chat_template_kwargs={"a": 1})
    assert isinstance(off.prompt, dict)
    assert off.prompt["chat_template_kwargs"] == {"enable_thinking": False, "a": 1}
    assert off.params.thinking_token_budget is None
    assert "chat_template_kwargs" not in prompt()


def test_effort_and_form() -> None:
    call = parsed(output_config={"effort": "max", "format": {"type": "json_schema", "schema": SCHEMA}})
    assert isinstance(call.prompt, dict)
    assert call.prompt["reasoning_effort"] == "xhigh"
    assert call.params.structured_outputs is not None
    assert call.params.structured_outputs.json == SCHEMA


def test_tools_and_the_choice_among_them() -> None:
    tools = [TOOL | {"cache_control": {"type": "ephemeral"}, "type": "custom"}, TOOL | {"name": "look", "strict": True}]
    functions = [tool["function"] for tool in prompt(tools=tools)["tools"]]
    assert functions[0] == {"name": "add", "description": "Adds.", "parameters": SCHEMA}
    assert functions[1] == {"name": "look", "description": "Adds.", "parameters": SCHEMA, "strict": True}
    assert prompt(tools=tools, tool_choice={"type": "any"})["tool_choice"] == "required"
    assert prompt(tools=tools, tool_choice={"type": "none"})["tool_choice"] == "none"
    named = prompt(tools=tools, tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert named["parallel_tool_calls"] is False
    assert "parallel_tool_calls" not in prompt(tools=tools, tool_choice={"type": "auto"})


def test_the_prompt_is_counted_without_a_limit() -> None:
    body = {"model": "tiny", "messages": USER, "system": "Rhyme.", "tools": [TOOL]}
    counted = parse_counted(body).prompt
    assert counted == parse_message(body | {"max_tokens": 1}).prompt
    with pytest.raises(APIError, match="messages: this field is required"):
        parse_counted({"model": "tiny"})


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
CALL = {"type": "tool_use", "id": "1", "name": "add", "input": {}}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ("x", None, "JSON object"),
        ({"messages": USER, "max_tokens": 5}, "model", "required"),
        ({"model": "tiny", "messages": USER}, "max_tokens", "required"),
        ({"model": "tiny", "max_tokens": 5}, "messages", "required"),
        (ASKED | {"messages": []}, "messages", "empty"),
        (ASKED | {"messages": [], "system": "x"}, "messages", "empty"),
        (ASKED | {"messages": "hi"}, "messages", "must be a list"),
        (ASKED | {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "must be one of"),
        (ASKED | {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        (ASKED | {"messages": [{"role": "user", "content": []}]}, "messages[0].content", "no blocks"),
        (ASKED | {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a list"),
        (ASKED | {"messages": [{"role": "user", "content": "x", "nmae": 1}]}, "messages[0].nmae", "no such field"),
        (
            ASKED | {"messages": [{"role": "user", "content": [IMAGE]}]},
            "messages[0].content[0].type",
            "models read text alone",
        ),
        (
            ASKED | {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [IMAGE]}]}]},
            "messages[0].content[0].content[0].type",
            "models read text alone",
        ),
        (
            ASKED | {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages[0].content[0].tool_use_id",
            "required",
        ),
        (ASKED | {"messages": [{"role": "user", "content": [CALL]}]}, "messages[0].content[0].type", "must be one of"),
        (ASKED | {"messages": [*USER, {"role": "assistant", "content": [CALL]}]}, "messages", "tool_result"),
        (
            ASKED | {"messages": [*USER, {"role": "assistant", "content": [CALL | {"input": "{}"}]}, *USER]},
            "messages[1].content[0].input",
            "an object",
        ),
        (
            ASKED | {"messages": [*USER, {"role": "assistant", "content": [CALL | {"input": {"a": float("inf")}}]}]},
            "messages[1].content[0].input",
            "finite",
        ),
        (ASKED | {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        (ASKED | {"system": 5}, "system", "must be a list"),
        (ASKED | {"system": [IMAGE]}, "system[0].type", "text alone"),
        (ASKED | {"max_tokens": 0}, "max_tokens", "must be"),
        (ASKED | {"max_tokens": None}, "max_tokens", "required"),
        (ASKED | {"temperature": -1}, "temperature", "must be"),
        (ASKED | {"stop_sequences": "x"}, "stop_sequences", "a list"),
        (ASKED | {"stop_sequences": [5]}, "stop_sequences[0]", "Expected str"),
        (ASKED | {"stop": ["x"]}, "stop", "is a field of /v1/chat/completions"),
        (ASKED | {"n": 2}, "n", "is a field of /v1/chat/completions"),
        (ASKED | {"max_token": 2}, "max_token", "mean max_tokens"),
        (ASKED | {"stream": "yes"}, "stream", "true or false"),
        (ASKED | {"container": "c"}, "container", "nothing runs code"),
        (ASKED | {"mcp_servers": [{"url": "http://x"}]}, "mcp_servers", "functions"),
        (ASKED | {"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "required"),
        (ASKED | {"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens", "must be"),
        (ASKED | {"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens", "no such field"),
        (ASKED | {"thinking": {"type": "on"}}, "thinking.type", "must be one of"),
        (ASKED | {"output_config": {"effort": "much"}}, "output_config.effort", "must be one of"),
        (ASKED | {"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema", "required"),
        (ASKED | {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type", "functions"),
        (ASKED | {"tools": [{"name": "add"}]}, "tools[0].input_schema", "required"),
        (ASKED | {"tools": [TOOL | {"input_schema": 5}]}, "tools[0].input_schema", "an object"),
        (ASKED | {"tools": [TOOL | {"name": "a b"}]}, "tools[0].name", "must"),
        (ASKED | {"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading", "no such field"),
        (ASKED | {"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "an object"),
        (ASKED | {"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name", "required"),
        (ASKED | {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice", "tools"),
        (ASKED | {"tool_choice": {"type": "any"}}, "tool_choice", "tools"),
        (
            ASKED | {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
            "tool_choice.disable_parallel_tool_use",
            "true or false",
        ),
    ],
)
def test_bodies_that_are_refused(body: Any, param: str | None, says: str) -> None:
    error = refused(body)
    assert error.param == param
    assert says in str(error)
    assert str(error).startswith(param or "")


def test_what_is_found_wrong_later_is_told_in_words_of_the_body() -> None:
    call = parsed(thinking={"type": "enabled", "budget_tokens": 5})
    error = RequestError("thinking_token_budget: no reasoning here", "thinking_token_budget")
    assert str(MESSAGES.in_its_words(refusal(call, error))) == "thinking.budget_tokens: no reasoning here"


def test_nesting_without_end_is_refused() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    conversation = [*USER, {"role": "assistant", "content": [CALL | {"input": deep}]}]
    assert "nested too deeply" in str(refused(ASKED | {"messages": conversation}))


# Answers --------------------------------------------------------------------------------------------------------------


def streamed(text: str, finish_reason: FinishReason = "stop", stop_sequence: str | None = None) -> list[Any]:
    events = MessageEvents("1", "tiny")
    started = events.start(Usage(20, 0, 20, PromptTokensDetails(0)))
    pushed = [event for delta in deltas(text) for event in events.push(delta)]
    return [*started, *pushed, *events.finish(finish_reason, USAGE, stop_sequence)]


def put_together(events: list[dict[str, Any]]) -> Message:
    """As the client does it."""
    api = anthropic.Anthropic(api_key="x", base_url="http://x", http_client=served(events))
    with api.messages.stream(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "hi"}]) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize(
    ("text", "finish_reason", "stop_reason"),
    [
        ("Hello there.", "stop", "end_turn"),
        ("", "stop", "end_turn"),
        ("Hello the", "length", "max_tokens"),
        ("<think>Hm</think>Yes.", "stop", "end_turn"),
        ("<think>Hm, and", "length", "max_tokens"),
        (CALLS, "tool_calls", "tool_use"),
        (EVERYTHING, "tool_calls", "tool_use"),
    ],
)
def test_the_client_makes_the_whole_message_of_events(text: str, finish_reason: FinishReason, stop_reason: str) -> None:
    events = plain(streamed(text, finish_reason))
    for event in events:
        if event != PING:
            EVENT.validate_python(event)
    whole = plain(message(completion(text, finish_reason), message_id="1"))
    assert Message.model_validate(whole).stop_reason == stop_reason
    assert put_together(events).model_dump(exclude_none=True, exclude={"content": {"__all__": {"parsed_output"}}}) == (
        Message.model_validate(whole).model_dump(exclude_none=True)
    )


def test_blocks_begin_and_end_in_order() -> None:
    events = plain(streamed(EVERYTHING, "tool_calls"))
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    begun = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert begun == ["thinking", "text", "tool_use", "tool_use"]
    open_block, last = None, -1
    for event in events:
        if event["type"] == "content_block_start":
            assert open_block is None
            open_block = last = last + 1
            assert event["index"] == open_block
        elif event["type"] in ("content_block_delta", "content_block_stop"):
            assert event["index"] == open_block
            open_block = None if event["type"] == "content_block_stop" else open_block
    assert (open_block, last) == (None, 3)


def test_the_prompt_that_was_cached_is_counted_apart() -> None:
    usage = put_together(streamed("Hi")).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 16, 7)


def test_a_stop_sequence_is_told() -> None:
    whole = message(completion("Hi"), message_id="1", stop_sequence="END")
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "END")
    got = put_together(streamed("Hi", stop_sequence="END"))
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", "END")


def test_a_call_that_breaks_off_has_no_input_but_its_pieces_were_told() -> None:
    broken = '<tool_call>\n{"name": "add", "arguments": {"a": 1'
    (block,) = message(completion(broken, "length"), message_id="1")["content"]
    assert (block["name"], block["input"]) == ("add", {})
    pieces = [
        event["delta"]["partial_json"]
        for event in streamed(broken, "length")
        if "delta" in event and "partial_json" in event["delta"]
    ]
    assert "".join(pieces) == '{"a": 1'


def test_the_client_reads_a_whole_message() -> None:
    http = client(httpx2.Response(200, json=plain(message(completion("Hello there."), message_id="1"))))
    api = anthropic.Anthropic(api_key="x", base_url="http://x", http_client=http)
    got = api.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
    assert (got.id, got.type, got.role, got.model) == ("msg_1", "message", "assistant", "tiny")
    assert got.content[0].type == "text"
    assert got.content[0].text == "Hello there."


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "raised"),
    [
        (400, "invalid_request_error", anthropic.BadRequestError),
        (401, "authentication_error", anthropic.AuthenticationError),
        (403, "permission_error", anthropic.PermissionDeniedError),
        (404, "not_found_error", anthropic.NotFoundError),
        (405, "invalid_request_error", anthropic.APIStatusError),
        (413, "request_too_large", anthropic.APIStatusError),
        (429, "rate_limit_error", anthropic.RateLimitError),
        (500, "api_error", anthropic.InternalServerError),
        (503, "overloaded_error", anthropic.InternalServerError),
    ],
)
def test_errors_are_those_of_the_client(status: int, kind: str, raised: type[anthropic.APIStatusError]) -> None:
    body = error_body(APIError("no", status=status), "req_1")
    http = client(httpx2.Response(status, json=body))
    api = anthropic.Anthropic(api_key="x", base_url="http://x", http_client=http, max_retries=0)
    with pytest.raises(raised) as caught:
        api.messages.create(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.body == {"type": "error", "error": {"type": kind, "message": "no"}, "request_id": "req_1"}


def test_the_client_raises_an_error_in_the_middle() -> None:
    events = MessageEvents("1", "tiny")
    told = [*events.start(USAGE), *events.push(Delta(content="Hel")), error_body(APIError("too slow", status=500))]
    with pytest.raises(anthropic.APIStatusError, match="too slow"):
        put_together(told)
