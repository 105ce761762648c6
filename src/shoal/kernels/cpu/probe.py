"""The most multiply-adds that this CPU does: tiles of sums that never leave their registers, operands in the first-level cache.

No matrix product made of the same instructions can be faster; it is what a roofline needs (shoal/bench/peaks.py). With AVX2 int8
products are multiplied and not added up: what must be added, and how, is the recipe's own affair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.cpu.isa import HAS
from shoal.kernels.cpu.jit import Lazy, kernel
from shoal.kernels.cpu.pool import Pool, program
from shoal.kernels.cpu.simd import (
    Address,
    byte_products,
    dot_start,
    load_f32x16,
    load_i64,
    load_u8x64,
    tile_dot,
    tile_fma,
    tile_load,
    tile_store,
    tile_zero_i32,
)

# Arguments, int64 each.
(
    WEIGHTS,  # address of _LINES cache lines
    INPUT,  # address of four bytes for each sum of a tile
    STEPS,  # products of a chunk, a tile each
    OUT,  # address of a tile for each chunk
) = (8 * i for i in range(4))

_LINE = 64
_LINES = 32
_CHUNKS_PER_THREAD = 4
# As many sums as the registers hold: fewer, and each would wait for the one before.
_TILE = (0,) * 8 if HAS.vectors >= 32 else (0,) * 6
_TILE_BYTES = _LINE * len(_TILE)
_PRODUCTS_ALONE = HAS.int16_sums


@kernel
def multiply_floats(args: Address, chunk: int) -> None:
    """Float32 multiply-adds, 16 a sum and step. All sums take the same input, so that one register is enough for it; they start
    from what is in memory, or the compiler would see that they are equal."""
    weights, x = load_i64(args + WEIGHTS), load_i64(args + INPUT)
    out = load_i64(args + OUT) + chunk * _TILE_BYTES
    acc = tile_load(_TILE, out, _LINE)
    for step in range(load_i64(args + STEPS)):
        acc = tile_fma(acc, load_f32x16(weights + step % _LINES * _LINE), x, 0)
    tile_store(acc, out, _LINE)


@kernel
def multiply_bytes(args: Address, chunk: int) -> None:
    """Int8 multiply-adds, 64 a sum and step."""
    weights, x = load_i64(args + WEIGHTS), load_i64(args + INPUT)
    if _PRODUCTS_ALONE:
        byte_products(load_i64(args + OUT) + chunk * _TILE_BYTES, load_i64(args + STEPS))
        return
    acc = dot_start(tile_zero_i32(_TILE))
    for step in range(load_i64(args + STEPS)):
        acc = tile_dot(acc, load_u8x64(weights + step % _LINES * _LINE), x, 4)
    tile_store(acc, load_i64(args + OUT) + chunk * _TILE_BYTES, _LINE)


class Probe:
    """``run`` does ``macs`` multiply-adds, of float32 or int8, on all threads of the pool."""

    def __init__(self, threads: int, *, floats: bool, steps: int = 1 << 19) -> None:
        chunks = threads * _CHUNKS_PER_THREAD
        self.macs = chunks * steps * len(_TILE) * (16 if floats else 64)
        self.sums: NDArray[np.uint8] = np.zeros(chunks * _TILE_BYTES, np.uint8)
        self._pool = Pool(threads)
        kind = np.float32 if floats else np.uint8
        self._weights = np.ones(_LINES * _LINE // np.dtype(kind).itemsize, kind)
        self._input = np.ones(4 * len(_TILE) // np.dtype(kind).itemsize, kind)
        addresses = [array.ctypes.data for array in (self._weights, self._input)]
        self._args = np.array([*addresses, steps, self.sums.ctypes.data], np.int64)
        self._chunks = np.array([chunks], np.int64)
        code: Lazy = multiply_floats if floats else multiply_bytes
        self._program = program([(code.address, self._args.ctypes.data, self._chunks.ctypes.data)])

    def run(self) -> None:
        """Multiply; what comes of it is added to ``sums`` (float32) or put there."""
        self._pool.run(self._program)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.close()
