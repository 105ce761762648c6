"""One folder of files on a local disk, or of objects at any URL that fsspec knows, in which a name can be taken only once.

That a name can be taken only once is all that keeps two processes on one job apart: see ``parts``. Names are relative, as
``_shoal/journal/000000000001``; folders come into being with what is in them. What a call has done is durable when it returns.
Every failure is an OSError that says where, but for AlreadyThereError and JobErrors about the store itself.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from shoal.errors import JobError
from shoal.jobs.durable.file_systems import sync, sync_folder
from shoal.jobs.durable.storage import write_all
from shoal.jobs.durable.urls import shown, told
from shoal.system.streams import open_above_standard

STAGED = "_shoal/staged"  # what is not finished lies here, and may be deleted when its process is gone

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOCAL_SCHEMES = ("file", "local")
_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds before a request is sent again
# Not worth asking a second time. All else, of whatever type, may be the network's.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ValueError,
    TypeError,
)
_FINAL_NAMES = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "NoRegionError",
    "ProfileNotFound",
    "ParamValidationError",
)
_NUMBERS: dict[type[Exception], int] = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
}
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})


class AlreadyThereError(Exception):
    """A name was to be taken that somebody else has taken."""


class Store(Protocol):
    """One folder. ``place`` is what people call it: a path, or a URL as ``shown``. ``is_local``: on a disk of this machine, or one it
    has mounted."""

    place: str
    is_local: bool

    def create(self, name: str, data: bytes) -> None:
        """Take ``name`` for ``data``. Raises AlreadyThereError if it holds other bytes.

        Bytes that differ in every call (a nonce in them) make sure that equal ones are one's own: those of a request that had its
        effect, and whose answer was lost.
        """

    def read(self, name: str) -> bytes:
        """All bytes of it. Raises FileNotFoundError."""

    def replace(self, name: str, data: bytes) -> None:
        """Put ``data`` there, whatever was there before, in one step."""

    def copy(self, source: str, target: str) -> None:
        """Put the bytes of ``source`` into ``target`` too, in one step. Raises FileNotFoundError."""

    def list(self, folder: str) -> dict[str, int]:
        """The names in ``folder`` (not in folders of it), in order, each with its size in bytes. Empty for one that is not there."""

    def delete(self, name: str) -> None:
        """Take it away, if it is there."""

    def exists(self, name: str) -> bool:
        """Whether it is there."""

    def modified(self, name: str) -> float:
        """When it was written, by the clock of the store, in seconds since 1970. Raises FileNotFoundError."""


def is_url(place: str | Path) -> bool:
    """Whether it is a URL, and no path."""
    return isinstance(place, str) and _URL.match(place) is not None


def open_store(place: str | Path) -> Store:
    """The folder at a path or URL, which need not be there yet.

    Raises JobError for a URL that nothing here can open, saying what is missing.
    """
    path = local_path(place)
    return ObjectStore(str(place).rstrip("/")) if path is None else LocalStore(path)


def local_path(place: str | Path) -> Path | None:
    """The path of a folder or file on this machine, also as a ``file://`` URL; None for other URLs."""
    if not is_url(place):
        return Path(place)
    parts = urlsplit(str(place))
    return Path(unquote(parts.path)) if parts.scheme in _LOCAL_SCHEMES else None


def check_creates(store: Store) -> float:
    """Make sure that a name can be taken only once: one is taken twice, which must fail. Returns the time by the clock of the store.

    Raises JobError for a store where it does not.
    """
    name = f"_shoal/probe-{uuid.uuid4().hex}"
    try:
        store.create(name, b"1")
        store.create(name, b"2")
    except AlreadyThereError:
        return store.modified(name)
    finally:
        store.delete(name)
    raise no_create(store.place, "it lets two processes take the same name")


def no_create(place: str, reason: str) -> JobError:
    """What a store is refused with that could not keep two processes on one job apart."""
    return JobError(f"{place}: cannot hold a job: {reason} (no create-if-absent)")


# On a disk ------------------------------------------------------------------------------------------------------------


