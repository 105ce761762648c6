"""A job whose output is a folder of parts: what holds after commits, after coming back, and with two drivers at once."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import pytest

from shoal.errors import JobError
from shoal.jobs.durable import numbered, parts
from shoal.jobs.durable.journal import Totals, Usage
from shoal.jobs.durable.numbered import TakenOverError, object_name
from shoal.jobs.durable.parts import PartLedger
from shoal.jobs.durable.store import STAGED, LocalStore, Store, open_store
from tests.jobs.disk import Disk, Stopped, intercepted, no_waiting
from tests.jobs.faulty_store import Died, FaultyStore, Moment

MEMORY = pytest.param(
    "memory", marks=pytest.mark.skipif(not importlib.util.find_spec("fsspec"), reason="fsspec is not installed")
)
ROWS = range(1, 8)
FAILING = (3, 6)


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    with intercepted(no_waiting):
        yield


@pytest.fixture(params=["local", MEMORY])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}/out" if request.param == "memory" else tmp_path / "out")


class Clock:
    """Goes on by ``step`` seconds whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 100.0
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def open_ledger(store: Any, *, anew_after: int | None = None, clock: Clock | None = None) -> PartLedger:
    return PartLedger.open(store, "this job", anew_after=anew_after, clock=clock or Clock())


def finished(ledger: PartLedger) -> set[int]:
    return {row for row in range(100) if row in ledger.finished}


def contents(store: Store, folder: str) -> dict[str, bytes]:
    return {name.rpartition("/")[2]: store.read(name) for name in store.list(folder)}


def lines(store: Store, folder: str) -> list[bytes]:
    return sorted(line for data in contents(store, folder).values() for line in data.splitlines())


def two_rows(store: Store) -> None:
    """Row 1 is done, row 2 failed: in the second object of the journal, after the claim."""
    with open_ledger(store) as ledger:
        ledger.add(1, b"one", failed=False, usage=Usage(10, 4, 2))
        ledger.add(2, b"two", failed=True, usage=Usage(3, 0, 0))
        ledger.totals.steps += 5
        ledger.totals.seconds += 2.5
        ledger.commit()


TWO_ROWS = Totals(1, 1, 0, 13, 4, 2, 2.5, 5)
PART = "part-000000000002.jsonl"


# One driver -----------------------------------------------------------------------------------------------------------


def test_rows_are_finished_with_the_commit(store: Store) -> None:
    with open_ledger(store) as ledger:
        assert (finished(ledger), ledger.totals) == (set(), Totals())
        ledger.add(7, b"seven", failed=False, usage=Usage(1, 0, 1))
        ledger.add(8, b"eight", failed=True)
        assert finished(ledger) == set()
        assert contents(store, "results") == contents(store, STAGED) == {}
        ledger.commit()
        assert finished(ledger) == {7, 8}
        assert ledger.totals == Totals(done=1, failed=1, prompt_tokens=1, generated_tokens=1)
        assert contents(store, "results") == {PART: b"seven\n"}
        assert contents(store, "errors") == {PART: b"eight\n"}
        assert contents(store, STAGED) == {}


def test_a_part_is_never_changed(store: Store) -> None:
    two_rows(store)
    with open_ledger(store) as ledger:
        ledger.add(3, b"three", failed=False)
        ledger.commit()
        ledger.add(4, b"four", failed=False)
        ledger.commit()
    assert contents(store, "results") == {
        PART: b"one\n",
        "part-000000000004.jsonl": b"three\n",
        "part-000000000005.jsonl": b"four\n",
    }


def test_a_job_goes_on_where_it_was(store: Store) -> None:
    two_rows(store)
    assert parts.read_totals(store) == TWO_ROWS
    with open_ledger(store) as ledger:
        assert finished(ledger) == {1, 2}
        assert ledger.totals == TWO_ROWS
        assert ledger.cut_off == {}


def test_a_commit_of_nothing_is_no_object(store: Store) -> None:
    with open_ledger(store) as ledger:
        ledger.commit()
        assert not ledger.commit_if_due()
    assert list(store.list(numbered.JOURNAL)) == [object_name(1)]


