"""Requests to replicas: connections that are kept, and answers that are read piece by piece as they come."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

import httptools

_READ_BYTES = 64 << 10
_KEPT_SECONDS = 30.0  # of the 75 after which a replica closes a connection that nothing comes over
_CONNECT_SECONDS = 5.0
# A machine that has vanished sends nothing, not even an end: it is given up after some 20 seconds.
_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}

Headers = list[tuple[bytes, bytes]]


class Connection:
    """A connection to a replica, for one request after the other. Its methods raise OSError where the replica is gone before the end
    of its answer, or does not speak HTTP."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._begun = self._interim = self._ended = self._stays = False

    async def ask(self, method: str, target: bytes, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a request, and wait for the status and the headers of the answer."""
        self._begin()
        lines = [b"%s %s HTTP/1.1" % (method.encode(), target), *(b"%s: %s" % header for header in headers)]
        self._writer.write(b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body]))
        while not self._begun:
            await self._feed()

    @property
    def status(self) -> int:
        """The answer's."""
        return self._parser.get_status_code()

    @property
    def headers(self) -> Headers:
        """The answer's; names in small letters."""
        return self._headers

    async def pieces(self) -> AsyncIterator[bytes]:
        """The answer's body as it comes."""
        while self._body or not self._ended:
            if self._body:
                piece = b"".join(self._body)
                self._body.clear()
                yield piece
            else:
                await self._feed()

    @property
    def can_be_kept(self) -> bool:
        """Whether it can take another request now."""
        return self._ended and self._stays and not self._reader.at_eof() and self._reader.exception() is None

    def close(self) -> None:
        """Give up what is under way."""
        self._writer.close()

    async def _feed(self) -> None:
        data = await self._reader.read(_READ_BYTES)
        if not data:
            raise ConnectionResetError("the replica closed the connection before the end of its answer")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ConnectionAbortedError(f"the replica does not speak HTTP: {error}") from None

    # what the parser tells

    def on_message_begin(self) -> None:
        """Nobody has asked for one behind the end: whose answers these are is not known."""
        if self._ended:
            self._stays = False
            raise ConnectionAbortedError

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of the answer."""
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """All of them are there. What comes before the answer (1xx, as 100 Continue) is not the answer."""
        self._interim = self._parser.get_status_code() < 200
        if self._interim:
            self._headers.clear()
        self._begun = not self._interim

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The end."""
        if not self._interim:
            self._ended, self._stays = True, self._parser.should_keep_alive()


class Pool:
    """Connections to one replica at ``host`` and ``port``."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._kept: list[tuple[float, Connection]] = []

    async def take(self) -> Connection:
        """One that is not in use. Raises OSError where nobody listens."""
        while self._kept:
            since, connection = self._kept.pop()
            if connection.can_be_kept and time.monotonic() - since < _KEPT_SECONDS:
                return connection
            connection.close()
        async with asyncio.timeout(_CONNECT_SECONDS):  # its TimeoutError is an OSError
            reader, writer = await asyncio.open_connection(self.host, self.port)
        _keep_alive(writer.get_extra_info("socket"))
        return Connection(reader, writer)

    def give_back(self, connection: Connection) -> None:
        """After use, however it went."""
        if connection.can_be_kept:
            self._kept.append((time.monotonic(), connection))
        else:
            connection.close()

    def close(self) -> None:
        """Close those that are not in use."""
        for _, connection in self._kept:
            connection.close()
        self._kept.clear()


def _keep_alive(connected: socket.socket) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE.items():
        with suppress(AttributeError):  # not every system has all of them
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
