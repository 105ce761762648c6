"""Clients that go away, stop reading, come too many at once; and an engine that fails."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.llm import LLM
from tests.server.conftest import CONFIG
from tests.server.running import Running, running

LONG = {"model": "tiny", "prompt": "a long story", "max_tokens": 240, "ignore_eos": True}


def until(condition: Callable[[], bool]) -> None:
    """Wait for it; a test that waits in vain is ended by the limit of all tests."""
    while not condition():
        time.sleep(0.005)


def idle(server: Running) -> bool:
    """Whether nothing is left of any request, anywhere."""
    stats = server.llm.engine.stats()
    pages = stats.free_pages == stats.num_pages or server.llm.config.enable_prefix_caching
    room = server.service.room
    return not (stats.running or stats.waiting or room.waiting_tokens or room._requests) and pages


def connected(server: Running, body: dict[str, Any]) -> socket.socket:
    """A socket with a request under way."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
    client = socket.create_connection((host, int(port)))
    client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_takes_its_request_along(server: Running, stream: bool) -> None:
    client = connected(server, LONG | {"stream": stream})
    until(lambda: server.llm.engine.stats().running == 1)
    client.close()
    until(lambda: idle(server))
    assert server.service.metrics.ended["abort"] >= 1


def test_one_that_waits_in_line_goes_too(server: Running) -> None:
    clients = [connected(server, LONG | {"stream": number % 2 == 0}) for number in range(20)]
    until(lambda: server.llm.engine.stats().waiting >= 5)
    for client in clients:
        client.close()
    until(lambda: idle(server))


def test_two_thousand_aborts_at_any_moment_leave_nothing_behind(server: Running) -> None:
    rng = random.Random(7)

    async def once(client: httpx.AsyncClient) -> None:
        body = LONG | {"stream": rng.random() < 0.5, "max_tokens": rng.randrange(1, 30)}
        try:
            async with asyncio.timeout(rng.random() * 0.1):
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for _ in response.aiter_bytes():
                        if rng.random() < 0.1:
                            return
        except (TimeoutError, httpx.HTTPError):
            pass

    async def worker(client: httpx.AsyncClient) -> None:
        for _ in range(63):
            await once(client)

    async def all_of_them() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits, verify=False) as client:
            await asyncio.gather(*(worker(client) for _ in range(32)))

    asyncio.run(all_of_them())
    until(lambda: idle(server))
    assert server.get("/health").status_code == 200


def test_a_stream_that_nobody_reads_is_given_up(tiny_path: Path) -> None:
    load = lambda: LLM(tiny_path, config=CONFIG)  # noqa: E731
    with running(load, CONFIG, stall_timeout=0.2) as server:
        clients = []
        for _ in range(8):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.close()
            clients.append(connected(server, LONG | {"stream": True, "n": 8, "logprobs": 20}))
        until(lambda: idle(server))
        for client in clients:
            client.close()


def test_an_idle_stream_gets_comments(tiny_path: Path) -> None:
    with running(lambda: LLM(tiny_path, config=CONFIG), CONFIG, keep_alive=0.05) as server:
        blockers = [connected(server, LONG) for _ in range(24)]
        until(lambda: server.llm.engine.stats().waiting > 8)
        with httpx.stream(
            "POST", server.url + "/v1/completions", json=LONG | {"stream": True}, timeout=None
        ) as response:
            lines = response.iter_lines()
            assert next(lines) == ": keep-alive"
        for blocker in blockers:
            blocker.close()
        until(lambda: idle(server))


def test_too_many_are_told_to_come_back(tiny_path: Path) -> None:
    with running(lambda: LLM(tiny_path, config=CONFIG), CONFIG, max_waiting=2) as server:
        clients = [connected(server, LONG) for _ in range(10)]
        until(lambda: server.service.room._requests == 10)
        refused = server.post("/v1/completions", LONG)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "shoal:admission_rejections_total" in server.get("/metrics").text
        for client in clients:
            client.close()
        until(lambda: idle(server))
        assert server.post("/v1/completions", LONG | {"max_tokens": 1}).status_code == 200


