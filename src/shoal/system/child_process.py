"""Work that nobody can vouch for, in a process of its own: asked line by line, killed when its time is up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

_START_TIMEOUT = 60.0  # seconds; a busy machine may take long to start Python

# What Python and the C library would take from the machine: the order of sets, the language of dates, the zone of %s.
_SURROUNDINGS = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C", "TZ": "UTC"}


class ChildFailure(Exception):  # noqa: N818 - never leaves shoal: who asks says whose fault it is
    """A child that did not answer; the text says why."""


class ChildProcess:
    """``python -m module``, which says "ready" and then answers each line with a line. May be used from several threads, one at a time.

    The process starts with the first request and is kept for the next; it ends with this object or the program. A program
    that was forked starts one of its own. ``greeting`` is its first line of input, before it is ready.
    """

    def __init__(self, module: str, timeout: float, greeting: bytes = b"") -> None:
        self._module = module
        self._timeout = timeout
        self._greeting = greeting
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., ChildProcess] | None = None

    def ask(self, request: bytes) -> bytes:
        """The answer to a request (a line with its end). Raises ChildFailure where there is none in time."""
        self._leave_what_was_forked()
        with self._lock:
            self._ensure()
            return self._exchange(request, self._timeout)

    def start(self) -> None:
        """Start the process now, not with the first request. Raises ChildFailure."""
        self._leave_what_was_forked()
        with self._lock:
            self._ensure()

    def close(self) -> None:
        """End the process; the next request starts another. Waits for an answer in progress."""
        with self._lock:
            self._stop()

    def _leave_what_was_forked(self) -> None:
        """Forget the process and the lock of the program that this one was forked from."""
        if self._pid == os.getpid():
            return
        if self._finalizer is not None:
            self._finalizer.detach()
        self._pid, self._lock, self._process, self._finalizer = os.getpid(), threading.Lock(), None, None

    def _ensure(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_SURROUNDINGS, "PYTHONPATH": path},
                start_new_session=True,
            )
        except OSError as problem:
            raise ChildFailure(f"cannot start {sys.executable!r} to run it: {problem}") from problem
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._exchange(self._greeting, _START_TIMEOUT)

    def _exchange(self, request: bytes, timeout: float) -> bytes:
        """One line in, one line out. Whatever goes wrong, interrupts too, costs the process: its pipe may be half read."""
        assert self._process is not None
        expired = threading.Event()
        timer = threading.Timer(timeout, _expire, (self._process, expired))
        timer.daemon = True
        timer.start()
        try:
            line = _write_and_read(self._process, request)
        except BaseException:
            self._stop()
            raise
        finally:
            timer.cancel()
        if not line or expired.is_set():
            self._stop()
        if line:
            return line
        if expired.is_set():
            raise ChildFailure(f"did not end within {timeout:g} s")
        raise ChildFailure("its process died (out of memory, or nested too deeply)")

    def _stop(self) -> None:
        self._process = None
        if self._finalizer is not None:
            self._finalizer()


def _write_and_read(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The answer, or nothing where the process has died."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except OSError:
        return b""
    return process.stdout.readline()


def _expire(process: subprocess.Popen[bytes], expired: threading.Event) -> None:
    expired.set()
    process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was still in the buffer has nowhere to go
                pipe.close()
