"""One process holds a job, until it ends in whatever way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.jobs.durable.lock import JobLock, owner

HOLD = """
import sys
from pathlib import Path
from shoal.jobs.durable.lock import JobLock
with JobLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the job until its stdin ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_the_second_process_hears_who_is_the_first(tmp_path: Path) -> None:
    with holder(tmp_path / "job") as process:
        assert owner(tmp_path / "job") == process.pid
        with pytest.raises(JobError, match=rf"process {process.pid} is working on this job"), JobLock(tmp_path / "job"):
            pass
        assert owner(tmp_path / "job") == process.pid, "asking in vain leaves the lock as it was"
    assert owner(tmp_path / "job") is None
    with JobLock(tmp_path / "job"):
        assert owner(tmp_path / "job") == os.getpid()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path / "job") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert owner(tmp_path / "job") is None
        with JobLock(tmp_path / "job"):
            assert owner(tmp_path / "job") == os.getpid()


def test_nobody_owns_what_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert owner(tmp_path / "none") is None
    assert owner(tmp_path / "file") is None


def test_one_process_takes_a_job_only_once(tmp_path: Path) -> None:
    with JobLock(tmp_path):
        with pytest.raises(JobError, match=str(os.getpid())), JobLock(tmp_path):
            pass
        assert owner(tmp_path) == os.getpid()
    assert owner(tmp_path) is None


def test_a_pid_that_is_not_there_yet(tmp_path: Path) -> None:
    with JobLock(tmp_path):
        (tmp_path / "lock").write_text("")
        assert owner(tmp_path) == 0
        with pytest.raises(JobError, match="process of unknown number is working"), JobLock(tmp_path):
            pass


def test_asking_who_owns_it_keeps_nobody_out(tmp_path: Path) -> None:
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            owner(tmp_path)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(100):
            with JobLock(tmp_path):
                pass
    finally:
        done.set()
        asking.join()
