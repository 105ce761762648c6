"""One request: answers, errors of every kind, and connections that are kept, lost and given up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable

import pytest

from shoal.bench.serve.client import Client, Outcome
from shoal.errors import ParameterError
from tests.bench.serve.stub import (
    CUT,
    HANG,
    STREAM_HEAD,
    Answer,
    Request,
    Stub,
    chunk,
    completion_events,
    event,
    good,
    stream,
    whole,
)


def generate(answer: Answer, times: int = 1) -> tuple[list[Outcome], Stub]:
    """What becomes of ``times`` requests, one after the other."""
    with Stub(answer) as stub:
        return asyncio.run(_generate(stub.url, times)), stub


async def _generate(url: str, times: int, body: dict[str, object] | None = None) -> list[Outcome]:
    async with Client(url) as client:
        request = client.request("POST", "/v1/completions", {"stream": True} if body is None else body)
        return [await client.generate(request, 5) for _ in range(times)]


def parts(*content: bytes) -> Answer:
    return lambda request: content


def test_a_stream() -> None:
    (outcome,), stub = generate(good)
    assert outcome.success
    assert (outcome.prompt_len, outcome.output_len, len(outcome.itls)) == (7, 3, 2)
    assert 0 < outcome.ttft <= outcome.ttft + sum(outcome.itls) <= outcome.latency
    assert outcome.tpot == pytest.approx((outcome.latency - outcome.ttft) / 2)
    assert stub.posts == [{"stream": True}]


def test_without_usage_events_are_counted() -> None:
    events = [event({"choices": [{"text": text}]}) for text in "abcd"]
    (outcome,), _ = generate(lambda request: stream([*events, event(b"[DONE]")]))
    assert (outcome.success, outcome.prompt_len, outcome.output_len, len(outcome.itls)) == (True, 5, 4, 3)


def test_an_answer_in_one_piece() -> None:
    with Stub(good) as stub:
        (outcome,) = asyncio.run(_generate(stub.url, 1, {}))
    assert (outcome.success, outcome.prompt_len, outcome.output_len, outcome.itls) == (True, 7, 3, [])
    assert outcome.ttft == outcome.latency > 0


def test_a_connection_is_used_again() -> None:
    outcomes, stub = generate(good, 3)
    assert all(outcome.success for outcome in outcomes)
    assert stub.connections == 1


def test_a_connection_that_the_server_closed_is_replaced() -> None:
    outcomes, stub = generate(lambda request: [*good(request), CUT], 3)
    assert all(outcome.success for outcome in outcomes)
    assert stub.connections == 3


def test_a_connection_that_closes_as_it_is_used_again_is_replaced() -> None:
    with Stub(lambda request: [CUT] if len(stub.requests) == 2 else good(request)) as stub:
        outcomes = asyncio.run(_generate(stub.url, 2))
    assert all(outcome.success for outcome in outcomes)
    assert (stub.connections, len(stub.requests)) == (2, 3)


def test_a_new_connection_that_closes_is_not_tried_again() -> None:
    (outcome,), stub = generate(parts(CUT))
    assert outcome.error == "the connection ended before the answer was whole"
    assert (outcome.status, len(stub.requests)) == (0, 1)


def test_connection_close_is_kept_to() -> None:
    answer = whole({"choices": [1]}).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    outcomes, stub = generate(parts(answer), 2)
    assert all(outcome.success for outcome in outcomes)
    assert stub.connections == 2


ERROR = {"error": {"message": "too many requests wait", "type": "rate_limit", "param": None, "code": None}}


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        ([whole(ERROR, 429)], 429, "HTTP 429: too many requests wait"),
        ([whole({"error": "bad"}, 400)], 400, "HTTP 400: bad"),
        ([whole(b"<html>Bad Gateway", 502)], 502, "HTTP 502: <html>Bad Gateway"),
        ([whole(b"", 500)], 500, "HTTP 500"),
        ([whole({})], 200, "HTTP 200, but no choices in the body"),
        (stream([*completion_events()[:2], event(ERROR)]), 200, "too many requests wait"),
        (stream(completion_events()[:2]), 200, "the stream ended without [DONE]"),
        (stream([event(b"[DONE]")]), 200, "the stream ended without an event"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], 0, "not HTTP/1.1: b'SSH-2.0-OpenSSH'"),
    ],
)
def test_errors(answer: Iterable[bytes], status: int, error: str) -> None:
    (outcome,), _ = generate(parts(*answer))
    assert (outcome.success, outcome.error) == (False, error)
    assert outcome.status == status
    assert outcome.latency > 0


def test_a_stream_that_is_cut_is_an_error_and_the_next_is_not() -> None:
    cut = [STREAM_HEAD, *map(chunk, completion_events()[:2]), CUT]
    with Stub(lambda request: cut if len(stub.requests) == 1 else good(request)) as stub:
        first, second = asyncio.run(_generate(stub.url, 2))
    assert first.error == "the connection ended before the answer was whole"
    assert second.success


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (outcome,) = asyncio.run(_generate(f"http://127.0.0.1:{free.getsockname()[1]}", 1))
    assert "onnect" in outcome.error


def test_who_gives_up_ends_the_connection() -> None:
    async def give_up(url: str) -> None:
        async with Client(url) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.generate(client.request("POST", "/v1/completions", {}), 5)

    with Stub(parts(STREAM_HEAD, chunk(completion_events()[0]), HANG)) as stub:
        asyncio.run(give_up(stub.url))
        assert stub.gone.wait(10)


def test_what_is_sent() -> None:
    async def ask(url: str) -> None:
        async with Client(f"{url}/base/", "secret") as client:
            await client.send(client.request("GET", "/v1/models"))
            await client.send(client.request("POST", "/v1/completions", {"prompt": "é"}))

    def headers(request: Request) -> tuple[str | None, ...]:
        return tuple(request.headers.get(name) for name in ("authorization", "content-type", "host"))

    with Stub(good) as stub:
        asyncio.run(ask(stub.url))
    get, post = stub.requests
    host = stub.url.removeprefix("http://")
    assert (get.method, get.path, *headers(get)) == ("GET", "/base/v1/models", "Bearer secret", None, host)
    assert (post.method, post.path, *headers(post)) == (
        "POST",
        "/base/v1/completions",
        "Bearer secret",
        "application/json",
        host,
    )
    assert post.body == {"prompt": "é"}


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://here", "http://", "http://here:many", "http://hére"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ParameterError, match="base_url"):
        Client(url)


def test_a_key_with_a_line_break_is_refused_and_not_shown() -> None:
    with pytest.raises(ParameterError, match="api_key") as caught:
        Client("http://here", "secret\r\nX-Other: 1")
    assert "secret" not in str(caught.value)
