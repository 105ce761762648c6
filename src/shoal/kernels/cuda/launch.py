"""Where Triton is imported, and how its kernels are launched: with the same arithmetic everywhere, and by one function.

With TRITON_INTERPRET=1 kernels run on tensors in the memory of the CPU, one program after the other: for tests, without a GPU.

One GPU is used in a process: the one that is current in the thread that first asks for it. Other threads have a current GPU of their
own, so what is called from outside takes it for the time of the call (`on_device`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

# A product and a sum become one instruction only where the source says so: kernels that share an expression share its bits.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")

import torch
import triton

from shoal.errors import UnsupportedError

INTERPRETED: bool = triton.knobs.runtime.interpret
if INTERPRETED:
    from shoal.kernels.cuda.interpreted import use_ordered_products

    use_ordered_products()

Tensor = torch.Tensor
Launcher = Callable[..., None]


def on_gpu() -> bool:
    """Whether kernels run on a GPU: they do not under the interpreter, nor where launches are only looked at."""
    return not INTERPRETED and _launcher is _run


@dataclass(frozen=True, slots=True)
class _Owner:
    """The process that uses a device, and the GPU's index (0 where there is none)."""

    pid: int
    index: int


_owner: _Owner | None = None


def device() -> torch.device:
    """Where tensors lie: in the memory of the CPU unless ``on_gpu``. Raises UnsupportedError where there is no GPU, and in a process
    that was forked from one that has asked before."""
    global _owner
    if _owner is None:
        _owner = _Owner(os.getpid(), _current_gpu() if on_gpu() else 0)
    if _owner.pid != os.getpid():
        raise UnsupportedError(
            "device cuda: this process was forked from one that uses the GPU, which no fork can share:"
            " start it by multiprocessing's spawn, and load the model there"
        )
    return torch.device("cuda", _owner.index) if on_gpu() else torch.device("cpu")


def _current_gpu() -> int:
    if not torch.cuda.is_available():
        raise UnsupportedError("device cuda: no GPU found (torch.cuda.is_available() is false)")
    try:
        return int(torch.cuda.current_device())
    except (
        RuntimeError
    ) as error:  # forked from a process that uses it without shoal; driver and torch do not fit together
        raise UnsupportedError(f"device cuda: {error}") from error


_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_device(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` with ``device()`` as the current GPU of whichever thread calls it. Raises as that does."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        place = device()
        if place.type == "cpu":
            return function(*args, **kwargs)
        with torch.cuda.device(place):
            return function(*args, **kwargs)

    return run


# --- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """What options depend on: ``backend`` cuda or hip, and NVIDIA's ``capability``, 90 for sm_90 (0: no matter)."""

    backend: str
    capability: int = 0


def options_for(kind: Kind, kernel: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a launch as GPUs of a kind take them. AMD's know no limit of registers, and get one matrix instruction for tiles of
    all sizes. From sm_90 on kernels that have a parameter PDL are launched while the one before still runs (dependent.py)."""
    if kind.backend == "hip":
        return {name: value for name, value in options.items() if name != "maxnreg"} | {"matrix_instr_nonkdim": 16}
    if kind.capability >= 90 and "PDL" in kernel.arg_names:
        return {**options, "launch_pdl": True, "PDL": True}
    return options


@cache
def _kind() -> Kind:
    """Of the device that is used."""
    if INTERPRETED or os.environ.get("SHOAL_PDL") == "0":
        return Kind("hip" if torch.version.hip else "cuda")
    major, minor = torch.cuda.get_device_capability(device())
    return Kind("hip") if torch.version.hip else Kind("cuda", 10 * major + minor)


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    kernel[grid](*args, **options_for(_kind(), kernel, options))


def on_compile(hear: Callable[[str], None] | None) -> None:
    """``hear`` the name of every kernel that was in no cache and had to be compiled, from now on."""

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **other: Any) -> None:
        if hear is not None and not cache_hit:
            hear(str(metadata["name"]))

    triton.knobs.compilation.listener = listen


_launcher: Launcher = _run


@contextmanager
def launches_go_to(launcher: Launcher) -> Iterator[None]:
    """Nothing runs for a while: ``launcher`` is told of each launch instead, as (kernel, grid, args, options)."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 2, **constexprs: Any) -> None:
    """Run ``kernel`` over ``grid``: tensors and numbers by position, constants by name. An empty grid is no fault."""
    if min(grid) > 0:
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False, **constexprs}
        _launcher(kernel, grid, args, options)
