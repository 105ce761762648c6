"""The relay in front of real servers, with Ray Serve left out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from shoal.ray.ingress import Relay, Routing
from shoal.ray.replica import State, name_of
from shoal.ray.replicas import Replicas
from shoal.server.front import Front, behind
from tests.server.live import echo, live

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
