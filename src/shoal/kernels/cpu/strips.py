"""What all products of a strip have in common: the arguments of a linear kernel, where a token's values are, and where sums go."""

from __future__ import annotations

from typing import Any

from shoal.kernels.cpu.groups import TENSOR_SCALE
from shoal.kernels.cpu.jit import inline
from shoal.kernels.cpu.simd import (
    Address,
    Register,
    Shape,
    load_i64,
    prefetch,
    prefetch_near,
    store_u8x64,
    tile_add,
    tile_load,
    tile_store,
    tile_store_first,
)

# Arguments of a linear kernel, int64 each. A decode kernel takes the same, with WEIGHTS the strip and OUT where to write.
(
    _TENSOR_SCALE,  # address of a float32 that scales the whole matrix (I2_S)
    WEIGHTS,  # address of the first strip
    STRIPS,  # how many
    STRIP_BYTES,
    STRIPS_PER_CHUNK,
    COLUMNS,
    ROWS,  # address of the number of tokens
    X,  # float input, or int8 input [tokens, columns]
    X_STRIDE,  # bytes from one token to the next
    SCALES,  # float32 [tokens, columns / 16]: activation scales
    MINUS_SUMS,  # int32 [tokens, columns / 16]: - sum of 16 activations
    HALF_SUMS,  # float32 [tokens, columns / 16]: scale * sum of 16 activations
    SUMS,  # float32 [tokens, columns / 32]: sums of two of these
    OUT,  # float32 output of this part's first row
    OUT_STRIDE,
    OUT_ROWS,  # weight rows of this part
    ADD,  # 1: add to what is there
) = (8 * i for i in range(17))
LINEAR_FIELDS = 17
assert _TENSOR_SCALE == TENSOR_SCALE

# A core runs ahead of a small tile by itself and reads memory early enough; from this size on it must be told.
_SLOW_TILE, _AHEAD = 4, 4096
_MANY = 512  # bytes of a group: 8-bit weights


@inline
def token_input(args: Address, t: int) -> Any:
    """Token t's rounded values: int8, bytes to the next token's, scales, bytes to the next token's."""
    stride = load_i64(args + X_STRIDE)
    scale_stride = stride // 4
    return load_i64(args + X) + t * stride, stride, load_i64(args + SCALES) + t * scale_stride, scale_stride


@inline
def ask_ahead(shape: Shape, w: Address, size: int) -> None:
    """Ask for what follows a group by and by, if the tile is slow: into the first level, or where that has too few requests under
    way for so many bytes, into the second."""
    if len(shape) >= _SLOW_TILE:
        for i in range(_AHEAD, _AHEAD + size, 64):
            if size < _MANY:
                prefetch_near(w + i)
            else:
                prefetch(w + i)


@inline
def put_tile(shape: Shape, acc: Register, args: Address, index: int, t: int) -> None:
    """What a strip makes of some tokens, to where it belongs."""
    stride = load_i64(args + OUT_STRIDE)
    out = load_i64(args + OUT) + t * stride + 64 * index
    if load_i64(args + ADD) != 0:
        acc = tile_add(acc, tile_load(shape, out, stride))
    left = load_i64(args + OUT_ROWS) - 16 * index
    if left >= 16:
        tile_store(acc, out, stride)
    else:
        tile_store_first(acc, out, stride, left)


@inline
def store_codes(at: Address, codes: Any) -> None:
    """The codes of a group, quad by quad."""
    c0, c1, c2, c3, c4, c5, c6, c7 = codes
    store_u8x64(at, c0)
    store_u8x64(at + 64, c1)
    store_u8x64(at + 128, c2)
    store_u8x64(at + 192, c3)
    store_u8x64(at + 256, c4)
    store_u8x64(at + 320, c5)
    store_u8x64(at + 384, c6)
    store_u8x64(at + 448, c7)
