"""Name -> Backend: the one place where a backend is chosen, and the one lazy import of the package."""

from __future__ import annotations

from collections.abc import Callable

from shoal.errors import ParameterError, ShoalError, UnsupportedError
from shoal.kernels.base import Backend
from shoal.system.machine_limits import usable_cores


def load_backend(
    device: str = "auto", threads: int | None = None, on_compile: Callable[[str], None] | None = None
) -> Backend:
    """The backend for ``device`` (auto, cpu, reference); what it returns is what runs.

    ``threads`` None means one for each core this process may use, fewer where a container has less CPU time. ``on_compile`` hears
    the name of each kernel that was not in the cache and had to be compiled. Raises ParameterError for what SHOAL_ISA or
    NUMBA_DISABLE_JIT rule out, UnsupportedError where Numba cannot be imported.
    """
    if device == "reference":
        from shoal.kernels.reference import ReferenceBackend

        return ReferenceBackend()
    if device in ("auto", "cpu"):
        try:
            from shoal.kernels.cpu.backend import CPUBackend
            from shoal.kernels.cpu.jit import Lazy
        except ShoalError:
            raise
        except (ImportError, ValueError) as error:  # another NumPy than it wants, NUMBA_NUM_THREADS=0
            raise UnsupportedError(f"Numba cannot be imported: {error}") from error
        Lazy.on_compile = on_compile
        return CPUBackend(threads or usable_cores())
    raise ParameterError("device", device, "one of auto, cpu, reference")
