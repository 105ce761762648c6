"""The openai client: texts, streams, embeddings, errors, and requests that are given up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.clients.conftest import Served, until

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "Name three fish."}]


@pytest.fixture(scope="module")
def client(tiny: Served) -> Iterator[Any]:
    """Untyped: its types know its own models and fields alone."""
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key=tiny.key, max_retries=0, timeout=None) as client:
        yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_a_chat_is_the_same_as_its_stream(client: Any) -> None:
    how = {"model": "tiny", "messages": MESSAGES, "seed": 4, "max_completion_tokens": 20, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**how)
    assert whole.usage.completion_tokens <= 40
    pieces = ["", ""]
    stream = client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
    assert chunk.usage == whole.usage.model_copy(update={"prompt_tokens_details": chunk.usage.prompt_tokens_details})
    assert pieces == [choice.message.content for choice in whole.choices]


def test_completions_of_texts_and_of_ids(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=5, seed=1, echo=True)
    assert [choice.text[0] for choice in answer.choices] == ["a", "b"]
    whole = client.completions.create(model="tiny", prompt=[65, 66], max_tokens=9, seed=2)
    stream = client.completions.create(model="tiny", prompt=[65, 66], max_tokens=9, seed=2, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_embeddings_are_the_same_numbers_in_both_forms(client: Any) -> None:
    """The client asks for base64 unless it is told otherwise."""
    packed = client.embeddings.create(model="tiny", input=["one", "two"])
    plain = client.embeddings.create(model="tiny", input=["one", "two"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)


@pytest.mark.parametrize(
    ("how", "param", "code"),
    [
        ({"temperature": -1}, "temperature", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"n": 17}, "n", None),
        ({"messages": []}, "messages", None),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", "context_length_exceeded"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template", None),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
                ]
            },
            "messages[0].content[0].type",
            None,
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client: Any, how: dict[str, Any], param: str, code: str | None, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, "stream": stream} | how)
    assert (error.value.param, error.value.code, error.value.type) == (param, code, "invalid_request_error")
    assert error.value.response.headers["x-request-id"]


def test_unknown_models_and_wrong_keys(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as wrong:
        client.with_options(api_key="sk-of-nobody").models.list()
    assert wrong.value.code == "invalid_api_key"
    assert wrong.value.type == "authentication_error"


def test_too_many_at_once_are_told_when_to_come_back(tiny: Served) -> None:
    async def crowd() -> openai.RateLimitError:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key=tiny.key, max_retries=0) as client:
            how: dict[str, Any] = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
            asking = [
                asyncio.ensure_future(client.completions.create(model="tiny", prompt="a", **how)) for _ in range(60)
            ]
            done, rest = await asyncio.wait(asking, return_when=asyncio.FIRST_EXCEPTION)
            for one in rest:
                one.cancel()
            await asyncio.gather(*rest, return_exceptions=True)
        return next(error for one in done if isinstance(error := one.exception(), openai.RateLimitError))

    busy = asyncio.run(crowd())
    assert busy.code == "rate_limit_exceeded"
    assert int(busy.response.headers["retry-after"]) >= 1
    until(lambda: tiny.get("/slots") == [])


def test_a_stream_that_is_closed_frees_its_place(tiny: Served, client: Any) -> None:
    how = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model="tiny", prompt="a", stream=True, **how)
    next(iter(stream))
    stream.close()
    until(lambda: tiny.get("/slots") == [])


def test_a_request_that_is_cancelled_frees_its_place(tiny: Served) -> None:
    async def cancelled() -> None:
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key=tiny.key, max_retries=0) as client:
            forever = client.completions.create(
                model="tiny", prompt="a", max_tokens=400, extra_body={"ignore_eos": True}
            )
            asking = asyncio.ensure_future(forever)
            while not await asyncio.to_thread(tiny.get, "/slots"):
                assert not asking.done()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(cancelled())
    until(lambda: tiny.get("/slots") == [])


def test_a_batch_from_upload_to_results(client: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    rows = [
        {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body | more}
        for number, more in enumerate([{}, {"max_tokens": -1}, {"seed": 3}])
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = client.files.create(file=("rows.jsonl", data), purpose="batch")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == data
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"of": "tests"}
    )
    until(lambda: client.batches.retrieve(batch.id).status == "completed")
    done = client.batches.retrieve(batch.id)
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 2, 1)
    assert next(iter(client.batches.list(limit=1))).id == batch.id
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    answers = {
        row["custom_id"]: row for row in map(json.loads, client.files.content(done.output_file_id).text.splitlines())
    }
    asked = client.chat.completions.create(**body)
    told = answers["row-0"]["response"]["body"]["choices"][0]["message"]["content"]
    assert told == asked.choices[0].message.content
    (failed,) = map(json.loads, client.files.content(done.error_file_id).text.splitlines())
    assert failed["custom_id"] == "row-1"
    assert failed["response"]["body"]["error"]["param"] == "max_tokens"
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_files_and_batches_that_cannot_be(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.files.create(file=("x", b"{}"), purpose="fine-tune")
    assert error.value.param == "purpose"
    with pytest.raises(openai.APIStatusError):
        client.batches.create(input_file_id="file-none", endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_none")
