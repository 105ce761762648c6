"""The rows of an input: read one at a time, each made a Row or refused alone.

A row is a line of a batch file (custom_id, method, url, body), or *plain*: the body itself, with a ``prompt`` or with
``messages``. A plain row need not have a custom_id; without one it is called "row-N", after its number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

import msgspec

from shoal.jobs.input.kinds import BOM
from shoal.jobs.input.streams import LineStream
from shoal.models.sampling_defaults import missing
from shoal.openai.convert import PARSERS, Call, check_model, parse_chat, parse_completion
from shoal.openai.embeddings import EMBEDDINGS, EmbeddingCall, parse_embedding
from shoal.openai.fields import did_you_mean, given_fields
from shoal.openai.schema import APIError, parse_json
from shoal.requests.prompts import TEXT_OPTIONS

MAX_LINE_BYTES = 16 << 20
MAX_CUSTOM_ID = 512

_CHUNK = 1 << 20
_KEYS = ("custom_id", "method", "url", "body")
_EMPTY: tuple[object, ...] = (None, "", [])
_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Line:
    """The JSON of a row, not yet looked at. ``number`` counts from 1, through all files of an input; ``place`` says, of several files,
    where the row stands: "b.jsonl, line 2".

    ``data`` is None where there is nothing that could be read; ``error`` says why.
    """

    number: int
    data: bytes | None
    error: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A request, ready to be submitted."""

    line: int
    custom_id: str
    call: Call


@dataclass(frozen=True, slots=True)
class EmbeddingRow:
    """A request for embeddings, ready to be submitted."""

    line: int
    custom_id: str
    call: EmbeddingCall


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that is refused; ``custom_id`` where it could be read."""

    line: int
    custom_id: str | None
    error: APIError


AnyRow = Row | EmbeddingRow | BadRow


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Text prompts of plain rows are said by the user of a chat, after ``system`` if that is given."""

    system: str | None = None

    def conversation(self, prompt: Any) -> list[dict[str, str]]:
        """The messages for a prompt. Raises APIError for one that is no text, or empty."""
        if not isinstance(prompt, str):
            raise APIError("prompt: must be a text, to be a message of a chat", "prompt")
        if not prompt:
            raise APIError("prompt: is empty; it needs at least 1 token", "prompt")
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]


class LineReader:
    """Iterates over the Lines of ``stream``, holding no more than one of them.

    A byte order mark at the beginning of a line, as files that were joined have it, and blank lines are passed over.
    """

    def __init__(self, stream: LineStream, *, limit: int = MAX_LINE_BYTES) -> None:
        self._stream = stream
        self._limit = limit
        self._number = 0

    def __iter__(self) -> Iterator[Line]:
        while data := self._stream.readline(self._limit + 1):
            self._number += 1
            if len(data) > self._limit and not data.endswith(b"\n"):
                self._skip_rest()
                yield Line(self._number, None, f"the line is longer than {self._limit} bytes")
                continue
            text = data.removeprefix(BOM)
            if text.strip():
                yield Line(self._number, text)

    def _skip_rest(self) -> None:
        while (data := self._stream.readline(_CHUNK)) and not data.endswith(b"\n"):
            pass


