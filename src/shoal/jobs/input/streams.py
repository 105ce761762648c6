"""The bytes of an input: a file, local or remote, as it is or compressed by gzip or Zstandard (by its suffix), or stdin."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import GzipFile
from io import BufferedReader
from pathlib import Path, PurePath
from typing import BinaryIO, Literal, Protocol, cast

from shoal.errors import JobError
from shoal.jobs.input.kinds import HEAD_BYTES, refuse_misnamed
from shoal.jobs.input.remote import RemoteFile, open_remote

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STANDARD_STREAM = Path("-")
COMPRESSIONS = (".gz", ".zst")

# What the decompressors raise for data that is damaged or ends too early; gzip's BadGzipFile is an OSError.
_DAMAGE = (EOFError, OSError, zlib.error, zstd.ZstdError)

TableFormat = Literal["csv", "parquet"]
InputFile = Path | RemoteFile

_LINES = (".jsonl", ".ndjson", ".json")  # in a folder; a file that is named may have any other suffix


class LineStream(Protocol):
    """What gives bytes line by line, as binary files do."""

    def readline(self, size: int, /) -> bytes:
        """The next line with its end, or the next ``size`` bytes of it; b"" at the end."""


class InputStream:
    """An open input, read line by line and decompressed.

    Raises JobError for one that is not compressed as ``compression``, a suffix, says.
    """

    def __init__(self, path: InputFile, stored: BinaryIO, compression: str = "") -> None:
        self.path = path
        self._stored = stored
        if compression:
            refuse_misnamed(path, _peek(stored), compression)
        self._content = _decompressed(stored, compression)

    @property
    def bytes_read(self) -> int:
        """How many of its bytes as stored are behind; 0 for a pipe. A decompressor is some kilobytes ahead."""
        return self._stored.tell() if self._stored.seekable() else 0

    def head(self) -> bytes:
        """The next bytes, some thousands if they are there, which stay to be read. JobError as of ``readline``."""
        try:
            return _peek(self._content)
        except _DAMAGE as error:
            raise self._damage(error) from error

    def readline(self, size: int, /) -> bytes:
        """The next line with its end, or the next ``size`` bytes of it. JobError for damaged or truncated data."""
        try:
            return self._content.readline(size)
        except _DAMAGE as error:
            raise self._damage(error) from error

    def _damage(self, error: Exception) -> JobError:
        return JobError(f"{self.path}: cannot be read on at about byte {self.bytes_read}: {error}")


@contextmanager
def open_stream(path: InputFile) -> Iterator[InputStream]:
    """The input for reading, from its start; ``-`` is stdin."""
    if path == STANDARD_STREAM:
        if sys.stdin is None:
            raise JobError("-: stdin is closed")
        yield InputStream(path, sys.stdin.buffer)
        return
    with open_stored(path) as stored:
        yield InputStream(path, stored, compression_of(path))


def open_stored(path: InputFile) -> BinaryIO:
    """A file as it is, for reading. Raises OSError, and JobError as ``open_remote``."""
    return open_remote(path) if isinstance(path, RemoteFile) else open(path, "rb", buffering=HEAD_BYTES)


def compression_of(path: InputFile) -> str:
    """The suffix, ".gz" or ".zst", of a file that is compressed by its name, else ""."""
    suffix = PurePath(path.name).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def table_format(path: InputFile) -> TableFormat | None:
    """What kind of table a file is by its name, compressed or not; None for JSONL, and for ``-``."""
    compression = compression_of(path)
    suffix = _suffix_below(path.name)
    if suffix == ".parquet" and compression:
        raise JobError(f"{path}: Parquet is compressed inside, and cannot be read through {compression}; decompress it")
    match suffix:
        case ".csv":
            return "csv"
        case ".parquet":
            return "parquet"
        case _:
            return None


def is_known(name: str) -> bool:
    """Whether a file in a folder of inputs is one, by its name. Hidden files are none."""
    return not name.startswith(".") and _suffix_below(name) in (*_LINES, ".csv", ".parquet")


def _suffix_below(name: str) -> str:
    """The last suffix but that of a compression."""
    path = PurePath(name.lower())
    return PurePath(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _peek(stream: BinaryIO) -> bytes:
    return cast(BufferedReader, stream).peek(HEAD_BYTES)[:HEAD_BYTES]  # as all of them can


def _decompressed(stored: BinaryIO, compression: str) -> BinaryIO:
    """Both formats may hold several streams one after the other. Memory stays bounded, whatever they expand to."""
    match compression:
        case ".gz":
            return cast(BinaryIO, GzipFile(fileobj=stored, mode="rb"))
        case ".zst":
            return cast(BinaryIO, zstd.ZstdFile(stored, "rb"))
        case _:
            return stored
