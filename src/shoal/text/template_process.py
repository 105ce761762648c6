"""The parent's side of ``shoal.text.sandbox``: starts the process, asks it, and kills it when time is up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from shoal.errors import TemplateError

_START_TIMEOUT = 60.0  # seconds; a busy machine may take long to start Python

# What Python and the C library would take from the machine: the order of sets, the language of dates, the zone of %s.
_SURROUNDINGS = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C", "TZ": "UTC"}


class World(NamedTuple):
    """What a rendering sees besides its variables: the moment that ``strftime_now`` tells, by the clock on the wall of ``now``'s time
    zone, and the seed of all that is random in it."""

    now: datetime
    seed: str


class TemplateProcess:
    """Renders templates in a process of their own, one at a time. May be used from several threads.

    The process starts with the first request and is kept for the next; it ends with this object or the program. A program
    that was forked starts one of its own.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., TemplateProcess] | None = None

    def render(self, source: str, variables: Mapping[str, Any], world: World) -> str:
        """The output of template ``source``. Raises TemplateError where it fails, refuses or takes too long."""
        now = world.now.replace(tzinfo=None).isoformat()  # as in transformers, %z and %Z are empty
        request = (
            json.dumps({"source": source, "variables": variables, "now": now, "seed": world.seed}).encode() + b"\n"
        )
        if self._pid != os.getpid():
            self._leave_to_parent()
        with self._lock:
            answer = json.loads(self._ask(request))
        if "error" in answer:
            raise TemplateError(f"chat template: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the process; the next ``render`` starts another. Waits for a rendering in progress."""
        with self._lock:
            self._stop()

    def _leave_to_parent(self) -> None:
        """Forget the process and the lock of the program that this one was forked from."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._pid, self._lock, self._process, self._finalizer = os.getpid(), threading.Lock(), None, None

    def _ask(self, request: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._start()
        return self._exchange(request, self._timeout)

    def _start(self) -> None:
        self._stop()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "shoal.text.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_SURROUNDINGS, "PYTHONPATH": path},
                start_new_session=True,
            )
        except OSError as problem:
            raise TemplateError(f"chat template: cannot start {sys.executable!r} to run it: {problem}") from problem
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._exchange(b"", _START_TIMEOUT)

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
            raise TemplateError(f"chat template: did not end within {timeout:g} s")
        raise TemplateError("chat template: its process died (out of memory, or nested too deeply)")

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
