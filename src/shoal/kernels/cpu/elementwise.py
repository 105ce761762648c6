"""What happens to one token at a time: embedding, RMSNorm, SwiGLU, biases, and rounding to int8.

A *row space* is three int64: how many rows there are this step, how many go into a chunk, how many chunks that makes.
Every kernel here takes its rows from one, and hands on float32 rows, int8 rows, or both.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from numpy import float32

from shoal.kernels.cpu.jit import Lazy, inline, kernel
from shoal.kernels.cpu.simd import (
    Address,
    Function,
    Register,
    add,
    div,
    exp,
    first_lanes,
    fma,
    largest_magnitude,
    load_bf16,
    load_f16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    load_u8,
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
    EXTRA,  # norm: weight. embed: first strip. bias: the bias
    EXTRA2,  # norm: address of eps. embed: strip bytes
    INDEX,  # norm: address of int32 row numbers, 0: rows as they are. embed: address of the address of token ids
) = (8 * i for i in range(14))
ROW_FIELDS = 14

_STEP = float32(1 / 127)
TINY = float32(1e-30)  # a group whose largest value is below this is all zeros


@inline
def _span(args: Address, chunk: int) -> Any:
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
    first, last = _span(args, chunk)
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
    first, last = _span(args, chunk)
    width, weight, index = load_i64(args + WIDTH), load_i64(args + EXTRA), load_i64(args + INDEX)
    for row in range(first, last):
        source = row if index == 0 else load_i32(load_i64(index) + 4 * row)
        x = load_i64(args + IN) + source * load_i64(args + IN_STRIDE)
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        mean = _sum_of_squares(x, width) / float32(width) + load_f32(load_i64(args + EXTRA2))
        scale = splat(float32(1.0) / sqrt(mean))
        for i in range(0, width, 16):
            store_f32x16(out + 4 * i, mul(mul(load_f32x16(x + 4 * i), scale), load_f32x16(weight + 4 * i)))
        if load_i64(args + Q8) != 0:
            _quantise_row(args, row, out)


@kernel
def swiglu(args: Address, chunk: int) -> None:
    """silu(gate) * up for rows of gate | up. Always writes OUT; rounds it to Q8 too if that is wanted."""
    first, last = _span(args, chunk)
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
    first, last = _span(args, chunk)
    width, bias = load_i64(args + WIDTH), load_i64(args + EXTRA)
    for row in range(first, last):
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        for i in range(width):
            store_f32(out + 4 * i, load_f32(out + 4 * i) + load_f32(bias + 4 * i))


# --- embedding -------------------------------------------------------------------------------------------------------
# One weight at a time: column c of lane r of a strip at w. The order of operations is that of the gguf package's dequantise.


@inline
def _nibble(w: Address, c: int, r: int) -> Any:
    """Column c (of a group at w) of a nibble vector."""
    q = (c % 32) // 4
    return load_u8(w + 64 * (q % 4) + 4 * r + c % 4) >> (q // 4 * 4) & 15


@inline
def _value_q4_0(w: Address, c: int, r: int) -> Any:
    group = w + c // 32 * 288
    return load_f16(group + 256 + 2 * r) * float32(_nibble(group, c, r) - 8)


@inline
def _value_q4_1(w: Address, c: int, r: int) -> Any:
    group = w + c // 32 * 320
    return load_f16(group + 256 + 2 * r) * float32(_nibble(group, c, r)) + load_f16(group + 288 + 2 * r)


@inline
def _value_q8_0(w: Address, c: int, r: int) -> Any:
    group = w + c // 32 * 544
    q = load_u8(group + 64 * (c % 32 // 4) + 4 * r + c % 4)
    return load_f16(group + 512 + 2 * r) * float32(q - 128)


@inline
def _value_q4_k(w: Address, c: int, r: int) -> Any:
    block = w + c // 256 * (64 + 8 * 288)
    group = block + 64 + c % 256 // 32 * 288
    scale = load_f16(block + 2 * r) * float32(load_u8(group + 256 + r))
    least = load_f16(block + 32 + 2 * r) * float32(load_u8(group + 272 + r))
    return scale * float32(_nibble(group, c, r)) - least


@inline
def _value_q5_k(w: Address, c: int, r: int) -> Any:
    block = w + c // 256 * (64 + 8 * 352)
    group = block + 64 + c % 256 // 32 * 352
    scale = load_f16(block + 2 * r) * float32(load_u8(group + 320 + r))
    least = load_f16(block + 32 + 2 * r) * float32(load_u8(group + 336 + r))
    high = load_u8(group + 256 + 4 * r + c % 4) >> (c % 32 // 4) & 1
    return scale * float32(_nibble(group, c, r) + 16 * high) - least


@inline
def _value_q6_k(w: Address, c: int, r: int) -> Any:
    block = w + c // 256 * (32 + 8 * 416)
    group = block + 32 + c % 256 // 32 * 416
    half = c % 32 // 16
    scale = load_u8(group + 384 + 16 * half + r)
    scale = load_f16(block + 2 * r) * float32(scale - 256 * (scale >> 7))
    high = load_u8(group + 256 + 64 * half + 4 * r + c % 4) >> (c % 16 // 4 * 2) & 3
    return scale * float32(_nibble(group, c, r) + 16 * high - 32)


@inline
def _value_f32(w: Address, c: int, r: int) -> Any:
    return load_f32(w + 64 * c + 4 * r)


@inline
def _value_f16(w: Address, c: int, r: int) -> Any:
    return load_f16(w + 32 * c + 2 * r)


@inline
def _value_bf16(w: Address, c: int, r: int) -> Any:
    return load_bf16(w + 32 * c + 2 * r)


@inline
def _embed(value: Function, args: Address, chunk: int) -> None:
    """The weight rows named by the step's token ids."""
    first, last = _span(args, chunk)
    tokens, width = load_i64(load_i64(args + INDEX)), load_i64(args + WIDTH)
    for row in range(first, last):
        token = load_i32(tokens + 4 * row)
        w = load_i64(args + EXTRA) + token // 16 * load_i64(args + EXTRA2)
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        for c in range(width):
            store_f32(out + 4 * c, value(w, c, token % 16))


