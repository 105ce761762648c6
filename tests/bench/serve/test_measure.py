"""Whole measurements: what servers are asked, in which order, and what keeps a measurement from being made."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.bench.serve import measure
from shoal.bench.serve.dataset import RandomShape
from shoal.bench.serve.load import Arrivals
from shoal.bench.serve.measure import ServePlan, Target, measure_serve
from shoal.errors import EngineError
from tests.bench.serve.stub import Answer, Request, Stub, good, whole

SHAPE = RandomShape(input_len=6, output_len=3)


def plan(**changes: Any) -> ServePlan:
    return ServePlan(**{"num_prompts": 4, "shape": SHAPE, **changes})


def test_one_server() -> None:
    said: list[str] = []
    with Stub(good) as stub:
        models, results = measure_serve(plan(), [Target(name="a", base_url=stub.url)], said.append)
    (result,) = results["a"]
    found = result.as_json()
    assert models == {"a": "org/first"}
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"]) == (4, 28, 12)
    assert [len(body["prompt"]) for body in stub.posts] == [6] * 4
    assert {body["model"] for body in stub.posts} == {"org/first"}
    assert all(number < 50 for body in stub.posts for number in body["prompt"])
    assert said[0].startswith("round 1/1, a: 4 requests in ")


def test_a_model_that_is_named_is_asked_for() -> None:
    with Stub(good) as stub:
        target = Target(name="a", base_url=stub.url, model="mine", endpoint="other/completions")
        measure_serve(plan(vocab_size=9), [target], lambda line: None)
    assert {request.path for request in stub.requests} == {"/other/completions"}
    assert {body["model"] for body in stub.posts} == {"mine"}


def test_chats() -> None:
    with Stub(good) as stub:
        target = Target(name="a", base_url=stub.url, backend="openai-chat")
        measure_serve(plan(), [target], lambda line: None)
    assert [len(body["messages"][0]["content"].split()) for body in stub.posts] == [6] * 4


def test_a_server_that_hides_its_vocabulary_gets_low_ids() -> None:
    def answer(request: Request) -> list[bytes]:
        return [whole({"data": [{"id": "m"}]})] if request.path == "/v1/models" else good(request)

    said: list[str] = []
    with Stub(answer) as stub:
        measure_serve(
            plan(shape=RandomShape(input_len=500, output_len=1)), [Target(name="a", base_url=stub.url)], said.append
        )
    assert said[0] == "a does not say its vocabulary: token ids are below 1000 (--vocab-size)"
    assert 50 < max(number for body in stub.posts for number in body["prompt"]) < 1000


def test_servers_get_the_same_prompts_in_turns_and_other_ones_each_round() -> None:
    order: list[str] = []

    def named(name: str) -> Answer:
        return lambda request: order.append(name) or good(request)  # type: ignore[func-returns-value]

    with Stub(named("a")) as one, Stub(named("b")) as other:
        targets = [Target(name="a", base_url=one.url), Target(name="b", base_url=other.url)]
        _, results = measure_serve(
            plan(rounds=2, num_warmups=1, arrivals=Arrivals(max_concurrency=1)), targets, lambda line: None
        )
    assert [len(rounds) for rounds in results.values()] == [2, 2]
    prompts = [[body["prompt"] for body in stub.posts] for stub in (one, other)]
    assert prompts[0] == prompts[1]
    assert len({tuple(prompt) for prompt in prompts[0]}) == 1 + 2 * 4  # a warm-up and two rounds
    assert "".join(order[-16:]) == "aaaabbbb" * 2


def test_waiting_until_a_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_RETRY_SECONDS", 0.01)
    with Stub(lambda request: [whole({}, 503)] if len(stub.requests) < 4 else good(request)) as stub:
        target = Target(name="a", base_url=stub.url, model="m")
        measure_serve(plan(ready_check_timeout=30.0), [target], lambda line: None)
    assert [body["max_tokens"] for body in stub.posts] == [1, 1, 1, 1, 3, 3, 3, 3]


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_RETRY_SECONDS", 0.01)
    with Stub(lambda request: [whole({}, 503)]) as stub:
        target = Target(name="a", base_url=stub.url)
        with pytest.raises(EngineError, match=r"a \(http://.*\) is not ready: GET /v1/models: HTTP 503"):
            measure_serve(plan(ready_check_timeout=0.05), [target], lambda line: None)
    assert len(stub.requests) > 1


def test_requests_that_all_fail_are_no_measurement() -> None:
    def answer(request: Request) -> list[bytes]:
        return [whole({"error": {"message": "no such path"}}, 404)] if request.method == "POST" else good(request)

    with (
        Stub(answer) as stub,
        pytest.raises(EngineError, match="a answered none of 4 requests: HTTP 404: no such path"),
    ):
        measure_serve(plan(), [Target(name="a", base_url=stub.url)], lambda line: None)


def test_warming_up_must_succeed() -> None:
    def answer(request: Request) -> list[bytes]:
        return [whole({}, 500)] if request.method == "POST" else good(request)

    with Stub(answer) as stub, pytest.raises(EngineError, match="a: warming up failed: HTTP 500"):
        measure_serve(plan(num_warmups=1), [Target(name="a", base_url=stub.url)], lambda line: None)


def test_a_server_without_models() -> None:
    with Stub(lambda request: [whole({"data": []})]) as stub, pytest.raises(EngineError, match="--model NAME"):
        measure_serve(plan(), [Target(name="a", base_url=stub.url)], lambda line: None)


def test_health_beside_the_load() -> None:
    with Stub(good) as stub:
        _, results = measure_serve(plan(health_probe=True), [Target(name="a", base_url=stub.url)], lambda line: None)
    assert results["a"][0].as_json()["health_probes"] >= 1
    assert "/health" in {request.path for request in stub.requests}


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(Target(name="a", base_url="http://here", api_key="secret"))
