"""Products of activations and packed weights: out[row, n] = sum over k of x[row, k] * weight[n, k].

Weight rows are on the M side of the matrix instruction, tokens on its N side: a few tokens fill it, and each weight is read and
decoded once for all tokens of a tile. K is walked in blocks of 256 columns, each as 8 products of 32 (the groups of pack.py), or as
fewer where K is shorter than a block.

An output's bits depend on its row of x and its row of weights alone. K is cut into pieces by type, rows and columns of the weights,
never by the number of tokens; each piece is summed by itself, and pieces are added in their order. Many tokens: a program sums one
piece after the other. Few tokens: pieces of a tile are the work of different programs. Each leaves its sums in scratch memory, and
the last to be done adds up what all have left, in the order of the pieces (last_program.py). All ways give the same bits, and so does
every shape of tile, as long as the matrix instruction is the same.

Rows come in their half form, or as float32 with the largest magnitudes of parts of each row, from which a program makes the same
half form as it reads: a product of gate and up, or attention, whose programs know a part of a row each, can leave no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from shoal.kernels.base import Activation
from shoal.kernels.cuda import elementwise
from shoal.kernels.cuda.activation import activate, half_scale
from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.last_program import is_last
from shoal.kernels.cuda.launch import Tensor, device, launch, on_gpu
from shoal.kernels.cuda.pack import GROUP, Layout, PackedMatrix, PackedPart
from shoal.kernels.cuda.unpack import decode

FEW = 64  # rows up to which pieces of K go to different programs
BLOCK_K = 256
_PROGRAMS = 256  # that a product for few rows has at least, if K is long enough
_MOST_PIECES = 16
_NARROWEST = 16  # tokens of a tile
GATED_TILE = 64  # columns of the output of a program of ``linear_gated``


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

SMALL_FLOATS: dict[int, Config] = {64: Config(64, 64, 8, 3)}
"""What those take instead for activations that come as floats: rounding them takes registers too."""


@dataclass(frozen=True, order=True, slots=True)
class Form:
    """Of a product: whether its rows come as floats, and whether it is gated."""

    floats: bool = False
    gated: bool = False


PLAIN = Form()

TUNED: dict[tuple[str, int, int, int, Form], Config] = {}
"""(type, weight rows, columns, bucket, form) -> what is taken instead."""


@dataclass(frozen=True, slots=True)
class Chip:
    """What launches depend on: bytes of shared memory that a program can have, the table of configurations and its exceptions for
    floats, and whether programs can share a task and leave it to the last of them (last_program.py: not on AMD)."""

    shared: int
    configs: dict[int, Config]
    floats: dict[int, Config] = field(default_factory=dict)
    side_by_side: bool = True


CHIPS = {
    "sm_80": Chip(163 << 10, SMALL_CONFIGS, SMALL_FLOATS),
    "sm_90": Chip(227 << 10, CONFIGS),
    "gfx942": Chip(64 << 10, SMALL_CONFIGS, SMALL_FLOATS, side_by_side=False),
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
    amd = torch.version.hip is not None
    shared = getattr(properties, "shared_memory_per_block_optin", 1 << 16)
    if amd or properties.major < 9:
        return Chip(shared, SMALL_CONFIGS, SMALL_FLOATS, side_by_side=not amd)
    return Chip(shared, CONFIGS)


def bucket(rows: int) -> int:
    """The one of CONFIGS for this number of rows."""
    return next((most for most in CONFIGS if rows <= most), max(CONFIGS))


def usual_config(size: int, form: Form) -> Config:
    """What the chip's table says for a bucket."""
    table = chip()
    found = table.floats.get(size, table.configs[size]) if form.floats else table.configs[size]
    return replace(found, block_m=GATED_TILE) if form.gated else found


