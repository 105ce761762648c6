"""Name -> Backend: the one place where a backend is chosen, and the one lazy import of the package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import ParameterError, ShoalError, UnsupportedError
from shoal.kernels.base import Backend
from shoal.params import DEVICES
from shoal.system.machine_limits import usable_cores

if TYPE_CHECKING:
    from shoal.kernels.cuda.probe import Probe as Probe
    from shoal.kernels.cuda.probe import Use as Use

INSTALL = "pip install 'shoal[cuda]'"

_GPU_PACKAGES = ("torch", "triton")
_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # NVIDIA's, under Linux and under WSL 2


def find_device(device: str) -> str:
    """What computes for ``device``: auto is cuda where there is a GPU that torch can use, else cpu."""
    if device != "auto":
        return device
    return "cuda" if _gpu_is_there() else "cpu"


def load_backend(
    device: str = "auto",
    threads: int | None = None,
    on_compile: Callable[[str], None] | None = None,
    *,
    gpu_memory_utilization: float = 0.9,
    compile_at_load: bool = True,
) -> Backend:
    """The backend for ``device`` (auto, cpu, cuda, reference); what it returns is what runs.

    ``threads`` of the CPU: None means one for each core this process may use, fewer where a container has less CPU time.
    ``on_compile`` hears the name of each kernel that was not in the cache and had to be compiled. ``compile_at_load``: on a GPU, all
    that a network can need when it is bound; otherwise each when it is first needed, for those who need few.
    Raises ParameterError for what SHOAL_ISA or NUMBA_DISABLE_JIT rule out, UnsupportedError where Numba, or torch and Triton, cannot
    be imported or there is no GPU.
    """
    if device not in DEVICES:
        raise ParameterError("device", device, "one of " + ", ".join(DEVICES))
    chosen = find_device(device)
    if chosen == "cuda":
        return _cuda(
            gpu_memory_utilization=gpu_memory_utilization, on_kernel=on_compile, compile_at_load=compile_at_load
        )
    if chosen == "reference":
        from shoal.kernels.reference import ReferenceBackend

        return ReferenceBackend()
    return _cpu(threads, on_compile)


def load_probe() -> Probe:
    """What measures a GPU. Raises UnsupportedError as ``load_backend`` does for cuda."""
    _require_packages()
    from shoal.kernels.cuda.probe import Probe

    return Probe()


def _cpu(threads: int | None, on_compile: Callable[[str], None] | None) -> Backend:
    try:
        from shoal.kernels.cpu.backend import CPUBackend
        from shoal.kernels.cpu.jit import Lazy
    except ShoalError:
        raise
    except (ImportError, ValueError) as error:  # another NumPy than it wants, NUMBA_NUM_THREADS=0
        raise UnsupportedError(f"Numba cannot be imported: {error}") from error
    Lazy.on_compile = on_compile
    return CPUBackend(threads or usable_cores())


def _cuda(**settings: Any) -> Backend:
    _require_packages()
    try:
        module = import_module("shoal.kernels.cuda.backend")
    except (ImportError, OSError) as error:  # OSError: a library that torch brings does not fit this machine
        raise UnsupportedError(
            f"device cuda: torch and Triton cannot be imported: {error} (another build: {INSTALL})"
        ) from error
    backend: Backend = module.CudaBackend(**settings)
    return backend


def _require_packages() -> None:
    missing = _missing_packages()
    if missing:
        raise UnsupportedError(f"device cuda: {' and '.join(missing)} not installed: {INSTALL}")


def _missing_packages() -> list[str]:
    return [name for name in _GPU_PACKAGES if find_spec(name) is None]


def _gpu_is_there() -> bool:
    """Whether torch finds a GPU. Importing it takes seconds: only where a driver is, and torch and Triton are, is it asked."""
    if not any(path.exists() for path in _DRIVERS) or _missing_packages():
        return False
    try:
        launch = import_module("shoal.kernels.cuda.launch")
        launch.device()
    except (UnsupportedError, ImportError, OSError, RuntimeError):  # RuntimeError: driver and torch do not fit together
        return False
    return not launch.INTERPRETED
