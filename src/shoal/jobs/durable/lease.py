"""Who works on the job in a store, said there every few seconds: a second process is told so, and does not begin.

That is a courtesy. A process that is taken for dead and is not does no harm: see ``numbered``.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType

import msgspec
import psutil

from shoal.errors import JobError
from shoal.jobs.durable.parts import CANCEL
from shoal.jobs.durable.store import Store, check_creates

_LOG = logging.getLogger(__name__)

LEASE = "_shoal/lease"

_LOOK = 5.0  # seconds between two looks at whether the job is cancelled
_LOOKS_PER_RENEWAL = 3
_VALID = 60.0  # seconds for which a lease holds
_own: set[str] = set()  # leases of this process


class Holder(msgspec.Struct, frozen=True):
    """Whose lease it is. ``driver`` is another text for each lease."""

    host: str
    pid: int
    driver: str

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """Holds the job in ``store`` for this process. A context manager.

    Entering it raises JobError that names the process which holds it already, and for a store in which no job can be.
    ``cancelled``: whether somebody has asked for an end, as of some seconds ago.
    """

    def __init__(self, store: Store) -> None:
        self.cancelled = False
        self._store = store
        self._holder = Holder(socket.gethostname(), os.getpid(), uuid.uuid4().hex)
        self._looking = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="shoal-lease", daemon=True)

    def __enter__(self) -> Lease:
        now = check_creates(self._store)
        found = holder(self._store, now)
        if found is not None:
            raise JobError(
                f"{self._store.place}: {found} is working on this job (if it is gone, start again in {_VALID:.0f} s)"
            )
        self._write()
        self.cancelled = self._store.exists(CANCEL)
        _own.add(self._holder.driver)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        _own.discard(self._holder.driver)
        with suppress(OSError):
            if _read(self._store) == self._holder:
                self._store.delete(LEASE)

    def withdraw_cancel(self) -> None:
        """The job is not asked to end any more."""
        with self._looking:
            self._store.delete(CANCEL)
            self.cancelled = False

    def _keep(self) -> None:
        looks = 0
        while not self._stopping.wait(_LOOK):
            looks += 1
            try:
                with self._looking:
                    self.cancelled = self.cancelled or self._store.exists(CANCEL)
                if looks % _LOOKS_PER_RENEWAL == 0 and _read(self._store) in (None, self._holder):
                    self._write()  # that of a process which has taken the job over stays
            except Exception as error:  # the next commit finds out whether the store is gone
                _LOG.debug("%s: the lease could not be renewed: %s", self._store.place, error)

    def _write(self) -> None:
        self._store.replace(LEASE, msgspec.json.encode(self._holder))


def holder(store: Store, now: float | None = None) -> Holder | None:
    """The process that works on the job in ``store``, None if there is none. ``now``: by the clock of the store, or about so.

    On this machine a process that has ended holds nothing; of one on another machine that is known after a minute.
    """
    found = _read(store)
    if found is None or (found.is_here and not _is_alive(found)):
        return None
    try:
        age = (time.time() if now is None else now) - store.modified(LEASE)
    except FileNotFoundError:
        return None
    return found if age < _VALID else None


def _is_alive(found: Holder) -> bool:
    """A process may have the number of one that has ended, this one too."""
    return found.driver in _own if found.pid == os.getpid() else psutil.pid_exists(found.pid)


def _read(store: Store) -> Holder | None:
    with suppress(FileNotFoundError, msgspec.MsgspecError, ValueError):
        return msgspec.json.decode(store.read(LEASE), type=Holder)
    return None