def config(part: PackedPart, rows: int, form: Form = PLAIN) -> Config:
    """How a part is multiplied by this number of rows: what the tables say, with no more stages than shared memory allows."""
    size = bucket(rows)
    shape = TUNED.get((part.layout.name, part.rows, part.columns, size, form), usual_config(size, form))
    if form.gated and _fills_registers(part, size):
        shape = replace(shape, block_n=min(shape.block_n, 32))
    while shape.stages > 1 and shared_bytes(part.layout, shape, form) > chip().shared:
        shape = replace(shape, stages=shape.stages - 1)
    return shape


def _fills_registers(part: PackedPart, size: int) -> bool:
    """Whether two sums of 64 tokens are too many: beside floats on their way to float16, or, without wgmma, beside pieces' sums."""
    cut = size <= FEW and pieces(part)[0] > 1 and chip().configs is SMALL_CONFIGS
    return part.layout.value_bytes == 4 or cut


def shared_bytes(layout: Layout, shape: Config, form: Form = PLAIN) -> int:
    """Shared memory of a program, more than one stage: activations of each, weights of all but one, a tile of float16 weights, and of
    activations that come as floats."""
    activations, weights = (4 if form.floats else 2) * BLOCK_K * shape.block_n, layout.row_bytes * shape.block_m
    rounded = 64 * (shape.block_m + (shape.block_n if form.floats else 0))
    return shape.stages * activations + (shape.stages - 1) * weights + rounded


