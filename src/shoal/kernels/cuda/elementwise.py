"""What is done row by row: norms, activations, sums, copies; and the half form of a row, by the kernel that makes the row.

``x``, ``out`` and other operands are float32 [at least rows, width], rows any stride apart. The half form is what products take:
float16 [.., width], below 1 in magnitude, and a power of two for each row, float32 [..]; x ~ half * power
(``reference.round_half``). What needs a whole row has one program for it, its sums in an order that the width alone decides; all
else has one program for some columns of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from shoal.kernels.base import Activation, Heads, Norm
from shoal.kernels.cuda.activation import activate as _activate
from shoal.kernels.cuda.activation import half_scale, sigmoid, tanh
from shoal.kernels.cuda.launch import INTERPRETED, Tensor, device, launch
from shoal.kernels.cuda.rows import row_tiles, rows_of_program

Half = tuple[Tensor, Tensor]

_MAX_BLOCK = 16384  # columns that a program holds at once
_COLUMNS = _MAX_BLOCK if INTERPRETED else 1024  # columns of a program that does not need the whole row


# --- whole rows ------------------------------------------------------------------------------------------------------


def norm(x: Tensor, out: Tensor | None, rows: int, norm: Norm, half: Half | None = None) -> None:
    """Every row normalised, to ``out``, its half form, or both."""
    _norm_rows(x, None, out, rows, norm, half)


def add_norm(residual: Tensor, x: Tensor, out: Tensor | None, rows: int, norm: Norm, half: Half | None = None) -> None:
    """residual += x, and the sum normalised: the bits of ``add`` and ``norm``."""
    _norm_rows(residual, x, out, rows, norm, half)


def _norm_rows(x: Tensor, y: Tensor | None, out: Tensor | None, rows: int, norm: Norm, half: Half | None) -> None:
    width, (programs, together) = x.shape[1], row_tiles(rows)
    args = (*_rows_of(x), *_rows_of(y), *_rows_of(out), *_half_of(half), norm.weight, norm.bias, norm.eps, rows)
    launch(_norm, (programs,), *args, WIDTH=width, CENTRED=norm.centred, **_whole_row(width), **together)


def to_half(x: Tensor, half: Half, rows: int) -> None:
    """The half form of x."""
    _make_rows(x, None, rows, x.shape[1], half, FORM="copy", ACTIVATION="")


def gated(gate_up: Tensor, out: Tensor | None, activation: Activation, rows: int, half: Half | None = None) -> None:
    """activation(gate) * up of gate_up [.., 2 width], all of gate first."""
    _make_rows(gate_up, out, rows, gate_up.shape[1] // 2, half, FORM="gated", ACTIVATION=activation)


def activate(x: Tensor, out: Tensor | None, activation: Activation, rows: int, half: Half | None = None) -> None:
    """activation(x); ``out`` may be x."""
    _make_rows(x, out, rows, x.shape[1], half, FORM="activate", ACTIVATION=activation)


def _make_rows(x: Tensor, out: Tensor | None, rows: int, width: int, half: Half | None, **form: Any) -> None:
    if half is None:
        grid, block = _column_grid(rows, width)
        launch(_make, grid, *_rows_of(x), *_rows_of(out), rows, WIDTH=width, **block, **form)
    else:
        programs, together = row_tiles(rows)
        args = (*_rows_of(x), *_rows_of(out), *_half_of(half), rows)
        launch(_make_half, (programs,), *args, WIDTH=width, **_whole_row(width), **together, **form)


def norm_heads(x: Tensor, heads: Heads, norm: Norm, rows: int) -> None:
    """Each of some heads normalised by itself, in place; weight and bias [heads.count * heads.width] hold all heads' in turn."""
    width = triton.next_power_of_2(heads.width)
    block = min(triton.next_power_of_2(heads.count), max(1, _MAX_BLOCK // 2 // width))
    programs, together = row_tiles(rows)
    grid = (programs, triton.cdiv(heads.count, block))
    args = (x[:, heads.first :], x.stride(0), norm.weight, norm.bias, norm.eps, rows)
    sizes = {"COUNT": heads.count, "WIDTH": heads.width, "HEADS": block, "BLOCK": width, "CENTRED": norm.centred}
    launch(_norm_heads, grid, *args, **sizes, **together, warps=_warps(block * width))


@triton.jit(do_not_specialize=["rows"])
def _norm(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    y,
    y_stride,
    out,
    out_stride,
    half,
    half_stride,
    scale,
    weight,
    bias,
    eps,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, there = rows_of_program(rows, ROWS)
    x += row * x_stride
    if y is not None:
        y += row * y_stride
    mean, rest = 0.0, 0.0
    if CENTRED:  # the mean of what the rounded mean leaves is its error
        mean = _mean_of_rest(x, y, 0.0, WIDTH, BLOCK, ROWS)
        rest = _mean_of_rest(x, y, mean, WIDTH, BLOCK, ROWS)
    squares = tl.zeros([ROWS, 1], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        columns, inside = _columns(first, WIDTH, BLOCK)
        value = tl.where(inside, _sum(x, y, columns, inside) - mean - rest, 0.0)
        squares += tl.sum(value * value, 1, keep_dims=True)
    factor = 1.0 / tl.sqrt_rn(squares / WIDTH + eps)

    # Nothing is stored before all is read: of a row in one block every load but the first is dropped.
    power, inverse = 1.0, 1.0
    if half is not None:
        largest = tl.zeros([ROWS, 1], tl.float32)
        for first in range(0, WIDTH, BLOCK):
            columns, inside = _columns(first, WIDTH, BLOCK)
            value = (_sum(x, y, columns, inside) - mean - rest) * factor
            value = _weighted(value, weight, bias, columns, inside)
            largest = tl.maximum(largest, tl.max(tl.abs(value), 1, keep_dims=True))
        power, inverse = half_scale(largest)
    for first in range(0, WIDTH, BLOCK):
        columns, inside = _columns(first, WIDTH, BLOCK)
        value = _sum(x, y, columns, inside)
        if y is not None:
            tl.store(x + columns, value, mask=inside & there)
        normed = _weighted((value - mean - rest) * factor, weight, bias, columns, inside)
        if out is not None:
            tl.store(out + row * out_stride + columns, normed, mask=inside & there)
        if half is not None:
            tl.store(half + row * half_stride + columns, (normed * inverse).to(tl.float16), mask=inside & there)
    if half is not None:
        tl.store(scale + row, power, mask=there)


@triton.jit
def _mean_of_rest(x, y, mean, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mean of x + y - mean."""
    total = tl.zeros([ROWS, 1], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        columns, inside = _columns(first, WIDTH, BLOCK)
        total += tl.sum(tl.where(inside, _sum(x, y, columns, inside) - mean, 0.0), 1, keep_dims=True)
    return total / WIDTH


@triton.jit(do_not_specialize=["rows"])
def _make_half(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    out,
    out_stride,
    half,
    half_stride,
    scale,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row, there = rows_of_program(rows, ROWS)
    x += row * x_stride
    largest = tl.zeros([ROWS, 1], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        columns, inside = _columns(first, WIDTH, BLOCK)
        value = _made(x, columns, inside, WIDTH, FORM, ACTIVATION)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1, keep_dims=True))
    power, inverse = half_scale(largest)
    for first in range(0, WIDTH, BLOCK):
        columns, inside = _columns(first, WIDTH, BLOCK)
        value = _made(x, columns, inside, WIDTH, FORM, ACTIVATION)
        if out is not None:
            tl.store(out + row * out_stride + columns, value, mask=inside & there)
        tl.store(half + row * half_stride + columns, (value * inverse).to(tl.float16), mask=inside & there)
    tl.store(scale + row, power, mask=there)


@triton.jit(do_not_specialize=["rows"])
def _norm_heads(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    weight,
    bias,
    eps,
    rows,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Values as [rows, heads, columns]."""
    row, there = rows_of_program(rows, ROWS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    inside = (head < COUNT) & (column < WIDTH)
    places = head * WIDTH + column
    x += row[:, :, None] * x_stride
    value = tl.load(x + places, mask=inside, other=0.0)
    if CENTRED:  # twice: the second time it is the error of the first mean
        value = tl.where(inside, value - tl.sum(value, 2, keep_dims=True) / WIDTH, 0.0)
        value = tl.where(inside, value - tl.sum(value, 2, keep_dims=True) / WIDTH, 0.0)
    factor = 1.0 / tl.sqrt_rn(tl.sum(value * value, 2, keep_dims=True) / WIDTH + eps)
    tl.store(x + places, _weighted(value * factor, weight, bias, places, inside), mask=inside & there[:, :, None])


# --- columns of a row ------------------------------------------------------------------------------------------------


def add(x: Tensor, y: Tensor, rows: int) -> None:
    """x += y."""
    _change_rows(x, rows, "add", y, y.stride(0))


def add_vector(x: Tensor, vector: Tensor, rows: int) -> None:
    """Every row of x += vector [width]."""
    _change_rows(x, rows, "add", vector, 0)


def multiply(x: Tensor, factor: float, rows: int) -> None:
    """x *= factor."""
    _change_rows(x, rows, "multiply", number=factor)


def multiply_columns(x: Tensor, factors: Tensor, rows: int) -> None:
    """Every row of x *= factors [width]."""
    _change_rows(x, rows, "multiply_columns", factors, 0)


def soft_cap(x: Tensor, cap: float, rows: int) -> None:
    """x = cap * tanh(x / cap)."""
    _change_rows(x, rows, "soft_cap", number=cap)


def clamp(x: Tensor, limit: float, rows: int) -> None:
    """Every value brought into +-limit."""
    _change_rows(x, rows, "clamp", number=limit)


def gate_rows(x: Tensor, gate: Tensor, rows: int) -> None:
    """x *= sigmoid(gate [.., 1])."""
    _change_rows(x, rows, "gate", gate, gate.stride(0))


def copy_columns(x: Tensor, out: Tensor, rows: int) -> None:
    """out = x."""
    _make_rows(x, out, rows, x.shape[1], None, FORM="copy", ACTIVATION="")


@dataclass(frozen=True, slots=True)
class Parts:
    """Arrays that lie side by side in another: ``table`` holds of each its address, row stride, first column there, width (int64 on
    the device), ``arrays`` keeps their memory."""

    table: Tensor
    widest: int
    arrays: tuple[Tensor, ...]


def side_by_side(arrays: Sequence[Tensor]) -> Parts:
    """For ``concat``, made once: arrays [.., width] in their order."""
    lines, first = [], 0
    for array in arrays:
        lines.append((array.data_ptr(), array.stride(0), first, array.shape[1]))
        first += array.shape[1]
    table = torch.tensor(lines, dtype=torch.int64, device=device())
    return Parts(table, max(array.shape[1] for array in arrays), tuple(arrays))


def concat(parts: Parts, out: Tensor, rows: int) -> None:
    """Rows of all parts side by side, in one launch."""
    grid, block = _column_grid(rows, parts.widest)
    launch(_concat, (*grid, len(parts.arrays)), parts.table, *_rows_of(out), rows, **block)


def _change_rows(
    x: Tensor, rows: int, op: str, other: Tensor | None = None, stride: int = 0, number: float = 0.0
) -> None:
    grid, block = _column_grid(rows, x.shape[1])
    launch(_change, grid, *_rows_of(x), other, stride, float(number), rows, WIDTH=x.shape[1], OP=op, **block)


@triton.jit(do_not_specialize=["rows"])
def _change(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    other,
    other_stride,
    number,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OP: tl.constexpr,
):
    row, there = rows_of_program(rows, ROWS)
    columns, inside = _columns(tl.program_id(1) * BLOCK, WIDTH, BLOCK)
    x += row * x_stride + columns
    value = tl.load(x, mask=inside, other=0.0)
    if OP == "add":
        value += tl.load(other + row * other_stride + columns, mask=inside, other=0.0)
    elif OP == "multiply":
        value *= number
    elif OP == "multiply_columns":
        value *= tl.load(other + columns, mask=inside, other=0.0)
    elif OP == "soft_cap":
        value = number * tanh(value / number)
    elif OP == "clamp":  # NaN stays
        value = tl.where(value > number, number, tl.where(value < -number, -number, value))
    elif OP == "gate":
        value *= sigmoid(tl.load(other + row * other_stride))
    tl.store(x, value, mask=inside & there)


@triton.jit(do_not_specialize=["rows"])
def _make(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    out,
    out_stride,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row, there = rows_of_program(rows, ROWS)
    columns, inside = _columns(tl.program_id(1) * BLOCK, WIDTH, BLOCK)
    value = _made(x + row * x_stride, columns, inside, WIDTH, FORM, ACTIVATION)
    tl.store(out + row * out_stride + columns, value, mask=inside & there)


@triton.jit(do_not_specialize=["rows"])
def _concat(table, out, out_stride, rows, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row, there = rows_of_program(rows, ROWS)
    table += tl.program_id(2) * 4
    x = tl.load(table).to(tl.pointer_type(tl.float32)) + row * tl.load(table + 1)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = columns < tl.load(table + 3)
    value = tl.load(x + columns, mask=inside, other=0.0)
    tl.store(out + row * out_stride + tl.load(table + 2) + columns, value, mask=inside & there)


# --- what kernels share ----------------------------------------------------------------------------------------------


@triton.jit
def _columns(first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The columns from ``first`` on, [1, BLOCK], and which of them there are."""
    columns = first + tl.arange(0, BLOCK)[None, :]
    return columns, columns < WIDTH


@triton.jit
def _sum(x, y, columns, inside):  # type: ignore[no-untyped-def]
    """x + y, if there is a y."""
    value = tl.load(x + columns, mask=inside, other=0.0)
    if y is not None:
        value += tl.load(y + columns, mask=inside, other=0.0)
    return value


@triton.jit
def _weighted(value, weight, bias, places, inside):  # type: ignore[no-untyped-def]
    """value * weight + bias; 0 outside."""
    value = value * tl.load(weight + places, mask=inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + places, mask=inside, other=0.0)
    return value


@triton.jit
def _made(x, columns, inside, WIDTH: tl.constexpr, FORM: tl.constexpr, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns of what ``_make`` makes of a row."""
    value = tl.load(x + columns, mask=inside, other=0.0)
    if FORM == "activate":
        value = _activate(value, ACTIVATION)
    elif FORM == "gated":
        value = _activate(value, ACTIVATION) * tl.load(x + WIDTH + columns, mask=inside, other=0.0)
    return value


def _rows_of(x: Tensor | None) -> tuple[Any, int]:
    """A kernel's two arguments for an array that may be absent."""
    return (None, 0) if x is None else (x, x.stride(0))


def _half_of(half: Half | None) -> tuple[Any, int, Any]:
    """Its three for the half form."""
    return (None, 0, None) if half is None else (half[0], half[0].stride(0), half[1])


def _whole_row(width: int) -> dict[str, int]:
    """Block and warps of a kernel that goes through rows of this width: all of a row at once, if it is not too wide."""
    block = min(triton.next_power_of_2(width), _MAX_BLOCK)
    return {"BLOCK": block, "warps": _warps(block)}


def _column_grid(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(triton.next_power_of_2(width), _COLUMNS)
    programs, together = row_tiles(rows)
    return (programs, triton.cdiv(width, block)), {"BLOCK": block, "warps": _warps(block), **together}


def _warps(values: int) -> int:
    """Enough that a thread holds at most 32 of so many values, and where it can be 8."""
    return min(16, max(1, values // 256))
