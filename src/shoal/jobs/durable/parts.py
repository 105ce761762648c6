"""The output of a job as immutable parts in one folder, local or in object storage, together with its journal.

    results/part-000000000003.jsonl     answered rows      errors/part-000000000003.jsonl     failed rows
    manifest.json                       the valid parts, once the job has come to its end
    _shoal/journal/000000000003         see ``numbered``   _shoal/staged/000000000003-...     not part of the output yet

A commit puts its lines into staged objects, creates the next object of the journal, which names them, and only then publishes them:
copies them to where readers look and deletes the staged ones. A row is finished once that journal object is there. Two drivers cannot
both create it; what the loser staged is never published, and is deleted by the next claim. A driver that dies after it
created the object leaves its parts to be published by the next one.

What keeps a driver that does not know yet that it has lost from doing harm: it can publish only what the journal names, which the
new driver has published already or will; and it deletes nothing with a number above that of its own claim.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from zlib import crc32

import msgspec

from shoal.errors import JobError
from shoal.jobs.durable import numbered
from shoal.jobs.durable.journal import ERRORS, NO_USAGE, RESULTS, Record, Redo, Totals, Usage
from shoal.jobs.durable.numbered import Claim, Header, Part, Replay, TakenOverError, number_in, object_name
from shoal.jobs.durable.rowset import RowSet
from shoal.jobs.durable.store import STAGED, AlreadyThereError, Store
from shoal.jobs.durable.waiting import Waiting

JOB = "_shoal/manifest.json"  # what the job is
CANCEL = "_shoal/cancel"  # is there once the job is asked to end
MANIFEST = "manifest.json"
FOLDERS = {RESULTS: "results", ERRORS: "errors"}

_LOCAL_INTERVAL, _REMOTE_INTERVAL = 1.0, 10.0  # seconds between two commits
_INTERVAL_PER_COST = 100  # ... or so many times as long as the last one took: about 1 % of the time goes to commits
_MOST_WAITING = 8 << 20  # bytes of lines in memory that make a commit due whatever the time
_OLD = 3600.0  # seconds after which a file that is being written on a local disk is what a crash left


class PartLedger:
    """Takes the lines of finished rows and makes them durable as parts. A context manager, and otherwise as ``ledger.Ledger``.

    ``cut_off`` are the staged objects that no journal object names, and their sizes in bytes: they are gone.
    """

    def __init__(self, store: Store, driver: str, replay: Replay, clock: Callable[[], float]) -> None:
        self._store = store
        self._driver = driver
        self._replay = replay
        self._clock = clock
        self._waiting = Waiting(replay.state)
        self._recorded = replay.state.totals.work
        self._usable = True
        self._interval = _LOCAL_INTERVAL if store.is_local else _REMOTE_INTERVAL
        self._due = clock() + self._interval
        self.cut_off: dict[str, int] = {}

    @classmethod
    def open(
        cls, store: Store, job: str, *, anew_after: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> PartLedger:
        """The ledger of the job in ``store``, claimed for this process, new or as the last run left it.

        ``job`` says what job it is: whoever claims it next must say the same. ``anew_after`` begins it anew and drops what is there, if
        ``last_number`` is still that. Raises TakenOverError if it has not; JobError for
        a folder of another job, a damaged journal and parts that are not what it says; OSError where the store fails.
        """
        replay = numbered.read(store) if anew_after is None else Replay(store.place)
        replay.check()
        replay.number = replay.number if anew_after is None else anew_after
        if not replay.number:
            _check_journal_of_parts(store)
        if replay.job not in ("", job):
            raise JobError(f"{store.place}: is of another job than its manifest says (--restart begins anew)")
        fresh = anew_after is not None or not replay.number
        driver = uuid.uuid4().hex
        numbered.claim(store, replay, driver, Claim(fresh, job, socket.gethostname(), os.getpid(), time.time()))
        replay.check()
        ledger = cls(store, driver, replay, clock)
        if anew_after is not None:
            store.delete(JOB)  # what is said of the old job ends before its parts do
        ledger._tidy(replay.number)
        return ledger

    @property
    def finished(self) -> RowSet:
        """The rows whose lines are durable."""
        return self._replay.state.finished

    @property
    def totals(self) -> Totals:
        """The figures over all runs."""
        return self._replay.state.totals

    def add(self, row: int, line: bytes, *, failed: bool, usage: Usage = NO_USAGE) -> None:
        """Take the ``line`` (without newline) of ``row``, which is finished; it is durable after the next commit."""
        self._check_usable()
        self._waiting.add(row, line, failed=failed, usage=usage)

    def commit_if_due(self) -> bool:
        """Commit if lines have waited long enough or are many; whether it did."""
        due = bool(self._waiting) and (self._clock() >= self._due or self._waiting.num_bytes >= _MOST_WAITING)
        if due:
            self.commit()
        return due

    def commit(self) -> None:
        """Make all waiting lines and the totals durable. After an error the ledger can only be closed.

        Raises TakenOverError where another process has the job now.
        """
        work = self.totals.work
        if not self._waiting and work == self._recorded:
            return
        started = self._clock()
        with self._whole():
            parts = [self._stage(file) for file in FOLDERS if self._waiting.lines(file)]
            self._record([work, *self._waiting.entries()], parts)
            self._waiting.clear()
            self._recorded = work
            for part in parts:
                self._publish(part)
        ended = self._clock()
        self._due = ended + max(self._interval, _INTERVAL_PER_COST * (ended - started))

    def retry_errors(self) -> int:
        """Put all failed rows back and drop the parts that hold their records; returns how many there were."""
        self.commit()
        redo = Redo(len(self._replay.state.failed))
        if redo.rows:
            with self._whole():
                void = [part for name, part in self._replay.parts.items() if name.startswith(f"{FOLDERS[ERRORS]}/")]
                self._record([redo], [])
                for part in void:
                    self._store.delete(part.name)
        return redo.rows

    def write_manifest(self) -> None:
        """Say in the output folder which parts are valid: those of ``results`` and ``errors``, with rows, bytes and CRC-32."""
        self._check_usable()
        self.check_owned()
        listed = {
            folder: [_public(part) for name, part in self._replay.parts.items() if name.startswith(f"{folder}/")]
            for folder in FOLDERS.values()
        }
        content = {"journal": object_name(self._replay.number), **listed}
        self._store.replace(MANIFEST, msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")

    def close(self) -> None:
        """Lines that wait are dropped: their rows are not finished."""
        self._usable = False

    def __enter__(self) -> PartLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- commits -----------------------------------------------------------------------------------------------------

    def _stage(self, file: int) -> Part:
        lines, number = self._waiting.lines(file), self._replay.number + 1
        data = b"".join(lines)
        part = Part(
            part_name(file, number),
            f"{STAGED}/{number:012}-{self._driver}.{FOLDERS[file]}.jsonl",
            len(lines),
            len(data),
            crc32(data),
        )
        self._store.replace(part.staged, data)
        return part

    def _record(self, records: list[Record], parts: list[Part]) -> None:
        """Create the next object of the journal: from here on it holds."""
        header = Header(numbered.VERSION, self._replay.number + 1, self._driver, len(records), parts)
        try:
            crc = numbered.create(self._store, header, records, self._replay.crc)
        except AlreadyThereError:
            for part in parts:
                with suppress(OSError):  # the next claim deletes it
                    self._store.delete(part.staged)
            raise self._taken_over() from None
        self._replay.number, self._replay.crc = header.number, crc
        self._replay.apply(records, parts)
        self._replay.check()

    def _publish(self, part: Part) -> None:
        """Put a part that the journal names where readers look. It may be there already."""
        try:
            self._store.copy(part.staged, part.name)
        except FileNotFoundError:  # a driver before or after this one has done it
            if not self._store.exists(part.name):
                self.check_owned()
                raise JobError(
                    f"{self._store.place}/{part.name}: is gone, the journal vouches for {part.rows} rows in it"
                    " (--restart begins anew)"
                ) from None
        self._store.delete(part.staged)

    # -- what a run before left --------------------------------------------------------------------------------------

    def _tidy(self, claimed: int) -> None:
        """Publish what is named and not published, check what is, and drop what is void: all of drivers before this one."""
        published = parts_in(self._store)
        staged = self._store.list(STAGED)
        for part in self._replay.parts.values():
            if part.name in published:
                self._check_part(part, published[part.name])
            else:
                self._publish(part)
        named = {part.staged for part in self._replay.parts.values()}
        for name, size in staged.items():
            number = number_in(name)
            if number is not None and number <= claimed:
                self._store.delete(name)
                self.cut_off |= {} if name in named else {f"{self._store.place}/{name}": size}
            elif name.endswith(".tmp"):
                self._drop_if_old(name)
        for name in published.keys() - self._replay.parts.keys():
            if (number_in(name) or 0) <= claimed:
                self._store.delete(name)
        self._drop_manifest()

    def _check_part(self, part: Part, size: int) -> None:
        """Raise JobError for a part that is not what the journal says; on a local disk its bytes are read for that."""
        place = f"{self._store.place}/{part.name}"
        if size != part.bytes:
            raise JobError(f"{place}: has {size} bytes, the journal vouches for {part.bytes} (--restart begins anew)")
        if self._store.is_local and crc32(self._store.read(part.name)) != part.crc32:
            raise JobError(f"{place}: was changed; put it back as it was, or begin anew with --restart")

    def _drop_manifest(self) -> None:
        """Parts may come and go from here on. A driver that came later may have written its own."""
        with suppress(FileNotFoundError, msgspec.MsgspecError, ValueError):
            found = msgspec.json.decode(self._store.read(MANIFEST), type=_Listed)
            if (number_in(found.journal) or 0) > self._replay.number:
                return
        self._store.delete(MANIFEST)

    def _drop_if_old(self, name: str) -> None:
        with suppress(FileNotFoundError):
            if time.time() - self._store.modified(name) > _OLD:
                self._store.delete(name)

    # -- whether it can go on ----------------------------------------------------------------------------------------

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is begun here and not brought to its end is found out by the next claim: no more use of the ledger."""
        self._check_usable()
        self._usable = False
        yield
        self._usable = True

    def _check_usable(self) -> None:
        if not self._usable:
            raise JobError(f"{self._store.place}: closed, or a write failed before; start the job again to go on")

    def check_owned(self) -> None:
        """Raise TakenOverError if another process has the job by now."""
        found = numbered.header_at(self._store, self._replay.number + 1)
        if found is not None and found.driver != self._driver:
            raise self._taken_over()

    def _taken_over(self) -> TakenOverError:
        found = numbered.header_at(self._store, self._replay.number + 1)
        who = f"process {found.claim.pid} on {found.claim.host}" if found and found.claim else "another process"
        return TakenOverError(f"{self._store.place}: {who} took this job over and goes on with it; this one ends here")


