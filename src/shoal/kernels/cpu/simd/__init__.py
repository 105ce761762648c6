"""SIMD as ordinary Numba values: vectors of 16 lanes, tiles of vectors, and the few operations the kernels are made of.

Every vector is one *logical* width on every machine, 16 float32 lanes or 64 bytes; LLVM splits it into what the CPU has (one zmm,
two ymm, four NEON registers). Lane r belongs to weight row (or KV position) r, so sums run along time, never across lanes, and the
result does not depend on the width. Only the int8 dot product is written per instruction set (``ISA``); it is exact
integer arithmetic, so all of them agree bit for bit.

Addresses are plain int64 values. A *tile* holds one vector per token; its size is the length of the tuple that ``shape`` is.

vectors.py   the types
emit.py      writing LLVM IR; an operation is a function that does, and kernels call it by name
memory.py    loads, stores, atomics, calls; halves.py: float16 where there is no instruction for it
floats.py    arithmetic on float32
integers.py  bytes, int32, the int8 dot product

operations.py    all of them

Kernels import operations from here, whichever file they stand in. All these files need Numba, so that what is imported from here
is made when a kernel is compiled (later.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from shoal.kernels.cpu.later import Later

# What the annotations of kernels mean by their types; Numba infers its own.
Address = int
Register = Any  # a vector, or a tile of vectors
Scalar = Any  # a float32
Shape = tuple[int, ...]  # its length is the size of a tile
Function = Any  # a compiled helper, passed in

_FILES = ("emit", "floats", "halves", "integers", "memory", "operations", "panel_format", "panels", "vectors")


def __getattr__(name: str) -> Any:
    """An operation by its name."""
    if name.startswith("_") or name in _FILES:  # not one
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return Later(lambda: getattr(import_module(f"{__name__}.operations"), name))
