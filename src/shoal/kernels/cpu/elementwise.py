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
    maximum_i32,
    mul,
    round_i32,
    splat,
    store_f32,
    store_f32x16,
    store_i8x16,
    sub,
    sum_lanes,
    sum_lanes_i32,
    to_f32,
)

# Arguments, int64 each. Every kernel here begins with the same ones.
(
    SPACE,  # address of the row space
    IN,  # float32 rows
    IN_STRIDE,  # bytes
    WIDTH,  # values of an output row
    OUT,  # float32 rows; 0: not wanted
    OUT_STRIDE,
    Q8,  # int8 [rows, passes, width]; 0: not wanted
    PASSES,  # 1, or 2: what the first leaves over is rounded again
    SCALES,  # float32 [rows, passes, width / 32]
    SUMS,  # float32 [rows, passes, width / 32]
    HALF_SUMS,  # float32 [rows, passes, width / 16]
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
def _quantise_group(a: Register, b: Register, q8: Address, scale: Address, total: Address, halves: Address) -> Any:
    """32 values as int8 in +-127 with one scale; also scale * sum of all, and of each half. NaN and infinity stay visible
    in the scale. Returns what rounding left over."""
    largest = largest_magnitude(maximum_i32(magnitude(a), magnitude(b)))
    step = largest * _STEP
    inverse = splat(127.0 / largest if largest > TINY else 0.0)
    qa, qb = round_i32(mul(a, inverse)), round_i32(mul(b, inverse))
    store_i8x16(q8, qa)
    store_i8x16(q8 + 16, qb)
    sum_a, sum_b = sum_lanes_i32(qa), sum_lanes_i32(qb)
    store_f32(scale, step)
    store_f32(total, step * float32(sum_a + sum_b))
    store_f32(halves, step * float32(sum_a))
    store_f32(halves + 4, step * float32(sum_b))
    back = splat(-step)
    return fma(to_f32(qa), back, a), fma(to_f32(qb), back, b)


@inline
def _quantise_row(args: Address, row: int, values: Address) -> None:
    """A whole float32 row at ``values``."""
    width, passes = load_i64(args + WIDTH), load_i64(args + PASSES)
    groups = width // 32
    for g in range(groups):
        a, b = load_f32x16(values + 128 * g), load_f32x16(values + 128 * g + 64)
        for p in range(row * passes, (row + 1) * passes):
            q8, at = load_i64(args + Q8) + p * width + 32 * g, 4 * (p * groups + g)
            scale, total = load_i64(args + SCALES) + at, load_i64(args + SUMS) + at
            a, b = _quantise_group(a, b, q8, scale, total, load_i64(args + HALF_SUMS) + 2 * at)


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
