"""Works batches off, one after another, as jobs: with the manifest, the journal and the guarantees of ``shoal run-batch``."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from shoal.errors import EngineError, JobError
from shoal.jobs.durable import journal
from shoal.jobs.durable.manifest import ChangedError
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.running.file_place import FilePlace
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.launch import Host, local_half, run_task
from shoal.jobs.running.model import Requests
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.task import JobOptions, Task
from shoal.openai.schema import APIError
from shoal.server.store.batches import OVER, Batch, BatchError, BatchErrors, Outcome, RequestCounts, Status, Stored
from shoal.server.store.files import FileInfo
from shoal.server.store.low_priority import LowPriority, Model
from shoal.server.store.store import INPUT, Store
from shoal.server.store.validation import check_rows

_OUTPUT = "output.jsonl"  # in the folder of a batch, as its job writes it

_LOG = logging.getLogger(__name__)
_LOOK_AGAIN = 1.0  # seconds: at deadlines, and at what failed for a reason that may pass
_PAUSE = 10.0  # seconds after such a failure
_JOIN = 30.0  # seconds
_END: dict[str, Status] = {"finished": "completed", "expired": "expired", "cancelled": "cancelled"}


@dataclass(frozen=True, slots=True)
class Served:
    """What batches run on: an LLM, a session of it that nobody else uses, and the ``names`` that rows may call it."""

    model: Model
    requests: Requests
    names: tuple[str, ...]


class BatchRunner:
    """Brings the batches of ``store`` to their ends, also those that an earlier process left.

    From ``start`` on two threads do: one runs rows, of the oldest batch first; the other checks new batches meanwhile and ends those
    that were cancelled in line or came too late. ``stop`` leaves what is not finished for the next start. ``pause``: seconds after
    which a batch is taken up again that the disk or the engine failed.
    """

    def __init__(self, store: Store, *, pause: float = _PAUSE) -> None:
        self._store, self._pause = store, pause
        self._changed = threading.Condition()
        self._claimed: set[str] = set()
        self._paused: dict[str, float] = {}
        self._stopping = False
        self._threads: list[threading.Thread] = []

    # -- for handlers ------------------------------------------------------------------------------------------------

    def create(self, owner: str, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> Batch:
        """A new batch. Raises APIError for a file that cannot be its input."""
        batch = self._store.create_batch(owner, input_file_id, endpoint, metadata)
        self._wake()
        return batch

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Ask a batch to end: what is not finished gets a record that says so. Raises APIError 404, and 409 for one that has ended."""
        batch = self._store.batches.get(owner, batch_id)
        if batch.status != "cancelling" and not self._store.batches.move(batch_id, "cancelling"):
            status = self._store.batches.get(owner, batch_id).status
            raise APIError(f"Cannot cancel a batch with status '{status}'.", "batch_id", status=409)
        self._wake()
        return self._store.batches.get(owner, batch_id)

    # -- for the server ----------------------------------------------------------------------------------------------

    def start(self, served: Served) -> None:
        """Begin, with a model that is loaded."""
        for name, takes in (("shoal-batch-rows", _has_rows_to_run), ("shoal-batch-checks", _needs_no_engine)):
            thread = threading.Thread(target=self._loop, args=(served, takes), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, seconds: float = _JOIN) -> None:
        """End after the step that is computed. What is finished is durable; the rest goes on at the next start."""
        self._stopping = True
        self._wake()
        for thread in self._threads:
            thread.join(seconds)

    def unfinished(self) -> list[Batch]:
        """Those that are not over, the oldest first, whosever they are."""
        return [stored.batch for stored in self._store.batches.unfinished()]

    # -- the threads -------------------------------------------------------------------------------------------------

    def _loop(self, served: Served, takes: Callable[[Stored], bool]) -> None:
        while not self._stopping:
            batch_id = self._claim(takes)
            if batch_id is not None:
                try:
                    self._advance(served, batch_id)
                finally:
                    self._release(batch_id)

    def _claim(self, takes: Callable[[Stored], bool]) -> str | None:
        """The oldest batch that there is something to do for, for this thread alone; None after a while."""
        with self._changed:
            now = time.monotonic()
            for stored in self._store.batches.unfinished():
                name = stored.batch.id
                if name not in self._claimed and self._paused.get(name, 0.0) <= now and takes(stored):
                    self._claimed.add(name)
                    return name
            if not self._stopping:
                self._changed.wait(_LOOK_AGAIN)
            return None

    def _release(self, batch_id: str) -> None:
        with self._changed:
            self._claimed.remove(batch_id)
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _advance(self, served: Served, batch_id: str) -> None:
        """Move a batch on as far as can be."""
        try:
            self._move_on(served, batch_id)
        except (OSError, EngineError, JobError) as error:
            _LOG.warning("batch %s: %s; it is taken up again in %g s", batch_id, error, self._pause)
            self._paused[batch_id] = time.monotonic() + self._pause
        except Exception:
            _LOG.exception("batch %s", batch_id)
            self._paused[batch_id] = time.monotonic() + self._pause
        else:
            self._paused.pop(batch_id, None)

    def _move_on(self, served: Served, batch_id: str) -> None:
        stored = self._store.batches.stored(batch_id)
        if stored.outcome is None and stored.batch.status == "validating":
            self._validate(stored.batch)
            return
        if stored.outcome is None and stored.batch.in_progress_at is None:  # nothing of it was run
            self._store.batches.move(batch_id, "cancelled")
            self._store.batches.tidy(batch_id)
            return
        if stored.outcome is None:
            self._run(served, stored.batch)
        self._bring_to_its_end(batch_id)

    def _validate(self, batch: Batch) -> None:
        batches, folder = self._store.batches, self._store.batches.folder(batch.id)
        rows, errors = check_rows(folder / INPUT, batch.endpoint, folder / "ids.sqlite")
        if errors:
            batches.move(batch.id, "failed", errors=BatchErrors(errors))
            batches.tidy(batch.id)
        else:
            batches.move(batch.id, "in_progress", request_counts=RequestCounts(total=rows))

    def _run(self, served: Served, batch: Batch) -> None:
        """Run its job, or go on with it, to its end or that of this process."""
        task = self._task(served, batch)
        host = Host(
            lambda given: local_half(given, LowPriority(served.model, served.requests)),
            say=lambda text: _LOG.info("batch %s: %s", batch.id, text),
            report=lambda progress: self._count(batch, progress),
            cancelled=lambda: self._store.batches.stored(batch.id).batch.status == "cancelling",
            interrupted=lambda: self._stopping,
        )
        try:
            summary = run_task(task, host)
        except JobError as error:
            if isinstance(error.__cause__, (OSError, sqlite3.Error)):
                raise
            self._conclude_as_failed(FilePlace.named(self._store.batches.folder(batch.id) / _OUTPUT), batch, error)
            return
        counts = RequestCounts(batch.request_counts.total, summary.done, summary.failed)
        self._store.batches.count(batch.id, counts, durably=True)
        if summary.state in _END:
            self._conclude(batch, _END[summary.state])

    def _task(self, served: Served, batch: Batch) -> Task:
        folder = self._store.batches.folder(batch.id)
        return Task(
            served.model.path,
            served.names,
            JobFiles(Inputs.of(folder / INPUT), FilePlace.named(folder / _OUTPUT)),
            JobOptions(deadline=batch.expires_at - batch.created_at),
            served.model.config,
            datetime.fromtimestamp(batch.created_at).astimezone(),
        )

    def _count(self, batch: Batch, progress: JobProgress) -> None:
        totals = progress.totals
        counts = RequestCounts(batch.request_counts.total, totals.done, totals.failed)
        if counts != self._store.batches.stored(batch.id).batch.request_counts:
            self._store.batches.count(batch.id, counts)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _conclude(self, batch: Batch, status: Status, errors: BatchErrors | None = None) -> None:
        new_id = self._store.files.new_id
        outcome = Outcome(status=status, output_file_id=new_id(), error_file_id=new_id(), errors=errors)
        self._store.batches.conclude(batch.id, outcome)

    def _conclude_as_failed(self, place: FilePlace, batch: Batch, error: JobError) -> None:
        """It cannot go on, with another model say; what is finished is kept."""
        _LOG.warning("batch %s has failed: %s", batch.id, error)
        self._cut_to_what_is_finished(place)
        self._conclude(batch, "failed", BatchErrors([BatchError(code="cannot_go_on", message=_told(error, place))]))

    def _cut_to_what_is_finished(self, place: FilePlace) -> None:
        path = place.folder / "journal"
        ends = journal.read(path, errors_apart=True).state.ends if path.exists() else [0, 0]
        for output, end in zip((place.results, place.errors_file), ends, strict=True):
            if output.exists() and output.stat().st_size > end:
                os.truncate(output, end)

    def _bring_to_its_end(self, batch_id: str) -> None:
        """What its job has written becomes files, and it what it is to become; all of that may be begun a second time."""
        stored = self._store.batches.stored(batch_id)
        outcome = stored.outcome
        if outcome is None:  # it is not through
            return
        folder = self._store.batches.folder(batch_id)
        place = FilePlace.named(folder / _OUTPUT)
        output = self._keep(stored, place.results, outcome.output_file_id, "output")
        errors = self._keep(stored, place.errors_file, outcome.error_file_id, "error")
        self._store.batches.move(
            batch_id, outcome.status, output_file_id=output, error_file_id=errors, errors=outcome.errors
        )
        self._store.batches.tidy(batch_id)

    def _keep(self, stored: Stored, path: Path, file_id: str, what: str) -> str | None:
        """The id of the file that ``path`` becomes, or has become; None where it holds nothing."""
        if self._store.files.has(file_id):
            return file_id
        if not path.exists() or not (size := path.stat().st_size):
            return None
        name, now = f"{stored.batch.id}_{what}.jsonl", int(time.time())
        file = FileInfo(id=file_id, bytes=size, created_at=now, filename=name, purpose="batch_output")
        self._store.files.adopt(stored.owner, path, file)
        return file_id


def _told(error: JobError, place: FilePlace) -> str:
    """Why a batch cannot go on, for its owner, who need not know where its files are."""
    if isinstance(error, ChangedError):
        return f"the server is not what it was when the batch was begun: {'; '.join(error.changes)}"
    return str(error).replace(f"{place.output_file.parent}{os.sep}", "")


def _is_late(batch: Batch) -> bool:
    return time.time() >= batch.expires_at


def _has_rows_to_run(stored: Stored) -> bool:
    batch = stored.batch
    return stored.outcome is None and batch.status == "in_progress" and not _is_late(batch)


def _needs_no_engine(stored: Stored) -> bool:
    return stored.batch.status not in OVER and not _has_rows_to_run(stored)
