"""Faulty disks for tests: calls that fail, and a disk that forgets at a power failure what was not synced.

Only ``os.write``, ``os.fsync``, ``os.ftruncate`` and ``os.replace`` are stood in for; reading goes to the real files.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

CALLS = ("write", "fsync", "ftruncate", "replace")


class Stopped(BaseException):
    """The process ends here. Nothing catches it."""


@contextmanager
def intercepted(calls: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """Have ``calls(name, real, arguments)`` in the place of the four calls."""

    def stand_in(name: str) -> Callable[..., Any]:
        real = getattr(os, name)
        return lambda *arguments: calls(name, real, arguments)

    with ExitStack() as patches:
        for name in CALLS:
            patches.enter_context(mock.patch.object(os, name, stand_in(name)))
        yield


def no_waiting(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """For ``intercepted``: all goes well, and no call waits for a disk."""
    return None if name == "fsync" else real(*arguments)


class FaultyCalls:
    """For ``intercepted``: the ``at``-th call (from 0) of ``names`` fails with ``error``.

    With a ``part`` that call, a write, writes only so much of its data, and the one after it fails; if ``error`` is 0 that
    one goes well.
    """

    def __init__(self, names: Sequence[str], at: int, error: int, part: float = 0.0) -> None:
        self.reached = False
        self._names = names
        self._at = at
        self._error = error
        self._part = part
        self._count = 0

    def __call__(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name not in self._names:
            return no_waiting(name, real, arguments)
        after = self._count - self._at
        self._count += 1
        self.reached |= after == 0
        if self._part and after == 0:
            fd, data = arguments
            return real(fd, data[: max(1, int(len(data) * self._part))])
        if self._error and after == (1 if self._part else 0):
            raise OSError(self._error, os.strerror(self._error), arguments[0] if name == "replace" else None)
        return no_waiting(name, real, arguments)


@dataclass
class _File:
    """``durable`` is what a power failure leaves at least; ``dirty`` are the ranges written since, in their order."""

    fd: int
    durable: bytearray
    dirty: list[tuple[int, int]] = field(default_factory=list)

    def content(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)

    def sync(self) -> None:
        now = self.content()
        del self.durable[len(now) :]
        for start, end in self.dirty:
            _put(self.durable, start, now[start:end])
        self.durable.extend(bytes(len(now) - len(self.durable)))
        self.dirty.clear()

    def survivor(self, random: Random) -> bytes:
        """What is found after a power failure: of the unsynced bytes a part, then nothing or zeros."""
        now = self.content()
        found = bytearray(self.durable)
        if random.random() < 0.5:
            del found[len(now) :]
        left = random.randint(0, sum(end - start for start, end in self.dirty))
        zeros = random.random() < 0.5
        for start, end in self.dirty:
            kept = min(left, end - start)
            left -= kept
            _put(found, start, now[start : start + kept])
            if zeros and kept < end - start:
                found.extend(bytes(max(0, end - len(found))))
        return bytes(found)


class Disk:
    """A folder on a disk that a power failure can hit. All that is there at first is durable.

    An fsync that fails forgets the bytes it was to write, and the next one, which succeeds, does not write them either.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[int, _File] = {}
        self._names: dict[int, dict[str, int]] = {}
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            self._names[folder.stat().st_ino] = _names_in(folder)
            for path in filter(Path.is_file, folder.iterdir()):
                with open(path, "rb") as stream:
                    known = self._file(stream.fileno())
                known.durable[:] = known.content()

    def close(self) -> None:
        for file in self._files.values():
            os.close(file.fd)

    @contextmanager
    def running(self, stop_at: int, *, failing: bool = False) -> Iterator[None]:
        """Stop the process at the ``stop_at``-th call (from 0), or have that call fail with EIO if ``failing``."""
        count = 0

        def call(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            nonlocal count
            count += 1
            if failing and count - 1 == stop_at:
                self._forget(name, arguments)
                raise OSError(errno.EIO, "injected")
            if not failing and count > stop_at:
                raise Stopped
            return self._perform(name, real, arguments)

        with intercepted(call):
            yield

    def durable_names(self, folder: Path) -> set[str]:
        """The names in ``folder`` that a power failure leaves for sure."""
        return set(self._names.get(folder.stat().st_ino, {}))

    def _perform(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "fsync":
            return self._sync(arguments[0])
        if name == "write":
            file, start = self._file(arguments[0]), os.lseek(arguments[0], 0, os.SEEK_CUR)
            written = real(*arguments)
            file.dirty.append((start, start + written))
            return written
        if name == "ftruncate":
            self._file(arguments[0])
        return real(*arguments)

    def _sync(self, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            self._names[os.fstat(fd).st_ino] = _names_in(Path(os.readlink(f"/proc/self/fd/{fd}")))
        else:
            self._file(fd).sync()

    def _forget(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "fsync" and stat.S_ISREG(os.fstat(arguments[0]).st_mode):
            self._file(arguments[0]).dirty.clear()

    def _file(self, fd: int) -> _File:
        """Kept open, so that the inode's number is not given away."""
        inode = os.fstat(fd).st_ino
        if inode not in self._files:
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
            self._files[inode] = _File(own, bytearray())
        return self._files[inode]

    def power_failure(self, random: Random) -> None:
        """Leave in the folder what a power failure might leave of it."""
        left = self._survivors(self._root, random)
        for path in sorted(self._root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        for path, data in left.items():
            path.mkdir() if data is None else path.write_bytes(data)

    def _survivors(self, folder: Path, random: Random) -> dict[Path, bytes | None]:
        """What each surviving name stands for: bytes, or None for a folder, which comes before what is in it."""
        now, durable = _names_in(folder), self._names.get(folder.stat().st_ino, {})
        left: dict[Path, bytes | None] = {}
        for name in sorted(now | durable):
            inode = random.choice([now.get(name), durable.get(name)])
            if inode in self._files:
                left[folder / name] = self._files[inode].survivor(random)
            elif inode is not None and (folder / name).is_dir():
                left[folder / name] = None
                left |= self._survivors(folder / name, random)
            elif inode is not None:
                left[folder / name] = b""
        return left


def _names_in(folder: Path) -> dict[str, int]:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}


def _put(data: bytearray, start: int, part: bytes) -> None:
    if part:
        data.extend(bytes(max(0, start - len(data))))
        data[start : start + len(part)] = part
