"""A client of HTTP/1.1 that costs little: one request, its answer, and when the parts of it came.

Connections are kept and used again. Nothing here knows a load; ``shoal.bench.serve.load`` does.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from shoal.bench.serve.wire import EventTimes, ResponseReader, WireError
from shoal.errors import ParameterError

_SHOWN_CHARACTERS = 200  # of a server's error


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request. Times are in seconds, ``start`` on ``time.perf_counter``'s clock, all others from it.

    ``itls``: from one event with text to the next. Where ``error`` says something the request failed, and only ``start`` and
    ``latency`` mean anything; ``status`` is 0 if there was no answer at all.
    """

    start: float
    latency: float
    error: str = ""
    status: int = 0
    prompt_len: int = 0
    output_len: int = 0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)

    @property
    def success(self) -> bool:
        """Whether all of the answer came, and it was no error."""
        return not self.error

    @property
    def tpot(self) -> float:
        """Seconds for each token after the first; 0 if there is none."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


class Reply:
    """One answer as it comes in."""

    def __init__(self) -> None:
        self.start = self.end = time.perf_counter()
        self.reader = ResponseReader()
        self.events: EventTimes | None = None  # of a stream
        self.body = bytearray()  # of anything else

    @property
    def latency(self) -> float:
        """Seconds from the request to the end."""
        return self.end - self.start

    @property
    def nothing_came(self) -> bool:
        """Whether there was no answer at all."""
        return self.end == self.start

    def feed(self, data: bytes) -> bool:
        """Bytes from the connection; whether the answer is complete. Raises WireError."""
        self.end = time.perf_counter()
        part = self.reader.feed(data)
        if self.events is None and self.reader.headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            self.events = EventTimes()
        if self.events is None:
            self.body += part
        elif part:
            self.events.feed(part, self.end)
        return self.reader.complete

    def json(self) -> dict[str, Any]:
        """The object in the body; empty if there is none."""
        try:
            found = json.loads(self.body)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


class _Connection(asyncio.Protocol):
    """One connection, which carries one request after the other."""

    def __init__(self) -> None:
        self.used = False
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._done: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        """Whether it can still be used."""
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, request: bytes, reply: Reply) -> None:
        """Send ``request`` and fill in ``reply``. Raises ConnectionError or WireError."""
        assert self._transport is not None, "sent before it was connected"
        self._reply = reply
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self.used, self._reply = True, None

    def close(self) -> None:
        """End it at once; what is under way on it is lost."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        if self._reply is None:  # nothing was asked
            self.close()
            return
        try:
            complete = self._reply.feed(data)
        except WireError as error:
            self._finish(error)
            self.close()
        else:
            if complete:
                self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        whole = self._reply is not None and self._reply.reader.close()
        self._transport = None
        self._finish(None if whole else ConnectionError("the connection ended before the answer was whole"))

    def _finish(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)


class Client:
    """Requests to one server, on as many connections as there are requests at once. An async context manager.

    Raises ParameterError for a ``base_url`` that is no HTTP address.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or not base_url.isascii():
            raise ParameterError("base_url", base_url, "an address such as http://127.0.0.1:8000")
        self._host, self._base_path = parts.hostname, parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nUser-Agent: shoal-bench\r\nAccept: */*\r\n"
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable():
                raise ParameterError("api_key", "...", "printable ASCII")
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[_Connection] = []

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of a request, ready to be sent."""
        head = f"{method} {self._base_path}{path} HTTP/1.1\r\n{self._headers}"
        if body is None:
            return f"{head}\r\n".encode("ascii")
        content = json.dumps(body).encode("utf-8")
        return (
            f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode("ascii") + content
        )

    async def send(self, request: bytes) -> Reply:
        """The answer. Whoever cancels this ends the connection. Raises OSError or WireError where there is no whole answer."""
        reply = Reply()
        while True:
            connection = await self._connection()
            again = connection.used
            try:
                await connection.send(request, reply)
                break
            except BaseException as error:
                connection.close()
                # A server may close a connection that has been idle just when it is used again.
                if not (again and isinstance(error, ConnectionError) and reply.nothing_came):
                    raise
        if reply.reader.keep_alive and connection.open:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    async def generate(self, request: bytes, prompt_len: int) -> Outcome:
        """What comes of a request for a completion; ``prompt_len`` counts unless the server says how many tokens there were."""
        start = time.perf_counter()
        try:
            reply = await self.send(request)
        except (OSError, WireError) as error:
            return Outcome(start, time.perf_counter() - start, error=str(error) or type(error).__name__)
        return outcome_of(reply, prompt_len)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await asyncio.sleep(0)  # the loop closes what was aborted

    def close(self) -> None:
        """End the connections that are idle."""
        while self._idle:
            self._idle.pop().close()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return made


def outcome_of(reply: Reply, prompt_len: int) -> Outcome:
    """An answer to a request for a completion, streamed or not."""
    if reply.reader.status != 200:
        shown = _error_of(reply.json()) or reply.body[:_SHOWN_CHARACTERS].decode("utf-8", "replace")
        return _failed(reply, f"HTTP {reply.reader.status}: {shown}".rstrip(": "))
    if reply.events is None:
        return _of_body(reply, prompt_len)
    return _of_stream(reply, reply.events, prompt_len)


def _of_body(reply: Reply, prompt_len: int) -> Outcome:
    body = reply.json()
    if not body.get("choices"):
        return _failed(reply, "HTTP 200, but no choices in the body")
    usage = body.get("usage") or {}
    return Outcome(
        start=reply.start,
        latency=reply.latency,
        status=200,
        prompt_len=usage.get("prompt_tokens", prompt_len),
        output_len=usage.get("completion_tokens", 0),
        ttft=reply.latency,
    )


def _of_stream(reply: Reply, events: EventTimes, prompt_len: int) -> Outcome:
    last = events.last
    error = next((said for event in last if (said := _error_of(event))), "")
    times = events.text_times
    if error or not events.done or not times:
        return _failed(reply, error or "the stream ended without " + ("[DONE]" if times else "an event"))
    usage: dict[str, Any] = next((event["usage"] for event in reversed(last) if event.get("usage")), {})
    return Outcome(
        start=reply.start,
        latency=reply.latency,
        status=200,
        prompt_len=usage.get("prompt_tokens", prompt_len),
        output_len=usage.get("completion_tokens", len(times)),
        ttft=times[0] - reply.start,
        itls=[after - before for before, after in pairwise(times)],
    )


def _failed(reply: Reply, error: str) -> Outcome:
    return Outcome(reply.start, reply.latency, error=error, status=reply.reader.status)


def _error_of(body: dict[str, Any]) -> str:
    """What an error body says; empty if it is none."""
    error = body.get("error")
    if isinstance(error, dict):
        error = error.get("message") or json.dumps(error)
    return str(error)[:_SHOWN_CHARACTERS] if error else ""
