"""The openai client: tools, answers of a given form, and Responses, with a model that can follow them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.server.clients.conftest import Served

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the current weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
OTHER: dict[str, Any] = {
    "name": "get_time",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}, {"type": "function", "function": OTHER}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Rome for the next 3 days?"}]
HOW: dict[str, Any] = {"model": "smollm2", "temperature": 0}


class Fish(pydantic.BaseModel):
    colour: Literal["red", "blue"]
    fins: int


@pytest.fixture(scope="module")
def client(smollm2: Served) -> Iterator[Any]:
    """Untyped: its types know its own models and fields alone."""
    with openai.OpenAI(base_url=f"{smollm2.url}/v1", api_key=smollm2.key, max_retries=0, timeout=None) as client:
        yield client


def _is_weather(arguments: str) -> None:
    given = json.loads(arguments)
    assert given.keys() == {"city", "days"}
    assert given["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_tool_is_called_where_it_has_to_be(client: Any, choice: Any) -> None:
    how = HOW | {"messages": QUESTION, "tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    whole = client.chat.completions.create(**how, parallel_tool_calls=False)
    (call,) = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    if choice is NAMED:
        assert call.function.name == "get_weather"
    if call.function.name == "get_weather":
        _is_weather(call.function.arguments)
    with client.chat.completions.stream(**how, parallel_tool_calls=False) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [event.arguments for event in done] == [call.function.arguments]
    assert final.choices[0].message.tool_calls[0].function.name == call.function.name
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_conversation_goes_on_after_a_call(client: Any) -> None:
    first = client.chat.completions.create(**HOW, messages=QUESTION, tools=TOOLS, tool_choice=NAMED, max_tokens=300)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Sunny, 25 degrees."}
    then = client.chat.completions.create(**HOW, messages=[*QUESTION, message, result], tools=TOOLS, max_tokens=60)
    assert then.choices[0].message.content or then.choices[0].message.tool_calls


def test_answers_of_a_form(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "Describe a fish as JSON: its colour and how many fins it has."}]
    parsed = client.chat.completions.parse(**HOW, messages=messages, response_format=Fish, max_tokens=200)
    fish = parsed.choices[0].message.parsed
    assert isinstance(fish, Fish)
    with client.chat.completions.stream(**HOW, messages=messages, response_format=Fish, max_tokens=200) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.parsed == fish
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**HOW, messages=messages, response_format=Fish, max_tokens=2)


def test_a_response_is_the_same_as_its_stream(client: Any) -> None:
    how = HOW | {"input": "Name three fish.", "instructions": "Be short.", "max_output_tokens": 60}
    whole = client.responses.create(**how)
    assert whole.output_text
    assert whole.store is False
    with client.responses.stream(**how) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens
    ids = {event.item.id for event in events if event.type == "response.output_item.added"}
    assert ids == {item.id for item in final.output}
    assert {event.response.id for event in events if event.type.startswith("response.created")} == {final.id}


def test_responses_of_a_form_and_with_tools(client: Any) -> None:
    parsed = client.responses.parse(
        **HOW, input="Describe a fish as JSON: its colour and fins.", text_format=Fish, max_output_tokens=200
    )
    assert isinstance(parsed.output_parsed, Fish)
    tool: Any = {"type": "function", "strict": True, **WEATHER}
    how = HOW | {"input": QUESTION[0]["content"], "tools": [tool], "tool_choice": "required", "max_output_tokens": 300}
    called = client.responses.create(**how, parallel_tool_calls=False)
    (call,) = called.output
    assert call.type == "function_call"
    _is_weather(call.arguments)
    then = client.responses.create(
        **HOW,
        input=[
            *QUESTION,
            call.model_dump(exclude_none=True),
            {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."},
        ],
        max_output_tokens=30,
    )
    assert then.status in ("completed", "incomplete")


def test_responses_that_cannot_be(client: Any) -> None:
    for field, value in {"previous_response_id": "resp_1", "background": True}.items():
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(**HOW, input="x", **{field: value})
        assert error.value.param == field
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="other", input="x")
    assert missing.value.code == "model_not_found"
