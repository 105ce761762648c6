"""Embedding: rows of a packed matrix by token id, decoded exactly as the gguf package does it.

The type's decode kernel (linear.py) turns a block of 16 rows into codes and scales, or floats; one row of it is taken. That is 16
times the work one row needs, still nothing beside a layer, and each type is decoded in one place only.
"""

from __future__ import annotations

from typing import Any

from numpy import float32

from shoal.kernels.cpu import linear, strips
from shoal.kernels.cpu.elementwise import OUT, OUT_STRIDE, WIDTH, span
from shoal.kernels.cpu.groups import TENSOR_SCALE
from shoal.kernels.cpu.jit import inline, kernel
from shoal.kernels.cpu.simd import (
    Address,
    call_kernel,
    load_f32,
    load_i32,
    load_i64,
    load_u8,
    scratch,
    store_f32,
    store_i64,
)

# Arguments: those of every row kernel (elementwise.py), then these.
(
    DECODE,  # decode kernel of the type
    STRIPS,  # address of the first strip
    STRIP_BYTES,
    COLUMNS_PER_BLOCK,  # what the decode kernel decodes at once
    SCALE,  # address of the tensor's scale, float32
    OFFSET,  # the code that means zero
    KIND,  # what is decoded (below)
    TOKENS,  # address of the address of the step's token ids
) = (8 * i for i in range(6, 14))
EMBED_FIELDS = 14
FLOATS, CENTRED, AFFINE = 0, 1, 2  # floats; (code - OFFSET) * d; code * d + m

_K1, _K6 = (0,), (0,) * 6


@inline
def _value(decoded: Address, kind: int, offset: int, c: int, r: int) -> Any:
    """Column c of row r."""
    if kind == FLOATS:
        return load_f32(decoded + 64 * c + 4 * r)
    group = decoded + c // 32 * linear.DECODED_BYTES
    code = load_u8(group + c % 32 // 4 * 64 + 4 * r + c % 4)
    scales = group + 512 + c % 32 // 16 * 128 + 4 * r
    if kind == CENTRED:
        return float32(code - offset) * load_f32(scales)
    return float32(code) * load_f32(scales) + load_f32(scales + 64)


@inline
def _embed_row(args: Address, row: int, call: Address, decoded: Address) -> None:
    token = load_i32(load_i64(load_i64(args + TOKENS)) + 4 * row)
    out, width = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE), load_i64(args + WIDTH)
    store_i64(call + strips.WEIGHTS, load_i64(args + STRIPS) + token // 16 * load_i64(args + STRIP_BYTES))
    columns, kind, offset = load_i64(args + COLUMNS_PER_BLOCK), load_i64(args + KIND), load_i64(args + OFFSET)
    for first in range(0, width, columns):
        call_kernel(load_i64(args + DECODE), call, first // columns)
        for c in range(min(columns, width - first)):
            store_f32(out + 4 * (first + c), _value(decoded, kind, offset, c, token % 16))


@kernel
def embed(args: Address, chunk: int) -> None:
    """The weight rows named by the step's token ids."""
    call, decoded = scratch(_K1), scratch(_K6)
    store_i64(call + TENSOR_SCALE, load_i64(args + SCALE))
    store_i64(call + strips.OUT, decoded)
    store_i64(call + strips.COLUMNS, load_i64(args + WIDTH))
    first, last = span(args, chunk)
    for row in range(first, last):
        _embed_row(args, row, call, decoded)
