"""Products of activations and packed weights: out[row, n] = sum over k of x[row, k] * weight[n, k].

Weight rows are on the M side of the matrix instruction, tokens on its N side: a few tokens fill it, and each weight is read and
decoded once for all tokens of a tile. K is walked in blocks of 256 columns, each as 8 products of 32 (the groups of pack.py), or as
fewer where K is shorter than a block.

An output's bits depend on its row of x and its row of weights alone. K is cut into pieces by type, rows and columns of the weights,
never by the number of tokens; each piece is summed by itself, and pieces are added in their order. Few tokens: pieces are the work
of different programs, whose sums go to scratch memory, and a second kernel adds them. Many tokens: one program after the other.
Both give the same bits, and so does every shape of tile, as long as the matrix instruction is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from shoal.kernels.base import Activation
from shoal.kernels.cuda.activation import activate
from shoal.kernels.cuda.launch import Tensor, device, launch, on_gpu
from shoal.kernels.cuda.pack import GROUP, Layout, PackedMatrix, PackedPart
from shoal.kernels.cuda.unpack import decode

FEW = 64  # rows up to which pieces of K go to different programs
BLOCK_K = 256
_PROGRAMS = 256  # that a product for few rows has at least, if K is long enough
_MOST_PIECES = 16
_COLUMNS = 128  # of an output row that a program makes of the sums of pieces


@dataclass(frozen=True, slots=True)
class Config:
    """Shape of the tile of a program: weight rows (a multiple of 64, at most 128), tokens; warps (a multiple of 4), stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


CONFIGS: dict[int, Config] = {
    16: Config(64, 16, 4, 3),
    32: Config(64, 32, 4, 3),
    64: Config(64, 64, 4, 3),
    128: Config(128, 128, 8, 2),
}
"""Bucket (the most rows; the last is for all above) -> configuration, of GPUs with wgmma."""

SMALL_CONFIGS: dict[int, Config] = {**CONFIGS, 128: Config(128, 64, 8, 2)}
"""The same of others, whose matrix instructions take both operands from registers."""

TUNED: dict[tuple[str, int, int, int], Config] = {}
"""(type, weight rows, columns, bucket) -> what is taken instead."""


@dataclass(frozen=True, slots=True)
class Chip:
    """What configurations depend on: bytes of shared memory that a program can have, and the table of configurations."""

    shared: int
    configs: dict[int, Config]


CHIPS = {
    "sm_80": Chip(163 << 10, SMALL_CONFIGS),
    "sm_90": Chip(227 << 10, CONFIGS),
    "gfx942": Chip(64 << 10, SMALL_CONFIGS),
}
_absent = Chip(1 << 30, CONFIGS)


@contextmanager
def as_on(chip: Chip) -> Iterator[None]:
    """Configurations are those of this one, where there is no GPU."""
    global _absent
    before, _absent = _absent, chip
    try:
        yield
    finally:
        _absent = before


def chip() -> Chip:
    """The GPU that is used."""
    return _this_chip() if on_gpu() else _absent


@cache
def _this_chip() -> Chip:
    properties = torch.cuda.get_device_properties(device())
    wgmma = torch.version.hip is None and properties.major >= 9
    shared = getattr(properties, "shared_memory_per_block_optin", 1 << 16)
    return Chip(shared, CONFIGS if wgmma else SMALL_CONFIGS)


def bucket(rows: int) -> int:
    """The one of CONFIGS for this number of rows."""
    return next((most for most in CONFIGS if rows <= most), max(CONFIGS))


def config(part: PackedPart, rows: int) -> Config:
    """How a part is multiplied by this number of rows: what the tables say, with no more stages than shared memory allows."""
    size, limits = bucket(rows), chip()
    shape = TUNED.get((part.layout.name, part.rows, part.columns, size), limits.configs[size])
    while shape.stages > 1 and shared_bytes(part.layout, shape) > limits.shared:
        shape = replace(shape, stages=shape.stages - 1)
    return shape


