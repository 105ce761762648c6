"""The one endpoint in front of the replicas: checks requests as the server does, and hands them on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import msgspec

from shoal.openai.schema import APIError
from shoal.openai.stream import sse
from shoal.ray.exposition import Totals
from shoal.ray.replica import OWNER, SECRET, name_of
from shoal.ray.replicas import Replicas, Upstream, none_ready
from shoal.ray.routing import prompt_keys
from shoal.ray.upstream import Connection, Headers
from shoal.server.app import body_of_error
from shoal.server.front import Front, behind
from shoal.server.limits import refuse
from shoal.server.replies import Health
from shoal.server.service import unavailable
from shoal.server.streams import ClientGoneError, unless_gone

_PATIENCE = 3.0  # seconds for a replica to appear
_SEARCH_SECONDS = 12.0  # then no other one is tried: those of machines that have vanished take five each
_RETRY_SECONDS = b"5"
_JSON, _PROMETHEUS = b"application/json", b"text/plain; version=0.0.4; charset=utf-8"
# Of each replica, of the next server, or of the connection alone.
_NOT_PASSED = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"date", b"server"}
_NOT_ASKED = _NOT_PASSED | {
    b"host",
    b"origin",
    b"authorization",
    b"x-api-key",
    b"content-length",
    b"x-request-id",
    b"expect",
}
_NOT_TOLD = _NOT_PASSED | {b"x-request-id"}  # Ray Serve's proxy adds it
_NOT_HERE = ("/slots",)
_UNACCEPTABLE = 1003  # of a WebSocket's close codes (RFC 6455)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How requests find their replica: see ``routing.choose`` and ``routing.prompt_keys``. ``secret`` is what replicas ask for."""

    spill_above: int
    prefix_bytes: int
    secret: str = field(repr=False)


class Ingress:
    """What Ray Serve's proxies call. ``engines`` is the handle of the replicas."""

    def __init__(self, engines: Any, front: Front, routing: Routing) -> None:
        replicas = Replicas(engines, routing.spill_above, name_of(routing.secret))
        self._app = Mounted(behind(front, Relay(replicas, routing)))

    def __serve_build_asgi_app__(self) -> Mounted:
        return self._app


class Mounted:
    """The app below any prefix of the route, with one X-Request-Id in its answers: that of Ray Serve."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, or the app's life."""
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
            scope = {**scope, "path": path, "root_path": ""}
        await self._app(scope, receive, lambda message: send(_without_id(message)))


def _without_id(message: Message) -> Message:
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [header for header in message["headers"] if header[0].lower() != b"x-request-id"]}


