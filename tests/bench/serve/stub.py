"""A tiny HTTP server that answers as a test tells it to, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

CUT = b""  # as a part of an answer: end the connection here
HANG = b"\0hang"  # send nothing more, and wait until the client goes

SAID = ("Hello", " wide", " world")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Answer = Callable[[Request], Iterable[bytes]]


@dataclass
class Stub:
    """``with Stub(answer) as stub`` serves at ``stub.url``. It keeps what it was asked, and counts connections."""

    answer: Answer
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    most_at_once: int = 0
    gone: threading.Event = field(default_factory=threading.Event)  # a client went while an answer hung

    def __enter__(self) -> Stub:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def posts(self) -> list[dict[str, Any]]:
        """Bodies of requests for completions."""
        return [request.body for request in self.requests if request.method == "POST"]

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._at_once = 0
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request = await _read(reader)
        self.requests.append(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            for part in self.answer(request):
                if part == CUT:
                    return False
                if part == HANG:
                    await reader.read()
                    self.gone.set()
                    return False
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
        finally:
            self._at_once -= 1
        return True


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split()
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, json.loads(content or b"{}"))


def whole(body: object, status: int = 200) -> bytes:
    """An answer of known length; bytes as they are, anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def event(body: object) -> bytes:
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


def chat_events(said: Sequence[str] = SAID) -> list[bytes]:
    """As shoal and vLLM stream a chat: a role, text, the reason to stop, usage."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": text} for text in said)]
    found = [event({"choices": [{"delta": delta, "finish_reason": None}]}) for delta in deltas]
    found.append(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    return [*found, event({"choices": [], "usage": usage(len(said))}), event(b"[DONE]")]


def completion_events(said: Sequence[str] = SAID) -> list[bytes]:
    """As llama-server streams a completion: usage comes with the reason to stop."""
    found = [event({"choices": [{"text": text, "finish_reason": None}]}) for text in said]
    found.append(event({"choices": [{"text": "", "finish_reason": "length"}], "usage": usage(len(said))}))
    return [*found, event(b"[DONE]")]


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}


def stream(events: Iterable[bytes]) -> list[bytes]:
    """A whole streamed answer, a chunk an event."""
    return [STREAM_HEAD, *map(chunk, events), chunk(b"")]


def good(request: Request) -> list[bytes]:
    """A server without faults, of two models and 50 token ids."""
    if request.path == "/v1/models":
        return [whole({"data": [{"id": "org/first", "meta": {"n_vocab": 50}}, {"id": "second"}]})]
    if request.path == "/health":
        return [whole({})]
    if not request.body.get("stream"):
        return [whole({"choices": [{"text": "Hello"}], "usage": usage(3)})]
    return stream(chat_events() if "chat" in request.path else completion_events())