def pieces(part: PackedPart) -> tuple[int, int]:
    """How many pieces K is cut into, and the blocks of each but the last: a function of the part's type, rows and columns alone."""
    wanted = min(_MOST_PIECES, -(-_PROGRAMS * 64 // part.padded_rows), max(1, part.blocks // 2))
    each = -(-part.blocks // wanted)
    return -(-part.blocks // each), each


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where programs that share a tile leave their sums, float32 [pieces, rows, N], and int32 counters, one of each tile: how many of
    them are done. Those are zero whenever no product runs. One scratch serves all products of a stream."""

    sums: Tensor
    counters: Tensor


def scratch_for(matrices: Iterable[PackedMatrix], max_rows: int) -> Scratch:
    """What products of these matrices with up to so many rows need."""
    rows, sums, counters = min(max_rows, FEW), 0, 0
    for part in (part for matrix in matrices for part in matrix.parts if pieces(part)[0] > 1):
        sums = max(sums, pieces(part)[0] * rows * part.rows)
        counters = max(counters, triton.cdiv(part.rows, 64) * triton.cdiv(rows, _NARROWEST))
    where = device()
    return Scratch(torch.empty(sums, device=where), torch.zeros(counters, dtype=torch.int32, device=where))


@dataclass(frozen=True, slots=True)
class Source:
    """Rows x of a product: ``half`` float16 [max_rows, columns] times ``scale`` float32 [max_rows] of each row.

    With ``floats`` those are only room for them. x is ``floats`` float32 [max_rows, columns], and the maximum over the parts of
    ``largest`` float32 [parts, max_rows] the largest magnitude of each row. Few rows are rounded as they are read, by every program
    anew; more go to ``half`` and ``scale`` before."""

    half: Tensor
    scale: Tensor
    floats: Tensor | None = None
    largest: Tensor | None = None

    def prepared(self, rows: int) -> Source:
        """What is read of so many rows."""
        if self.floats is None or rows <= FEW:
            return self
        elementwise.to_half(self.floats, (self.half, self.scale), rows)
        return Source(self.half, self.scale)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the kernel takes: x and its row stride, scale, largest and its stride."""
        if self.floats is None or self.largest is None:
            return self.half, self.half.stride(0), self.scale, None, 0
        return self.floats, self.floats.stride(0), None, self.largest, self.largest.stride(0)

    @property
    def parts(self) -> int:
        """Of ``largest``."""
        return 0 if self.largest is None else len(self.largest)


def can_gate(matrix: PackedMatrix) -> bool:
    """Whether ``linear_gated`` takes it: gate and up of one type, each a multiple of 64 rows."""
    return len(matrix.parts) == 1 and matrix.rows % (2 * GATED_TILE) == 0


def gated_parts(matrix: PackedMatrix) -> int:
    """Of how many parts of each row ``linear_gated`` can leave the largest magnitudes."""
    return matrix.rows // (2 * GATED_TILE)


def linear(
    source: Source,
    matrix: PackedMatrix,
    out: Tensor,
    rows: int,
    *,
    scratch: Scratch | None = None,
    add: bool = False,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """out[:rows, :matrix.rows] = x @ matrix.T * factor + bias, or with ``add`` that added to it.

    ``out`` float32, its columns side by side; ``factor`` and ``bias`` float32 [matrix.rows]; ``scratch`` of ``scratch_for``, which is
    only missing where no K is cut.
    """
    source = source.prepared(rows)
    for part in matrix.parts:
        columns = slice(part.first_row, part.first_row + part.rows)
        epilogue = _Epilogue(
            None if factor is None else factor[columns],
            None if bias is None else bias[columns],
            add,
        )
        _multiply(_Product(source, part, out[:, columns], rows, scratch), epilogue)


def linear_gated(
    source: Source,
    matrix: PackedMatrix,
    out: Tensor,
    rows: int,
    activation: Activation,
    *,
    scratch: Scratch | None = None,
    largest: Tensor | None = None,
) -> None:
    """out[:rows] = activation(x @ gate.T) * (x @ up.T) of a matrix [2 n_ff, columns] (``can_gate``), gate first: float32 [rows, n_ff].
    ``largest`` float32 [``gated_parts``, max_rows] gets the largest magnitude of every 64 columns of a row. The rest as ``linear``."""
    product = _Product(source.prepared(rows), matrix.parts[0], out, rows, scratch)
    _multiply(product, _Epilogue(activation=activation, largest=largest))


@dataclass(frozen=True, slots=True)
class _Product:
    source: Source
    part: PackedPart
    out: Tensor
    rows: int
    scratch: Scratch | None


@dataclass(frozen=True, slots=True)
class _Epilogue:
    factor: Tensor | None = None
    bias: Tensor | None = None
    add: bool = False
    activation: Activation | Literal[""] = ""
    largest: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the kernel takes: factor, bias, largest and its stride."""
        stride = 0 if self.largest is None else self.largest.stride(0)
        return self.factor, self.bias, self.largest, stride


def _multiply(product: _Product, epilogue: _Epilogue) -> None:
    """One part of a matrix."""
    part, rows = product.part, product.rows
    form = Form(product.source.floats is not None, epilogue.activation != "")
    shape, (count, each) = config(part, rows, form), pieces(part)
    width = part.rows // 2 if form.gated else part.rows
    tiles = triton.cdiv(width, shape.block_m), triton.cdiv(rows, shape.block_n)
    side_by_side = rows <= FEW and count > 1 and chip().side_by_side
    launch(
        _product,
        (*tiles, count if side_by_side else 1),
        *(*product.source.arguments, part.columns, part.data, part.padded_rows, part.blocks, each),
        *(*_scratch_of(product, tiles[0] * tiles[1], side_by_side), product.out, product.out.stride(0), rows, width),
        *epilogue.arguments,
        PARTS=product.source.parts,
        PIECES=count,
        ADD=epilogue.add,
        ACTIVATION=epilogue.activation,
        BLOCK_M=shape.block_m,
        **tile_constants(part, shape),
        warps=shape.warps,
        stages=shape.stages,
        **(_gated_registers(shape) if form.gated else {}),
    )


def _gated_registers(shape: Config) -> dict[str, int]:
    """Left to itself, ptxas moves some to memory so that more programs fit a processor; but no more tiles of this size fit its shared
    memory. Kernels with one sum spill because of it."""
    return {"maxnreg": 255} if shape.warps == 4 and shape.block_n == 64 else {}


def _scratch_of(product: _Product, tiles: int, side_by_side: bool) -> tuple[Tensor | None, Tensor | None]:
    """Sums and counters of a product whose pieces are the work of programs side by side."""
    if not side_by_side:
        return None, None
    scratch, part = product.scratch, product.part
    assert scratch is not None
    assert scratch.sums.numel() >= pieces(part)[0] * product.rows * part.rows
    assert scratch.counters.numel() >= tiles
    return scratch.sums, scratch.counters


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
def multiply(weights, R, row, x, x_mask, inverse, K, first, last,  # type: ignore[no-untyped-def]
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_K: tl.constexpr, GROUPS: tl.constexpr, FORMAT: tl.constexpr,
             BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    """Sums over blocks ``first`` ... ``last`` - 1 of weight rows ``row`` [BLOCK_M] and of the rows of x at ``x`` (pointers [BLOCK_N]; 0
    where not ``x_mask``), which are float16, or float32 that become so times ``inverse`` [BLOCK_N]: float32 [BLOCK_M, BLOCK_N].
    Of weights divided by the scale of the part."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    factor = tl.load(weights.to(tl.pointer_type(tl.float32)) + 1)
    for block in range(first, last):
        for group in tl.static_range(GROUPS):
            weight = decode(weights, R, block, row, factor, group, FORMAT, BITS, ROW_BYTES).to(tl.float16)
            k = block * 256 + group * 32 + tl.arange(0, 32)
            mask = x_mask[None, :] if WHOLE_K else x_mask[None, :] & (k[:, None] < K)
            value = tl.load(x[None, :] + k[:, None], mask=mask, other=0.0)
            if inverse is not None:
                value = (value * inverse[None, :]).to(tl.float16)
            sums = tl.dot(weight, value, sums)
    return sums


@triton.jit
def add_up(weights, R, row, x, x_mask, inverse, K, blocks, each,  # type: ignore[no-untyped-def]
           PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_K: tl.constexpr, GROUPS: tl.constexpr,
           FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    """``multiply`` over all pieces of K, which are added in their order."""
    if PIECES == 1:
        total = multiply(weights, R, row, x, x_mask, inverse, K, 0, blocks,
                         BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for piece in range(PIECES):
            first = piece * each
            last = tl.minimum(first + each, blocks)
            total += multiply(weights, R, row, x, x_mask, inverse, K, first, last,
                              BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
    return total


@triton.jit(do_not_specialize=["rows"])
def _product(x, x_stride, scale, largest, largest_stride, K, weights, R, blocks, each,  # type: ignore[no-untyped-def]
             sums, counters, out, out_stride, rows, width, factor, bias, out_largest, out_largest_stride,
             PARTS: tl.constexpr, PIECES: tl.constexpr, ADD: tl.constexpr, ACTIVATION: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_K: tl.constexpr, GROUPS: tl.constexpr,
             FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, PDL: tl.constexpr = False):  # fmt: skip
    """A tile of ``out``, whose columns are the first ``width`` rows of the weights; gated, up are those behind them. With ``sums``, one
    piece of its K: the last program to be done makes the tile of all."""
    wait_for_earlier(PDL)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = token < rows
    x += token.to(tl.int64) * x_stride
    inverse = None
    if largest is not None:
        inverse = _half_inverses(largest, largest_stride, token, here, PARTS, BLOCK_N)
    if sums is None:
        first = add_up(weights, R, row, x, here, inverse, K, blocks, each,
                       PIECES, BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
        second = None
        if ACTIVATION != "":
            second = add_up(weights, R, row + width, x, here, inverse, K, blocks, each,
                            PIECES, BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
        _finish(first, second, weights, scale, inverse, row, token, here, out, out_stride, width, factor, bias,
                out_largest, out_largest_stride, ADD, ACTIVATION)  # fmt: skip
    else:
        piece = tl.program_id(2)
        begin = piece * each
        end = tl.minimum(begin + each, blocks)
        N = width if ACTIVATION == "" else 2 * width
        mask = here[None, :] & (row[:, None] < width)
        at = sums + token[None, :] * N + row[:, None]  # below 2^31: where K is cut, N is no more than 2^14
        size = rows.to(tl.int64) * N
        first = multiply(weights, R, row, x, here, inverse, K, begin, end,
                         BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
        tl.store(at + piece * size, first, mask=mask)
        if ACTIVATION != "":
            second = multiply(weights, R, row + width, x, here, inverse, K, begin, end,
                              BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
            tl.store(at + piece * size + width, second, mask=mask)
        if is_last(counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), PIECES):
            first = _total(at, size, mask, PIECES, BLOCK_M, BLOCK_N)
            second = None
            if ACTIVATION != "":
                second = _total(at + width, size, mask, PIECES, BLOCK_M, BLOCK_N)
            _finish(first, second, weights, scale, inverse, row, token, here, out, out_stride, width, factor, bias,
                    out_largest, out_largest_stride, ADD, ACTIVATION)  # fmt: skip


@triton.jit
def _half_inverses(largest, stride, token, here, PARTS: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverses of ``half_scale`` of some rows, from the largest magnitudes of their parts: [BLOCK_N]."""
    TOGETHER: tl.constexpr = 2048 // BLOCK_N  # parts at a time: 16 registers of a thread
    found = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(0, PARTS, TOGETHER, num_stages=1):
        part = first + tl.arange(0, TOGETHER)
        mask = here[None, :] & (part < PARTS)[:, None]
        parts = tl.load(largest + part[:, None] * stride + token[None, :], mask=mask, other=0.0)
        found = tl.maximum(found, tl.max(parts, 0))
    return half_scale(found)[1]


@triton.jit
def _reciprocal(power):  # type: ignore[no-untyped-def]
    """Of a power of two."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _total(at, size, mask, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """What all programs have left, added in the order of the pieces."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_N < 64:  # what is loaded at once has room in registers
        for piece in tl.static_range(PIECES):
            total += tl.load(at + piece * size, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        for piece in tl.range(PIECES, num_stages=1):
            total += tl.load(at + piece * size, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _finish(sums, up, weights, scale, inverse, row, token, here, out, out_stride, width, factor, bias,  # type: ignore[no-untyped-def]
            largest, largest_stride, ADD: tl.constexpr, ACTIVATION: tl.constexpr):  # fmt: skip
    """Sums to a tile of ``out``: scaled, gated, times ``factor``, plus ``bias`` and what is there; and its largest magnitudes."""
    if inverse is None:
        scales = tl.load(scale + token, mask=here, other=1.0)[None, :]
    else:
        scales = _reciprocal(inverse)[None, :]
    y = scaled(sums, weights, scales)
    if ACTIVATION != "":
        y = activate(y, ACTIVATION) * scaled(up, weights, scales)
    column = row[:, None]
    if factor is not None:
        y *= tl.load(factor + column, mask=column < width, other=0.0)
    if bias is not None:
        y += tl.load(bias + column, mask=column < width, other=0.0)
    at, mask = out + token.to(tl.int64)[None, :] * out_stride + column, here[None, :] & (column < width)
    if ADD:
        y += tl.load(at, mask=mask, other=0.0)
    tl.store(at, y, mask=mask)
    if largest is not None:  # of a tile that is all within the width
        tl.store(largest + tl.program_id(0) * largest_stride + token, tl.max(tl.abs(y), 0), mask=here)


@triton.jit
def scaled(sums, weights, scales):  # type: ignore[no-untyped-def]
    """Sums times the scale of the weights and those of the activations: powers of two."""
    return sums * tl.load(weights.to(tl.pointer_type(tl.float32))) * scales
