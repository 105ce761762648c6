"""The relay in front of real servers, with Ray Serve left out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from shoal.ray import ingress
from shoal.ray.ingress import Mounted, Relay, Routing
from shoal.ray.replica import State, name_of
from shoal.ray.replicas import Replicas, Upstream
from shoal.ray.routing import prompt_keys, ranked
from shoal.server.front import Front, behind
from tests.server.live import echo, live

NOBODY = 1  # a port on which nobody listens
ROUTING = Routing(spill_above=8, prefix_bytes=256, secret="a secret")


def replicas_at(*ports: int) -> Replicas:
    """Those called a, b ... that listen there; nobody asks them how they are."""
    app = name_of(ROUTING.secret)
    replicas = Replicas(None, ROUTING.spill_above, app)
    names = "abcdefgh"[: len(ports)]
    replicas.update([State(name, "127.0.0.1", port, 0, "ok", app) for name, port in zip(names, ports, strict=True)], {})
    return replicas


async def posted(relay: Relay, body: bytes, *headers: tuple[bytes, bytes]) -> tuple[int, dict[str, Any]]:
    """Status and JSON of the answer."""
    sent: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
    got: list[Any] = []

    async def receive() -> Any:
        return sent.pop() if sent else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        got.append(message)

    own = [(b"host", b"h"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions"}
    await behind(Front(), relay)(scope | {"headers": [*own, *headers]}, receive, send)
    return got[0]["status"], json.loads(b"".join(message["body"] for message in got[1:]))


def test_a_secret_is_not_shown() -> None:
    assert ROUTING.secret not in repr(ROUTING)


def test_what_is_between_a_client_and_its_server_stays_there() -> None:
    async def work(port: int) -> None:
        replicas = replicas_at(port)
        relay = Relay(replicas, ROUTING)
        status, seen = await posted(relay, b"{}", (b"expect", b"100-continue"), (b"x-shoal-owner", b"me"), (b"x", b"y"))
        assert (status, seen["size"]) == (200, 2)
        assert sorted(seen["headers"]) == sorted(
            ["x", "host", "content-type", "content-length", "x-request-id", "x-shoal-secret", "x-shoal-owner"]
        )
        assert (await posted(relay, b"{ }"))[1]["size"] == 3
        replicas.update([], {})  # closes the connections
        await asyncio.sleep(0)

    with live(echo) as port:
        asyncio.run(work(port))


def body_for(name: str) -> bytes:
    """Of a request that goes to this one of the replicas a and b."""
    bodies = [b'{"prompt": "%d"}' % number for number in range(64)]
    return next(body for body in bodies if ranked(prompt_keys("/v1/completions", body)[0], "ab")[0] == name)


def test_a_replica_that_cannot_be_reached_in_time_leaves_the_request_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingress, "_PATIENCE", -1.0)  # what a vanished machine takes is more than that

    async def work(port: int) -> None:
        replicas = replicas_at(NOBODY, port)
        status, _ = await posted(Relay(replicas, ROUTING), body_for("a"))
        assert (status, len(replicas)) == (200, 1)
        replicas.update([], {})
        await asyncio.sleep(0)

    with live(echo) as port:
        asyncio.run(work(port))


def test_when_none_can_be_reached_the_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "_PATIENCE", 0.0)

    async def work() -> None:
        replicas = replicas_at(NOBODY, NOBODY)
        status, told = await posted(Relay(replicas, ROUTING), b"{}")
        assert (status, told["error"]["message"], len(replicas)) == (503, "no replica of the model is ready", 0)

    asyncio.run(work())


def test_one_that_is_heard_of_but_never_reached_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "_SEARCH_SECONDS", 0.05)
    lost: list[Upstream] = []

    async def work() -> None:
        replicas = replicas_at(NOBODY)
        monkeypatch.setattr(replicas, "lose", lost.append)  # it is back at once
        assert (await posted(Relay(replicas, ROUTING), b"{}"))[0] == 503

    asyncio.run(work())
    assert {gone.in_flight for gone in lost} == {0}


def test_a_websocket_is_refused() -> None:
    async def work() -> None:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        app = Mounted(behind(Front(), Relay(replicas_at(), ROUTING)))
        await app({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
        assert sent == [{"type": "websocket.close", "code": 1003}]

    asyncio.run(work())
