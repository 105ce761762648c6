"""Multipart uploads, from the socket to the disk: never more of a file in memory than a piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from shoal.openai.schema import APIError
from shoal.server.store.files import Upload

_PIECE = 1 << 20  # bytes that are written at once
_MOST_FIELDS = 1 << 16  # bytes of all fields that are no file, and of the headers of all parts
_MOST_PARTS = 64
_AROUND = 1 << 20  # bytes of a body that may be no file
_FILE = "file"


@dataclass(slots=True)
class Form:
    """The fields of a form, and the name of the file that came with them; None where none did."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def receive(request: Request, upload: Upload, idle: float) -> Form:
    """Write the file of a multipart body into ``upload``. ``idle``: seconds without a byte after which nothing more is waited for.

    Raises APIError for a body that is wrong, cut short, too slow or too large.
    """
    reader = _Reader(_boundary(request))
    _refuse_too_large(request, upload.limit + _AROUND)
    received = 0
    async for piece in _pieces(request, idle):
        received += len(piece)
        if received > upload.limit + _AROUND:
            raise _too_large(upload.limit)
        reader.feed(piece)
        if len(reader.data) >= _PIECE:
            await run_in_threadpool(upload.write, reader.taken())
    await run_in_threadpool(upload.write, reader.taken())
    return reader.end()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise APIError("the body must be multipart/form-data", status=415)
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= 70:
        raise APIError("the content type must name a boundary of 1 to 70 characters")
    return boundary


def _refuse_too_large(request: Request, most: int) -> None:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > most:
        raise _too_large(most - _AROUND)


def _too_large(limit: int) -> APIError:
    return APIError(f"file: is larger than {limit} bytes", _FILE, status=413)


async def _pieces(request: Request, idle: float) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(idle):
                piece = await anext(stream, None)
        except TimeoutError:
            raise APIError(f"no more of the upload came for {idle:g} s", status=408) from None
        except ClientDisconnect:
            raise APIError("the upload was broken off") from None
        if piece is None:
            return
        yield piece


class _Reader:
    """Takes a multipart body apart. ``data`` is what has come of the file and was not taken yet."""

    def __init__(self, boundary: bytes) -> None:
        self.data = bytearray()
        self._form = Form()
        self._header = (bytearray(), bytearray())  # name and value of the one that is read
        self._headers: dict[bytes, bytes] = {}
        self._name: str | None = None
        self._value = bytearray()
        self._small, self._parts, self._ended = 0, 0, False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._add_small(self._header[0], data[start:end]),
                "on_header_value": lambda data, start, end: self._add_small(self._header[1], data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._add_content,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, piece: bytes) -> None:
        """Read on. Raises APIError."""
        try:
            self._parser.write(piece)
        except MultipartParseError as error:
            raise APIError(f"not a well-formed multipart body: {error}") from None

    def taken(self) -> bytes:
        """What has come of the file since the last call."""
        data = bytes(self.data)
        self.data.clear()
        return data

    def end(self) -> Form:
        """What there was besides the file. Raises APIError for a body that was cut short."""
        if not self._ended:
            raise APIError("the multipart body ends before its last part does")
        return self._form

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise APIError(f"the form has more than {_MOST_PARTS} parts")
        self._headers = {}

    def _add_small(self, to: bytearray, data: bytes) -> None:
        self._small += len(data)
        if self._small > _MOST_FIELDS:
            raise APIError(f"the fields of the form have more than {_MOST_FIELDS} bytes", status=413)
        to += data

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise APIError("a part of the form has no name")
        self._name = options[b"name"].decode("utf-8", "replace")
        self._value.clear()
        if self._name == _FILE:
            if self._form.filename is not None:
                raise APIError("file: there is more than one", _FILE)
            self._form.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._name == _FILE:
            self.data += data[start:end]
        else:
            self._add_small(self._value, data[start:end])

    def _end_part(self) -> None:
        if self._name is not None and self._name != _FILE:
            self._form.fields[self._name] = bytes(self._value).decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True
