"""A real server on loopback in a thread, and a client that sends what it likes, byte by byte."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.server.protocol import Bounds
from shoal.server.run import Server, Serving

PATIENCE = 60.0  # seconds; a busy machine may take long


@dataclass(frozen=True)
class Reply:
    """A response as it came over the wire."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        found = json.loads(self.body)["error"]
        assert found.keys() == {"message", "type", "param", "code"}
        return dict(found)


class Client:
    """One connection."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", port))
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, data: bytes) -> Reply:
        self.send(data)
        return self.reply()

    def reply(self) -> Reply:
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if headers.get("transfer-encoding") != "chunked":
            return Reply(status, headers, self._file.read(int(headers.get("content-length", "0"))))
        body = b""
        while size := int(self._file.readline(), 16):
            body += self._file.read(size)
            self._file.readline()
        self._file.readline()
        return Reply(status, headers, body)

    def rest(self) -> bytes:
        """All that comes until the server closes its half; nothing where it resets the connection."""
        try:
            return self._file.read()
        except ConnectionResetError:
            return b""


@contextmanager
def live(app: ASGIApp, bounds: Bounds | None = None) -> Iterator[int]:
    """The port of a server that serves ``app`` until the end of the block."""
    addresses: queue.Queue[str] = queue.Queue()
    server = Server(app, Serving(port=0, drain_seconds=PATIENCE, bounds=bounds or Bounds()))
    thread = threading.Thread(target=server.main, args=(addresses.put,))
    thread.start()
    try:
        yield int(addresses.get(timeout=PATIENCE).rpartition(":")[2])
    finally:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def get(path: str = "/", *headers: str) -> bytes:
    """A GET request on the wire."""
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def post(body: bytes, *headers: str, path: str = "/") -> bytes:
    """A POST request on the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that answers with what it was sent: the path, the headers' names, and the size of the body."""
    if scope["type"] != "http":
        return
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    seen = {"path": scope["path"], "headers": [name.decode() for name, _ in scope["headers"]], "size": size}
    await answer(send, json.dumps(seen).encode())


async def answer(send: Send, body: bytes, status: int = 200) -> None:
    """A whole response."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
