"""What happens to one token at a time: norms, activations, changes in place, and rounding to int8.

A *row space* is three int64: how many rows there are this step, how many go into a chunk, how many chunks that makes.
Every kernel here takes its rows from one, and hands on float32 rows, int8 rows, or both.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

from numpy import float32

from shoal.kernels.cpu.isa import HAS
from shoal.kernels.cpu.jit import Lazy, inline, kernel, specialised
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
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    magnitude,
    maximum,
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
    EXTRA,  # norm: weight. column operations: a number for each column
    EPS,  # norm: address of eps, float32. Operations with a constant: its address
    INDEX,  # norm: address of int32 row numbers, 0: rows as they are
    BIAS,  # norm: bias, 0: none
    HEADS,  # norm_heads: how many
) = (8 * i for i in range(16))
ROW_FIELDS = 16

_STEP = float32(1 / 127)
_GELU, _GELU_CUBE = 2 * sqrt(2 / pi), 2 * sqrt(2 / pi) * 0.044715
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


_PAST = 64 if HAS.panels else 0


def rounded_stride(width: int) -> int:
    """Bytes from one int8 row to the next; a quarter of it for scales, and so on. Rows some multiple of 2048 bytes apart are in each
    other's way in the first cache: of 4096 columns the products of panels.py, which read four at a time, take a tenth longer."""
    return width + _PAST if width % 2048 == 0 else width


_rounded_stride = inline(rounded_stride)


