"""The driver's connection to a Ray cluster: made, watched, and kept from writing where results go."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray._private.worker

from shoal.errors import EngineError, JobError

LOCAL = "local"

_SECONDS_BETWEEN_LOOKS = 2.0
_HEAD_PATIENCE = 40.0  # seconds; Ray ends a driver without a word after 60
_NODE_PATIENCE = 3.0  # ... and after about 10 where its own node has gone
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
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
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


class Lifeline:
    """Whether the driver's node and the cluster's head can be reached: Ray ends a driver without a word some time after one cannot."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        head, _, port = context.gcs_address.rpartition(":")
        self._ends = {
            "the head of the Ray cluster": (head, int(port), _HEAD_PATIENCE),
            "the Ray node of this machine": (own["NodeManagerAddress"], own["NodeManagerPort"], _NODE_PATIENCE),
        }
        self._reached = dict.fromkeys(self._ends, time.monotonic())
        self._next_look = 0.0

    def look(self) -> None:
        """Try to reach them, every other second. Raises EngineError where there is no hope."""
        now = time.monotonic()
        if now < self._next_look:
            return
        for name, (host, port, patience) in self._ends.items():
            if _answers(host, port):
                self._reached[name] = now
            elif now - self._reached[name] > patience:
                raise EngineError(f"{name} ({host}:{port}) cannot be reached")
        self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
