"""Name -> Backend: the one place where a backend is chosen, and the one lazy import of the package."""

from __future__ import annotations

from shoal.errors import ParameterError
from shoal.kernels.base import Backend


def load_backend(device: str = "auto", threads: int | None = None) -> Backend:
    """The backend for ``device`` (auto, cpu, reference); what it returns is what runs.

    ``threads`` None means one for each core this process may use.
    """
    if device == "reference":
        from shoal.kernels.reference import ReferenceBackend

        return ReferenceBackend()
    if device in ("auto", "cpu"):
        from shoal.kernels.cpu.backend import CPUBackend

        return CPUBackend(threads)
    raise ParameterError("device", device, "one of auto, cpu, reference")
