"""Compiled kernels between processes: a file each, in a folder for everything that went into them.

A file is a checksum and content. Nothing of the content is looked at before the checksum fits, as it is machine code, which can do
anything once damaged. Name and folder are part of the sum, so that no file stands for another.

Whatever is wrong with a file or a folder is said once, and the kernel compiled again. A folder that cannot be written is read as far
as it goes; new kernels then go to a folder of this user's in /tmp, or nowhere. Files that somebody else may have put there are not
used: anybody can make a folder of a known name in /tmp.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from shoal.system.streams import say

_SUM_BYTES = 32
_TEMPORARY = "/tmp"  # where TMPDIR is not set, or of no use


class KernelStore:
    """Named contents in the folder ``key`` of ``root``, which is None for a user who has no place for caches."""

    def __init__(self, root: Path | None, key: str) -> None:
        self.folder = None if root is None else root / key
        self._key = key
        self._said: set[str] = set()

    def load(self, name: str) -> bytes | None:
        """What this or another process has saved under ``name``; None if none has, or if it cannot be used."""
        found = None if self.folder is None else self._read(self.folder / name)
        if found is None and self._spare is not None:  # asked for only now: a warm start tries to write nothing
            found = self._read(self._spare / name)
        return found

    def has(self, name: str) -> bool:
        """Whether there is a file of this name, of whatever use."""
        if self.folder is not None and (self.folder / name).exists():
            return True
        return self._spare is not None and (self._spare / name).exists()

    @property
    def keeps(self) -> bool:
        """Whether what is saved can be loaded."""
        return not self._unwritable or self._spare is not None

    def save(self, name: str, content: bytes) -> None:
        """Keep ``content`` for later processes, if there is a place for it."""
        place = self.folder
        if self._unwritable:
            place = self._spare
            kept = f"kernels are kept in {place}" if place else "kernels are compiled in every process"
            self._say("unwritable", f"{self._unwritable}: {kept}; set SHOAL_KERNEL_CACHE to a folder of yours")
        if place is None:
            return
        try:
            _write(place / name, self._sum(name, content) + content)
        except OSError as error:
            self._say(
                "not kept", f"cannot write {place / name} ({error.strerror}): it is compiled again in every process"
            )

    def _refuse(self, name: str | Path, why: str) -> None:
        """Say that a file is of no use."""
        self._say("refused", f"compiled kernel {name}: {why}; it is compiled again, and others like it")

    def _read(self, path: Path) -> bytes | None:
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                status = os.fstat(file.fileno())
                whole = file.read() if stat.S_ISREG(status.st_mode) else b""
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._refuse(path, str(error.strerror))
            return None
        content = whole[_SUM_BYTES:]
        if status.st_uid not in self._trusted:
            self._refuse(path, f"belongs to user {status.st_uid}")
        elif whole[:_SUM_BYTES] != self._sum(path.name, content):
            self._refuse(path, "is damaged")
        else:
            return content
        return None

    def _sum(self, name: str, content: bytes) -> bytes:
        digest = hashlib.blake2b(f"{self._key}\0{name}\0".encode(), digest_size=_SUM_BYTES)
        digest.update(content)
        return digest.digest()

    @cached_property
    def _trusted(self) -> set[int]:
        """Whose files are used: this user's and root's, and the folder's owner's unless it lies where everybody can make one."""
        users = {os.geteuid(), 0}
        with suppress(OSError):
            if self.folder is not None:
                root = self.folder.parent.resolve(strict=True)
                if not _anybody_writes(root):
                    users.add(root.stat().st_uid)
        return users

    @cached_property
    def _unwritable(self) -> str:
        """Why the folder cannot be written; nothing if it can."""
        if self.folder is None:
            return "this user has no home folder"
        try:
            _try_to_write(self.folder)
        except OSError as error:
            return f"cannot write to {self.folder} ({error.strerror})"
        return ""

    @cached_property
    def _spare(self) -> Path | None:
        """The folder that takes what the other cannot, if there is one."""
        if not self._unwritable:
            return None
        places = filter(None, (os.environ.get("TMPDIR"), _TEMPORARY))
        return next((place / self._key for place in map(_private_folder, places) if place), None)

    def _say(self, kind: str, text: str) -> None:
        """One line on stderr, for the first of its kind."""
        if kind not in self._said:
            self._said.add(kind)
            say(text)


def _anybody_writes(folder: Path) -> bool:
    """Whether anybody could have made it, or something in it."""
    return any(path.stat().st_mode & stat.S_IWOTH for path in (folder, *folder.parents))


def _private_folder(parent: str) -> Path | None:
    """A folder in ``parent`` that is this user's alone, made now if it is not there."""
    folder = Path(parent).absolute() / f"shoal-kernels-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            return None
        _try_to_write(folder)
    except OSError:
        return None
    return folder


def _try_to_write(folder: Path) -> None:
    """Make a folder, and in it a file that does not stay."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe of that name would wait for a writer


def _open_new(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes the same file or is killed while doing so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb", opener=_open_new) as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