def test_closing_commits_nothing(store: Store) -> None:
    with open_ledger(store) as ledger:
        ledger.add(1, b"one", failed=False)
    with pytest.raises(JobError, match="closed, or a write failed before"):
        ledger.commit()
    with open_ledger(store) as ledger:
        assert finished(ledger) == set()


def test_commits_are_due_after_a_time_or_many_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    interval, clock = (1.0 if store.is_local else 10.0), Clock()
    monkeypatch.setattr(parts, "_MOST_WAITING", 100)
    with open_ledger(store, clock=clock) as ledger:
        ledger.add(1, b"one", failed=False)
        assert not ledger.commit_if_due()
        clock.now += interval
        assert ledger.commit_if_due()
        ledger.add(2, b"x" * 100, failed=False)
        assert ledger.commit_if_due()
        ledger.add(3, b"three", failed=False)
        clock.step = 2.0
        ledger.commit()  # takes two seconds
        clock.step = 0.0
        ledger.add(4, b"four", failed=False)
        clock.now += 199.0
        assert not ledger.commit_if_due()
        clock.now += 1.0
        assert ledger.commit_if_due()


def test_the_manifest_lists_the_valid_parts_and_ends_with_the_next_claim(store: Store) -> None:
    two_rows(store)
    with open_ledger(store) as ledger:
        ledger.write_manifest()
    found = json.loads(store.read("manifest.json"))
    assert found == {
        "journal": object_name(3),
        "results": [{"name": f"results/{PART}", "rows": 1, "bytes": 4, "crc32": crc32(b"one\n")}],
        "errors": [{"name": f"errors/{PART}", "rows": 1, "bytes": 4, "crc32": crc32(b"two\n")}],
    }
    with open_ledger(store):
        assert not store.exists("manifest.json")


def test_the_manifest_of_a_later_driver_stays(store: Store) -> None:
    two_rows(store)

    def another() -> None:
        with open_ledger(store) as ledger:
            ledger.write_manifest()

    class Slow(FaultyStore):
        def list(self, folder: str) -> dict[str, int]:
            if folder == STAGED:
                another()
            return store.list(folder)

    slow: Any = Slow(store, -1, "before")
    with open_ledger(slow):
        assert json.loads(store.read("manifest.json"))["journal"] == object_name(4)


def test_failed_rows_are_put_back_and_their_parts_go(store: Store) -> None:
    two_rows(store)
    with open_ledger(store) as ledger:
        ledger.add(3, b"three", failed=True)
        assert ledger.retry_errors() == 2
        assert finished(ledger) == {1}
        assert contents(store, "errors") == {}
        assert ledger.retry_errors() == 0
        ledger.add(2, b"two", failed=False)
        ledger.commit()
    with open_ledger(store) as ledger:
        assert finished(ledger) == {1, 2}
        assert (ledger.totals.done, ledger.totals.failed, ledger.totals.retried) == (2, 0, 2)
    assert lines(store, "results") == [b"one", b"two"]


def test_a_job_begun_anew_drops_what_there_was_but_not_its_numbers(store: Store) -> None:
    two_rows(store)
    with open_ledger(store, anew_after=2) as ledger:
        assert (finished(ledger), ledger.totals) == (set(), Totals())
        assert contents(store, "results") == contents(store, "errors") == {}
        ledger.add(1, b"other", failed=False)
        ledger.commit()
    assert contents(store, "results") == {"part-000000000004.jsonl": b"other\n"}
    with open_ledger(store) as ledger:
        assert finished(ledger) == {1}


def test_a_job_begun_anew_without_its_journal_drops_all_parts(store: Store) -> None:
    two_rows(store)
    store.copy(f"results/{PART}", "results/part-000000000009.jsonl")
    for name in store.list(numbered.JOURNAL):
        store.delete(name)
    with pytest.raises(JobError, match=rf"results/{PART}: is of no job, its journal is gone"):
        open_ledger(store)
    with open_ledger(store, anew_after=parts.last_number(store)) as ledger:
        assert parts.parts_in(store) == {}
        ledger.add(1, b"one", failed=False)
        ledger.commit()
    with open_ledger(store) as ledger:
        assert finished(ledger) == {1}


