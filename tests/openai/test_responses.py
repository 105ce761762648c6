"""/v1/responses: bodies as chats, and answers as OpenAI's client reads them."""

from __future__ import annotations

from typing import Any, get_args

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from shoal.chat.reply import Delta
from shoal.errors import ParameterError, RequestError, TemplateError
from shoal.openai.convert import Call, refusal
from shoal.openai.responses import RESPONSES, ResponseEvents, head, parse_response, response
from shoal.openai.schema import APIError, ChatLogprobs, FinishReason, TokenLogprob, TopLogprob
from tests.support.dialects import CALLS, EVERYTHING, USAGE, client, completion, deltas, plain, served

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
ASKED = {"model": "tiny", "input": "hi"}


def parsed(**body: Any) -> Call:
    return parse_response(ASKED | body)


def begun(**body: Any) -> dict[str, Any]:
    return head(ASKED | body, parsed(**body), response_id="1", model="tiny")


def messages(given: Any, **body: Any) -> Any:
    prompt = parsed(input=given, **body).prompt
    assert isinstance(prompt, dict)
    return prompt["messages"]


def refused(body: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        parse_response(body)
    assert caught.value.status == 400
    return caught.value


# Bodies ---------------------------------------------------------------------------------------------------------------


def test_a_text_is_what_the_user_says() -> None:
    assert messages("hi") == [{"role": "user", "content": "hi"}]
    assert messages("hi", instructions="Rhyme.") == [
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": "hi"},
    ]


def test_instructions_and_a_first_system_message_are_one() -> None:
    given = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert messages(given, instructions="Rhyme.")[0] == {"role": "system", "content": "Rhyme.\nBe brief."}


def test_items_of_an_answer_become_one_message_of_the_assistant() -> None:
    """As a client sends them back: what ``output`` of a response holds, and the results of its calls."""
    first = begun()
    output = plain(response(first, completion(EVERYTHING, "tool_calls")))["output"]
    results = [
        {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "3"},
        {
            "type": "function_call_output",
            "call_id": output[3]["call_id"],
            "output": [{"type": "input_text", "text": "x"}],
        },
    ]
    user, assistant, first, second = messages([{"role": "user", "content": "1 + 2?"}, *output, *results])
    assert user == {"role": "user", "content": "1 + 2?"}
    assert assistant["content"] == "I will add."
    assert assistant["reasoning"] == "One and two."
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "add", "arguments": '{"a": 1, "b": null}'},
        {"name": "look", "arguments": "{}"},
    ]
    assert first == {"role": "tool", "content": "3", "tool_call_id": assistant["tool_calls"][0]["id"]}
    assert second == {"role": "tool", "content": "x", "tool_call_id": assistant["tool_calls"][1]["id"]}


def test_messages_of_one_role_stay_apart_and_thoughts_go_with_what_follows_them() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]}
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}
    given = [
        {"role": "assistant", "content": "A", "phase": "commentary"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "B"}]},
        thought,
        call,
        thought,
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "C"}]},
    ]
    a, b, called, user = messages(given)
    assert (a["content"], b["content"], user) == ("A", "B", {"role": "user", "content": "C"})
    assert (called["content"], called["reasoning"]) == (None, "Hm.")
    assert "reasoning" not in a | b


def test_what_is_asked_for_reaches_the_parameters() -> None:
    call = parsed(
        max_output_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        stop=["x"],
        seed=7,
        priority=-1,
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=2,
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        chat_template_kwargs={"a": 1},
        metadata={"a": "b"},
        user="me",
        store=True,
        truncation="disabled",
        stream=True,
        stream_options={"include_obfuscation": False},
        previous_response_id=None,
        background=False,
    )
    params = call.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (5, 0.5, 0.9, 3)
    assert (params.seed, params.logprobs, call.priority, list(params.stop or ())) == (7, 2, -1, ["x"])
    assert isinstance(call.prompt, dict)
    assert call.prompt["parallel_tool_calls"] is False
    assert call.prompt["reasoning_effort"] == "low"
    assert call.prompt["chat_template_kwargs"] == {"a": 1}
    assert parsed().params.logprobs is None
    assert parsed(include=["message.output_text.logprobs"]).params.logprobs == 0


