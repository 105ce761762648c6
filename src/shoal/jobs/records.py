"""The lines of output and error files, and the files they are appended to."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from shoal.openai.schema import APIError, ChatCompletion, ErrorBody, TextCompletion

STANDARD_STREAM = Path("-")


class Response(msgspec.Struct):
    """What the server would have answered."""

    status_code: int
    request_id: str
    body: ChatCompletion | TextCompletion | ErrorBody


class Failure(msgspec.Struct):
    """Why there is no response."""

    code: str
    message: str


class Record(msgspec.Struct):
    """One line of an output or error file. ``custom_id`` is None only for a line that had none to read."""

    id: str
    custom_id: str | None
    response: Response | None
    error: Failure | None


def succeeded(custom_id: str, body: ChatCompletion | TextCompletion) -> Record:
    """The record of an answered row."""
    return Record(_record_id(), custom_id, Response(200, body.id, body), None)


def refused(custom_id: str | None, error: APIError, line: int) -> Record:
    """The record of a row that is wrong in itself; ``line`` is where it stands."""
    response = Response(error.status, f"req_{uuid.uuid4().hex}", error.body(line))
    return Record(_record_id(), custom_id, response, None)


def failed(custom_id: str, message: str) -> Record:
    """The record of a row that was accepted and could not be finished."""
    return Record(_record_id(), custom_id, None, Failure("server_error", message))


def _record_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


class RecordWriter:
    """Writes whole lines to a file, each handed to the system before ``write`` returns. A context manager.

    The file comes into being, or is emptied, with ``open`` or the first record. ``-`` is stdout.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO | None = None

    def open(self) -> BinaryIO:
        """The open file."""
        if self._stream is None:
            to_stdout = self._path == STANDARD_STREAM
            target = sys.stdout.fileno() if to_stdout else self._path
            self._stream = open(target, "wb", closefd=not to_stdout)  # noqa: SIM115 - __exit__ closes it
        return self._stream

    def write(self, record: Record) -> None:
        """Append a record."""
        stream = self.open()
        stream.write(msgspec.json.encode(record) + b"\n")
        stream.flush()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
