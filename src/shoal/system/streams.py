"""Standard streams as they are found: closed, full, read by nobody, or replaced by objects that are only half a file.

stdout carries results: what cannot be written there is an error. stderr carries what people may read and nothing depends on:
writing to it never fails and never ends up elsewhere.
"""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TextIO, cast

_FIRST_FREE = 3  # descriptors below are the standard streams, whatever is opened there


# For people -----------------------------------------------------------------------------------------------------------


class Forgiving(io.TextIOBase):
    """Writes to ``stream`` what it takes, and drops the rest; None takes nothing. Characters that its encoding lacks are escaped.

    ``print(file=None)`` and rich's ``Console(file=None)`` write to stdout: where sys.stderr is None, this is what they need.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return encoding_of(self._stream)

    def write(self, text: str) -> int:
        """The number of characters, written or not."""
        if not isinstance(text, str):
            raise TypeError(f"got {type(text).__name__}, must be str")  # by this, click tells text from binary streams
        if self._stream is not None:
            with suppress(Exception):  # the object may be anybody's, and raise anything
                self._write(self._stream, text)
        return len(text)

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(sayable(text, self.encoding).decode(self.encoding, "backslashreplace"))

    def flush(self) -> None:
        """Never fails either."""
        if self._stream is not None:
            with suppress(Exception):
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream says that it is a terminal."""
        try:
            return self._stream is not None and bool(self._stream.isatty())
        except Exception:  # it has no such method, or is closed
            return False

    def fileno(self) -> int:
        """The descriptor; io.UnsupportedOperation where there is none."""
        try:
            return cast(TextIO, self._stream).fileno()
        except Exception:
            raise io.UnsupportedOperation("fileno") from None


def say(text: str) -> None:
    """A line for people, on stderr if there is one."""
    stream = Forgiving(sys.stderr)
    stream.write(f"shoal: {text}\n")
    stream.flush()


# Results --------------------------------------------------------------------------------------------------------------


def binary_stdout() -> BinaryIO | None:
    """stdout for bytes in UTF-8, None where it is closed. Closing this leaves stdout itself open."""
    stream = sys.stdout
    if stream is None or getattr(stream, "closed", False):
        return None
    try:
        return open(stream.fileno(), "wb", closefd=False)
    except (AttributeError, io.UnsupportedOperation):  # an object of a notebook or a test
        return cast(BinaryIO, io.BufferedWriter(_AsBytes(stream)))


class _AsBytes(io.RawIOBase):
    """A text stream as one that takes whole lines of UTF-8."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        text = bytes(cast(bytes, data))
        self._stream.write(text.decode())
        return len(text)


def sayable(text: str, encoding: str) -> bytes:
    """``text`` in an encoding that lacks some of its characters: bytes of file names as they are, or else escapes."""
    try:
        return text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace")


def encoding_of(stream: TextIO | None) -> str:
    """The encoding that a stream says it has, if there is such a one, else UTF-8."""
    try:
        return codecs.lookup(getattr(stream, "encoding", "utf-8")).name
    except (LookupError, TypeError):
        return "utf-8"


# Descriptors ----------------------------------------------------------------------------------------------------------


@contextmanager
def streams_of_a_program() -> Iterator[None]:
    """For as long as a command runs: sys.stderr forgives, and no file that is opened can be taken for a standard stream.

    What could not be written is dropped at the end, so that the interpreter, which tries once more when it exits, finds nothing
    to complain about.
    """
    _fill_closed_descriptors()
    stdout, stderr = sys.stdout, sys.stderr
    sys.stderr = cast(TextIO, Forgiving(stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for stream in (stdout, stderr):
            if stream is not None:
                _drop_what_is_stuck(stream)


def open_above_standard(path: str | os.PathLike[str], flags: int) -> int:
    """As os.open, but never 0, 1 or 2: where those are closed, what a library or a child writes to "stderr" would be in the file.

    Fits ``open(opener=...)``.
    """
    fd = os.open(path, flags, 0o666)
    if fd >= _FIRST_FREE:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    finally:
        os.close(fd)


def _fill_closed_descriptors() -> None:
    for fd in range(_FIRST_FREE):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, so fd itself
            os.set_inheritable(null, True)


def _drop_what_is_stuck(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError:
        with suppress(Exception):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()
    except Exception:  # closed, or no file at all
        return
