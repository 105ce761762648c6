"""Rotary positions, and k and v into the pages of the cache (layout: attention.py)."""

from __future__ import annotations

from typing import Any

import numpy as np

from shoal.kernels.cpu.attention import (
    COS,
    DATA,
    GROUP,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NEOX,
    PAGE,
    PAIRS,
    POSITIONS,
    QKV,
    QKV_STRIDE,
    ROW_START,
    ROWS,
    ROWS_PER_CHUNK,
    SCALE,
    SIN,
    STEP,
    TABLE_WIDTH,
    UNIT_BYTES,
    K,
    V,
    padded,
    page_table,
)
from shoal.kernels.cpu.elementwise import TINY
from shoal.kernels.cpu.jit import Lazy, inline, kernel
from shoal.kernels.cpu.simd import (
    Address,
    Function,
    Scalar,
    first_lanes,
    fma,
    largest_magnitude,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    magnitude,
    maximum_i32,
    mul,
    rotate_pairs,
    round_i32,
    splat,
    store_f16,
    store_f16x16,
    store_f32,
    store_f32x16,
    store_i8_apart,
    store_i8x16,
    sub,
)

_STEP, _ZERO = np.float32(1 / 127), np.float32(0)


@inline
def _rotate(args: Address, x: Address, position: int) -> None:
    """Turn one head in place."""
    pairs = load_i64(args + PAIRS)
    offset = 4 * position * load_i64(args + TABLE_WIDTH)
    cos, sin = load_i64(args + COS) + offset, load_i64(args + SIN) + offset
    if load_i64(args + NEOX) != 0:
        _rotate_halves(x, x + 4 * pairs, cos, sin, pairs)
    else:
        _rotate_neighbours(x, cos, sin, 2 * pairs)


@inline
def _rotate_neighbours(x: Address, cos: Address, sin: Address, dims: Address) -> None:
    """Pairs (2i, 2i + 1); the table holds c, c and -s, s for each."""
    whole = dims // 16 * 16
    for i in range(0, 4 * whole, 64):
        turned = rotate_pairs(load_f32x16(x + i), load_f32x16(cos + i), load_f32x16(sin + i))
        store_f32x16(x + i, turned)
    for i in range(4 * whole, 4 * dims, 8):
        a, b, c, s = load_f32(x + i), load_f32(x + i + 4), load_f32(cos + i), load_f32(sin + i + 4)
        store_f32(x + i, a * c - b * s)
        store_f32(x + i + 4, b * c + a * s)


@inline
def _rotate_halves(x: Address, y: Address, cos: Address, sin: Address, pairs: int) -> None:
    """Pairs (i, i + pairs); the table holds c and s once for each."""
    whole = pairs // 16 * 16
    for i in range(0, 4 * whole, 64):
        a, b, c, s = load_f32x16(x + i), load_f32x16(y + i), load_f32x16(cos + i), load_f32x16(sin + i)
        store_f32x16(x + i, sub(mul(a, c), mul(b, s)))
        store_f32x16(y + i, fma(a, s, mul(b, c)))
    for i in range(4 * whole, 4 * pairs, 4):
        a, b, c, s = load_f32(x + i), load_f32(y + i), load_f32(cos + i), load_f32(sin + i)
        store_f32(x + i, a * c - b * s)
        store_f32(y + i, b * c + a * s)


# --- storing: put(args, k, v, K unit, V unit, position in the page) --------------------------------------------------------


@inline
def _put_f16(args: Address, k: Address, v: Address, keys: Address, values: Address, offset: int) -> None:
    """k down a column of the K unit, v along a row of the V unit."""
    head_dim = load_i64(args + HEAD_DIM)
    whole, row = head_dim // 16 * 16, values + 2 * offset * padded(head_dim)
    for d in range(head_dim):
        store_f16(keys + 2 * (PAGE * d + offset), load_f32(k + 4 * d))
    for d in range(0, whole, 16):
        store_f16x16(row + 2 * d, load_f32x16(v + 4 * d))
    for d in range(whole, head_dim):
        store_f16(row + 2 * d, load_f32(v + 4 * d))


@inline
def _put_f32(args: Address, k: Address, v: Address, keys: Address, values: Address, offset: int) -> None:
    """As `_put_f16`, unrounded."""
    head_dim = load_i64(args + HEAD_DIM)
    row = values + 4 * offset * padded(head_dim)
    for d in range(head_dim):
        store_f32(keys + 4 * (PAGE * d + offset), load_f32(k + 4 * d))
        store_f32(row + 4 * d, load_f32(v + 4 * d))