def test_a_form_of_the_text() -> None:
    schema = {"type": "object", "properties": {"a": {"const": None}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    asked = parsed(text={"format": form, "verbosity": "medium"}).params.structured_outputs
    assert asked is not None
    assert asked.json == schema
    asked = parsed(text={"format": {"type": "json_object"}}).params.structured_outputs
    assert asked is not None
    assert asked.json_object
    assert parsed(text={"format": {"type": "text"}}).params.structured_outputs is None


def test_tools_and_the_choice_among_them() -> None:
    def prompt(**body: Any) -> dict[str, Any]:
        call = parsed(tools=[TOOL, TOOL | {"name": "look", "strict": True}], **body)
        assert isinstance(call.prompt, dict)
        return call.prompt

    functions = [tool["function"] for tool in prompt()["tools"]]
    assert [one["name"] for one in functions] == ["add", "look"]
    assert functions[1] == {key: TOOL[key] for key in ("description", "parameters")} | {"name": "look", "strict": True}
    assert prompt(tool_choice="required")["tool_choice"] == "required"
    assert prompt(tool_choice={"type": "function", "name": "look"})["tool_choice"]["function"] == {"name": "look"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    chosen = prompt(tool_choice=allowed)
    assert [tool["function"]["name"] for tool in chosen["tools"]] == ["look"]
    assert chosen["tool_choice"] == "required"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ([], None, "JSON object"),
        ({"input": "hi"}, "model", "required"),
        ({"model": "tiny"}, "input", "required"),
        (ASKED | {"input": ""}, "input", "empty"),
        (ASKED | {"input": []}, "input", "empty"),
        (ASKED | {"input": 5}, "input", "must be a list"),
        (ASKED | {"input": ["x"]}, "input[0]", "must be an object"),
        (ASKED | {"input": [{"type": "message", "content": "x"}]}, "input[0].role", "required"),
        (ASKED | {"input": [{"role": "usr", "content": "x"}]}, "input[0].role", "mean user"),
        (ASKED | {"input": [{"role": "user"}]}, "input[0].content", "required"),
        (ASKED | {"input": [{"role": "user", "content": []}]}, "input[0].content", "no parts"),
        (ASKED | {"input": [{"role": "user", "content": "x", "nmae": "y"}]}, "input[0].nmae", "no such field"),
        (
            ASKED | {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "input[0].content[0].type",
            "models read text alone",
        ),
        (ASKED | {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "nothing is stored"),
        (ASKED | {"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "must be one of"),
        (ASKED | {"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "required"),
        (
            ASKED | {"input": [{"type": "function_call", "name": "f", "call_id": "1", "arguments": "{"}]},
            "input",
            "not valid JSON",
        ),
        (ASKED | {"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output", "required"),
        (ASKED | {"input": "\ud800"}, "input", "surrogate"),
        (ASKED | {"instructions": ["x"]}, "instructions", "a text"),
        (ASKED | {"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        (ASKED | {"conversation": "c"}, "conversation", "nothing is stored"),
        (ASKED | {"prompt": {"id": "p"}}, "prompt", "no stored prompts"),
        (ASKED | {"background": True}, "background", "waited for"),
        (ASKED | {"truncation": "auto"}, "truncation", "whole or refused"),
        (ASKED | {"include": ["x"]}, "include[0]", "must be one of"),
        (ASKED | {"include": "x"}, "include", "a list"),
        (ASKED | {"stream": 1}, "stream", "true or false"),
        (ASKED | {"messages": []}, "messages", "is a field of /v1/chat/completions"),
        (ASKED | {"max_tokens": 5}, "max_tokens", "is a field of /v1/chat/completions"),
        (ASKED | {"n": 2}, "n", "is a field of /v1/chat/completions"),
        (ASKED | {"temprature": 1}, "temprature", "mean temperature"),
        (ASKED | {"max_output_tokens": -1}, "max_output_tokens", "must be"),
        (ASKED | {"max_output_tokens": "x"}, "max_output_tokens", "Expected int"),
        (ASKED | {"temperature": float("nan")}, "temperature", "finite"),
        (ASKED | {"top_logprobs": 21}, "top_logprobs", "must be"),
        (ASKED | {"reasoning": {"effort": "much"}}, "reasoning.effort", "must be one of"),
        (ASKED | {"reasoning": {"budget": 5}}, "reasoning.budget", "no such field"),
        (ASKED | {"text": {"format": {"type": "xml"}}}, "text.format.type", "must be one of"),
        (ASKED | {"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "required"),
        (ASKED | {"text": {"verbosity": "high"}}, "text.verbosity", "not supported"),
        (ASKED | {"tools": [{"type": "web_search"}]}, "tools[0].type", "functions that the client runs"),
        (ASKED | {"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        (ASKED | {"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "must"),
        (ASKED | {"tools": [TOOL | {"parameters": "x"}]}, "tools[0].parameters", "an object"),
        (ASKED | {"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading", "no such field"),
        (ASKED | {"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type", "must be one of"),
        (ASKED | {"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "tools"),
        (
            ASKED | {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "x"}]}},
            "tool_choice.tools",
            "not among tools",
        ),
    ],
)
def test_bodies_that_are_refused(body: Any, param: str | None, says: str) -> None:
    error = refused(body)
    assert error.param == param
    assert says in str(error)
    assert str(error).startswith(param or "")


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (RequestError("prompt_token_ids: 9 tokens, the context has 8", "prompt_token_ids"), "input"),
        (RequestError("max_tokens: 9, the context has 8", "max_tokens"), "max_output_tokens"),
        (TemplateError("the template refuses the conversation"), "input"),
        (ParameterError("structured_outputs.json", {}, "a schema"), "text.format"),
    ],
)
def test_what_is_found_wrong_later_is_told_in_words_of_the_body(error: Any, param: str) -> None:
    call = parsed(text={"format": {"type": "json_schema", "schema": {"type": "object"}}})
    told = RESPONSES.in_its_words(refusal(call, error))
    assert told.param is not None
    assert told.param.startswith(param)
    assert str(told).startswith(param)


def test_nesting_without_end_is_refused() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    assert "nested too deeply" in str(refused(ASKED | {"input": [{"role": "user", "content": "x", "more": deep}]}))


# Answers --------------------------------------------------------------------------------------------------------------


def streamed(said: str, finish_reason: FinishReason = "stop", **body: Any) -> list[Any]:
    events = ResponseEvents(begun(**body))
    started = events.start()
    pushed = [event for delta in deltas(said) for event in events.push(delta)]
    return [*started, *pushed, *events.finish(finish_reason, USAGE)]


def without_times(one: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name not in ("created_at", "completed_at")}


@pytest.mark.parametrize(
    ("text", "finish_reason"),
    [
        ("Hello there.", "stop"),
        ("", "stop"),
        ("Hello the", "length"),
        ("<think>Hm</think>Yes.", "stop"),
        ("<think>Hm, and", "length"),
        (CALLS, "tool_calls"),
        (CALLS[:40], "length"),
        (EVERYTHING, "tool_calls"),
    ],
)
def test_events_are_those_of_the_client_and_end_in_the_whole_response(text: str, finish_reason: FinishReason) -> None:
    events = plain(streamed(text, finish_reason))
    for number, event in enumerate(events):
        EVENT.validate_python(event, strict=False)
        assert event["sequence_number"] == number
    last = events[-1]
    assert last["type"] == ("response.incomplete" if finish_reason == "length" else "response.completed")
    whole = plain(response(begun(), completion(text, finish_reason)))
    Response.model_validate(whole)
    assert without_times(last["response"]) == without_times(whole)
    assert whole["store"] is False


@pytest.mark.parametrize("text", ["Hello there.", "", EVERYTHING])
def test_items_that_are_done_are_those_of_the_response(text: str) -> None:
    events = plain(streamed(text))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in done]
    assert len(set(added)) == len(added)
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == added[event["output_index"]]


def test_pieces_add_up() -> None:
    events = plain(streamed(EVERYTHING, "tool_calls"))
    for kind, key in (("output_text", "text"), ("reasoning_text", "text"), ("function_call_arguments", "arguments")):
        pieces: dict[int, str] = {}
        for event in events:
            if event["type"] == f"response.{kind}.delta":
                pieces[event["output_index"]] = pieces.get(event["output_index"], "") + event["delta"]
        done = {event["output_index"]: event[key] for event in events if event["type"] == f"response.{kind}.done"}
        assert {index: said for index, said in done.items() if index in pieces} == pieces
        assert pieces


def test_the_client_puts_a_stream_together() -> None:
    events = streamed(EVERYTHING, "tool_calls", tools=[TOOL])
    api = openai.OpenAI(api_key="x", base_url="http://x", http_client=served(events))
    with api.responses.stream(model="tiny", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert final.output_text == "I will add."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert final.usage is not None
    assert (final.usage.input_tokens, final.usage.output_tokens, final.usage.total_tokens) == (20, 7, 27)
    assert final.usage.input_tokens_details.cached_tokens == 16


def test_the_client_reads_a_whole_response() -> None:
    whole = response(begun(), completion("Hello there."))
    http = client(httpx2.Response(200, json=plain(whole)))
    got = openai.OpenAI(api_key="x", base_url="http://x", http_client=http).responses.create(model="tiny", input="hi")
    assert (got.id, got.status, got.output_text) == ("resp_1", "completed", "Hello there.")


def test_the_client_raises_an_error_in_the_middle() -> None:
    events = ResponseEvents(begun())
    told = [*events.start(), *events.push(Delta(content="Hel")), *events.fail(APIError("too slow", status=500))]
    for event in plain(told):
        EVENT.validate_python(event)
    failed = plain(told)[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "too slow"}
    assert failed["response"]["output"][0]["status"] == "incomplete"
    api = openai.OpenAI(api_key="x", base_url="http://x", http_client=served(told))
    with (
        pytest.raises(openai.APIError, match="too slow"),
        api.responses.create(model="tiny", input="hi", stream=True) as stream,
    ):
        list(stream)


def test_a_response_says_what_was_asked_for() -> None:
    asked = {
        "instructions": "Rhyme.",
        "temperature": 0.5,
        "tools": [TOOL],
        "tool_choice": "required",
        "presence_penalty": 0.25,
        "store": True,
        "metadata": {"a": "b"},
        "reasoning": {"effort": "low"},
        "user": None,
    }
    form = {"type": "json_schema", "name": "n", "schema": {}}
    told = begun(**asked, text={"format": form})
    Response.model_validate(told)
    assert told["presence_penalty"] == 0.25
    assert told["text"] == {"format": form | {"description": None, "strict": False}}
    assert (told["model"], told["temperature"], told["top_p"], told["store"]) == ("tiny", 0.5, 1.0, False)
    assert told["tools"] == [{"strict": False, **TOOL}]
    assert told["reasoning"] == {"effort": "low", "summary": None}
    assert (told["status"], told["output"], told["usage"]) == ("in_progress", [], None)


def token(text: str) -> TokenLogprob:
    data = list(text.encode())
    return TokenLogprob(text, -0.5, data, [TopLogprob(text, -0.5, data)])


def test_log_probabilities_are_those_of_the_text() -> None:
    first = begun()
    told = completion("<think>Yes</think>Yes, é")
    told.choices[0].logprobs = ChatLogprobs([token(one) for one in ("<think>", "Yes", "</think>", "Yes", ", é", "")])
    whole = plain(response(first, told))
    Response.model_validate(whole)
    assert [one["token"] for one in whole["output"][1]["content"][0]["logprobs"]] == ["Yes", ", é"]
    events = ResponseEvents(first)
    pushed = [
        *events.push(Delta(reasoning="Yes"), [token("Yes")]),
        *events.push(Delta(content="Yes"), [token("Yes")]),
        *events.push(Delta(content=", é"), [token(", é")]),
        *events.finish("stop", USAGE),
    ]
    for event in plain(pushed):
        EVENT.validate_python(event)
    assert plain(pushed)[-1]["response"]["output"] == whole["output"]


def test_every_event_has_a_type_that_the_client_knows() -> None:
    known = {get_args(one.model_fields["type"].annotation)[0] for one in get_args(get_args(ResponseStreamEvent)[0])}
    assert {event["type"] for event in streamed(EVERYTHING)} <= known
