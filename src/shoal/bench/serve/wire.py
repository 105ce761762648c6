"""Bytes of HTTP/1.1 answers and of server-sent events, as they come in and however they are cut.

It does little for each byte, because what the client needs of the machine the server does not get: bodies stay bytes, and of a stream
only the events up to the first text are decoded, and the last few.
"""

from __future__ import annotations

import json
from collections import deque
from enum import Enum, auto
from typing import Any

_DONE = b"[DONE]"
_TAIL = 4  # events at the end of a stream that may be without text: the reason to stop, usage, timings


class WireError(Exception):
    """What came in is not an HTTP/1.1 answer."""


class _State(Enum):
    HEAD = auto()
    LENGTH = auto()  # a body of ``_left`` more bytes
    UNTIL_CLOSE = auto()
    CHUNK_SIZE = auto()
    CHUNK = auto()  # a chunk of ``_left`` more bytes
    CHUNK_END = auto()
    TRAILER = auto()
    COMPLETE = auto()


class ResponseReader:
    """One answer: ``feed`` it bytes as they come; it returns those of the body. ``status`` is 0 until the head is there."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}  # names in lower case
        self._state = _State.HEAD
        self._rest = b""
        self._left = 0

    @property
    def complete(self) -> bool:
        """Whether all of it has come."""
        return self._state is _State.COMPLETE

    @property
    def keep_alive(self) -> bool:
        """Whether the connection may be used again; only of an answer that is complete."""
        return self.headers.get(b"connection", b"").lower() != b"close" and not self._rest

    def feed(self, data: bytes) -> bytes:
        """Bytes of the body in ``data``. Raises WireError where it is not HTTP."""
        self._rest += data
        body = []
        while (part := self._next()) is not None:
            body.append(part)
        return b"".join(body)

    def close(self) -> bool:
        """The connection has ended; whether the answer is complete."""
        if self._state is _State.UNTIL_CLOSE:
            self._state = _State.COMPLETE
        return self.complete

    def _next(self) -> bytes | None:
        """What the next piece adds to the body; None where more bytes have to come first."""
        match self._state:
            case _State.HEAD:
                return self._head()
            case _State.LENGTH:
                return self._counted(_State.COMPLETE)
            case _State.CHUNK:
                return self._counted(_State.CHUNK_END)
            case _State.UNTIL_CLOSE:
                part, self._rest = self._rest, b""
                return part or None
            case _State.COMPLETE:
                return None
            case _:
                return self._chunk_line()

    def _counted(self, then: _State) -> bytes | None:
        part, self._rest = self._rest[: self._left], self._rest[self._left :]
        self._left -= len(part)
        if not self._left:
            self._state = then
            return part
        return part or None

    def _chunk_line(self) -> bytes | None:
        line = self._until(b"\r\n")
        if line is None:
            return None
        if self._state is _State.CHUNK_SIZE:
            self._left = _number(line.partition(b";")[0], 16)
            self._state = _State.CHUNK if self._left else _State.TRAILER
        elif self._state is _State.CHUNK_END:
            if line:
                raise WireError(f"a chunk is longer than it says: {line[:40]!r}")
            self._state = _State.CHUNK_SIZE
        elif not line:  # the end of the trailers
            self._state = _State.COMPLETE
        return b""

    def _head(self) -> bytes | None:
        head = self._until(b"\r\n\r\n")
        if head is None:
            return None
        first, *lines = head.split(b"\r\n")
        version, _, status = first.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            raise WireError(f"not HTTP/1.1: {first[:40]!r}")
        code = _number(status[:3], 10)
        if code < 200:  # such as 100 Continue: the answer comes after it
            return b""
        pairs = (line.partition(b":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self.status = code
        self._state = self._of_body()
        return b""

    def _of_body(self) -> _State:
        if self.status in (204, 304):
            return _State.COMPLETE
        if b"chunked" in self.headers.get(b"transfer-encoding", b"").lower():
            return _State.CHUNK_SIZE
        if b"content-length" not in self.headers:
            return _State.UNTIL_CLOSE
        self._left = _number(self.headers[b"content-length"], 10)
        return _State.LENGTH if self._left else _State.COMPLETE

    def _until(self, end: bytes) -> bytes | None:
        """What comes before ``end``, which is skipped; None while it is not there."""
        found, separator, rest = self._rest.partition(end)
        if not separator:
            return None
        self._rest = rest
        return found


def _number(text: bytes, base: int) -> int:
    try:
        return int(text.strip(), base)
    except ValueError:
        raise WireError(f"not a number: {text[:40]!r}") from None


class EventTimes:
    """The events of a stream: when each came, what the last of them say, whether ``[DONE]`` was among them."""

    def __init__(self) -> None:
        self.done = False
        self._times: list[float] = []
        self._first: int | None = None  # the first event with text
        self._tail: deque[bytes] = deque(maxlen=_TAIL)
        self._rest = b""

    def feed(self, data: bytes, now: float) -> None:
        """Bytes of the body that came at ``now``."""
        text = self._rest + data
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *blocks, self._rest = text.split(b"\n\n")
        for block in blocks:
            payload = block[5:].lstrip(b" ") if block.startswith(b"data:") else _data_of(block)
            if payload == _DONE:
                self.done = True
            elif payload:
                self._note(payload, now)

    @property
    def last(self) -> list[dict[str, Any]]:
        """The last few events, decoded."""
        return [_decoded(payload) for payload in self._tail]

    @property
    def text_times(self) -> list[float]:
        """When each event with text came; where none had any, when the first event came. Events between two with text are taken to
        have some too."""
        if self._first is None:
            return self._times[:1]
        silent = 0
        while silent < len(self._tail) and not _has_text(_decoded(self._tail[-1 - silent])):
            silent += 1
        return self._times[self._first : len(self._times) - silent]

    def _note(self, payload: bytes, now: float) -> None:
        if self._first is None and _has_text(_decoded(payload)):
            self._first = len(self._times)
        self._times.append(now)
        self._tail.append(payload)


def _data_of(block: bytes) -> bytes:
    """The data of an event that has other lines too, such as comments and names."""
    lines = (line for line in block.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(line[5:].lstrip(b" ") for line in lines)


def _decoded(payload: bytes) -> dict[str, Any]:
    """The object in an event; empty if it is something else."""
    try:
        event = json.loads(payload)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _has_text(event: dict[str, Any]) -> bool:
    """Whether it brings text, reasoning or a tool call; a role or the reason to stop alone is none."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        parts = (delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))
        if choice.get("text") or any(parts):
            return True
    return False