class _Listed(msgspec.Struct):
    """Of a manifest: the last object of the journal that it knows."""

    journal: str


def read_totals(store: Store) -> Totals:
    """The figures of the job in ``store`` over all its runs. Raises JobError for a damaged journal, OSError."""
    replay = numbered.read(store)
    replay.check()
    return replay.state.totals


def last_number(store: Store) -> int:
    """The largest number that an object of the journal or a part has, 0 if there is none."""
    return max((number_in(name) or 0 for name in (*store.list(numbered.JOURNAL), *parts_in(store))), default=0)


def part_name(file: int, number: int) -> str:
    """The name of a part: ``file`` is RESULTS or ERRORS."""
    return f"{FOLDERS[file]}/part-{number:012}.jsonl"


def parts_in(store: Store) -> dict[str, int]:
    """What readers of the folder would take for parts: names, and sizes in bytes."""
    found = {name: size for folder in FOLDERS.values() for name, size in store.list(folder).items()}
    return {name: size for name, size in found.items() if number_in(name) is not None}


def _check_journal_of_parts(store: Store) -> None:
    """Raise JobError for parts without a journal: nothing vouches for them, and what is not a job's is not its to drop."""
    found = list(parts_in(store))
    if found and not numbered.numbers(store):  # else another has begun a job meanwhile, which the claim finds out
        raise JobError(f"{store.place}/{found[0]}: is of no job, its journal is gone (--restart replaces it)")


def _public(part: Part) -> dict[str, str | int]:
    return {"name": part.name, "rows": part.rows, "bytes": part.bytes, "crc32": part.crc32}
