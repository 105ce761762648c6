"""The driver's connection to a Ray cluster: made, watched, and kept from writing where results go."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
import ray._private.worker

from shoal.errors import EngineError, JobError

_SECONDS_BETWEEN_LOOKS = 2.0
_HEAD_PATIENCE = 40.0  # seconds; Ray ends a driver without a word after 60
_NODE_PATIENCE = 3.0  # ... and after about 10 where its own node has gone
_SMALL: dict[str, Any] = {
    "include_dashboard": False
}  # its ten processes take cores from the workers of a cluster for one job
_SAID_BY_US = "A worker died or was killed"


@contextmanager
def connected(address: str, say: Callable[[str], None]) -> Iterator[None]:
    """Be a driver of the cluster as long as the context lasts, unless this process is one already. ``say`` hears its notices.

    Raises JobError where it cannot be reached.
    """
    with _notices_to(say):
        if ray.is_initialized():
            yield
            return
        _check(address)
        try:
            ray.init(
                address, log_to_driver=False, logging_level=logging.ERROR, **(_SMALL if address == "local" else {})
            )
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise JobError(f"the Ray cluster {address} cannot be reached: {error}") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _notices_to(say: Callable[[str], None]) -> Iterator[None]:
    """Hear in one line each what the cluster tells its drivers: Ray itself prints pages of it to stdout, where results may go."""
    of_ray = ray._private.worker
    printing = of_ray.print_to_stdstream

    def hear(data: dict[str, Any], ignore_prefix: bool) -> None:
        text = " ".join(" ".join(data["lines"]).split())
        if text and not text.startswith(_SAID_BY_US):
            say(f"Ray says: {text:.200}")

    of_ray.print_to_stdstream = hear
    try:
        yield
    finally:
        of_ray.print_to_stdstream = printing


class End(NamedTuple):
    """What a driver hangs on, and for how many seconds it may be out of reach."""

    host: str
    port: int
    patience: float


class Lifeline:
    """Whether the driver's node and the cluster's head can be reached: Ray ends a driver without a word some time after one cannot."""

    def __init__(self, ends: dict[str, End]) -> None:
        self._ends = ends
        self._reached = dict.fromkeys(ends, time.monotonic())
        self._next_look = 0.0

    @classmethod
    def of_this_driver(cls) -> Lifeline:
        """This process is connected."""
        context = ray.get_runtime_context()
        own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        host, _, port = context.gcs_address.rpartition(":")
        head = End(host, int(port), _HEAD_PATIENCE)
        node = End(own["NodeManagerAddress"], own["NodeManagerPort"], _NODE_PATIENCE)
        return cls({"the head of the Ray cluster": head, "the Ray node of this machine": node})

    def look(self) -> None:
        """Try to reach them, every other second. Raises EngineError where there is no hope."""
        now = time.monotonic()
        if now < self._next_look:
            return
        for name, end in self._ends.items():
            if _answers(end):
                self._reached[name] = now
            elif now - self._reached[name] > end.patience:
                raise EngineError(f"{name} ({end.host}:{end.port}) cannot be reached")
        self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS


def _check(address: str) -> None:
    """Raise JobError for HOST:PORT where nobody is: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host and not _answers(End(host, int(port), 0), timeout=10):
        raise JobError(f"the Ray cluster {address} cannot be reached: nothing answers there")


def _answers(end: End, timeout: float = 1) -> bool:
    try:
        socket.create_connection((end.host, end.port), timeout).close()
    except OSError:
        return False
    return True
