"""/v1/responses and /v1/messages through a socket, with the real clients."""

from __future__ import annotations

import anthropic
import openai
import pytest

from shoal.params import SamplingParams
from tests.server.running import Running

ASKED = "Name three fish."
SAMPLED = {"temperature": 0.5, "seed": 4}
PARAMS = SamplingParams(temperature=0.5, seed=4, max_tokens=12)


@pytest.fixture(scope="module")
def text(server: Running) -> str:
    """What both have to say."""
    (output,) = server.llm.chat([{"role": "user", "content": ASKED}], PARAMS, use_tqdm=False)
    return output.outputs[0].text


def test_a_response_whole_and_streamed(server: Running, text: str) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.responses.create(
            model="tiny", input=ASKED, temperature=0.5, max_output_tokens=12, extra_body={"seed": 4}
        )
        assert whole.output_text == text
        assert whole.status == "incomplete"
        assert whole.to_dict()["store"] is False
        stream = client.responses.create(
            model="tiny", input=ASKED, temperature=0.5, max_output_tokens=12, extra_body={"seed": 4}, stream=True
        )
        events = list(stream)
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(model="tiny", input=ASKED, previous_response_id="resp_1")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    last = events[-1]
    assert last.type == "response.incomplete"
    added = next(event.item for event in events if event.type == "response.output_item.added")
    assert last.response.output[0].id == added.id
    assert last.response.output_text == text
    assert last.response.usage == whole.usage


def test_a_message_whole_and_streamed(server: Running, text: str) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        asked: list[anthropic.types.MessageParam] = [{"role": "user", "content": ASKED}]
        whole = client.messages.create(model="tiny", max_tokens=12, messages=asked, extra_body=SAMPLED)
        assert [block.text for block in whole.content if block.type == "text"] == [text]
        assert whole.stop_reason == "max_tokens"
        counted = client.messages.count_tokens(model="tiny", messages=asked)
        assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        with client.messages.stream(model="tiny", max_tokens=12, messages=asked, extra_body=SAMPLED) as stream:
            assert "".join(stream.text_stream) == text
            assert stream.get_final_message().stop_reason == "max_tokens"
        with pytest.raises(anthropic.NotFoundError, match="'other' is not served here"):
            client.messages.create(model="other", max_tokens=12, messages=asked)
        with pytest.raises(anthropic.BadRequestError, match="messages"):
            client.messages.create(model="tiny", max_tokens=12, messages=[{"role": "user", "content": "x" * 5000}])


def test_a_stop_string_ends_a_message_by_name(server: Running, text: str) -> None:
    stop = text[len(text) // 2 :][:1]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        message = client.messages.create(
            model="tiny",
            max_tokens=12,
            messages=[{"role": "user", "content": ASKED}],
            extra_body=SAMPLED,
            stop_sequences=[stop],
        )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
