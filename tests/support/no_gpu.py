"""A stand-in for a GPU: another backend under the device's name, with memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shoal.engine import placement
from shoal.jobs.running import task
from shoal.kernels import load
from shoal.kernels.base import Backend
from shoal.kernels.cpu.backend import CPUBackend
from shoal.kernels.reference import ReferenceBackend
from shoal.system.machine_limits import MemoryRoom


class SlowGPU(ReferenceBackend):
    """The reference, with ``room`` bytes (None: no memory of its own)."""

    name = "slow"

    def __init__(self, room: int | None = None) -> None:
        self.room = room

    def memory_room(self) -> MemoryRoom | None:  # type: ignore[override]
        return None if self.room is None else MemoryRoom(self.room, self.room, "a card")


def as_gpu(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Backend], cpu: str = "cpu") -> None:
    """``make`` gives what computes for device cuda; ``cpu`` is the device that takes the rest."""

    def load_backend(device: str, *arguments: Any, **options: Any) -> Backend:
        return make() if device == "cuda" else load.load_backend(cpu if device == "cpu" else device, *arguments)

    def find_device(device: str) -> str:
        return "cuda" if device == "auto" else device

    monkeypatch.setattr(placement, "load_backend", load_backend)
    for module in (placement, task):
        monkeypatch.setattr(module, "find_device", find_device)


def small_cpu() -> CPUBackend:
    """One thread."""
    return CPUBackend(1)
