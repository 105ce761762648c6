"""Where Triton is imported, and how its kernels are launched: with the same arithmetic everywhere, and by one function.

With TRITON_INTERPRET=1 kernels run on tensors in the memory of the CPU, one program after the other: for tests, without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


def device() -> torch.device:
    """Where tensors lie: in the memory of the CPU unless ``on_gpu``. Raises UnsupportedError where there is no GPU."""
    if not on_gpu():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError("device cuda: no GPU found (torch.cuda.is_available() is false)")
    return torch.device("cuda", torch.cuda.current_device())


def options_for(backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a launch as GPUs of one kind, cuda or hip, take them. AMD's know no limit of registers, and get one matrix instruction
    for tiles of all sizes."""
    if backend != "hip":
        return options
    return {name: value for name, value in options.items() if name != "maxnreg"} | {"matrix_instr_nonkdim": 16}


_BACKEND = "hip" if torch.version.hip else "cuda"


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    kernel[grid](*args, **options_for(_BACKEND, options))


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