def test_a_request_of_many_prompts_takes_one_place(tiny_path: Path) -> None:
    with running(lambda: LLM(tiny_path, config=CONFIG), CONFIG, max_waiting=0) as server:
        many = [f"text {number}" for number in range(40)]
        assert len(server.post("/v1/embeddings", {"input": many}).json()["data"]) == 40
        answer = server.post("/v1/completions", {"prompt": many, "max_tokens": 2, "ignore_eos": True}).json()
        assert len(answer["choices"]) == 40
        until(lambda: idle(server))


def test_prompts_that_wait_have_a_limit(tiny_path: Path) -> None:
    with running(lambda: LLM(tiny_path, config=CONFIG), CONFIG, max_waiting_tokens=300) as server:
        clients = [connected(server, LONG) for _ in range(8)]
        until(lambda: server.llm.engine.stats().running == 8)
        until(lambda: server.service.room.waiting_tokens == 0)
        clients += [connected(server, {"model": "tiny", "prompt": "x" * 200, "max_tokens": 9})]
        until(lambda: server.service.room.waiting_tokens == 200)
        assert server.post("/v1/completions", {"prompt": "y" * 200, "max_tokens": 9}).status_code == 429
        for client in clients:
            client.close()
        until(lambda: idle(server))


def test_a_model_that_cannot_be_loaded_is_no_server() -> None:
    def load() -> LLM:
        raise MemoryError("there is none")

    with running(load, CONFIG) as server:
        health = server.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed", "error": "there is none"})
        assert server.get("/live").status_code == 503
        refused = server.post("/v1/completions", LONG)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers


def test_while_it_drains_new_requests_are_refused_and_old_ones_end(tiny_path: Path) -> None:
    with (
        running(lambda: LLM(tiny_path, config=CONFIG), CONFIG) as server,
        httpx.stream("POST", server.url + "/v1/completions", json=LONG | {"stream": True}, timeout=None) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.service.draining = True
        assert server.get("/health").json() == {"status": "draining"}
        assert server.get("/live").status_code == 200
        assert server.post("/v1/completions", LONG).status_code == 503
        assert list(lines)[-2] == "data: [DONE]"


def test_an_engine_that_ends_fails_everybody_by_name(tiny_path: Path) -> None:
    with running(lambda: LLM(tiny_path, config=CONFIG), CONFIG) as server:
        client = connected(server, LONG)
        until(lambda: server.llm.engine.stats().running == 1)

        def broken() -> None:
            raise RuntimeError("out of order")

        server.service.worker._observer.stepped = lambda *how: broken()  # type: ignore[method-assign]
        answer = b""
        while b"out of order" not in answer:
            more = client.recv(65536)
            assert more, answer
            answer += more
        assert answer.startswith(b"HTTP/1.1 503")
        client.close()
        until(lambda: server.service.worker.state == "failed")
        assert server.get("/health").json() == {"status": "failed", "error": "out of order"}
        assert server.get("/live").status_code == 503
        assert server.post("/v1/completions", LONG).status_code == 503


def test_a_request_that_is_late_ends_with_an_error(tiny_path: Path) -> None:
    with running(lambda: LLM(tiny_path, config=CONFIG), CONFIG, request_timeout=0.05) as server:
        late = server.post("/v1/completions", LONG | {"n": 8})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
        streamed = server.post("/v1/completions", LONG | {"n": 8, "stream": True})
        assert streamed.status_code == 200
        last = [line for line in streamed.text.split("\n") if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        many = server.post("/v1/completions", LONG | {"prompt": ["one", "two", "three"], "n": 8, "stream": True})
        ends = [json.loads(line.removeprefix("data: ")) for line in many.text.split("\n") if line]
        assert [index for index, event in enumerate(ends) if "error" in event] == [len(ends) - 1]
        until(lambda: idle(server))
