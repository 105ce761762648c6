"""From an address to an exit code: listening, signals, and an end that loses nothing.

The first SIGTERM or SIGINT drains: new work is refused by the app, requests under way have ``drain_seconds``, the exit code is 0.
The second ends the process at once, with 128 and the signal's number: 130 or 143. (uvicorn itself would raise the first one again
after the end, and ignore a second SIGTERM.)
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from shoal.errors import EngineError, ParameterError
from shoal.server.protocol import Bounds, State, protocol_with
from shoal.system.streams import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where to listen (``uds``: a Unix socket, then ``host`` and ``port`` say nothing; port 0: any), and for how long to drain."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    drain_seconds: float = 30.0
    bounds: Bounds = field(default_factory=Bounds)


def serve(
    app: ASGIApp,
    serving: Serving,
    *,
    on_drain: Callable[[], None] | None = None,
    ready: Callable[[str], None] | None = None,
) -> int:
    """Serve ``app`` until a signal, and return the exit code. See ``Server``."""
    return Server(app, serving, on_drain=on_drain).main(ready)


def announce(address: str) -> None:
    """What people are told once connections are accepted."""
    say(f"listening on {address}")


class Server(uvicorn.Server):
    """A uvicorn server of one process. ``on_drain`` is called in the event loop when the end begins."""

    def __init__(self, app: ASGIApp, serving: Serving, *, on_drain: Callable[[], None] | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_with(serving.bounds),
                ws="none",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
            )
        )
        self.server_state = State()
        self._serving = serving
        self._on_drain = on_drain
        self._code = 0
        self._ready: Callable[[str], None] = announce
        self._address = ""

    def main(self, ready: Callable[[str], None] | None = None) -> int:
        """Listen, say so (``ready`` gets the address), serve, drain. Returns the exit code: 0, or what ``stop`` was given.

        Raises ParameterError where it cannot listen.
        """
        self._ready = ready or announce
        sockets = listen(self._serving)
        self._address = _shown(self._serving, sockets[0])
        try:
            with self._signals(), asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self.serve(sockets))
        finally:
            for listener in sockets:
                listener.close()
            if self._serving.uds is not None:
                with suppress(OSError):
                    os.unlink(self._serving.uds)
        return self._code

    def stop(self, code: int = 0) -> None:
        """Drain as after a signal, and let ``main`` return ``code``. May be called from any thread; the first call counts."""
        if not self.should_exit:
            self._code = code
            self.should_exit = True

    # What uvicorn calls -----------------------------------------------------------------------------------------------

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Nothing: ``main`` has them, until the process ends."""
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Ready when connections are accepted, which may be long before a model is."""
        with suppress(SystemExit):  # uvicorn's way to say that the app did not start
            await super().startup(sockets)
        if not self.started:
            raise EngineError("the server did not start: its log says why")
        self._ready(self._address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Goes on listening while requests are under way, so that new ones are told why they are refused."""
        state = self.server_state
        assert isinstance(state, State)
        deadline = time.monotonic() + self._serving.drain_seconds
        state.draining = True
        if self._on_drain is not None:
            self._on_drain()
        for connection in list(state.connections):
            connection.shutdown()
        await _until(lambda: not state.tasks, deadline)
        for task in list(state.tasks):
            task.cancel()
        for server in self.servers:
            server.close()
        for connection in list(state.connections):
            connection.transport.close()
        to_close = time.monotonic() + self._serving.bounds.closing_seconds + 1
        await _until(lambda: not state.connections, max(deadline, to_close))
        for connection in list(state.connections):
            connection.transport.abort()
        await self.lifespan.shutdown()

    # Signals ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + number)  # whatever other threads are at: what is durable stands a kill
        self.stop()


async def _until(done: Callable[[], bool], deadline: float) -> None:
    while not done() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


# Listening ------------------------------------------------------------------------------------------------------------


def listen(serving: Serving) -> list[socket.socket]:
    """Listening sockets: one, or one for each address of the host. Raises ParameterError."""
    if serving.uds is not None:
        return [_listen_unix(serving.uds)]
    found: list[socket.socket] = []
    port = serving.port
    try:
        for family, address in _addresses(serving):
            with suppress(_NoSuchAddress):
                found.append(_listen_at(family, address, port))
                port = found[0].getsockname()[1]
        if not found:
            raise ParameterError("host", serving.host, "an address of this machine")
    except BaseException:
        for listener in found:
            listener.close()
        raise
    return found


class _NoSuchAddress(Exception):  # noqa: N818 - never leaves this file
    """An address that this machine does not have, such as [::1] without IPv6."""


def _addresses(serving: Serving) -> list[tuple[socket.AddressFamily, str]]:
    try:
        infos = socket.getaddrinfo(serving.host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as problem:
        raise ParameterError("host", serving.host, f"an address of this machine: {problem}") from None
    return list(dict.fromkeys((info[0], str(info[4][0])) for info in infos))


def _listen_at(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        raise _NoSuchAddress from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except OSError as problem:
        listener.close()
        if problem.errno == errno.EADDRNOTAVAIL:
            raise _NoSuchAddress from None
        raise ParameterError("port", port, f"free for us on {address}: {problem.strerror}") from None
    except OverflowError:
        listener.close()
        raise ParameterError("port", port, "from 0 to 65535") from None
    return listener


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as problem:
        listener.close()
        raise ParameterError("uds", path, f"a path for a new socket: {problem.strerror or problem}") from None
    return listener


def _remove_stale(path: str) -> None:
    """A socket that nobody listens on any more was left by a server that was killed."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def _shown(serving: Serving, listener: socket.socket) -> str:
    if serving.uds is not None:
        return f"unix:{serving.uds}"
    host = f"[{serving.host}]" if ":" in serving.host else serving.host
    return f"http://{host}:{listener.getsockname()[1]}"