@kernel
def embed_q4_0(args: Address, chunk: int) -> None:
    """Rows of a Q4_0 matrix."""
    _embed(_value_q4_0, args, chunk)


@kernel
def embed_q4_1(args: Address, chunk: int) -> None:
    """Rows of a Q4_1 matrix."""
    _embed(_value_q4_1, args, chunk)


@kernel
def embed_q8_0(args: Address, chunk: int) -> None:
    """Rows of a Q8_0 matrix."""
    _embed(_value_q8_0, args, chunk)


@kernel
def embed_q4_k(args: Address, chunk: int) -> None:
    """Rows of a Q4_K matrix."""
    _embed(_value_q4_k, args, chunk)


@kernel
def embed_q5_k(args: Address, chunk: int) -> None:
    """Rows of a Q5_K matrix."""
    _embed(_value_q5_k, args, chunk)


@kernel
def embed_q6_k(args: Address, chunk: int) -> None:
    """Rows of a Q6_K matrix."""
    _embed(_value_q6_k, args, chunk)


@kernel
def embed_f32(args: Address, chunk: int) -> None:
    """Rows of an F32 matrix."""
    _embed(_value_f32, args, chunk)


@kernel
def embed_f16(args: Address, chunk: int) -> None:
    """Rows of an F16 matrix."""
    _embed(_value_f16, args, chunk)


@kernel
def embed_bf16(args: Address, chunk: int) -> None:
    """Rows of a BF16 matrix."""
    _embed(_value_bf16, args, chunk)


EMBED: dict[str, Lazy] = {
    "Q4_0": embed_q4_0,
    "Q4_1": embed_q4_1,
    "Q8_0": embed_q8_0,
    "Q4_K": embed_q4_k,
    "Q5_K": embed_q5_k,
    "Q6_K": embed_q6_k,
    "F32": embed_f32,
    "F16": embed_f16,
    "BF16": embed_bf16,
}
