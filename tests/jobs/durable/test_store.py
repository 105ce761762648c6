"""A folder in which a name can be taken only once: on a disk, and in fsspec's memory where that is installed."""

from __future__ import annotations

import errno
import importlib.util
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import JobError
from shoal.jobs.durable import store as stores
from shoal.jobs.durable.store import (
    AlreadyThereError,
    LocalStore,
    ObjectStore,
    Store,
    check_creates,
    is_url,
    open_store,
)

HAS_FSSPEC = importlib.util.find_spec("fsspec") is not None
needs_fsspec = pytest.mark.skipif(not HAS_FSSPEC, reason="fsspec is not installed")
KINDS = ["local", pytest.param("memory", marks=needs_fsspec)]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}/out/" if request.param == "memory" else tmp_path / "out")


def test_a_name_is_taken_once(store: Store) -> None:
    store.create("_shoal/journal/1", b"one")
    with pytest.raises(AlreadyThereError, match="_shoal/journal/1"):
        store.create("_shoal/journal/1", b"two")
    assert store.read("_shoal/journal/1") == b"one"


def test_the_same_bytes_are_ones_own(store: Store) -> None:
    """A request that had its effect and whose answer was lost is sent again."""
    store.create("name", b"one")
    store.create("name", b"one")


def test_of_many_that_take_a_name_at_once_one_gets_it(tmp_path: Path) -> None:
    store, won = LocalStore(tmp_path), []

    def take(number: int) -> None:
        try:
            store.create("journal/1", b"%d" % number)
            won.append(number)
        except AlreadyThereError:
            pass

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("journal/1") == b"%d" % won[0]


def test_what_is_written_is_read_listed_copied_and_deleted(store: Store) -> None:
    assert store.list("parts") == {}
    store.replace("parts/b", b"old")
    store.replace("parts/b", b"12")
    store.replace("parts/a", b"1")
    store.replace("parts/below/c", b"123")
    assert store.list("parts") == {"parts/a": 1, "parts/b": 2}
    store.copy("parts/b", "copies/b")
    store.copy("parts/b", "copies/b")
    store.delete("parts/b")
    store.delete("parts/b")
    assert store.list("parts") == {"parts/a": 1}
    assert store.read("copies/b") == b"12"
    assert (store.exists("parts/a"), store.exists("parts/b")) == (True, False)
    assert abs(store.modified("parts/a") - time.time()) < 600


def test_a_copy_takes_the_place_of_other_bytes(store: Store) -> None:
    store.replace("source", b"new")
    store.replace("target", b"old")
    store.copy("source", "target")
    assert store.read("target") == b"new"


def test_what_is_not_there_is_said(store: Store) -> None:
    for ask in (store.read, store.modified, lambda name: store.copy(name, "target")):
        with pytest.raises(FileNotFoundError):
            ask("absent")


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = LocalStore(tmp_path)
    store.create("journal/1", b"one")
    monkeypatch.setattr(os, "fsync", full)
    for write in (store.create, store.replace):
        with pytest.raises(OSError, match="No space left"):
            write("journal/2", b"two")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["1"]


def test_a_local_folder_without_hard_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*paths: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(JobError, match=r"cannot hold a job: its file system has no hard links .*no create-if-absent"):
        check_creates(LocalStore(tmp_path))


def test_a_store_is_checked_and_tells_the_time(store: Store) -> None:
    assert abs(check_creates(store) - time.time()) < 600
    assert store.list("_shoal") == {}


class Overwriting:
    """A store that takes a name whenever it is asked to."""

    place = "overwriting://bucket"

    def create(self, name: str, data: bytes) -> None:
        pass

    def delete(self, name: str) -> None:
        pass


def test_a_store_that_overwrites_is_refused_by_name() -> None:
    store: Any = Overwriting()
    with pytest.raises(
        JobError, match=r"^overwriting://bucket: cannot hold a job: it lets two processes take the same"
    ):
        check_creates(store)


def test_what_is_a_url(tmp_path: Path) -> None:
    assert is_url("s3://bucket/out")
    assert not is_url("out/results.jsonl")
    assert not is_url(Path("s3://bucket"))
    (tmp_path / "with space").mkdir()
    store = open_store(f"file://{tmp_path}/with%20space/")
    store.replace("a", b"1")
    assert (tmp_path / "with space" / "a").read_bytes() == b"1"


