"""What happens to one token at a time: RMSNorm, SwiGLU, biases, and rounding to int8.

A *row space* is three int64: how many rows there are this step, how many go into a chunk, how many chunks that makes.
Every kernel here takes its rows from one, and hands on float32 rows, int8 rows, or both.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from numpy import float32

from shoal.kernels.cpu.jit import inline, kernel
from shoal.kernels.cpu.simd import (
    Address,
    Register,
    add,
    div,
    exp,
    first_lanes,
    fma,
    largest_magnitude,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    magnitude,
    mul,
    round_i32,
    splat,
    store_f32,
    store_f32x16,
    store_i8x16,
    store_i32,
    sub,
    sum_lanes,
    sum_lanes_i32,
)

# Arguments, int64 each. Every kernel here begins with the same ones.
(
    SPACE,  # address of the row space
    IN,  # float32 rows
    IN_STRIDE,  # bytes
    WIDTH,  # values of an output row
    OUT,  # float32 rows; 0: not wanted
    OUT_STRIDE,
    Q8,  # int8 [rows, width]; 0: not wanted
    SCALES,  # float32 [rows, width / 16]
    MINUS_SUMS,  # int32 [rows, width / 16]
    HALF_SUMS,  # float32 [rows, width / 16]
    SUMS,  # float32 [rows, width / 32]
    EXTRA,  # norm: weight. bias: the bias
    EPS,  # norm: address of eps, float32
    INDEX,  # norm: address of int32 row numbers, 0: rows as they are
) = (8 * i for i in range(14))
ROW_FIELDS = 14

_STEP = float32(1 / 127)
TINY = float32(1e-30)  # a group whose largest value is below this is all zeros


@inline
def span(args: Address, chunk: int) -> Any:
    """First and last + 1 row of a chunk."""
    space = load_i64(args + SPACE)
    rows, per_chunk = load_i64(space), load_i64(space + 8)
    return chunk * per_chunk, min((chunk + 1) * per_chunk, rows)


# --- rounding to int8 ------------------------------------------------------------------------------------------------


@inline
def _quantise_16(x: Register, q8: Address, scale: Address, minus_sum: Address, total: Address) -> Any:
    """16 values as int8 in +-127 with one scale; also - sum, and scale * sum, which is returned. NaN and infinity stay visible in the
    scale."""
    largest = largest_magnitude(magnitude(x))
    step = largest * _STEP
    q = round_i32(mul(x, splat(127.0 / largest if largest > TINY else 0.0)))
    store_i8x16(q8, q)
    store_f32(scale, step)
    whole = sum_lanes_i32(q)
    store_i32(minus_sum, -whole)
    product = step * float32(whole)
    store_f32(total, product)
    return product


@inline
def _quantise_row(args: Address, row: int, values: Address) -> None:
    """A whole float32 row at ``values``."""
    width = load_i64(args + WIDTH)
    q8, at = load_i64(args + Q8) + row * width, row * (width // 16 * 4)
    scale, minus = load_i64(args + SCALES) + at, load_i64(args + MINUS_SUMS) + at
    halves, sums = load_i64(args + HALF_SUMS) + at, load_i64(args + SUMS) + at // 2
    for g in range(0, width // 16, 2):
        x, h = values + 64 * g, g + 1
        a = _quantise_16(load_f32x16(x), q8 + 16 * g, scale + 4 * g, minus + 4 * g, halves + 4 * g)
        b = _quantise_16(load_f32x16(x + 64), q8 + 16 * h, scale + 4 * h, minus + 4 * h, halves + 4 * h)
        store_f32(sums + 2 * g, a + b)


@kernel
def quantise(args: Address, chunk: int) -> None:
    """Float rows to int8 rows."""
    first, last = span(args, chunk)
    for row in range(first, last):
        _quantise_row(args, row, load_i64(args + IN) + row * load_i64(args + IN_STRIDE))


# --- norm, swiglu, bias ----------------------------------------------------------------------------------------------


@inline
def _sum_of_squares(x: Address, width: int) -> Any:
    acc = splat(0.0)
    for i in range(0, width - 15, 16):
        v = load_f32x16(x + 4 * i)
        acc = fma(v, v, acc)
    tail = width % 16
    if tail != 0:
        v = first_lanes(load_f32x16(x + 4 * (width - tail)), tail, float32(0.0))
        acc = fma(v, v, acc)
    return sum_lanes(acc)


@kernel
def norm(args: Address, chunk: int) -> None:
    """RMSNorm: rows / sqrt(mean square + eps) * weight. Always writes OUT; rounds it to Q8 too if that is wanted."""
    first, last = span(args, chunk)
    width, weight, index = load_i64(args + WIDTH), load_i64(args + EXTRA), load_i64(args + INDEX)
    for row in range(first, last):
        source = row if index == 0 else load_i32(load_i64(index) + 4 * row)
        x = load_i64(args + IN) + source * load_i64(args + IN_STRIDE)
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        mean = _sum_of_squares(x, width) / float32(width) + load_f32(load_i64(args + EPS))
        scale = splat(float32(1.0) / sqrt(mean))
        for i in range(0, width, 16):
            store_f32x16(out + 4 * i, mul(mul(load_f32x16(x + 4 * i), scale), load_f32x16(weight + 4 * i)))
        if load_i64(args + Q8) != 0:
            _quantise_row(args, row, out)


@kernel
def swiglu(args: Address, chunk: int) -> None:
    """silu(gate) * up for rows of gate | up. Always writes OUT; rounds it to Q8 too if that is wanted."""
    first, last = span(args, chunk)
    width = load_i64(args + WIDTH)
    one = splat(1.0)
    for row in range(first, last):
        gate = load_i64(args + IN) + row * load_i64(args + IN_STRIDE)
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        for i in range(0, width, 16):
            g = load_f32x16(gate + 4 * i)
            silu = div(g, add(one, exp(sub(splat(0.0), g))))
            store_f32x16(out + 4 * i, mul(silu, load_f32x16(gate + 4 * (width + i))))
        if load_i64(args + Q8) != 0:
            _quantise_row(args, row, out)


@kernel
def add_bias(args: Address, chunk: int) -> None:
    """Add one vector to every row of OUT."""
    first, last = span(args, chunk)
    width, bias = load_i64(args + WIDTH), load_i64(args + EXTRA)
    for row in range(first, last):
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        for i in range(width):
            store_f32(out + 4 * i, load_f32(out + 4 * i) + load_f32(bias + 4 * i))
