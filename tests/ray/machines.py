"""A Ray cluster of several nodes on this machine, whose nodes come and go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
CPUS_A_NODE = 2
_START = 180  # seconds for what takes two where nothing else runs
_EQUAL = {"RAY_worker_niceness": "0"}  # Ray makes workers nice: 15


class Machines:
    """``nodes`` nodes for workers, and a head that has room for none."""

    def __init__(self, nodes: int) -> None:
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))  # workers import these tests
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": path, **_EQUAL}
        head = {"num_cpus": 0, "include_dashboard": False, "wait": False}
        self._cluster = _patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        for _ in range(nodes):
            self.add()

    @property
    def address(self) -> str:
        """For drivers."""
        return str(self._cluster.address)

    def add(self, cpus: int = CPUS_A_NODE) -> Any:
        """A node joins."""
        node = _patiently(lambda: self._cluster.add_node(num_cpus=cpus, wait=False))
        self._cluster.wait_for_nodes(timeout=_START)
        return node

    def node_of(self, pid: int) -> Any:
        """The node on which the worker with this pid is, None where it has ended."""
        parents = {parent.pid for parent in psutil.Process(pid).parents()} if psutil.pid_exists(pid) else set()
        return next((node for node in self._cluster.worker_nodes if _raylet(node) in parents), None)

    def remove(self, node: Any) -> None:
        """All processes of a node end."""
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_raylet(self, node: Any) -> None:
        """Its workers are left alone for a while. ``remove`` takes the rest away."""
        node.kill_raylet(check_alive=False)

    def kill_head(self) -> None:
        """Drivers on this machine are without a node then."""
        self._cluster.head_node.kill_raylet(check_alive=False)

    def close(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


@contextmanager
def machines(nodes: int) -> Iterator[Machines]:
    """They end with the context."""
    found = Machines(nodes)
    try:
        yield found
    finally:
        found.close()


def _patiently(start: Callable[[], Any]) -> Any:
    """Ray waits 30 seconds for what it starts, which a busy machine may take for something else."""
    for _ in range(2):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid) if "raylet" in node.all_processes else 0