@inline
def _round_group(x: Address, dims: int) -> Any:
    """32 values (zeros from ``dims`` on) as two times 16 int8 in +-127, and their scale."""
    left, right = first_lanes(load_f32x16(x), dims, _ZERO), first_lanes(load_f32x16(x + 64), dims - 16, _ZERO)
    largest = largest_magnitude(maximum_i32(magnitude(left), magnitude(right)))
    inverse = splat(127.0 / largest if largest > TINY else 0.0)
    return round_i32(mul(left, inverse)), round_i32(mul(right, inverse)), largest * _STEP


@inline
def _put_q8(args: Address, k: Address, v: Address, keys: Address, values: Address, offset: int) -> None:
    """As `_put_f16`, as int8 with a scale for 32 dims, which is rounded to float16 after the division by it."""
    head_dim, data = load_i64(args + HEAD_DIM), load_i64(args + DATA)
    column, row = keys + data + offset, values + data + offset * padded(head_dim)
    for d in range(0, head_dim, GROUP):
        k_left, k_right, k_scale = _round_group(k + 4 * d, head_dim - d)
        v_left, v_right, v_scale = _round_group(v + 4 * d, head_dim - d)
        store_f16(keys + d + 2 * offset, k_scale)
        store_f16(values + d + 2 * offset, v_scale)
        store_i8_apart(column + PAGE * d, k_left, PAGE)
        store_i8x16(row + d, v_left)
        if head_dim - d > 16:
            store_i8_apart(column + PAGE * (d + 16), k_right, PAGE)
            store_i8x16(row + d + 16, v_right)


# --- rows ------------------------------------------------------------------------------------------------------------


@inline
def _scale_row(x: Address, floats: int, scale: Scalar) -> None:
    """x *= scale."""
    whole = floats // 16 * 16
    for i in range(0, 4 * whole, 64):
        store_f32x16(x + i, mul(load_f32x16(x + i), splat(scale)))
    for i in range(4 * whole, 4 * floats, 4):
        store_f32(x + i, load_f32(x + i) * scale)


@inline
def _rope_row(put: Function, args: Address, row: int, sequence: int) -> None:
    """Turn and scale the q heads of a row, turn its k heads, and put k and v in the cache."""
    step, head_bytes = load_i64(args + STEP), 4 * load_i64(args + HEAD_DIM)
    heads, kv_heads, unit = load_i64(args + HEADS), load_i64(args + KV_HEADS), load_i64(args + UNIT_BYTES)
    position = load_i32(load_i64(step + POSITIONS) + 4 * row)
    x = load_i64(args + QKV) + row * load_i64(args + QKV_STRIDE)
    for h in range(heads + kv_heads):
        _rotate(args, x + h * head_bytes, position)
    _scale_row(x, heads * load_i64(args + HEAD_DIM), load_f32(load_i64(args + SCALE)))
    page = load_i32(page_table(args, sequence) + 4 * (position // PAGE)) * kv_heads
    for h in range(kv_heads):
        k, at = x + (heads + h) * head_bytes, (page + h) * unit
        v = k + kv_heads * head_bytes
        put(args, k, v, load_i64(args + K) + at, load_i64(args + V) + at, position % PAGE)


@inline
def _rope_store(put: Function, args: Address, chunk: int) -> None:
    step = load_i64(args + STEP)
    rows, per_chunk = load_i64(step + ROWS), load_i64(step + ROWS_PER_CHUNK)
    starts, sequence = load_i64(step + ROW_START), 0
    for row in range(chunk * per_chunk, min((chunk + 1) * per_chunk, rows)):
        while load_i32(starts + 4 * (sequence + 1)) <= row:
            sequence += 1
        _rope_row(put, args, row, sequence)


@kernel
def rope_store_f16(args: Address, chunk: int) -> None:
    """Rotary positions, and k and v into float16 pages."""
    _rope_store(_put_f16, args, chunk)


@kernel
def rope_store_f32(args: Address, chunk: int) -> None:
    """Rotary positions, and k and v into float32 pages."""
    _rope_store(_put_f32, args, chunk)


@kernel
def rope_store_q8(args: Address, chunk: int) -> None:
    """Rotary positions, and k and v into int8 pages."""
    _rope_store(_put_q8, args, chunk)


ROPE_STORE: dict[str, Lazy] = {"f16": rope_store_f16, "f32": rope_store_f32, "q8_0": rope_store_q8}
