"""The routes through a socket, held against the model itself."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest

from shoal.params import SamplingParams
from tests.server.running import Running

MESSAGES = [{"role": "user", "content": "Name three fish."}]


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line and not line.startswith(":")]
    return [line.removeprefix("data: ") for line in lines]


def chunks(response: httpx.Response) -> list[Any]:
    *found, done = events(response)
    assert done == "[DONE]"
    return [json.loads(data) for data in found]


def test_a_chat_is_what_the_model_says(server: Running) -> None:
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=12)
    (expected,) = server.llm.chat([MESSAGES], params, use_tqdm=False)
    body = {"messages": MESSAGES, "temperature": 0.7, "seed": 3, "max_tokens": 12}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert answer["model"] == "tiny"
    assert answer["usage"]["completion_tokens"] == len(expected.outputs[0].token_ids)
    streamed = chunks(server.post("/v1/chat/completions", body | {"stream": True, "model": "alias"}))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in streamed) == expected.outputs[0].text
    assert {c["model"] for c in streamed} == {"alias"}


def test_completions_of_many_prompts_and_samples(server: Running) -> None:
    body = {"prompt": ["one", [65, 66], "three"], "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 6}
    answer = server.post("/v1/completions", body | {"return_token_ids": True}).json()
    prompts: list[Any] = ["one", {"prompt_token_ids": [65, 66]}, "three"]
    expected = server.llm.generate(prompts, SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=6), use_tqdm=False)
    given = [one.token_ids for output in expected for one in output.outputs]
    assert [choice["token_ids"] for choice in answer["choices"]] == given
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))


def test_embeddings_as_numbers_and_as_bytes(server: Running) -> None:
    outputs = server.llm.embed(["one", "two"], use_tqdm=False)
    expected = [output.outputs.embedding for output in outputs]
    answer = server.post("/v1/embeddings", {"input": ["one", "two"]}).json()
    assert [item["embedding"] for item in answer["data"]] == expected
    packed = server.post("/v1/embeddings", {"input": "two", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == pytest.approx(expected[1])
    refused = server.post("/v1/embeddings", {"input": "x" * 5000})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 17}, 400, "n"),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "other"}, 404, "model"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "stream_options": {"include_usage": True}},
            400,
            "stream_options",
        ),
        ("/v1/completions", {"prompt": "x" * 5000}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"70000": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": ["x", ""]}, 400, "prompt"),
        ("/v1/completions", [], 400, None),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_before_anything_is_sent(
    server: Running, path: str, body: Any, status: int, param: str | None, stream: bool
) -> None:
    if stream and (path.endswith("tokenize") or not isinstance(body, dict) or "stream_options" in body):
        return
    answer = server.post(path, body | {"stream": True} if stream else body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["code"] is None or isinstance(error["code"], str)


def test_unknown_paths_and_methods(server: Running) -> None:
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/nothing").json()["error"]["message"] == "no such path: /v1/nothing"
    wrong = server.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    garbled = httpx.post(server.url + "/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert garbled.status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 1}),
    ],
)
def test_a_body_says_which_model_it_means(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(server.url + path, json=body, timeout=None)
    assert answer.status_code == 400
    assert "model: this field is required" in answer.json()["error"]["message"]


def test_models_by_all_their_names(server: Running) -> None:
    listed = server.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny", "alias"]
    assert server.get("/v1/models/alias").json()["id"] == "alias"
    assert server.get("/v1/models/other").status_code == 404


def test_tokens_and_templates(server: Running) -> None:
    assert server.llm.tokenizer is not None
    answer = server.post("/tokenize", {"prompt": "Hi!", "return_token_strs": True}).json()
    assert answer["tokens"] == server.llm.encode("Hi!")
    assert answer["count"] == 3
    assert answer["token_strs"] == ["H", "i", "!"]
    assert server.post("/tokenize", {"content": "Hi!"}).json()["tokens"] == answer["tokens"]
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "Hi!", "content": "Hi!"}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert chat["tokens"] == server.llm.encode({"messages": MESSAGES})
    text = server.post("/apply-template", {"messages": MESSAGES}).json()["prompt"]
    assert text == "<|im_start|>user\nName three fish.<|im_end|>\n<|im_start|>assistant\n"


def test_sixty_four_at_once_get_what_each_gets_alone(server: Running) -> None:
    prompts = [f"{number} fish" * (1 + number % 5) for number in range(64)]
    params = [
        SamplingParams(temperature=number % 3 / 2, seed=number, max_tokens=4 + number % 9) for number in range(64)
    ]
    expected = server.llm.generate(prompts, params, use_tqdm=False)

    async def ask(client: httpx.AsyncClient, number: int) -> str:
        one = params[number]
        body: dict[str, Any] = {
            "model": "tiny",
            "prompt": prompts[number],
            "temperature": one.temperature,
            "seed": number,
        }
        body |= {"max_tokens": one.max_tokens, "stream": number % 2 == 0}
        answer = await client.post("/v1/completions", json=body)
        if number % 2:
            text: str = answer.json()["choices"][0]["text"]
            return text
        return "".join(chunk["choices"][0]["text"] for chunk in chunks(answer))

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    assert asyncio.run(all_of_them()) == [output.outputs[0].text for output in expected]


def test_metrics_count_what_happened(server: Running) -> None:
    def metrics() -> dict[str, float]:
        lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {
            line.rpartition(" ")[0].replace('model_name="tiny"', ""): float(line.rpartition(" ")[2]) for line in lines
        }

    before = metrics()
    server.post("/v1/completions", {"prompt": "abc", "max_tokens": 5, "ignore_eos": True, "temperature": 0})
    after = metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["shoal:prompt_tokens_total{}"] == 3
    assert grown["shoal:generation_tokens_total{}"] == 5
    assert grown['shoal:request_success_total{finished_reason="length",}'] == 1
    for name in (
        "time_to_first_token",
        "e2e_request_latency",
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
    ):
        assert grown[f"shoal:{name}_seconds_count{{}}"] == 1
    assert grown["shoal:inter_token_latency_seconds_count{}"] == 4
    assert after["shoal:num_requests_running{}"] == after["shoal:kv_cache_usage_perc{}"] == 0
