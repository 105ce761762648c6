"""Files of clients: uploaded in pieces, kept on the disk, each seen only by the owner that made it.

A file is ``ID.data`` with what is known of it in ``ID.json`` beside it. It is there once both are, and ``ID.data`` comes last, in one
step: what a crash leaves of an upload is removed at the next start, and nobody sees it.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from shoal.jobs.durable.file_systems import sync_folder
from shoal.jobs.durable.storage import AppendFile, write_atomically
from shoal.openai.schema import APIError
from shoal.server.store.ids import IdMaker
from shoal.server.store.paging import Page, PageQuery, page

Purpose = Literal["batch", "batch_output"]

MAX_FILE_SIZE = 1 << 30
_MOST_NAME = 255  # characters
_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOG = logging.getLogger(__name__)


class FileInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A file, in OpenAI's shape. ``created_at`` in seconds since 1970."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"
    expires_at: None = None
    status_details: None = None


class _Stored(msgspec.Struct, frozen=True):
    owner: str
    file: FileInfo


class FileStore:
    """The files in ``folder``. Any thread may call any method.

    ``max_file_size``: bytes of one upload; ``max_total``: of all files together, past which no upload is taken (None: no limit).
    ``owner`` is whoever a file belongs to: for all others it does not exist, which is APIError 404.
    """

    def __init__(self, folder: Path, *, max_file_size: int = MAX_FILE_SIZE, max_total: int | None = None) -> None:
        self.max_file_size, self._max_total = max_file_size, max_total
        self._folder = folder
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._files = dict(_found(folder))
        self._bytes = sum(stored.file.bytes for stored in self._files.values())
        self._ids = IdMaker("file-", max(self._files, default=""))

    def new_id(self) -> str:
        """An id for ``adopt``."""
        return self._ids.next()

    def upload(self, owner: str) -> Upload:
        """A new file to be written."""
        return Upload(self, owner, self._folder / f"upload-{secrets.token_hex(8)}.part")

    def has(self, file_id: str) -> bool:
        """Whether there is such a file, whosever it is."""
        return file_id in self._files

    def adopt(self, owner: str, path: Path, file: FileInfo) -> None:
        """Make the file ``path``, which is durable and in the same file system, the content of ``file``; it is gone from there then."""
        with self._lock:
            self._put(path, _Stored(owner, file))
            self._bytes += file.bytes

    def get(self, owner: str, file_id: str) -> FileInfo:
        """What is known of a file. Raises APIError 404."""
        return self._stored(owner, file_id).file

    def path(self, owner: str, file_id: str) -> Path:
        """Where its content is. Raises APIError 404."""
        return self._data(self._stored(owner, file_id).file.id)

    def page(self, owner: str, query: PageQuery, purpose: str | None = None) -> Page[FileInfo]:
        """Some of an owner's files. Raises APIError for an ``after`` that is no id."""
        if query.after is not None and not self._ids.owns(query.after):
            raise APIError(f"after: {query.after!r} is not the id of a file", "after")
        with self._lock:
            mine = [stored.file for stored in self._files.values() if stored.owner == owner]
        return page((file for file in mine if purpose is None or file.purpose == purpose), query)

    def delete(self, owner: str, file_id: str) -> None:
        """Remove a file for good; who reads it just now may go on. Raises APIError 404."""
        stored = self._stored(owner, file_id)
        with self._lock:
            if self._files.pop(file_id, None) is None:  # another was quicker
                return
            self._bytes -= stored.file.bytes
            self._data(file_id).unlink(missing_ok=True)
            self._about(file_id).unlink(missing_ok=True)
            sync_folder(self._folder)

    def _stored(self, owner: str, file_id: str) -> _Stored:
        stored = self._files.get(file_id)
        if stored is None or stored.owner != owner:
            raise APIError(f"No such File object: {file_id}", "id", status=404)
        return stored

    def _put(self, path: Path, stored: _Stored) -> None:
        """With the lock held."""
        file = stored.file
        write_atomically(self._about(file.id), msgspec.json.encode(stored))
        os.replace(path, self._data(file.id))
        sync_folder(self._folder)
        self._files[file.id] = stored

    def _take(self, owner: str, path: Path, filename: str, purpose: Purpose, size: int) -> FileInfo:
        """An upload that has come to its end; its bytes are counted already."""
        with self._lock:
            name = filename[:_MOST_NAME] or "file"
            now = int(time.time())
            file = FileInfo(id=self._ids.next(), bytes=size, created_at=now, filename=name, purpose=purpose)
            self._put(path, _Stored(owner, file))
            return file

    def _reserve(self, size: int) -> None:
        with self._lock:
            if size > 0 and self._max_total is not None and self._bytes + size > self._max_total:
                raise APIError(
                    f"file: all files together would have more than {self._max_total} bytes; delete some",
                    "file",
                    status=413,
                )
            self._bytes += size

    def _data(self, file_id: str) -> Path:
        assert self._ids.owns(file_id), "only our own ids become paths"
        return self._folder / f"{file_id}.data"

    def _about(self, file_id: str) -> Path:
        return self._data(file_id).with_suffix(".json")


class Upload:
    """A file on its way in, to be closed however that ends."""

    def __init__(self, store: FileStore, owner: str, path: Path) -> None:
        self._store, self._owner, self._path = store, owner, path
        self._file = AppendFile(path)
        self._finished = False
        self.limit = store.max_file_size

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.size

    def write(self, data: bytes) -> None:
        """Add ``data``. Raises APIError 413 beyond the limits, 507 where the disk is full."""
        if self.size + len(data) > self.limit:
            raise APIError(f"file: is larger than {self.limit} bytes", "file", status=413)
        self._store._reserve(len(data))
        before = self.size
        try:
            with _disk_full_said():
                self._file.append(data)
        finally:
            self._store._reserve(self.size - before - len(data))  # of a piece that was not written

    def finish(self, filename: str, purpose: Purpose) -> FileInfo:
        """Make it a file, durably."""
        with _disk_full_said():
            self._file.sync()
            file = self._store._take(self._owner, self._path, filename, purpose, self.size)
        self._finished = True
        return file

    def close(self) -> None:
        """Let go of it. What is not finished is gone."""
        self._file.close()
        if not self._finished:
            self._store._reserve(-self.size)
            self._path.unlink(missing_ok=True)


@contextmanager
def _disk_full_said() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise APIError("file: the server's disk is full", "file", status=507, kind="server_error") from error


def _found(folder: Path) -> Iterator[tuple[str, _Stored]]:
    """The files that are there; what a crash left of others is removed."""
    ids = IdMaker("file-")
    names = {path.stem for path in folder.iterdir() if path.suffix in (".data", ".json") and ids.owns(path.stem)}
    for name in sorted(names):
        data, about = folder / f"{name}.data", folder / f"{name}.json"
        if data.exists() and about.exists():
            try:
                yield name, msgspec.json.decode(about.read_bytes(), type=_Stored)
            except msgspec.MsgspecError as error:
                _LOG.warning("%s: not the description of a file, which is left alone: %s", about, error)
        else:
            data.unlink(missing_ok=True)
            about.unlink(missing_ok=True)
    for pattern in ("upload-*.part", "file-*.json.tmp"):
        for path in folder.glob(pattern):
            path.unlink()
