"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: on heads, on time, on pipelines, and on clients that do not read.

A connection is idle, or in the head of a request, or in its body. One timer runs for whichever it is:

    head   from the first byte (of a new connection: from its start) to the end of the headers
    body   as long as no byte of it comes, and from its start, with a second more for so many bytes

A refusal is written where no answer is under way, and then the connection is closed *gently*: our half at once, the client's when
it has stopped sending or a time is up. Closing both at once would send a reset, and the client might never see why.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from shoal.openai.schema import APIError
from shoal.server.errors import openai_body

_CLOSE = (b"connection", b"close")
_UNSENT_BYTES = 64 << 10  # in the kernel, for one connection; uvicorn's own buffer is as large


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one connection may take.

    ``head_bytes`` holds for the request line and the headers together, trailers included, ``headers`` for their number.
    A body may pause for ``body_idle_seconds`` and take ``body_seconds`` in all, a second more for every ``body_rate`` bytes.
    ``stall_seconds``: how long a client that was sent something may take none of it. ``closing_seconds``: how long a client may go on
    sending after it was refused. ``pipelined`` requests may be under way at a time.
    """

    head_bytes: int = 16 << 10
    headers: int = 100
    head_seconds: float = 10.0
    body_idle_seconds: float = 30.0
    body_seconds: float = 60.0
    body_rate: int = 16 << 10
    keep_alive_seconds: float = 75.0
    stall_seconds: float = 30.0
    closing_seconds: float = 2.0
    pipelined: int = 8


class State(ServerState):
    """What all connections of a server share; ``draining``: each closes after the answer that it is at."""

    def __init__(self) -> None:
        super().__init__()
        self.draining = False


def protocol_with(bounds: Bounds) -> type[BoundedProtocol]:
    """The protocol under these bounds, for ``uvicorn.Config(http=...)``: uvicorn makes the instances itself."""
    return type("BoundedProtocol", (BoundedProtocol,), {"bounds": bounds})


class _Phase(enum.Enum):
    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class _GentleTransport:
    """A transport whose ``close`` is what ``on_close`` does with it; everything else is as it was."""

    def __init__(self, transport: asyncio.Transport, on_close: Callable[[], None]) -> None:
        self.raw = transport
        self._on_close = on_close
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._on_close()

    def is_closing(self) -> bool:
        return self._closing or self.raw.is_closing()


class _Parser(httptools.HttpRequestParser):
    """httptools' parser. It takes what follows an offer to upgrade for another protocol: the body too. Such a request is parsed again
    without the offer, which Java's HTTP client makes with every first request."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__(protocol)
        with suppress(AttributeError):  # httptools before 0.6.3, which needs no leave
            self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._protocol = protocol

    def feed_data(self, data: Any) -> None:
        """What came over the connection."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            again = self._protocol.head_without_offer() + bytes(data[offer.args[0] :])
            self._protocol.parser = _Parser(self._protocol)
            self._protocol.parser.feed_data(again)


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    bounds: ClassVar[Bounds] = Bounds()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state, _loop=_loop)
        self.timeout_keep_alive = self.bounds.keep_alive_seconds  # type: ignore[assignment]  # for call_later
        self.parser = _Parser(self)
        self._phase = _Phase.IDLE
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._unfinished: list[RequestResponseCycle] = []
        self._keep_alive = False
        self._refusal: APIError | None = None
        self._head_size = 0
        self._num_headers = 0
        self._unseen = 0  # bytes since the parser last had something to show for them
        self._body_size = 0
        self._body_began = 0.0
        self._body_grew = 0.0

    # What the transport calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Nobody holds a connection open without asking for something."""
        _keep_little_unsent(transport)
        super().connection_made(cast(asyncio.Transport, _GentleTransport(transport, self._close)))
        self._timer = self.loop.call_later(self.bounds.head_seconds, self._head_overdue)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells every request that is not answered; uvicorn tells only the last one that came in."""
        for cycle in self._unanswered():
            _disconnect(cycle)
        self._stop_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """What comes after a refusal is dropped."""
        if self.transport.is_closing():
            return
        self._unseen += len(data)
        if self._phase is _Phase.IDLE:
            self._phase = _Phase.HEAD
        super().data_received(data)
        # The parser keeps an unfinished header to itself, and says nothing of what stands beside the chunks of a body.
        if self._unseen > self.bounds.head_bytes:
            self._refuse(self._head_too_large())
        self._start_timer()

    def pause_writing(self) -> None:
        """More is waiting for the client than we keep for it."""
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        """The client has read."""
        if not self.transport.is_closing():
            self._stop_stall_timer()
        super().resume_writing()

    # What the parser calls --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request line begins."""
        super().on_message_begin()
        self._phase = _Phase.HEAD
        self._head_size = self._num_headers = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or after the body a trailer: none of those can still mean anything."""
        self._num_headers += 1
        self._count_head(len(name) + len(value) + len(": \r\n"))
        if self._num_headers > self.bounds.headers:
            self._stop_parsing(_error(431, f"a request may have {self.bounds.headers} headers"))
        if self._phase is _Phase.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole, and the app is called. Until the body is whole too, an answer ends the connection."""
        if self.parser.get_method() == b"CONNECT":
            self._stop_parsing(_error(400, "this is no proxy"))
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._unfinished = [*self._unanswered(), self.cycle]
        if len(self._unfinished) > self.bounds.pipelined:
            self._stop_parsing(_error(400, f"{self.bounds.pipelined} requests may be under way on one connection"))
        self._keep_alive, self.cycle.keep_alive = self.cycle.keep_alive, False
        self.cycle.default_headers = [*self.server_state.default_headers, _CLOSE]
        self._stop_timer()
        self._phase = _Phase.BODY
        self._unseen = self._body_size = 0
        self._body_began = self._body_grew = self.loop.time()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unseen = 0
        self._body_size += len(body)
        self._body_grew = self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole."""
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._stop_timer()
        self._phase = _Phase.IDLE
        self._unseen = 0
        if not self.cycle.response_started and not self._draining:
            self.cycle.keep_alive = self._keep_alive
            self.cycle.default_headers = self.server_state.default_headers

    # What uvicorn calls -----------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """The next request may have begun to come in."""
        super().on_response_complete()
        self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """The parser gave up, or one of the callbacks above made it."""
        self._refuse(self._refusal or _error(400, "malformed HTTP request"))

    def shutdown(self) -> None:
        """The server drains: an idle connection is closed. A request whose head is coming in still gets its answer."""
        if self._phase is not _Phase.HEAD:
            super().shutdown()

    # What the parser above calls --------------------------------------------------------------------------------------

    def head_without_offer(self) -> bytes:
        """The head that was just parsed, to be parsed again as that of a request which offers no other protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in (b"upgrade", b"connection")]
        tokens = b",".join(value.lower() for name, value in self.headers if name == b"connection").split(b",")
        if b"close" in [token.strip() for token in tokens]:
            lines.append(b"connection: close")
        return b"\r\n".join([*lines, b"", b""])

    # Time -------------------------------------------------------------------------------------------------------------

    def _start_timer(self) -> None:
        if self._timer is not None or self.transport.is_closing():
            return
        if self._phase is _Phase.BODY:
            self._check_body()
        elif self._phase is _Phase.HEAD and not self._unanswered():
            self._timer = self.loop.call_later(self.bounds.head_seconds, self._head_overdue)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_overdue(self) -> None:
        if self._phase is _Phase.IDLE:  # not a byte so far: browsers open connections in advance
            self.transport.close()
        else:
            self._refuse(_error(408, f"the headers did not come within {self.bounds.head_seconds:g} s"))

    def _check_body(self) -> None:
        bounds, now = self.bounds, self.loop.time()
        if self.flow.read_paused:  # it is us who do not read
            self._body_began = self._body_grew = now
        overdue = min(
            self._body_grew + bounds.body_idle_seconds,
            self._body_began + bounds.body_seconds + self._body_size / bounds.body_rate,
        )
        if now < overdue:
            self._timer = self.loop.call_at(overdue, self._check_body)
        else:
            self._refuse(_error(408, "the body came too slowly"))

    def _watch_stall(self, before: int | None = None) -> None:
        """Look again in a while; ``before`` is how much was waiting the last time."""
        waiting = self.transport.get_write_buffer_size()
        if before is not None and waiting >= before:
            self.transport.abort()
        else:
            self._stall_timer = self.loop.call_later(self.bounds.stall_seconds, self._watch_stall, waiting)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    # Refusals ---------------------------------------------------------------------------------------------------------

    @property
    def _draining(self) -> bool:
        return isinstance(self.server_state, State) and self.server_state.draining

    def _unanswered(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._unfinished if not cycle.response_complete]

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self.bounds.head_bytes:
            self._stop_parsing(self._head_too_large())

    def _head_too_large(self) -> APIError:
        return _error(431, f"the request line and headers may take {self.bounds.head_bytes} bytes")

    def _stop_parsing(self, refusal: APIError) -> None:
        """From a callback of the parser: it stops, and ``send_400_response`` is called."""
        self._refusal = refusal
        raise ValueError(str(refusal))

    def _refuse(self, error: APIError) -> None:
        if self.transport.is_closing():
            return
        unanswered = self._unanswered()
        answerable = not unanswered or (unanswered == [self.cycle] and self._phase is _Phase.BODY)
        if not answerable or any(cycle.response_started for cycle in unanswered):
            self.transport.abort()  # another answer is due first, or half of this one is out
            return
        for cycle in unanswered:
            _disconnect(cycle)
        self.transport.write(self._response(error))
        self.transport.close()

    def _response(self, error: APIError) -> bytes:
        body = openai_body("", error)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            _CLOSE,
            (b"x-request-id", uuid.uuid4().hex.encode()),
        ]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        return STATUS_LINE[error.status] + lines + b"\r\n" + body

    def _close(self) -> None:
        transport = cast(_GentleTransport, self.transport).raw
        self._stop_timer()
        self._stop_stall_timer()
        self._watch_stall()  # what is still to be sent has its time, as ever
        if self._phase is _Phase.IDLE or not transport.can_write_eof():
            transport.close()
            return
        transport.write_eof()
        transport.resume_reading()
        self._timer = self.loop.call_later(self.bounds.closing_seconds, transport.close)


def _keep_little_unsent(transport: asyncio.Transport) -> None:
    """The kernel would take megabytes for a client that does not read, and tell of one that reads slowly once in many seconds."""
    connection = transport.get_extra_info("socket")
    if connection.family in (socket.AF_INET, socket.AF_INET6) and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


def _disconnect(cycle: RequestResponseCycle) -> None:
    """What the app sends is dropped from now on, and what it receives is http.disconnect."""
    cycle.disconnected = True
    cycle.message_event.set()


def _error(status: int, message: str) -> APIError:
    return APIError(message, status=status)
