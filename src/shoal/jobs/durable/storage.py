"""Files whose bytes are on the disk, not only in the memory of the system, when a call returns.

The name of a file is not part of it: a file that was created or renamed is sure to be found again only once its folder
is synced too. After any OSError here nobody knows which bytes reached the disk; what is on it must be read anew.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from shoal.jobs.durable import file_systems
from shoal.jobs.durable.file_systems import sync_folder
from shoal.system.streams import open_above_standard


class AppendFile:
    """A file that grows at its end; ``size`` is its length in bytes. A context manager.

    It is created if need be and cut to its first ``keep`` bytes, and both are durable before it can be used. Nobody else
    can open it so until it is closed, where the file system has locks. Every failure is an OSError that names the file.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = Path(os.path.realpath(path))  # behind a link, the folder to sync is that of the file
        self.size = 0
        self._fd = open_above_standard(self.path, os.O_RDWR | os.O_CREAT)
        try:
            self._claim()
            self.cut(keep)
            sync_folder(self.path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, data: bytes) -> None:
        """Write all of ``data``; it is durable after ``sync``."""
        write_all(self._fd, data, self.path)
        self.size += len(data)

    def sync(self) -> None:
        """Return once all that was written is on the disk, in the file that has this name."""
        file_systems.sync(self._fd, self.path)
        with _naming(self.path):
            if not os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                raise OSError(errno.ESTALE, "replaced by another file while it was written")

    def cut(self, size: int) -> None:
        """Drop all but the first ``size`` bytes, durably."""
        with _naming(self.path):
            assert os.fstat(self._fd).st_size >= size, "only what is there can be kept"
            os.ftruncate(self._fd, size)
            self._continue_at(size)
        self.sync()

    def write_again(self, start: int) -> None:
        """Write the bytes from ``start`` to the end once more, in place, and sync them.

        Bytes whose fsync failed can still be read, from memory, and the system takes them for written: no later fsync
        puts them on the disk unless they are written again.
        """
        with _naming(self.path):
            data = os.pread(self._fd, self.size - start, start)
            assert len(data) == self.size - start, "a file is read to its end"
            self._continue_at(start)
        self.append(data)
        self.sync()

    def _claim(self) -> None:
        """Two that append to one file would write over each other."""
        if file_systems.lock(self._fd, self.path) == "busy":
            raise OSError(errno.EBUSY, "another job writes to it", str(self.path))

    def _continue_at(self, size: int) -> None:
        os.lseek(self._fd, size, os.SEEK_SET)
        self.size = size

    def close(self) -> None:
        """Close the file; what was not synced may be lost."""
        os.close(self._fd)

    def __enter__(self) -> AppendFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_atomically(path: Path, data: bytes) -> None:
    """Put ``data`` into the file ``path``, durably: whatever happens, it holds all of the old bytes or all of the new.

    A crash may leave NAME.tmp beside it, which the next call replaces.
    """
    temporary = path.with_name(path.name + ".tmp")
    with AppendFile(temporary) as file:
        file.append(data)
        file.sync()
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_all(fd: int, data: bytes, path: Path) -> None:
    """Write all of ``data`` to the open file ``path``. Raises OSError that names it."""
    left = memoryview(data)
    with _naming(path):
        while left:
            left = left[os.write(fd, left) :]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Calls on a file descriptor fail without saying of which file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
