"""The lock: one at a time, in the order of asking, and no way to wait for oneself."""

from __future__ import annotations

import threading
import time

import pytest

from shoal.errors import EngineError
from shoal.requests.fair_lock import FairLock


def wait_until_waiting(lock: FairLock, count: int) -> None:
    while len(lock._waiting) < count:
        time.sleep(0.001)


def test_whoever_asked_first_is_first() -> None:
    lock, served = FairLock(), list[int]()

    def take(number: int) -> None:
        with lock:
            served.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    with lock:
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until_waiting(lock, number)
        assert served == []
    for thread in threads:
        thread.join(60)
    assert served == list(range(8))
    assert not lock.held


def test_a_thread_that_takes_it_again_and_again_lets_others_in() -> None:
    lock, turns = FairLock(), list[str]()

    def take(name: str) -> None:
        for _ in range(50):
            with lock:
                turns.append(name)

    threads = [threading.Thread(target=take, args=(name,)) for name in "ab"]
    with lock:
        for number, thread in enumerate(threads, start=1):
            thread.start()
            wait_until_waiting(lock, number)
    for thread in threads:
        thread.join(60)
    # Whoever comes back while the other waits is behind it; a thread may only be alone while the other is on its way back.
    assert turns[:2] == ["a", "b"]
    assert sorted(turns) == ["a"] * 50 + ["b"] * 50


def test_only_one_is_inside() -> None:
    lock, inside, most = FairLock(), 0, 0

    def take() -> None:
        nonlocal inside, most
        for _ in range(200):
            with lock:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (inside, most, lock.held) == (0, 1, False)


def test_taking_it_twice_is_an_error() -> None:
    lock = FairLock()
    with lock, pytest.raises(EngineError, match="from inside one of its own calls"):
        lock.__enter__()
    assert not lock.held
    with lock:
        assert lock.mine


class InterruptError(Exception):
    """As KeyboardInterrupt, which only the main thread gets."""


@pytest.mark.parametrize("called", [False, True])
def test_a_waiting_thread_that_is_interrupted_holds_nobody_up(called: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its turn comes, and just after it has come."""
    lock = FairLock()

    class Call:
        def acquire(self) -> None:
            if called:
                lock.__exit__()
            raise InterruptError

        def release(self) -> None:
            """Nobody waits."""

    class Ticket:
        def __init__(self, thread: int) -> None:
            self.thread = thread
            self.called = Call()

    monkeypatch.setattr("shoal.requests.fair_lock._Ticket", Ticket)
    lock._owner = -1  # another thread
    with pytest.raises(InterruptError):
        lock.__enter__()
    if not called:
        assert (lock._owner, len(lock._waiting)) == (-1, 0)
        lock.__exit__()
    assert not lock.held