@pytest.mark.skipif(HAS_FSSPEC, reason="fsspec is installed")
def test_without_fsspec_a_url_says_what_to_install() -> None:
    with pytest.raises(JobError, match=r"pip install 'shoal\[s3\]'"):
        open_store("s3://bucket/out")


# With fsspec ----------------------------------------------------------------------------------------------------------


@needs_fsspec
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("zip://a::memory://out", "cannot hold a job|cannot be opened"),
        ("nosuch://out", "Protocol not known: nosuch"),
        ("dask://out", "pip install"),
    ],
)
def test_urls_that_cannot_hold_a_job_are_refused(url: str, says: str) -> None:
    with pytest.raises(JobError, match=f"^{url.partition(':')[0]}://.*({says})"):
        open_store(url)


class Failing:
    """A request that fails with ``error`` so many ``times``, with or without having had its effect."""

    def __init__(self, real: Any, error: Exception, times: int, *, in_effect: bool = False) -> None:
        self.calls = 0
        self._real, self._error, self._times, self._in_effect = real, error, times, in_effect

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls > self._times:
            return self._real(*arguments, **options)
        if self._in_effect:
            self._real(*arguments, **options)
        raise self._error


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    if not HAS_FSSPEC:
        pytest.skip("fsspec is not installed")
    monkeypatch.setattr(stores, "_PAUSES", (0.0, 0.0))
    return ObjectStore(f"memory://{uuid.uuid4().hex}")


class OfNoTypeError(Exception):
    """As those of HTTP libraries, which are no OSErrors."""


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), TimeoutError(), OfNoTypeError("reset")])
@pytest.mark.parametrize("in_effect", [False, True])
def test_a_request_that_fails_is_sent_again(remote: ObjectStore, error: Exception, in_effect: bool) -> None:
    remote._fs.pipe_file = Failing(remote._fs.pipe_file, error, 2, in_effect=in_effect)
    remote.create("name", b"own")
    assert remote.read("name") == b"own"


def test_a_create_that_has_lost_fails_after_a_lost_answer_too(remote: ObjectStore) -> None:
    remote.create("name", b"of another")
    remote._fs.pipe_file = Failing(remote._fs.pipe_file, TimeoutError(), 1)
    with pytest.raises(AlreadyThereError):
        remote.create("name", b"own")


def test_a_request_is_not_sent_for_ever(remote: ObjectStore) -> None:
    failing = Failing(None, OfNoTypeError("no route to host"), 100)
    remote._fs.pipe_file = failing
    with pytest.raises(OSError, match=f"OfNoTypeError: no route to host: '{remote.place}'"):
        remote.replace("name", b"")
    assert failing.calls == 3


def test_a_login_is_not_told(remote: ObjectStore) -> None:
    private = ObjectStore(remote.place.replace("://", "://me:secret@"))
    assert private.place == remote.place
    private._fs.pipe_file = Failing(None, OfNoTypeError("denied to me:secret@bucket"), 100)
    with pytest.raises(OSError, match=f"denied to bucket: '{remote.place}'"):
        private.replace("name", b"")
    with pytest.raises(JobError, match=r"^foo://bucket/out: cannot be opened"):
        open_store("foo://me:secret@bucket/out")


@pytest.mark.parametrize("error", [PermissionError("denied"), FileNotFoundError("no bucket")])
def test_what_will_not_change_is_not_tried_again(remote: ObjectStore, error: OSError) -> None:
    failing = Failing(None, error, 100)
    remote._fs.pipe_file = failing
    with pytest.raises(type(error), match=remote.place):
        remote.replace("name", b"")
    assert failing.calls == 1


def test_a_precondition_that_failed_is_a_name_that_is_taken(remote: ObjectStore) -> None:
    """Not every store says which condition it was."""
    remote.create("name", b"of another")
    cause: Any = OfNoTypeError()
    cause.response = {"Error": {"Code": "PreconditionFailed"}}
    error = OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
    error.__cause__ = cause
    remote._fs.pipe_file = Failing(None, error, 100)
    with pytest.raises(AlreadyThereError):
        remote.create("name", b"own")


def test_a_file_system_that_lacks_create_is_refused(remote: ObjectStore) -> None:
    remote._fs.pipe_file = Failing(None, NotImplementedError(), 100)
    with pytest.raises(JobError, match=r"fsspec's MemoryFileSystem lacks it \(no create-if-absent\)"):
        check_creates(remote)
