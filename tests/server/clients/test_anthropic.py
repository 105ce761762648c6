"""The anthropic client: messages, streams, counting, tools, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.server.clients.conftest import Served

HOW: dict[str, Any] = {"model": "smollm2", "max_tokens": 60, "extra_body": {"temperature": 0}}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the current weather.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(smollm2: Served) -> Iterator[Any]:
    """Untyped: its types know its own models and fields alone."""
    with anthropic.Anthropic(base_url=smollm2.url, api_key=smollm2.key, max_retries=0, timeout=600) as client:
        yield client


def test_a_message_is_the_same_as_its_stream(client: Any) -> None:
    how = HOW | {"messages": [{"role": "user", "content": "Name three fish."}], "system": "Be short."}
    whole = client.messages.create(**how)
    assert whole.content[0].text
    assert whole.stop_reason in ("end_turn", "max_tokens")
    with client.messages.stream(**how) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = client.messages.count_tokens(model="smollm2", messages=how["messages"], system="Be short.")
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_it_stops_where_it_is_told(client: Any) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "Count from 1 to 9."},
        {"role": "assistant", "content": "1, 2, 3,"},
    ]
    stopped = client.messages.create(**HOW, messages=messages, stop_sequences=["5"])
    assert stopped.stop_reason == "stop_sequence"
    assert stopped.stop_sequence == "5"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_is_used_where_it_has_to_be(client: Any, choice: dict[str, Any]) -> None:
    how = HOW | {"messages": QUESTION, "tools": [TOOL], "max_tokens": 300}
    how["tool_choice"] = choice | {"disable_parallel_tool_use": True}
    whole = client.messages.create(**how)
    (block,) = whole.content
    assert (block.type, block.name, whole.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert block.input["city"] in ("Paris", "Rome")
    with client.messages.stream(**how) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == block.input
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny."}
    turns = [*QUESTION, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    then = client.messages.create(**HOW, messages=turns, tools=[TOOL])
    assert then.content


def test_errors_are_its_own(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="'invalid_request_error'"):
        client.messages.create(**HOW, messages=[])
    with pytest.raises(anthropic.NotFoundError, match="'not_found_error'"):
        client.messages.create(**HOW | {"model": "other"}, messages=QUESTION)
    with pytest.raises(anthropic.AuthenticationError, match="'authentication_error'"):
        client.with_options(api_key="sk-of-nobody").messages.create(**HOW, messages=QUESTION)
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="text alone"):
        client.messages.create(**HOW, messages=[{"role": "user", "content": [image]}])
