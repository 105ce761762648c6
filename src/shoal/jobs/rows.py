"""The lines of a batch file: read one at a time, each made a Row or refused alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, BinaryIO

from shoal.openai.convert import PARSERS, Call, check_model
from shoal.openai.schema import APIError, parse_json

MAX_LINE_BYTES = 16 << 20
MAX_CUSTOM_ID = 512

_CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_KEYS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank. ``number`` counts from 1; ``data`` is None where it is longer than the limit."""

    number: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Row:
    """A request of a batch file, ready to be submitted."""

    line: int
    custom_id: str
    call: Call


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that is refused; ``custom_id`` where it could be read."""

    line: int
    custom_id: str | None
    error: APIError


class LineReader:
    """Iterates over the Lines of ``stream``, holding no more than one of them.

    ``bytes_read`` says how far it is. A byte order mark at the start, and blank lines, are passed over.
    """

    def __init__(self, stream: BinaryIO, *, limit: int = MAX_LINE_BYTES) -> None:
        self.bytes_read = 0
        self._stream = stream
        self._limit = limit
        self._number = 0

    def __iter__(self) -> Iterator[Line]:
        while data := self._read(self._limit + 1):
            self._number += 1
            if len(data) > self._limit and not data.endswith(b"\n"):
                self._skip_rest()
                yield Line(self._number, None)
                continue
            text = data.removeprefix(_BOM) if self._number == 1 else data
            if text.strip():
                yield Line(self._number, text)

    def _read(self, size: int) -> bytes:
        data = self._stream.readline(size)
        self.bytes_read += len(data)
        return data

    def _skip_rest(self) -> None:
        while (data := self._read(_CHUNK)) and not data.endswith(b"\n"):
            pass


class RowReader:
    """Makes Rows of Lines. Bodies may name the models in ``served``; a custom_id may occur once.

    Of each custom_id that was read it keeps a hash of 64 bits (about 100 bytes of memory a row).
    """

    def __init__(self, served: Collection[str]) -> None:
        self._served = served
        self._seen: set[bytes] = set()

    def read(self, line: Line) -> Row | BadRow:
        """The row in a line, or what is wrong with it."""
        custom_id: str | None = None
        try:
            fields = _fields(line)
            custom_id = _custom_id(fields)
            self._claim(custom_id)
            call = _call(fields)
            check_model(call.model, self._served)
        except APIError as error:
            return BadRow(line.number, custom_id, error)
        return Row(line.number, custom_id, call)

    def _claim(self, custom_id: str) -> None:
        digest = blake2b(custom_id.encode(), digest_size=8).digest()
        if digest in self._seen:
            raise APIError(f"custom_id: {custom_id!r} was used by an earlier line", "custom_id")
        self._seen.add(digest)


def _fields(line: Line) -> dict[str, Any]:
    if line.data is None:
        raise APIError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    fields = parse_json(line.data)
    if not isinstance(fields, dict):
        raise APIError(f"the line must be a JSON object with {', '.join(_KEYS)}")
    return fields


def _custom_id(fields: dict[str, Any]) -> str:
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise APIError(f"custom_id: must be a text of 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise APIError("custom_id: holds a lone surrogate, which no text has", "custom_id") from None
    return custom_id


def _call(fields: dict[str, Any]) -> Call:
    unknown = next((name for name in fields if name not in _KEYS), None)
    if unknown is not None:
        raise APIError(f"{unknown}: no such field; a line has {', '.join(_KEYS)}", unknown)
    if fields.get("method") != "POST":
        raise APIError(f"method: got {fields.get('method')!r}, must be 'POST'", "method")
    url = fields.get("url")
    parse = PARSERS.get(url) if isinstance(url, str) else None
    if parse is None:
        raise APIError(f"url: got {url!r}, must be one of {', '.join(PARSERS)}", "url")
    return parse(fields.get("body"))
