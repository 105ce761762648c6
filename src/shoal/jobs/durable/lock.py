"""One process at a time on a job."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from shoal.errors import JobError

_TRIES = 5
_PAUSE = 0.02  # seconds


class JobLock:
    """Holds the job in ``folder``, created if need be, for this process. A context manager.

    Entering it raises JobError with the pid of the process that holds it already. The system takes the lock back when
    its process ends, however it ends; the pid in the file is only a word about who has it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1

    def __enter__(self) -> JobLock:
        self._folder.mkdir(exist_ok=True)
        fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _taken(fd):
                raise JobError(f"{self._folder}: process {_pid(fd) or 'of unknown number'} is working on this job")
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def owner(folder: Path) -> int | None:
    """The pid of the process that works on the job in ``folder`` now (0 if it cannot be told); None if there is none."""
    try:
        fd = os.open(folder / "lock", os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(fd)
    finally:
        os.close(fd)
    return None


def _taken(fd: int) -> bool:
    """Take the lock. Another process may have it for a moment only to see whether it is free, so more than one try."""
    for _ in range(_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
        else:
            return True
    return False


def _pid(fd: int) -> int:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else 0
