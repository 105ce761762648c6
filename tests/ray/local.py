"""A Ray cluster of this machine alone, and its processes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import ray
from ray import serve

PATIENCE = 120.0  # seconds; the machine may be busy


@contextmanager
def local_ray() -> Iterator[None]:
    """Ray with eight logical CPUs, whatever there are."""
    _start()
    try:
        yield
    finally:
        ray.shutdown()


def _start(tries: int = 4) -> None:
    """Ray gives itself 30 s, which are not enough on a busy machine."""
    try:
        ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    except Exception:
        ray.shutdown()
        if tries == 1:
            raise
        _start(tries - 1)


@contextmanager
def local_serve() -> Iterator[str]:
    """The address of Ray Serve on a cluster like that."""
    port = free_port()
    with local_ray():
        serve.start(http_options={"port": port}, logging_config={"log_level": "WARNING"})
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes(title: str) -> list[psutil.Process]:
    """Processes of this cluster that call themselves so."""
    return [found for found in psutil.Process(os.getpid()).children(recursive=True) if _title(found).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_until(condition: Callable[[], bool]) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)
