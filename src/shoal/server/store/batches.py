"""Batches of clients: what is known of each, on the disk as soon as it is true, in a folder with the files of its job."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from shoal.jobs.durable.file_systems import sync_folder
from shoal.jobs.durable.storage import write_atomically
from shoal.openai.schema import APIError
from shoal.server.store.ids import IdMaker
from shoal.server.store.paging import Page, PageQuery, page

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]

WINDOW = "24h"
WINDOW_SECONDS = 24 * 3600
OVER: tuple[Status, ...] = ("completed", "failed", "expired", "cancelled")

# What a batch must be to become what.
_BEFORE: dict[Status, tuple[Status, ...]] = {
    "in_progress": ("validating",),
    "cancelling": ("validating", "in_progress"),
    "finalizing": ("in_progress",),
    "completed": ("finalizing",),
    "expired": ("in_progress",),
    "cancelled": ("cancelling",),
    "failed": ("validating", "in_progress", "cancelling"),
}
_ABOUT = "batch.json"
_LOG = logging.getLogger(__name__)


class RequestCounts(msgspec.Struct, frozen=True):
    """Rows of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch was not run, or not to its end. ``line`` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    """All that is wrong with a batch."""

    data: list[BatchError]
    object: Literal["list"] = "list"


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, in OpenAI's shape. Times in seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None
    object: Literal["batch"] = "batch"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch whose rows are through is to become, and as which files what it wrote is to be kept."""

    status: Status
    output_file_id: str
    error_file_id: str
    errors: BatchErrors | None = None


class Stored(msgspec.Struct, frozen=True):
    """A batch as it is kept. ``outcome``: it is being brought to its end, which is done again if a crash cuts that short."""

    owner: str
    batch: Batch
    outcome: Outcome | None = None


class BatchStore:
    """The batches in ``folder``. Any thread may call any method. For all others than its ``owner`` a batch does not exist."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._batches = dict(_found(folder))
        self._ids = IdMaker("batch_", max(self._batches, default=""))
        for name, stored in self._batches.items():
            if stored.batch.status in OVER:  # a crash may have come in between
                self.tidy(name)

    def create(
        self,
        owner: str,
        input_file_id: str,
        endpoint: str,
        metadata: dict[str, str] | None,
        fill: Callable[[Path], None],
    ) -> Batch:
        """A new batch, durably, once ``fill`` has put into its folder what its job needs."""
        name, now = self._ids.next(), int(time.time())
        batch = Batch(
            id=name,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=WINDOW,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            metadata=metadata,
        )
        folder = self.folder(name)
        folder.mkdir(mode=0o700)
        try:
            fill(folder)
            with self._lock:
                self._save(Stored(owner, batch))
                sync_folder(self._folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return batch

    def get(self, owner: str, batch_id: str) -> Batch:
        """A batch as it stands. Raises APIError 404."""
        stored = self._batches.get(batch_id)
        if stored is None or stored.owner != owner:
            raise APIError(f"No batch found with id '{batch_id}'.", "batch_id", status=404)
        return stored.batch

    def page(self, owner: str, query: PageQuery) -> Page[Batch]:
        """Some of an owner's batches. Raises APIError for an ``after`` that is no id."""
        if query.after is not None and not self._ids.owns(query.after):
            raise APIError(f"after: {query.after!r} is not the id of a batch", "after")
        with self._lock:
            mine = [stored.batch for stored in self._batches.values() if stored.owner == owner]
        return page(mine, query)

    def unfinished(self) -> list[Stored]:
        """All that are not over, the oldest first."""
        with self._lock:
            left = [stored for stored in self._batches.values() if stored.batch.status not in OVER]
        return sorted(left, key=lambda stored: stored.batch.id)

    def stored(self, batch_id: str) -> Stored:
        """One that is there, whosever it is."""
        return self._batches[batch_id]

    def folder(self, batch_id: str) -> Path:
        """Where the files of its job are."""
        assert self._ids.owns(batch_id), "only our own ids become paths"
        return self._folder / batch_id

    def move(self, batch_id: str, status: Status, **fields: Any) -> bool:
        """Let a batch become ``status`` now, durably, with other ``fields``; False if it is not where that can be reached from.

        One that is over has no ``outcome`` to come any more.
        """
        with self._lock:
            stored = self._batches[batch_id]
            ending = stored.outcome is not None
            if stored.batch.status not in _BEFORE[status] or (ending and status == "cancelling"):
                return False
            times = {f"{status}_at": int(time.time())}
            batch = msgspec.structs.replace(stored.batch, status=status, **times, **fields)
            self._save(Stored(stored.owner, batch, None if status in OVER else stored.outcome))
            return True

    def conclude(self, batch_id: str, outcome: Outcome) -> Stored:
        """Settle, durably, how a batch ends: as ``outcome`` says, or as cancelled if that was asked for before."""
        with self._lock:
            stored = self._batches[batch_id]
            batch = stored.batch
            if batch.status == "cancelling":
                outcome = msgspec.structs.replace(outcome, status="cancelled", errors=None)
            elif outcome.status == "completed":
                batch = msgspec.structs.replace(batch, status="finalizing", finalizing_at=int(time.time()))
            return self._save(Stored(stored.owner, batch, outcome))

    def count(self, batch_id: str, counts: RequestCounts, *, durably: bool = False) -> None:
        """Note how far it is. (The journal of its job knows it better, so this need not be on the disk.)"""
        with self._lock:
            stored = self._batches[batch_id]
            changed = Stored(stored.owner, msgspec.structs.replace(stored.batch, request_counts=counts), stored.outcome)
            if durably:
                self._save(changed)
            else:
                self._batches[batch_id] = changed

    def tidy(self, batch_id: str) -> None:
        """Remove what the job of a batch needed that is over."""
        for path in self.folder(batch_id).iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _ABOUT:
                path.unlink(missing_ok=True)

    def _save(self, stored: Stored) -> Stored:
        """With the lock held."""
        name = stored.batch.id
        write_atomically(self.folder(name) / _ABOUT, msgspec.json.encode(stored))
        self._batches[name] = stored
        return stored


def _found(folder: Path) -> Iterator[tuple[str, Stored]]:
    """The batches that are there; a folder that a crash left without one is removed."""
    ids = IdMaker("batch_")
    for path in sorted(path for path in folder.iterdir() if ids.owns(path.name)):
        try:
            yield path.name, msgspec.json.decode((path / _ABOUT).read_bytes(), type=Stored)
        except FileNotFoundError:
            shutil.rmtree(path, ignore_errors=True)
        except msgspec.MsgspecError as error:
            _LOG.warning("%s: not the description of a batch, which is left alone: %s", path / _ABOUT, error)