def shared_bytes(layout: Layout, shape: Config) -> int:
    """Shared memory of a program, more than one stage: activations of each, weights of all but one, a tile of float16 weights."""
    activations, weights = 2 * BLOCK_K * shape.block_n, layout.row_bytes * shape.block_m
    return shape.stages * activations + (shape.stages - 1) * weights + 64 * shape.block_m


def pieces(part: PackedPart) -> tuple[int, int]:
    """How many pieces K is cut into, and the blocks of each but the last: a function of the part's type, rows and columns alone."""
    wanted = min(_MOST_PIECES, -(-_PROGRAMS * 64 // part.padded_rows), max(1, part.blocks // 2))
    each = -(-part.blocks // wanted)
    return -(-part.blocks // each), each


def scratch_bytes(matrix: PackedMatrix, max_rows: int) -> int:
    """What ``linear`` needs for sums of pieces, 0 where K is whole. One scratch tensor serves all products of a stream."""
    rows = min(max_rows, FEW)
    return max(4 * pieces(part)[0] * rows * part.rows if pieces(part)[0] > 1 else 0 for part in matrix.parts)


def can_gate(matrix: PackedMatrix) -> bool:
    """Whether ``linear_gated`` takes it: gate and up of one type, each a multiple of 64 rows."""
    return len(matrix.parts) == 1 and matrix.rows % 128 == 0


def linear(
    half: Tensor,
    scale: Tensor,
    matrix: PackedMatrix,
    out: Tensor,
    rows: int,
    *,
    scratch: Tensor | None = None,
    add: bool = False,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """out[:rows, :matrix.rows] = x @ matrix.T * factor + bias, or with ``add`` that added to it.

    x is ``half`` float16 [max_rows, columns] times ``scale`` float32 [max_rows] of each row; ``out`` float32, its columns side by side;
    ``factor`` and ``bias`` float32 [matrix.rows]; ``scratch`` float32 of ``scratch_bytes`` at least.
    """
    for part in matrix.parts:
        columns = slice(part.first_row, part.first_row + part.rows)
        product = _Product(half, scale, part, out[:, columns], rows, scratch)
        _multiply(
            product,
            _Epilogue(
                None if factor is None else factor[columns],
                None if bias is None else bias[columns],
                add,
            ),
        )


def linear_gated(
    half: Tensor,
    scale: Tensor,
    matrix: PackedMatrix,
    out: Tensor,
    rows: int,
    activation: Activation,
    *,
    scratch: Tensor | None = None,
) -> None:
    """out[:rows] = activation(x @ gate.T) * (x @ up.T) of a matrix [2 n_ff, columns] (``can_gate``), gate first: float32 [rows, n_ff].
    The rest as ``linear``."""
    _multiply(_Product(half, scale, matrix.parts[0], out, rows, scratch), _Epilogue(activation=activation))


@dataclass(frozen=True, slots=True)
class _Product:
    half: Tensor
    scale: Tensor
    part: PackedPart
    out: Tensor
    rows: int
    scratch: Tensor | None

    @property
    def source(self) -> tuple[Any, ...]:
        """What all kernels that multiply begin with."""
        return self.half, self.half.stride(0), self.part.columns, self.part.data, self.part.padded_rows

    @property
    def result(self) -> tuple[Any, ...]:
        """What all kernels that write the output need."""
        return self.scale, self.out, self.out.stride(0), self.rows


@dataclass(frozen=True, slots=True)
class _Epilogue:
    factor: Tensor | None = None
    bias: Tensor | None = None
    add: bool = False
    activation: Activation | Literal[""] = ""

    def width(self, rows: int) -> int:
        """Columns of the output of a matrix of ``rows``."""
        return rows // 2 if self.activation else rows

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {"ADD": self.add, "ACTIVATION": self.activation}


def _multiply(product: _Product, epilogue: _Epilogue) -> None:
    """One part of a matrix."""
    if product.rows <= FEW and pieces(product.part)[0] > 1:
        _multiply_pieces(product)
        _add_pieces(product, epilogue)
    else:
        _multiply_whole(product, epilogue)


def _multiply_whole(product: _Product, epilogue: _Epilogue) -> None:
    part, shape = product.part, config(product.part, product.rows)
    width, (count, each) = epilogue.width(part.rows), pieces(part)
    block_m = 64 if epilogue.activation else shape.block_m
    grid = (triton.cdiv(width, block_m), triton.cdiv(product.rows, shape.block_n))
    args = (*product.source, part.blocks, each, *product.result, epilogue.factor, epilogue.bias, width)
    constants = {"PIECES": count, "BLOCK_M": block_m, **epilogue.constants, **tile_constants(part, shape)}
    launch(_whole, grid, *args, warps=shape.warps, stages=shape.stages, **constants)


def _multiply_pieces(product: _Product) -> None:
    part, shape = product.part, config(product.part, product.rows)
    count, each = pieces(part)
    assert product.scratch is not None
    assert product.scratch.numel() >= count * product.rows * part.rows
    grid = (triton.cdiv(part.rows, shape.block_m), triton.cdiv(product.rows, shape.block_n), count)
    args = (*product.source, part.blocks, each, product.scratch, product.rows, part.rows)
    constants = {"BLOCK_M": shape.block_m, **tile_constants(part, shape)}
    launch(_sum_pieces, grid, *args, warps=shape.warps, stages=shape.stages, **constants)


def _add_pieces(product: _Product, epilogue: _Epilogue) -> None:
    part = product.part
    width = epilogue.width(part.rows)
    args = (product.scratch, part.rows, part.data, *product.result, epilogue.factor, epilogue.bias, width)
    grid = (triton.cdiv(width, _COLUMNS), product.rows)
    launch(_add, grid, *args, PIECES=pieces(part)[0], COLUMNS=_COLUMNS, **epilogue.constants)


def tile_constants(part: PackedPart, shape: Config) -> dict[str, Any]:
    """What ``multiply`` is compiled for, but for the weight rows of a tile."""
    groups = triton.cdiv(min(part.columns, BLOCK_K), GROUP)  # of a block: those behind a short row would add zeros
    return {
        "BLOCK_N": shape.block_n,
        "WHOLE_K": part.columns % BLOCK_K == 0,
        "GROUPS": groups,
        **part.layout.constants,
    }


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def multiply(weights, R, row, x, x_mask, K, first, last,  # type: ignore[no-untyped-def]
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_K: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr,
             BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    """Sums over blocks ``first`` ... ``last`` - 1 of weight rows ``row`` [BLOCK_M] and of the rows of x at ``x`` (float16 pointers
    [BLOCK_N]; 0 where not ``x_mask``): float32 [BLOCK_M, BLOCK_N]. Of weights divided by the scale of the part."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    factor = tl.load(weights.to(tl.pointer_type(tl.float32)) + 1)
    for block in range(first, last):
        for group in tl.static_range(GROUPS):
            weight = decode(weights, R, block, row, factor, group, FORMAT, BITS, ROW_BYTES).to(tl.float16)
            k = block * 256 + group * 32 + tl.arange(0, 32)
            mask = x_mask[None, :] if WHOLE_K else x_mask[None, :] & (k[:, None] < K)
            sums = tl.dot(weight, tl.load(x[None, :] + k[:, None], mask=mask, other=0.0), sums)
    return sums


@triton.jit
def add_up(weights, R, row, x, x_mask, K, blocks, each,  # type: ignore[no-untyped-def]
           PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_K: tl.constexpr, GROUPS: tl.constexpr,
           FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    """``multiply`` over all pieces of K, which are added in their order."""
    if PIECES == 1:
        total = multiply(weights, R, row, x, x_mask, K, 0, blocks,
                         BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for piece in range(PIECES):
            first = piece * each
            last = tl.minimum(first + each, blocks)
            total += multiply(weights, R, row, x, x_mask, K, first, last,
                              BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
    return total


@triton.jit(do_not_specialize=["rows"])
def _whole(half, x_stride, K, weights, R, blocks, each, scale, out, out_stride, rows,  # type: ignore[no-untyped-def]
           factor, bias, width, PIECES: tl.constexpr, ADD: tl.constexpr, ACTIVATION: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_K: tl.constexpr, GROUPS: tl.constexpr,
           FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    """A tile of ``out``, whose columns are the first ``width`` rows of the weights; gated, up are those behind them."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = token < rows
    x = half + token.to(tl.int64) * x_stride
    sums = add_up(weights, R, row, x, here, K, blocks, each,
                  PIECES, BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
    scales = tl.load(scale + token, mask=here, other=1.0)[None, :]
    y = scaled(sums, weights, scales)
    if ACTIVATION != "":
        up = add_up(weights, R, row + width, x, here, K, blocks, each,
                    PIECES, BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
        y = activate(y, ACTIVATION) * scaled(up, weights, scales)
    column = row[:, None]
    at = out + token.to(tl.int64)[None, :] * out_stride + column
    _write(at, y, here[None, :] & (column < width), factor, bias, column, width, ADD)


@triton.jit
def scaled(sums, weights, scales):  # type: ignore[no-untyped-def]
    """Sums times the scale of the weights and those of the activations: powers of two."""
    return sums * tl.load(weights.to(tl.pointer_type(tl.float32))) * scales


@triton.jit
def _write(at, y, mask, factor, bias, column, width, ADD: tl.constexpr):  # type: ignore[no-untyped-def]
    """y * factor + bias, to ``at`` or added to what is there."""
    if factor is not None:
        y *= tl.load(factor + column, mask=column < width, other=0.0)
    if bias is not None:
        y += tl.load(bias + column, mask=column < width, other=0.0)
    if ADD:
        y += tl.load(at, mask=mask, other=0.0)
    tl.store(at, y, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _sum_pieces(half, x_stride, K, weights, R, blocks, each, scratch, rows, N,  # type: ignore[no-untyped-def]
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_K: tl.constexpr, GROUPS: tl.constexpr,
                FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    """Sums of one piece of K, to scratch [pieces, rows, N]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    piece = tl.program_id(2)
    here = token < rows
    first = piece * each
    last = tl.minimum(first + each, blocks)
    x = half + token.to(tl.int64) * x_stride
    sums = multiply(weights, R, row, x, here, K, first, last,
                    BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
    at = scratch + (piece * rows + token[None, :]).to(tl.int64) * N + row[:, None]
    tl.store(at, sums, mask=here[None, :] & (row[:, None] < N))


@triton.jit(do_not_specialize=["rows"])
def _add(scratch, N, weights, scale, out, out_stride, rows, factor, bias, width,  # type: ignore[no-untyped-def]
         PIECES: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Some columns of one row of ``out`` from sums [pieces, rows, N]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1)
    mask = column < width
    scales = tl.load(scale + token)
    y = scaled(_total(scratch, token, rows, N, column, mask, PIECES, COLUMNS), weights, scales)
    if ACTIVATION != "":
        up = _total(scratch, token, rows, N, column + width, mask, PIECES, COLUMNS)
        y = activate(y, ACTIVATION) * scaled(up, weights, scales)
    _write(out + token.to(tl.int64) * out_stride + column, y, mask, factor, bias, column, width, ADD)


@triton.jit
def _total(scratch, token, rows, N, column, mask, PIECES: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((COLUMNS,), tl.float32)
    for piece in tl.static_range(PIECES):
        at = scratch + (piece * rows + token).to(tl.int64) * N + column
        total += tl.load(at, mask=mask, other=0.0)
    return total
