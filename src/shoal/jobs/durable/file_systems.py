"""What some file systems do not have: file locks (Lustre mounted without them, NFS without its lock service, some FUSE), and syncing.

A job goes on without: what no longer holds then is said once for each file system. Any other error is an error.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import Literal

_LOG = logging.getLogger(__name__)

Locked = Literal["taken", "busy", "none"]

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

_WITHOUT = {
    "lock": "file locks are not available in {folder} ({error}): nothing keeps two processes off the same job, so start only one",
    "look": "file locks are not available in {folder} ({error}): a process on another machine that works on the job is not seen",
    "file sync": "files in {folder} cannot be synced to the disk ({error}): if the machine crashes, finished rows may be lost",
    "folder sync": "names in {folder} cannot be synced to the disk ({error}): if the machine crashes, files of a job begun just"
    " before may be missing",
}
_said: set[tuple[str, int]] = set()  # what was said of which file system


def lock(fd: int, path: Path, *, shared: bool = False) -> Locked:
    """Take the lock of the open file ``path`` without waiting: "busy" if another holds it, "none" where there are no locks.

    ``shared``: only to see whether it is free. Raises OSError that names the file for any other reason.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        _go_on_without("look" if shared else "lock", error, fd, path, path.parent, _NO_LOCKS)
        return "none"
    return "taken"


def sync(fd: int, path: Path) -> None:
    """Return once the bytes of the open file ``path`` are on the disk. Raises OSError that names the file."""
    try:
        os.fsync(fd)
    except OSError as error:
        _go_on_without("file sync", error, fd, path, path.parent, _NO_SYNC)


def sync_folder(folder: Path) -> None:
    """Return once the names in ``folder`` are on the disk. Raises OSError that names it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        _go_on_without("folder sync", error, fd, folder, folder, _NO_SYNC)
    finally:
        os.close(fd)


def _go_on_without(what: str, error: OSError, fd: int, path: Path, folder: Path, harmless: frozenset[int]) -> None:
    """Warn if the file system just lacks ``what``, else raise the error, which as that of a descriptor names no file."""
    if error.errno not in harmless:
        error.filename = error.filename or str(path)
        raise error
    key = (what, os.fstat(fd).st_dev)
    if key not in _said:
        _said.add(key)
        _LOG.warning(_WITHOUT[what].format(folder=folder, error=error.strerror))
