"""Who works on the job in a store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from shoal.errors import JobError
from shoal.jobs.durable import lease
from shoal.jobs.durable.lease import LEASE, Holder, Lease, holder
from shoal.jobs.durable.parts import CANCEL
from shoal.jobs.durable.store import LocalStore

HOST = socket.gethostname()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def leave(store: LocalStore, host: str, pid: int, *, age: float = 0.0) -> None:
    """The lease of a driver, renewed ``age`` seconds ago."""
    store.replace(LEASE, msgspec.json.encode(Holder(host, pid, "other")))
    moment = time.time() - age
    os.utime(Path(store.place) / LEASE, (moment, moment))


@pytest.fixture(scope="module")
def gone() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_job_is_held_by_one_process(store: LocalStore) -> None:
    with Lease(store):
        assert holder(store) == Holder(HOST, os.getpid(), msgspec.json.decode(store.read(LEASE), type=Holder).driver)
        with pytest.raises(JobError, match=f"process {os.getpid()} on {HOST} is working on this job"), Lease(store):
            pass
        assert holder(store) is not None
    assert holder(store) is None
    assert not store.exists(LEASE)
    with Lease(store):
        pass


def test_a_process_on_another_machine_is_named(store: LocalStore) -> None:
    leave(store, "elsewhere", 7)
    with (
        pytest.raises(JobError, match=r"process 7 on elsewhere is working on this job .* start again in 60 s"),
        Lease(store),
    ):
        pass


def test_what_was_not_renewed_for_a_minute_holds_no_more(store: LocalStore) -> None:
    leave(store, "elsewhere", 7, age=61)
    assert holder(store) is None
    with Lease(store):
        found = holder(store)
        assert found is not None
        assert found.pid == os.getpid()


def test_a_process_of_this_machine_that_has_ended_holds_nothing(store: LocalStore, gone: int) -> None:
    for pid in (gone, os.getpid()):  # this process has the number of one that had it before
        leave(store, HOST, pid)
        with Lease(store):
            pass


def test_a_process_of_this_machine_that_lives_holds_its_job(store: LocalStore) -> None:
    leave(store, HOST, os.getppid())
    with pytest.raises(JobError, match=f"process {os.getppid()} on {HOST}"), Lease(store):
        pass


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 1000])
def test_a_damaged_lease_holds_nothing(store: LocalStore, content: bytes) -> None:
    store.replace(LEASE, content)
    assert holder(store) is None


def test_the_lease_of_another_stays(store: LocalStore) -> None:
    with Lease(store):
        leave(store, "elsewhere", 7)
    assert holder(store) == Holder("elsewhere", 7, "other")


def test_the_lease_is_renewed_and_a_cancel_is_seen(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_LOOK", 0.01)
    with Lease(store) as held:
        assert not held.cancelled
        store.delete(LEASE)
        store.replace(CANCEL, b"")
        wait_until(lambda: held.cancelled and store.exists(LEASE))
        held.withdraw_cancel()
        assert not store.exists(CANCEL)


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_wakes_leaves_the_lease_of_the_one_that_took_over(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LOOK", 0.001)
    monkeypatch.setattr(lease, "_LOOKS_PER_RENEWAL", 1)
    looks: list[object] = []
    read = lease._read

    def taken_over(store: LocalStore) -> Holder | None:
        looks.append(None)
        if len(looks) == 2:  # the first was at the start
            leave(store, "elsewhere", 7)
        return read(store)

    monkeypatch.setattr(lease, "_read", taken_over)
    with Lease(store):
        wait_until(lambda: len(looks) > 3)
    assert holder(store) == Holder("elsewhere", 7, "other")


def test_a_cancel_from_before_is_known_at_once(store: LocalStore) -> None:
    store.replace(CANCEL, b"")
    with Lease(store) as held:
        assert held.cancelled
