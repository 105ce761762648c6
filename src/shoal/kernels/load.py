"""Name -> Backend: the one place where a backend is chosen, and the one lazy import of the package."""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import ParameterError
from shoal.kernels.base import Backend
from shoal.machine_limits import usable_cores


def load_backend(
    device: str = "auto", threads: int | None = None, on_compile: Callable[[str], None] | None = None
) -> Backend:
    """The backend for ``device`` (auto, cpu, reference); what it returns is what runs.

    ``threads`` None means one for each core this process may use, fewer where a container has less CPU time. ``on_compile`` hears
    the name of each kernel that was not in the cache and had to be compiled.
    """
    if device == "reference":
        from shoal.kernels.reference import ReferenceBackend

        return ReferenceBackend()
    if device in ("auto", "cpu"):
        from shoal.kernels.cpu.backend import CPUBackend
        from shoal.kernels.cpu.jit import Lazy

        Lazy.on_compile = on_compile
        return CPUBackend(threads or usable_cores())
    raise ParameterError("device", device, "one of auto, cpu, reference")
