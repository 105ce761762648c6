"""The bytes of an input: a file as it is, one compressed by gzip or Zstandard (by its suffix), or stdin."""

from __future__ import annotations

import os
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import GzipFile
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, cast

from shoal.errors import JobError
from shoal.jobs.input.kinds import HEAD_BYTES, refuse_misnamed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STANDARD_STREAM = Path("-")

# What the decompressors raise for data that is damaged or ends too early; gzip's BadGzipFile is an OSError.
_DAMAGE = (EOFError, OSError, zlib.error, zstd.ZstdError)

TableFormat = Literal["csv", "parquet"]


class LineStream(Protocol):
    """What gives bytes line by line, as binary files do."""

    def readline(self, size: int, /) -> bytes:
        """The next line with its end, or the next ``size`` bytes of it; b"" at the end."""


class InputStream:
    """An open input, read line by line and decompressed. ``size`` counts its bytes as stored; None for a pipe.

    Raises JobError for one that is not compressed as ``compression``, a suffix, says.
    """

    def __init__(self, path: Path, stored: BinaryIO, compression: str = "") -> None:
        self.path = path
        self.size = _size_of(stored)
        self._stored = stored
        if compression:
            refuse_misnamed(path, _peek(stored), compression)
        self._content = _decompressed(stored, compression)

    @property
    def bytes_read(self) -> int:
        """How much of ``size`` is behind, 0 if that is not known. A decompressor is some kilobytes ahead."""
        return 0 if self.size is None else self._stored.tell()

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
def open_stream(path: Path) -> Iterator[InputStream]:
    """The input for reading, from its start; ``-`` is stdin."""
    if path == STANDARD_STREAM:
        if sys.stdin is None:
            raise JobError("-: stdin is closed")
        yield InputStream(path, sys.stdin.buffer)
        return
    with open(path, "rb", buffering=HEAD_BYTES) as stored:
        yield InputStream(path, stored, compression_of(path))


def compression_of(path: Path) -> str:
    """The suffix, ".gz" or ".zst", of a file that is compressed by its name, else ""."""
    suffix = path.suffix.lower()
    return suffix if suffix in (".gz", ".zst") else ""


def table_format(path: Path) -> TableFormat | None:
    """What kind of table a file is by its name, compressed or not; None for JSONL, and for ``-``."""
    compression = compression_of(path)
    suffix = Path(path.stem).suffix.lower() if compression else path.suffix.lower()
    if suffix == ".parquet" and compression:
        raise JobError(f"{path}: Parquet is compressed inside, and cannot be read through {compression}; decompress it")
    match suffix:
        case ".csv":
            return "csv"
        case ".parquet":
            return "parquet"
        case _:
            return None


def _size_of(stream: BinaryIO) -> int | None:
    status = os.fstat(stream.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None


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