class Relay:
    """An ASGI app that has a replica answer, but for what is said of all of them. A body must come as one message; WebSockets are
    refused."""

    def __init__(self, replicas: Replicas, routing: Routing) -> None:
        self._replicas, self._routing = replicas, routing
        self._totals = Totals()
        self._own = {"/health": self._health, "/live": self._live, "/metrics": self._metrics}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request, or the app's life."""
        if scope["type"] == "lifespan":
            await self._live_on(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _UNACCEPTABLE})
            return
        try:
            with suppress(ClientGoneError):
                await self._answer(scope, receive, send)
        except APIError as error:
            headers = {"retry-after": _RETRY_SECONDS.decode()} if error.status == 503 else None
            await refuse(scope, receive, send, error, body_of_error, headers)

    async def _live_on(self, receive: Receive, send: Send) -> None:
        await receive()
        watching = asyncio.ensure_future(self._replicas.watch())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        watching.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in _NOT_HERE:
            raise APIError(f"{path}: each replica has its own, which are not for the outside", status=404)
        if path in self._own and scope["method"] in ("GET", "HEAD"):
            await self._own[path](scope, send)
            return
        body = (await receive()).get("body", b"")
        await unless_gone(receive, self._relay(scope, body, send))

    async def _health(self, scope: Message, send: Send) -> None:
        await _send_json(
            scope, send, 200 if len(self._replicas) else 503, Health("ok" if self._replicas else "loading")
        )

    async def _live(self, scope: Message, send: Send) -> None:
        await _send_json(scope, send, 200, Health("ok" if self._replicas else "loading"))

    async def _metrics(self, scope: Message, send: Send) -> None:
        try:
            texts = dict(await self._replicas.ask_all("metrics"))
        except TimeoutError:
            raise unavailable("a replica does not answer") from None
        await _send(scope, send, 200, [(b"content-type", _PROMETHEUS)], self._totals.exposition(texts).encode())

    # -- with a replica ------------------------------------------------------------------------------------------------

    async def _relay(self, scope: Message, body: bytes, send: Send) -> None:
        keys = prompt_keys(scope["path"], body, self._routing.prefix_bytes)
        replica, connection = await self._connected(keys)
        try:
            await self._ask(scope, body, connection)
            await _pass_on(scope, connection, send)
        except OSError as error:
            raise _gone() from error
        finally:
            replica.in_flight -= 1
            replica.pool.give_back(connection)

    async def _connected(self, keys: Sequence[bytes]) -> tuple[Upstream, Connection]:
        """A connection to the replica for these keys, which counts it from now on. Raises APIError (503)."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while True:
            replica = await self._replicas.choose(keys, begun + _PATIENCE)
            replica.in_flight += 1
            try:
                return replica, await replica.pool.take()
            except OSError:  # it has just ended: another one takes the request, of which nothing was sent
                replica.in_flight -= 1
                self._replicas.lose(replica)
                if loop.time() > begun + _SEARCH_SECONDS:
                    raise none_ready() from None
            except BaseException:
                replica.in_flight -= 1
                raise

    async def _ask(self, scope: Message, body: bytes, connection: Connection) -> None:
        headers = [header for header in scope["headers"] if _passes(header[0])]
        state = scope["state"]
        headers += [
            (b"host", b"replica"),
            (b"x-request-id", state["request_id"].encode()),
            (SECRET, self._routing.secret.encode()),
            (OWNER, state["owner"].encode()),
        ]
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await connection.ask(method, _target(scope), headers, body)


def _passes(name: bytes) -> bool:
    return name not in _NOT_ASKED and not name.startswith(b"x-shoal-")


def _target(scope: Message) -> bytes:
    query = scope.get("query_string", b"")
    path = quote(scope["path"]).encode()
    return b"%s?%s" % (path, query) if query else path


async def _pass_on(scope: Message, connection: Connection, send: Send) -> None:
    headers = [header for header in connection.headers if header[0] not in _NOT_TOLD]
    if dict(headers).get(b"content-type", b"").startswith(b"text/event-stream"):
        await _pass_events_on(scope, connection, headers, send)
    else:  # whole, so that a replica that dies in the middle is an error like any other
        body = b"".join([piece async for piece in connection.pieces()])
        await _send(scope, send, connection.status, headers, body)


async def _pass_events_on(scope: Message, connection: Connection, headers: Headers, send: Send) -> None:
    """Whole events alone: behind them an error can still be told. The stream begins with the first of them."""
    start = {"type": "http.response.start", "status": connection.status, "headers": headers}
    begun, rest = False, b""
    try:
        async for piece in connection.pieces():
            whole, end, rest = (rest + piece).rpartition(b"\n\n")
            if end:
                await _begin(send, start, begun)
                begun = True
                await send({"type": "http.response.body", "body": whole + end, "more_body": True})
    except OSError:
        if not begun:
            raise
        rest = failure_event(scope["path"])
    await _begin(send, start, begun)
    await send({"type": "http.response.body", "body": rest, "more_body": False})


async def _begin(send: Send, start: Message, begun: bool) -> None:
    if not begun:
        await send(start)


def failure_event(path: str) -> bytes:
    """The end of a stream whose replica is gone, as the clients of this path read it."""
    error = _gone()
    if path.startswith("/v1/messages"):
        return sse(body_of_error(path, error), "error")
    if path == "/v1/responses":
        about = {"code": "server_error", "message": str(error), "param": None}
        return sse(msgspec.json.encode({"type": "error", **about, "error": {"type": error.kind, **about}}), "error")
    return sse(body_of_error(path, error))


def _gone() -> APIError:
    return unavailable("the replica that was at this request is gone; it may be sent again")


async def _send_json(scope: Message, send: Send, status: int, content: Any) -> None:
    await _send(scope, send, status, [(b"content-type", _JSON)], msgspec.json.encode(content))


async def _send(scope: Message, send: Send, status: int, headers: Headers, body: bytes) -> None:
    headers = [
        *(header for header in headers if header[0] != b"content-length"),
        (b"content-length", b"%d" % len(body)),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body, "more_body": False})
