"""File systems without locks or syncing: the job goes on and says once what no longer holds; any other error stays one."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.jobs.durable import file_systems
from shoal.jobs.durable.file_systems import lock, sync, sync_folder
from shoal.jobs.durable.lock import JobLock, owner
from shoal.jobs.durable.storage import AppendFile, write_atomically

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
NO_SYNC = [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP]

Fail = Callable[[int], None]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said in other tests is forgotten."""
    monkeypatch.setattr(file_systems, "_said", set())


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """``no_flock(ENOSYS)``: file locks fail so from now on."""

    def fail(number: int) -> None:
        def flock(fd: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return fail


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> Fail:
    def fail(number: int) -> None:
        def fsync(fd: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    return fail


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


def test_locks_where_there_are_some(file: Path) -> None:
    with open(file) as one, open(file) as other, open(file) as third:
        assert lock(one.fileno(), file, shared=True) == "taken"
        assert lock(other.fileno(), file, shared=True) == "taken"
        assert lock(third.fileno(), file) == "busy"


@pytest.mark.parametrize("number", NO_LOCKS)
def test_no_locks_are_said_once(file: Path, no_flock: Fail, caplog: pytest.LogCaptureFixture, number: int) -> None:
    no_flock(number)
    with open(file) as one:
        assert [lock(one.fileno(), file) for _ in range(3)] == ["none"] * 3
    (message,) = caplog.messages
    assert str(file.parent) in message
    assert os.strerror(number) in message
    assert "two processes" in message


@pytest.mark.parametrize("number", NO_SYNC)
def test_no_syncing_is_said_once_for_files_and_once_for_folders(
    file: Path, no_fsync: Fail, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    no_fsync(number)
    with open(file) as one:
        for _ in range(3):
            sync(one.fileno(), file)
            sync_folder(file.parent)
    first, second = caplog.messages
    assert first.startswith(f"files in {file.parent} cannot be synced")
    assert second.startswith(f"names in {file.parent} cannot be synced")


@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF, errno.EINVAL, errno.EACCES])
def test_other_errors_of_locks_are_errors_that_name_the_file(file: Path, no_flock: Fail, number: int) -> None:
    no_flock(number)
    with open(file) as one, pytest.raises(OSError, match=f"'{file}'") as caught:
        lock(one.fileno(), file)
    assert caught.value.errno == number


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.ENOLCK])
def test_other_errors_of_syncing_are_errors_that_name_the_file(file: Path, no_fsync: Fail, number: int) -> None:
    no_fsync(number)
    with open(file) as one, pytest.raises(OSError, match=f"'{file}'"):
        sync(one.fileno(), file)
    with pytest.raises(OSError, match=f"'{file.parent}'"):
        sync_folder(file.parent)


def test_files_are_written_without_either(tmp_path: Path, no_flock: Fail, no_fsync: Fail) -> None:
    no_flock(errno.ENOSYS)
    no_fsync(errno.EINVAL)
    with AppendFile(tmp_path / "grows") as growing:
        growing.append(b"line")
        growing.sync()
    write_atomically(tmp_path / "whole", b"new")
    assert ((tmp_path / "grows").read_bytes(), (tmp_path / "whole").read_bytes()) == (b"line", b"new")


def test_without_locks_a_job_keeps_nobody_out_but_a_process_of_this_machine_is_seen(
    tmp_path: Path, no_flock: Fail, caplog: pytest.LogCaptureFixture
) -> None:
    no_flock(errno.ENOLCK)
    with JobLock(tmp_path / "job"):
        assert owner(tmp_path / "job") == os.getpid()
        with JobLock(tmp_path / "job"):
            pass
    assert owner(tmp_path / "job") is None
    assert len(caplog.messages) == 2
    assert "another machine" in caplog.messages[1]


@pytest.mark.parametrize("left", ["", "word\n", "9" * 30, "0\n"])
def test_without_locks_what_is_no_pid_is_nobody(tmp_path: Path, no_flock: Fail, left: str) -> None:
    (tmp_path / "lock").write_text(left)
    no_flock(errno.ENOLCK)
    assert owner(tmp_path) is None


def test_without_locks_the_pid_of_a_process_that_was_killed_is_nobody(tmp_path: Path, no_flock: Fail) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    (tmp_path / "lock").write_text(f"{ended.pid}\n")
    no_flock(errno.ENOLCK)
    assert owner(tmp_path) is None


def test_a_lock_that_fails_for_another_reason_is_no_job(tmp_path: Path, no_flock: Fail) -> None:
    no_flock(errno.EIO)
    with pytest.raises(OSError, match="lock"), JobLock(tmp_path / "job"):
        pytest.fail("the job was taken")
    with pytest.raises(OSError, match="lock"):
        owner(tmp_path / "job")


def test_with_locks_the_second_is_still_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with JobLock(tmp_path), pytest.raises(JobError, match=str(os.getpid())), JobLock(tmp_path):
        pytest.fail("taken twice")
    assert not caplog.messages
