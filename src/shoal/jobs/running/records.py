"""The lines of output and error files."""

from __future__ import annotations

import uuid
from typing import Literal

import msgspec

from shoal.openai.schema import APIError, ChatCompletion, EmbeddingList, ErrorBody, TextCompletion

FailureCode = Literal["request_timeout", "batch_expired", "batch_cancelled", "server_error"]


class Response(msgspec.Struct):
    """What the server would have answered."""

    status_code: int
    request_id: str
    body: ChatCompletion | TextCompletion | EmbeddingList | ErrorBody


class Failure(msgspec.Struct):
    """Why there is no response."""

    code: FailureCode
    message: str


class Record(msgspec.Struct):
    """One line of an output or error file. ``custom_id`` is None only for a line that had none to read."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Failure | None

    def line(self) -> bytes:
        """Its JSON, without the line end."""
        return msgspec.json.encode(self)


def succeeded(custom_id: str, body: ChatCompletion | TextCompletion | EmbeddingList) -> Record:
    """The record of an answered row."""
    return Record(_record_id(), custom_id, Response(200, body.id, body), None)


def refused(custom_id: str | None, error: APIError, line: int, place: str = "") -> Record:
    """The record of a row that is wrong in itself; ``line`` and ``place`` are those of its Line."""
    body = error.body(line)
    if place:
        body.error.message = f"{place}: {body.error.message}"
    response = Response(error.status, f"req_{uuid.uuid4().hex}", body)
    return Record(_record_id(), custom_id, response, None)


def failed(custom_id: str | None, code: FailureCode, message: str) -> Record:
    """The record of a row that was accepted and could not be finished."""
    return Record(_record_id(), custom_id, None, Failure(code, message))


def _record_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"