def test_an_object_of_ones_own_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that was interrupted may have had its effect."""
    store = LocalStore(tmp_path)
    with open_ledger(store) as ledger:
        ledger.add(1, b"one", failed=False)
        with monkeypatch.context() as patch:
            patch.setattr(numbered, "create", interrupted_after(numbered.create))
            with pytest.raises(KeyboardInterrupt):
                ledger.commit()
        ledger.check_owned()
    with open_ledger(store) as ledger:
        assert finished(ledger) == {1}


def interrupted_after(real: Any) -> Any:
    def call(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    return call


# What is found there --------------------------------------------------------------------------------------------------


def test_what_nobody_vouches_for_is_dropped_and_what_is_not_of_a_job_stays(store: Store) -> None:
    two_rows(store)
    store.replace(f"{STAGED}/000000000003-other.results.jsonl", b"orphan")
    store.replace(f"{STAGED}/000000000999-other.results.jsonl", b"of a driver that came later")
    store.replace("results/notes.txt", b"notes")
    with open_ledger(store) as ledger:
        assert ledger.cut_off == {f"{store.place}/{STAGED}/000000000003-other.results.jsonl": 6}
    assert set(contents(store, STAGED)) == {"000000000999-other.results.jsonl"}
    assert set(contents(store, "results")) == {"notes.txt", PART}


def test_what_a_crash_left_of_a_write_on_a_disk_goes_once_it_is_old(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for name in ("old.tmp", "new.tmp"):
        store.replace(f"{STAGED}/{name}", b"half")
    os.utime(tmp_path / STAGED / "old.tmp", (0, 0))
    with open_ledger(store):
        assert set(contents(store, STAGED)) == {"new.tmp"}


def test_parts_that_were_changed_are_found(store: Store) -> None:
    two_rows(store)
    store.replace(f"results/{PART}", b"one and more\n")
    with pytest.raises(JobError, match=rf"results/{PART}: has 13 bytes, the journal vouches for 4"):
        open_ledger(store)


def test_bytes_that_were_changed_are_found_on_a_disk(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    two_rows(store)
    store.replace(f"results/{PART}", b"eno\n")
    with pytest.raises(JobError, match=rf"results/{PART}: was changed"):
        open_ledger(store)


def test_a_part_that_is_gone_is_found(store: Store) -> None:
    two_rows(store)
    store.delete(f"results/{PART}")
    with pytest.raises(JobError, match=rf"results/{PART}: is gone, the journal vouches for 1 rows"):
        open_ledger(store)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "the CRC of one of its records is wrong"),
        (lambda data: data[:-44], "or some are missing"),
        (lambda data: data + b"more", "or some are missing"),
        (lambda data: data.replace(b'"rows":1', b'"rows":2', 1), "the CRC of its header is wrong"),
        (
            lambda data: data.replace(b'"version":1', b'"version":2'),
            "its format has version 2, this shoal reads version 1",
        ),
        (lambda data: b"", "it does not begin like an object of a journal"),
        (lambda data: b"[" * 100000, "it does not begin like an object of a journal"),
    ],
)
def test_a_damaged_journal_is_refused_but_can_be_begun_anew(store: Store, damage: Any, says: str) -> None:
    two_rows(store)
    store.replace(object_name(2), damage(store.read(object_name(2))))
    with pytest.raises(JobError, match=f"{object_name(2)}.*: .*{says}.*--restart"):
        open_ledger(store)
    with open_ledger(store, anew_after=2) as ledger:
        ledger.add(1, b"one", failed=False)
        ledger.commit()
    with open_ledger(store) as ledger:
        assert finished(ledger) == {1}


def test_a_gap_in_the_journal_is_refused(store: Store) -> None:
    two_rows(store)
    two = store.read(object_name(2))
    with open_ledger(store):
        pass
    store.delete(object_name(2))
    with pytest.raises(JobError, match=f"there is no object {object_name(2)}"):
        open_ledger(store)
    store.replace(object_name(2), two)
    with open_ledger(store) as ledger:
        assert finished(ledger) == {1, 2}


def test_objects_of_two_journals_do_not_fit_together(store: Store, tmp_path: Path) -> None:
    other = LocalStore(tmp_path / "other")
    two_rows(store)
    two_rows(other)
    store.replace(object_name(2), other.read(object_name(2)))
    with pytest.raises(JobError, match="CRC"):
        open_ledger(store)


def test_a_job_goes_on_only_as_what_it_was(store: Store) -> None:
    two_rows(store)
    with pytest.raises(JobError, match=r"is of another job than its manifest says \(--restart begins anew\)"):
        PartLedger.open(store, "another job")


def test_a_write_that_fails_ends_the_ledger_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    with open_ledger(store) as ledger:
        ledger.add(1, b"one", failed=False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(OSError, match="full"):
                ledger.commit()
        with pytest.raises(JobError, match="a write failed before"):
            ledger.add(2, b"two", failed=False)
    two_rows(store)
    assert lines(store, "results") == [b"one"]


# Two drivers ----------------------------------------------------------------------------------------------------------


def test_a_driver_that_was_taken_over_stops_and_publishes_nothing(store: Store) -> None:
    zombie = open_ledger(store)
    zombie.add(1, b"of the zombie", failed=False)
    with open_ledger(store) as ledger:
        with pytest.raises(TakenOverError, match=rf"process {os.getpid()} on .* took this job over"):
            zombie.commit()
        with pytest.raises(JobError, match="closed, or a write failed before"):
            zombie.commit()
        ledger.add(1, b"one", failed=False)
        ledger.commit()
    assert lines(store, "results") == [b"one"]
    assert contents(store, STAGED) == {}


@pytest.mark.parametrize("commits", [0, 1, 2])
def test_a_zombie_of_a_job_begun_anew_stops_too(store: Store, commits: int) -> None:
    zombie = open_ledger(store)
    zombie.add(1, b"old", failed=False)
    with open_ledger(store, anew_after=1) as ledger:
        for row in range(1, commits + 1):
            ledger.add(row, b"new %d" % row, failed=False)
            ledger.commit()
        with pytest.raises(TakenOverError):
            zombie.commit()
    assert lines(store, "results") == [b"new %d" % row for row in range(1, commits + 1)]


def test_a_zombie_puts_nothing_back_and_writes_no_manifest(store: Store) -> None:
    two_rows(store)
    zombie, other = open_ledger(store), open_ledger(store)
    for act in (zombie.retry_errors, other.retry_errors):
        if act == zombie.retry_errors:
            with pytest.raises(TakenOverError):
                act()
        else:
            assert act() == 1
    late = open_ledger(store)
    with pytest.raises(TakenOverError):
        other.write_manifest()
    late.write_manifest()
    assert json.loads(store.read("manifest.json"))["errors"] == []


def test_a_job_is_not_begun_over_one_begun_meanwhile(store: Store) -> None:
    """A driver that saw nothing here, slept, and wakes after another has done all the work."""
    two_rows(store)
    for seen in (0, 1):
        with pytest.raises(TakenOverError, match="another process began a job here at the same time"):
            open_ledger(store, anew_after=seen)
    assert lines(store, "results") == [b"one"]


class Overtaken(FaultyStore):
    """Before the first create, another driver does what it does."""

    def __init__(self, store: Store, other: Any) -> None:
        super().__init__(store, -1, "before")
        self._other = other

    def create(self, name: str, data: bytes) -> None:
        other, self._other = self._other, None
        if other:
            other()
        self._store.create(name, data)


def test_a_claim_goes_on_from_what_was_committed_while_it_was_made(store: Store) -> None:
    def another() -> None:
        with open_ledger(store) as ledger:
            ledger.add(3, b"three", failed=False)
            ledger.commit()

    two_rows(store)
    overtaken: Any = Overtaken(store, another)
    with open_ledger(overtaken) as ledger:
        assert finished(ledger) == {1, 2, 3}


def test_a_driver_deletes_nothing_of_one_that_came_later(store: Store) -> None:
    """It is slow between its claim and its tidying up, and finds what the other has staged."""
    later = open_ledger(store)

    class Slow(FaultyStore):
        def list(self, folder: str) -> dict[str, int]:
            if folder == STAGED:
                store.replace(f"{STAGED}/000000000009-later.results.jsonl", b"nine")
                store.replace("results/part-000000000009.jsonl", b"nine")
            return store.list(folder)

    later.close()
    with open_ledger(Slow(store, -1, "before")) as ledger:
        assert ledger.cut_off == {}
    assert set(contents(store, STAGED)) == {"000000000009-later.results.jsonl"}
    assert contents(store, "results") == {"part-000000000009.jsonl": b"nine"}


# Deaths ---------------------------------------------------------------------------------------------------------------


def run(store: Any, promised: set[int], *, repaired: bool = False) -> None:
    """A job of a few rows, to its end; ``promised`` are those that were finished before, and grow."""
    with open_ledger(store) as ledger:
        if repaired:
            ledger.retry_errors()
        assert promised <= finished(ledger)
        for row in ROWS:
            if row not in ledger.finished:
                failed = row in FAILING and not repaired
                ledger.add(row, b"%d" % row, failed=failed, usage=Usage(row, 0, 1))
                if row % 2 == 0:
                    ledger.commit()
                    promised |= finished(ledger)
        ledger.commit()
        ledger.write_manifest()


def check(store: Store, *, repaired: bool) -> None:
    """Every row once, in valid parts, and nothing else where readers look."""
    failing = () if repaired else FAILING
    assert lines(store, "results") == [b"%d" % row for row in ROWS if row not in failing]
    assert lines(store, "errors") == [b"%d" % row for row in failing]
    found = json.loads(store.read("manifest.json"))
    for folder in ("results", "errors"):
        listed = {part["name"]: (part["bytes"], part["crc32"], part["rows"]) for part in found[folder]}
        assert listed == {
            f"{folder}/{name}": (len(data), crc32(data), data.count(b"\n"))
            for name, data in contents(store, folder).items()
        }
    assert {name for name in contents(store, STAGED) if not name.endswith(".tmp")} == set()


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_driver_dies_at_each_request(tmp_path: Path, moment: Moment, repaired: bool) -> None:
    for at in itertools.count():
        store, promised = LocalStore(tmp_path / str(at)), set[int]()
        if repaired:
            run(store, promised)
            promised -= set(FAILING)
        faulty = FaultyStore(store, at, moment)
        try:
            run(faulty, promised, repaired=repaired)
        except Died:
            run(store, promised, repaired=repaired)
        check(store, repaired=repaired)
        if not faulty.died:
            break
    assert at > 20


@pytest.mark.parametrize("repaired", [False, True])
def test_power_fails_at_each_call(tmp_path: Path, repaired: bool) -> None:
    for at in itertools.count():
        root, promised = tmp_path / str(at), set[int]()
        root.mkdir()
        store = LocalStore(root / "out")
        if repaired:
            run(store, promised)
            promised -= set(FAILING)
        disk, early = Disk(root), False
        with disk.running(at):
            try:
                run(store, promised, repaired=repaired)
            except Stopped:
                early = True
        disk.power_failure(Random(at))
        disk.close()
        run(store, promised, repaired=repaired)
        check(store, repaired=repaired)
        if not early:
            break
    assert at > 15


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_driver_dies_again_and_again(tmp_path: Path, moment: Moment) -> None:
    """At every request that is far enough from the last start for something to be done."""
    for every in range(25, 45, 3):
        store, promised = LocalStore(tmp_path / str(every)), set[int]()
        for _ in range(40):
            faulty = FaultyStore(store, every, moment)
            try:
                run(faulty, promised)
                break
            except Died:
                pass
        else:
            pytest.fail(f"no progress in {every} requests")
        check(store, repaired=False)


def test_a_driver_wakes_at_each_request_after_another_has_done_its_work(tmp_path: Path) -> None:
    """It does not know; whatever it does then, the result stays."""
    for at in itertools.count():
        store = LocalStore(tmp_path / str(at))
        asleep = Sleeper(store, at)
        try:
            run(asleep, set())
        except TakenOverError:
            assert asleep.woke
        if not store.exists("manifest.json"):  # it was just about to delete the one from before
            run(store, set())
        check(store, repaired=False)
        if not asleep.woke:
            break
    assert at > 20


class Sleeper(FaultyStore):
    """At the ``at``-th request another driver claims the job and brings it to its end."""

    def __init__(self, store: Store, at: int) -> None:
        super().__init__(store, -1, "before")
        self.woke = False
        self._sleep_at = at

    def __getattr__(self, name: str) -> Any:
        request = super().__getattr__(name)
        if not callable(request):
            return request

        def after_sleep(*arguments: Any) -> Any:
            if self.num_requests == self._sleep_at and not self.woke:
                self.woke = True
                run(self._store, set())
            return request(*arguments)

        return after_sleep
