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

Kernels import operations from here, whichever file they stand in.
"""

from shoal.kernels.cpu.simd.floats import *  # noqa: F403
from shoal.kernels.cpu.simd.integers import *  # noqa: F403
from shoal.kernels.cpu.simd.memory import *  # noqa: F403
from shoal.kernels.cpu.simd.vectors import *  # noqa: F403
