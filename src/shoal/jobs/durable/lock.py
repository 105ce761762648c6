"""One process at a time on a job."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from shoal.errors import JobError
from shoal.jobs.durable import file_systems
from shoal.system.streams import open_above_standard

_TRIES = 5
_PAUSE = 0.02  # seconds


class JobLock:
    """Holds the job in ``folder``, created if need be, for this process. A context manager. ``doing``: what it does there, for others.

    Entering it raises JobError with the pid of the process that holds it already. The system takes the lock back when
    its process ends, however it ends; the pid in the file is only a word about who has it. Where the file system has no
    locks, nobody is kept out.
    """

    def __init__(self, folder: Path, doing: str = "working on this job") -> None:
        self._folder, self._doing = folder, doing
        self._path = folder / "lock"
        self._fd = -1
        self._locked = False

    def __enter__(self) -> JobLock:
        self._folder.mkdir(exist_ok=True)
        fd = open_above_standard(self._path, os.O_RDWR | os.O_CREAT)
        try:
            found = _take(fd, self._path)
            if found == "busy":
                raise JobError(f"{self._folder}: process {_pid(fd) or 'of unknown number'} is {self._doing}")
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._locked = fd, found == "taken"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._locked:  # then the pid is all that tells of this process
            with suppress(OSError):
                os.ftruncate(self._fd, 0)
        os.close(self._fd)


def owner(folder: Path) -> int | None:
    """The pid of the process that works on the job in ``folder`` now (0 if it cannot be told); None if there is none.

    Where the file system has no locks, only a process of this machine is found.
    """
    path = folder / "lock"
    try:
        fd = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        match file_systems.lock(fd, path, shared=True):
            case "busy":
                return _pid(fd)
            case "none":
                pid = _pid(fd)
                return pid if pid and psutil.pid_exists(pid) else None
            case "taken":
                return None
    finally:
        os.close(fd)


def _take(fd: int, path: Path) -> file_systems.Locked:
    """Take the lock. Another process may have it for a moment only to see whether it is free, so more than one try."""
    for _ in range(_TRIES):
        found = file_systems.lock(fd, path)
        if found != "busy":
            break
        time.sleep(_PAUSE)
    return found


def _pid(fd: int) -> int:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() and len(text) < 10 else 0