class RowReader:
    """Makes Rows of Lines. Bodies may name the models in ``served``.

    ``defaults`` are fields for bodies that do not set them; those of ``TEXT_OPTIONS`` are for texts alone, and ``chat_defaults`` (the
    model's) for chats alone, after ``defaults``. With ``chat``, plain rows
    with a prompt become chats. ``now`` is the moment that chat templates are told which ask for the date; None: that at which they
    are rendered.
    """

    def __init__(
        self,
        served: Collection[str],
        defaults: Mapping[str, Any] = _NO_DEFAULTS,
        chat: ChatSettings | None = None,
        now: datetime | None = None,
        *,
        chat_defaults: Mapping[str, Any] = _NO_DEFAULTS,
    ) -> None:
        self._served = served
        self._defaults = defaults
        self._chat_defaults = {**chat_defaults, **defaults}
        self._chat = chat
        self._now = now

    def read(self, line: Line) -> AnyRow:
        """The row in a line, or what is wrong with it."""
        custom_id: str | None = None
        try:
            custom_id = _custom_id(line)
            call = self._call(_fields(line))
            check_model(call.model, self._served)
        except APIError as error:
            return BadRow(line.number, custom_id, error)
        if isinstance(call, EmbeddingCall):
            return EmbeddingRow(line.number, custom_id, call)
        return Row(line.number, custom_id, self._dated(call))

    def _dated(self, call: Call) -> Call:
        if self._now is None or not isinstance(call.prompt, dict) or "messages" not in call.prompt:
            return call
        own = call.prompt.get("chat_template_kwargs", {})
        return replace(call, prompt={**call.prompt, "chat_template_kwargs": {"strftime_now": self._now, **own}})

    def _call(self, fields: dict[str, Any]) -> Call | EmbeddingCall:
        if _is_plain(fields):
            return self._plain_call({name: value for name, value in fields.items() if name not in _KEYS})
        url = _url(fields)
        if url == EMBEDDINGS:
            return parse_embedding(fields.get("body"))
        parse = PARSERS[url]
        return parse(self._with_defaults(fields.get("body"), parse))

    def _plain_call(self, body: dict[str, Any]) -> Call:
        for name, other in (("messages", "prompt"), ("prompt", "messages")):
            if body.get(other) not in _EMPTY and body.get(name) in _EMPTY:
                body.pop(name, None)  # a table has columns for both
        if body.get("messages") is None and self._chat is not None:
            body["messages"] = self._chat.conversation(body.pop("prompt", None))
        parse = parse_completion if body.get("messages") is None else parse_chat
        return parse(self._with_defaults(body, parse))

    def _with_defaults(self, body: Any, parse: Callable[[Any], Call]) -> Any:
        if not isinstance(body, dict):
            return body
        given = given_fields(body)
        added = missing(self._chat_defaults if parse is parse_chat else self._defaults, given)
        if "max_completion_tokens" in given:
            added.pop("max_tokens", None)  # two names of one limit
        if parse is parse_chat:
            added = {name: value for name, value in added.items() if name not in TEXT_OPTIONS}
        return {**given, **added}


def custom_id_of(line: Line) -> str | None:
    """What RowReader calls the row in ``line``, found without decoding the rest; None where it has no usable name."""
    try:
        return _custom_id(line)
    except APIError:
        return None


class _Head(msgspec.Struct):
    """The fields that say what a row is called. Values other than the name are not decoded."""

    custom_id: Any = None
    method: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    url: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    def fields(self) -> dict[str, Any]:
        """Those of its fields that are there; None for null."""
        there = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: None if value == _NULL else value for name, value in there.items() if value is not msgspec.UNSET}


_NULL = msgspec.Raw(b"null")
_HEADS = msgspec.json.Decoder(_Head)


def _custom_id(line: Line) -> str:
    fields = _head(line)
    custom_id = fields.get("custom_id")
    if custom_id in (None, "") and _is_plain(fields):
        return f"row-{line.number}"
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise APIError(f"custom_id: must be a text of 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise APIError("custom_id: holds a lone surrogate, which no text has", "custom_id") from None
    return custom_id


def _head(line: Line) -> Mapping[str, Any]:
    """The fields (at least) that say what a row is called and tell kinds of rows apart."""
    try:
        return _HEADS.decode(line.data or b"").fields()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _fields(line)  # is more lenient with numbers and texts, and knows what is wrong


def _is_plain(fields: Mapping[str, Any]) -> bool:
    """Whether a row with these fields is the body itself."""
    around = any(fields.get(name) is not None for name in ("method", "url", "body"))
    return ("prompt" in fields or "messages" in fields) and not around


def _fields(line: Line) -> dict[str, Any]:
    if line.data is None:
        raise APIError(line.error)
    fields = parse_json(line.data)
    if not isinstance(fields, dict):
        raise APIError(f"the line must be a JSON object with {', '.join(_KEYS)}, or with a prompt or messages")
    return fields


def _url(fields: dict[str, Any]) -> str:
    """Where the line of a batch file would be sent, after a check of everything around its body."""
    unknown = next((name for name, value in fields.items() if name not in _KEYS and value is not None), None)
    if unknown is not None:
        hint = did_you_mean(unknown, _KEYS) or f"; a line has {', '.join(_KEYS)}"
        raise APIError(f"{unknown}: no such field{hint}", unknown)
    if fields.get("method") != "POST":
        raise APIError(f"method: got {fields.get('method')!r}, must be 'POST'", "method")
    url = fields.get("url")
    known = (*PARSERS, EMBEDDINGS)
    if not isinstance(url, str) or url not in known:
        raise APIError(f"url: got {url!r}, must be one of {', '.join(known)}", "url")
    return url
