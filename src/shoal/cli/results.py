"""Results on stdout: all of a text, or one line that says why not."""

from __future__ import annotations

import sys
from typing import TextIO

import click

from shoal.system.streams import encoding_of, sayable


def write_result(text: str = "", *, end: str = "\n") -> None:
    """Write ``text`` to stdout, at once. What the encoding lacks is escaped, and bytes of file names stay as they are.

    Raises click.ClickException where stdout is closed, full, or read by nobody any more.
    """
    if sys.stdout is None:
        raise click.ClickException("stdout is closed: there is nowhere to write the result")
    try:
        _write(sys.stdout, text + end)
    except OSError as error:
        raise click.ClickException(f"stdout: {error.strerror or error}") from error


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        _write_escaped(stream, text)
    if hasattr(stream, "flush"):
        stream.flush()


def _write_escaped(stream: TextIO, text: str) -> None:
    """Write what can be said of ``text``; to a stream that knows ASCII alone UTF-8, as nobody has chosen that encoding."""
    encoding = encoding_of(stream)
    if hasattr(stream, "buffer"):
        stream.flush()
        stream.buffer.write(sayable(text, "utf-8" if encoding == "ascii" else encoding))
    else:
        stream.write(sayable(text, encoding).decode(encoding, "backslashreplace"))
