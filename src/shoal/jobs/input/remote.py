"""Input files that fsspec reads (``shoal[s3]``): in object storage, on web servers, wherever a URL leads."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from shoal.errors import JobError, ParameterError
from shoal.jobs.durable.store import file_system
from shoal.jobs.durable.urls import is_web, shown, told
from shoal.jobs.input.kinds import HEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

_BLOCK_BYTES = 4 << 20  # one request; s3fs would take 50 MiB
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries of one read

_ABSENT = (404, 410)  # statuses of web servers

# What changes with a file's content, in the words of the stores; the first that is there counts.
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum", "crc32c", "blob_id")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that ``url`` leads to, as it was when it was looked up: ``size`` in bytes, and ``mark``, which is another one when the
    content is (its ETag or checksum, or where the store has none the time of its last change; "" where it has none of them)."""

    url: str
    size: int
    mark: str

    def __str__(self) -> str:
        """The URL as ``shown``."""
        return shown(self.url)

    @property
    def name(self) -> str:
        """The last part of its path."""
        path = urlsplit(self.url).path if is_web(self.url) else self.url
        return PurePosixPath(path).name


def remote_files(url: str, in_folder: Callable[[str], bool]) -> list[RemoteFile]:
    """The file that ``url`` leads to; where it is a glob or a folder all files of it, of a folder those whose name passes
    ``in_folder``.

    Raises ParameterError for a URL that leads to none, and JobError where fsspec or its package for this kind of URL is missing, or the
    store cannot be asked.
    """
    if "::" in url:
        raise ParameterError("input file", shown(url), "one URL, not several chained by ::")
    system, path = file_system(url, shared=True)
    with _asking(url):
        found = _listed(system, path, in_folder)
    return [_remote_file(system, url, name, info) for name, info in found.items()]


def open_remote(file: RemoteFile) -> BinaryIO:
    """The content for reading, from its start, some megabytes ahead. A read that fails is tried again from where it was, for about 15
    seconds. Raises JobError, as reading does, where it still fails, and for a file that is not what it was when it was looked up."""
    steady = _SteadyFile(file)
    steady.open()
    return cast("BinaryIO", io.BufferedReader(steady, HEAD_BYTES))


class _SteadyFile(io.RawIOBase):
    """A remote file that is opened again where reading fails."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._at = 0
        self._opened: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def open(self) -> None:
        """Find out now whether it can be."""
        self._tried(self._reopened)

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._file.size - self._at)
        if size <= 0:
            return 0
        data = self._tried(lambda: self._read(size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()

    def _tried(self, call: Callable[[], bytes | None]) -> bytes:
        for pause in (*_PAUSES, None):
            try:
                return call() or b""
            except JobError:
                raise
            except Exception as error:  # whatever the library of the store raises
                self._drop()
                reason = _reason(error, self._file.url)
                if pause is None or isinstance(reason, FileNotFoundError | PermissionError):
                    raise self._unreadable(reason) from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _unreadable(self, reason: BaseException) -> JobError:
        return JobError(f"{self._file}: cannot be read on at byte {self._at}: {told(reason, self._file.url)}")

    def _read(self, size: int) -> bytes:
        if self._opened is None:
            self._reopened()
        self._opened.seek(self._at)
        data: bytes = self._opened.read(size)
        if not data:
            raise OSError(f"it ended before its {self._file.size} bytes")
        return data

    def _reopened(self) -> None:
        system, path = file_system(self._file.url, shared=True)
        opened = system.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")
        self._opened = opened
        info = getattr(opened, "details", None) or {}
        info = info if _mark(info) else system.info(path)  # some know no more than the size
        if (info.get("size"), _mark(info)) != (self._file.size, self._file.mark):
            raise JobError(f"{self._file}: was changed after this run began; the same command looks at it anew")

    def _drop(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()


@contextmanager
def _asking(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the library of the store raises
        reason = _reason(error, url)
        if isinstance(reason, FileNotFoundError):
            raise ParameterError("input file", shown(url), "a file, a folder or a glob of files that exist") from None
        raise JobError(f"{shown(url)}: cannot be looked up: {told(reason, url)}") from error


def _listed(system: Any, path: str, in_folder: Callable[[str], bool]) -> Mapping[str, Any]:
    """What is known of the files at ``path``, by their names."""
    magic = "*" if is_web(path) else "*?["  # a web address may hold the others
    try:
        info = system.info(path)
    except FileNotFoundError:
        if not any(sign in path for sign in magic):
            raise
        matched = system.glob(path, detail=True)
        return {name: info for name, info in matched.items() if info["type"] == "file" and not _is_hidden(name)}
    if info["type"] == "file":
        return {path: info}
    inside = system.ls(path, detail=True)
    return {each["name"]: each for each in inside if each["type"] == "file" and in_folder(_last(each["name"]))}


def _remote_file(system: Any, url: str, name: str, info: Mapping[str, Any]) -> RemoteFile:
    if info.get("size") is None:
        raise JobError(f"{shown(url)}: the server does not say how large it is; download it and give the file")
    return RemoteFile(name if is_web(name) else system.unstrip_protocol(name), info["size"], _mark(info))


def _mark(info: Mapping[str, Any]) -> str:
    names = (*_MARKS, *_TIMES)
    return next((f"{name} {_plain(info[name])}" for name in names if info.get(name) is not None), "")


def _plain(value: object) -> object:
    """The same for a moment in any of the types that one store may use."""
    return value.timestamp() if isinstance(value, datetime) else value


def _last(name: str) -> str:
    return "" if name.endswith("/") else PurePosixPath(name).name


def _is_hidden(name: str) -> bool:
    return _last(name).startswith(".")


def _reason(error: Exception, url: str) -> BaseException:
    """What went wrong: fsspec says of all that a web server refuses, and of servers that do not answer, that the file is not found."""
    cause = error.__cause__
    if cause is None or not (is_web(url) and isinstance(error, FileNotFoundError)):
        return error
    is_absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in _ABSENT
    return error if is_absent else cause