@inline
def _quantise_row(args: Address, row: int, values: Address) -> None:
    """A whole float32 row at ``values``."""
    width = load_i64(args + WIDTH)
    stride = _rounded_stride(width)
    q8, at = load_i64(args + Q8) + row * stride, row * (stride // 4)
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


# --- norms -----------------------------------------------------------------------------------------------------------


@inline
def _sum(x: Address, width: int) -> Any:
    acc = splat(0.0)
    for i in range(0, width - 15, 16):
        acc = add(acc, load_f32x16(x + 4 * i))
    tail = width % 16
    if tail != 0:
        acc = add(acc, first_lanes(load_f32x16(x + 4 * (width - tail)), tail, float32(0.0)))
    return sum_lanes(acc)


@inline
def _sum_of_squares(x: Address, width: int, mean: Any) -> Any:
    """Of x - mean."""
    acc, centre = splat(0.0), splat(mean)
    for i in range(0, width - 15, 16):
        v = sub(load_f32x16(x + 4 * i), centre)
        acc = fma(v, v, acc)
    tail = width % 16
    if tail != 0:
        v = first_lanes(sub(load_f32x16(x + 4 * (width - tail)), centre), tail, float32(0.0))
        acc = fma(v, v, acc)
    return sum_lanes(acc)


def _norm_row(args: Address, x: Address, out: Address, weight: Address, bias: Address) -> None:
    """One row, or one head, of WIDTH values. Never writes past them: the next head may lie there."""
    width = load_i64(args + WIDTH)
    mean = MEAN(x, width)
    variance = _sum_of_squares(x, width, mean) / float32(width) + load_f32(load_i64(args + EPS))
    factor = float32(1.0) / sqrt(variance)
    centre, scale = splat(mean), splat(factor)
    whole = width - width % 16
    for i in range(0, whole, 16):
        v = mul(mul(sub(load_f32x16(x + 4 * i), centre), scale), load_f32x16(weight + 4 * i))
        store_f32x16(out + 4 * i, v if bias == 0 else add(v, load_f32x16(bias + 4 * i)))
    for i in range(whole, width):
        one = (load_f32(x + 4 * i) - mean) * factor * load_f32(weight + 4 * i)
        store_f32(out + 4 * i, one if bias == 0 else one + load_f32(bias + 4 * i))


@inline
def _mean(x: Address, width: int) -> Any:
    return _sum(x, width) / float32(width)


@inline
def _no_mean(x: Address, width: int) -> Any:
    return float32(0.0)


MEAN: Function = None
NORM_ROW: Function = None


def _norm(args: Address, chunk: int) -> None:
    """Rows normalised. Always writes OUT; rounds it to Q8 too if that is wanted."""
    first, last = span(args, chunk)
    index = load_i64(args + INDEX)
    for row in range(first, last):
        source = row if index == 0 else load_i32(load_i64(index) + 4 * row)
        x = load_i64(args + IN) + source * load_i64(args + IN_STRIDE)
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        NORM_ROW(args, x, out, load_i64(args + EXTRA), load_i64(args + BIAS))
        if load_i64(args + Q8) != 0:
            _quantise_row(args, row, out)


def _norm_heads(args: Address, chunk: int) -> None:
    """HEADS heads of WIDTH values from IN on, each by itself, in place."""
    first, last = span(args, chunk)
    width, bias = load_i64(args + WIDTH), load_i64(args + BIAS)
    for row in range(first, last):
        x = load_i64(args + IN) + row * load_i64(args + IN_STRIDE)
        for head in range(load_i64(args + HEADS)):
            at = 4 * width * head
            NORM_ROW(args, x + at, x + at, load_i64(args + EXTRA) + at, 0 if bias == 0 else bias + at)


def _norm_kernels(name: str, mean: Function) -> tuple[Lazy, Lazy]:
    row = inline(specialised(_norm_row, f"{name}_row", MEAN=mean))
    return (
        kernel(specialised(_norm, f"{name}_norm", NORM_ROW=row)),
        kernel(specialised(_norm_heads, f"{name}_norm_heads", NORM_ROW=row)),
    )


rms_norm, rms_norm_heads = _norm_kernels("rms", _no_mean)
layer_norm, layer_norm_heads = _norm_kernels("layer", _mean)

# --- activations -----------------------------------------------------------------------------------------------------


@inline
def _sigmoid_times(x: Register, y: Register) -> Register:
    """y / (1 + exp(-x))."""
    return div(y, add(splat(1.0), exp(sub(splat(0.0), x))))


@inline
def _silu(x: Register) -> Register:
    return _sigmoid_times(x, x)


@inline
def _gelu(x: Register) -> Register:
    """x / 2 (1 + tanh u) = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    cubed = fma(mul(mul(x, x), x), splat(_GELU_CUBE), mul(x, splat(_GELU)))
    return _sigmoid_times(cubed, x)


@inline
def _relu2(x: Register) -> Register:
    positive = maximum(x, splat(0.0))
    return mul(positive, positive)


ACT: Function = None


def _gated(args: Address, chunk: int) -> None:
    """act(gate) * up for rows of gate | up. Always writes OUT; rounds it to Q8 too if that is wanted."""
    first, last = span(args, chunk)
    width = load_i64(args + WIDTH)
    for row in range(first, last):
        gate = load_i64(args + IN) + row * load_i64(args + IN_STRIDE)
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        for i in range(0, width, 16):
            store_f32x16(out + 4 * i, mul(ACT(load_f32x16(gate + 4 * i)), load_f32x16(gate + 4 * (width + i))))
        if load_i64(args + Q8) != 0:
            _quantise_row(args, row, out)


def _activate(args: Address, chunk: int) -> None:
    """act(row). Always writes OUT; rounds it to Q8 too if that is wanted."""
    first, last = span(args, chunk)
    for row in range(first, last):
        x = load_i64(args + IN) + row * load_i64(args + IN_STRIDE)
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        for i in range(0, load_i64(args + WIDTH), 16):
            store_f32x16(out + 4 * i, ACT(load_f32x16(x + 4 * i)))
        if load_i64(args + Q8) != 0:
            _quantise_row(args, row, out)


_ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "relu2": _relu2}
GATED = {name: kernel(specialised(_gated, f"gated_{name}", ACT=act)) for name, act in _ACTIVATIONS.items()}
ACTIVATE = {name: kernel(specialised(_activate, f"activate_{name}", ACT=act)) for name, act in _ACTIVATIONS.items()}

# --- changes in place ------------------------------------------------------------------------------------------------
# Of rows that are buffers of their own: what lies behind the last value, up to a whole register, may be written.


@inline
def _plus_column(x: Register, column: Address, row: Address, constant: Register) -> Register:
    return add(x, load_f32x16(column))


@inline
def _times_column(x: Register, column: Address, row: Address, constant: Register) -> Register:
    return mul(x, load_f32x16(column))


@inline
def _plus_row(x: Register, column: Address, row: Address, constant: Register) -> Register:
    return add(x, load_f32x16(row))


@inline
def _times(x: Register, column: Address, row: Address, constant: Register) -> Register:
    return mul(x, constant)


@inline
def _clamped(x: Register, column: Address, row: Address, constant: Register) -> Register:
    return sub(splat(0.0), maximum(sub(splat(0.0), constant), sub(splat(0.0), maximum(x, sub(splat(0.0), constant)))))


@inline
def _capped(x: Register, column: Address, row: Address, constant: Register) -> Register:
    """cap * tanh(x / cap) = cap - 2 cap / (exp(2 x / cap) + 1)."""
    twice = add(constant, constant)
    return sub(constant, div(twice, add(exp(div(add(x, x), constant)), splat(1.0))))


CHANGE: Function = None


def _in_place(args: Address, chunk: int) -> None:
    """OUT changed, value by value: of it, of EXTRA's same column, of IN's same row and column, and of the constant."""
    first, last = span(args, chunk)
    column, constant = load_i64(args + EXTRA), splat(load_f32(load_i64(args + EPS)))
    for row in range(first, last):
        x = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        other = load_i64(args + IN) + row * load_i64(args + IN_STRIDE)
        for i in range(0, 4 * load_i64(args + WIDTH), 64):
            store_f32x16(x + i, CHANGE(load_f32x16(x + i), column + i, other + i, constant))


def _changing(name: str, change: Function) -> Lazy:
    return kernel(specialised(_in_place, name, CHANGE=change))


add_bias = _changing("add_bias", _plus_column)
multiply_columns = _changing("multiply_columns", _times_column)
add_rows = _changing("add_rows", _plus_row)
multiply = _changing("multiply", _times)
clamp = _changing("clamp", _clamped)
soft_cap = _changing("soft_cap", _capped)


@kernel
def gate_rows(args: Address, chunk: int) -> None:
    """Rows of OUT times the sigmoid of IN's one value in each row."""
    first, last = span(args, chunk)
    for row in range(first, last):
        x = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        gate = splat(load_f32(load_i64(args + IN) + row * load_i64(args + IN_STRIDE)))
        for i in range(0, 4 * load_i64(args + WIDTH), 64):
            store_f32x16(x + i, _sigmoid_times(gate, load_f32x16(x + i)))


@kernel
def copy(args: Address, chunk: int) -> None:
    """WIDTH values of each row of IN to OUT, and no more."""
    first, last = span(args, chunk)
    width = load_i64(args + WIDTH)
    whole = width - width % 16
    for row in range(first, last):
        x = load_i64(args + IN) + row * load_i64(args + IN_STRIDE)
        out = load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE)
        for i in range(0, whole, 16):
            store_f32x16(out + 4 * i, load_f32x16(x + 4 * i))
        for i in range(whole, width):
            store_f32(out + 4 * i, load_f32(x + 4 * i))