class LocalStore:
    """A folder on a disk. A name is taken by a hard link, which comes into being once and with all its bytes."""

    is_local = True

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        self._folder = folder

    def create(self, name: str, data: bytes) -> None:
        """As Store says. Raises JobError on a file system without hard links."""
        path = self._path(name)
        with self._written(data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                if path.read_bytes() != data:
                    raise AlreadyThereError(name) from None
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise no_create(self.place, f"its file system has no hard links ({error.strerror})") from error
                raise
        sync_folder(path.parent)

    def read(self, name: str) -> bytes:
        """As Store says."""
        return (self._folder / name).read_bytes()

    def replace(self, name: str, data: bytes) -> None:
        """As Store says."""
        path = self._path(name)
        with self._written(data) as temporary:
            os.replace(temporary, path)
        sync_folder(path.parent)

    def copy(self, source: str, target: str) -> None:
        """As Store says; both names are then of the same file."""
        path = self._path(target)
        try:
            os.link(self._folder / source, path)
        except FileExistsError:
            self.replace(target, self.read(source))
        sync_folder(path.parent)

    def list(self, folder: str) -> dict[str, int]:
        """As Store says."""
        with suppress(FileNotFoundError), os.scandir(self._folder / folder) as entries:
            return {f"{folder}/{name}": size for name, size in sorted(_files(list(entries)))}
        return {}

    def delete(self, name: str) -> None:
        """As Store says."""
        (self._folder / name).unlink(missing_ok=True)

    def exists(self, name: str) -> bool:
        """As Store says."""
        return (self._folder / name).exists()

    def modified(self, name: str) -> float:
        """As Store says."""
        return (self._folder / name).stat().st_mtime

    def _path(self, name: str) -> Path:
        path = self._folder / name
        _make_folder(path.parent)
        return path

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A file of another name that holds ``data``, durably, and is gone afterwards."""
        path = self._path(f"{STAGED}/{uuid.uuid4().hex}.tmp")
        try:
            fd = open_above_standard(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                write_all(fd, data, path)
                sync(fd, path)
            finally:
                os.close(fd)
            yield path
        finally:
            path.unlink(missing_ok=True)


def _files(entries: list[os.DirEntry[str]]) -> list[tuple[str, int]]:
    found = []
    for entry in entries:
        with suppress(FileNotFoundError):
            if entry.is_file():
                found.append((entry.name, entry.stat().st_size))
    return found


def _make_folder(folder: Path) -> None:
    """Create it and what it lies in, durably."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


# At a URL -------------------------------------------------------------------------------------------------------------


class ObjectStore:
    """A folder of a file system of fsspec. Nothing is cached; a request that fails is sent again, some times."""

    is_local = False

    def __init__(self, url: str) -> None:
        self.place = shown(url)
        self._url = url
        self._fs, self._root = file_system(url)
        if not _creates_itself(self._fs):
            raise no_create(self.place, f"fsspec's {type(self._fs).__name__} looks first and then writes")

    def create(self, name: str, data: bytes) -> None:
        """As Store says. Raises JobError where the file system cannot."""
        try:
            self._ask(self._fs.pipe_file, self._path(name), data, mode="create")
        except NotImplementedError as error:
            raise no_create(self.place, f"fsspec's {type(self._fs).__name__} lacks it") from error
        except FileExistsError:
            if self.read(name) != data:
                raise AlreadyThereError(name) from None

    def read(self, name: str) -> bytes:
        """As Store says."""
        data: bytes = self._ask(self._fs.cat_file, self._path(name))
        return data

    def replace(self, name: str, data: bytes) -> None:
        """As Store says."""
        self._ask(self._fs.pipe_file, self._path(name), data)

    def copy(self, source: str, target: str) -> None:
        """As Store says; the bytes do not pass through this machine."""
        self._ask(self._fs.cp_file, self._path(source), self._path(target))

    def list(self, folder: str) -> dict[str, int]:
        """As Store says."""
        found: dict[str, Any] = self._ask(self._fs.find, self._path(folder), maxdepth=1, detail=True)
        return {f"{folder}/{path.rpartition('/')[2]}": int(info["size"]) for path, info in sorted(found.items())}

    def delete(self, name: str) -> None:
        """As Store says."""
        with suppress(FileNotFoundError):
            self._ask(self._fs.rm_file, self._path(name))

    def exists(self, name: str) -> bool:
        """As Store says."""
        found: bool = self._ask(self._fs.exists, self._path(name))
        return found

    def modified(self, name: str) -> float:
        """As Store says."""
        moment: float = self._ask(self._fs.modified, self._path(name)).timestamp()
        return moment

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _ask(self, request: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer to a request, which may have taken effect more than once."""
        for pause in (*_PAUSES, None):
            try:
                return request(*arguments, **options)
            except Exception as error:
                if isinstance(error, NotImplementedError):
                    raise
                if _is_taken(error):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), arguments[0]) from error
                if pause is None or isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES:
                    raise self._told(error) from error
            time.sleep(pause)
        raise AssertionError("the last time it is raised")

    def _told(self, error: Exception) -> OSError:
        """What a file system raises may be of any type, and need not say where."""
        number = getattr(error, "errno", None) or _NUMBERS.get(type(error), errno.EIO)
        said = told(error, self._url)
        text = said if isinstance(error, OSError) and str(error) else f"{type(error).__name__}: {said}"
        return OSError(number, text, self.place)  # of the type that goes with the number


def file_system(url: str, *, shared: bool = False) -> tuple[Any, str]:
    """fsspec's file system of a URL, and what the URL is called there. Of ``shared`` ones there is one for all who ask.

    Raises JobError for a URL that nothing here can open, saying what is missing.
    """
    scheme = url.partition(":")[0]
    try:
        from fsspec.core import url_to_fs

        file_system, root = url_to_fs(url, skip_instance_cache=not shared, use_listings_cache=False)
    except ImportError as error:
        package = "'shoal[s3]'" if scheme in ("s3", "s3a") else f"fsspec and its package for {scheme}://"
        raise JobError(f"{shown(url)}: {told(error, url)}: pip install {package}") from error
    except Exception as error:  # a file system's constructor may look at the URL, at settings, at the network
        raise JobError(f"{shown(url)}: cannot be opened: {told(error, url)}") from error
    return file_system, root.rstrip("/")


def _creates_itself(file_system: Any) -> bool:
    """Whether it has a create of its own. What fsspec does for those that have none is no create-if-absent."""
    for name in ("_pipe_file", "pipe_file"):
        method = getattr(type(file_system), name, None)
        if method and not method.__module__.startswith(("fsspec.spec", "fsspec.asyn")):
            return "mode" in inspect.signature(method).parameters
    return False


def _is_taken(error: BaseException) -> bool:
    """Whether a create was refused because the name is taken: not all stores say so in the same words."""
    if isinstance(error, FileExistsError):
        return True
    answer = getattr(error.__cause__, "response", None)
    code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
    return str(code) in ("PreconditionFailed", "412")
