"""Mixtures of experts: each row chooses some experts, and each chosen expert's weights are read once for a tile of rows that chose it.

A *slot* is one choice of one row: slot row * used + place. A step goes through

    order     slots sorted by expert, and by slot within an expert; where each expert's begin
    products  gate and up of the slots' rows; a tile of a program has slots of one expert
    gate      activation(gate) * up of each slot, rounded to float16
    products  down
    combine   each row's slots, weighted, in the order of choice

Only the order of slots depends on who else is in the step, and no number depends on that order. Nothing waits for the host: grids are
as large as any choice needs, and programs without slots end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from shoal.kernels.base import Experts
from shoal.kernels.cuda.activation import activate, half_scale
from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.launch import Tensor, device, launch
from shoal.kernels.cuda.linear import add_up, config, pieces, scaled, tile_constants
from shoal.kernels.cuda.pack import PackedMatrix
from shoal.kernels.cuda.rows import row_tiles, rows_of_program

_CHUNK = 1024  # slots that are sorted at a time, and values of a row that are gated or combined at a time


@dataclass(frozen=True, slots=True)
class ExpertsSpace:
    """What steps of at most ``max_rows`` rows compute with. One serves all layers whose experts have these sizes."""

    slots: Tensor  # int32 [slots]: slots sorted by expert
    owners: Tensor  # int32 [slots]: their experts
    starts: Tensor  # int32 [experts + 1]: where each expert's begin
    gate_up: Tensor  # float32 [slots, 2 n_ff]
    half: Tensor  # float16 [slots, n_ff]
    scale: Tensor  # float32 [slots]
    down: Tensor  # float32 [slots, n_embd]


@dataclass(frozen=True, slots=True)
class ExpertTables:
    """The experts of a layer, and for each part of their matrices a table: int64 [experts], addresses of packed data."""

    experts: Experts
    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


def expert_tables(experts: Experts) -> ExpertTables:
    """Made once for a layer. Experts' matrices have the same sizes and types."""
    return ExpertTables(experts, _tables(experts.gate_up), _tables(experts.down))


def experts_space(max_rows: int, experts: Experts) -> ExpertsSpace:
    """Memory for ``experts``."""
    slots, n_ff, n_embd = max_rows * experts.routing.used, experts.down[0].columns, experts.down[0].rows

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device())

    return ExpertsSpace(
        slots=empty(slots, dtype=torch.int32),
        owners=empty(slots, dtype=torch.int32),
        starts=empty(len(experts.down) + 1, dtype=torch.int32),
        gate_up=empty(slots, 2 * n_ff, dtype=torch.float32),
        half=empty(slots, n_ff, dtype=torch.float16),
        scale=empty(slots, dtype=torch.float32),
        down=empty(slots, n_embd, dtype=torch.float32),
    )


def experts(
    residual: Tensor,
    half: Tensor,
    scale: Tensor,
    chosen: Tensor,
    weights: Tensor,
    tables: ExpertTables,
    rows: int,
    space: ExpertsSpace,
) -> None:
    """residual[:rows] += sum of weight * expert(x) over each row's choices, in their order.

    x is ``half`` float16 [max_rows, n_embd] times ``scale`` float32 [max_rows]; ``chosen`` int32 and ``weights`` float32, both
    [max_rows, used] without gaps, the experts of a row different ones; ``residual`` float32, its columns side by side.
    """
    layer = tables.experts
    used, count = chosen.shape[1], len(layer.down)
    slots = rows * used
    launch(_order, (count,), chosen, space.slots, space.owners, space.starts, slots, CHUNK=_CHUNK)
    choices = _Choices(space, rows, used, count)
    _products(choices, half, scale, used, layer.gate_up[0], tables.gate_up, space.gate_up)
    n_ff = layer.down[0].columns
    programs, together = row_tiles(slots)
    launch(_gate, (programs,), space.gate_up, space.half, space.scale, n_ff, slots,
           ACTIVATION=layer.activation, CHUNK=_CHUNK, **together)  # fmt: skip
    _products(choices, space.half, space.scale, 1, layer.down[0], tables.down, space.down)
    width = layer.down[0].rows
    programs, together = row_tiles(rows)
    launch(_combine, (programs, triton.cdiv(width, _CHUNK)), space.down, weights, residual, residual.stride(0), width, rows,
           USED=used, CHUNK=_CHUNK, **together)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Choices:
    space: ExpertsSpace
    rows: int
    used: int
    experts: int


def _tables(matrices: Sequence[PackedMatrix]) -> tuple[Tensor, ...]:
    """For each part of the matrices the addresses of its data in all of them."""
    first = matrices[0]
    for matrix in matrices:
        assert [(part.layout, part.rows) for part in matrix.parts] == [(part.layout, part.rows) for part in first.parts]
    return tuple(
        torch.tensor([matrix.parts[i].data.data_ptr() for matrix in matrices], dtype=torch.int64).to(device())
        for i in range(len(first.parts))
    )


def _products(
    choices: _Choices,
    half: Tensor,
    scale: Tensor,
    slots_per_row: int,
    matrix: PackedMatrix,
    tables: Sequence[Tensor],
    out: Tensor,
) -> None:
    """out[slot] = x[slot // slots_per_row] @ the matrix of the slot's expert, transposed."""
    space, slots = choices.space, choices.rows * choices.used
    for part, table in zip(matrix.parts, tables, strict=True):
        shape = config(part, triton.cdiv(slots, choices.experts))  # as if all experts had the same number of slots
        tiles = choices.experts * triton.cdiv(
            choices.rows, shape.block_n
        )  # no expert has more slots than there are rows
        # The fewer programs, as far as tiles are full: with every number of rows in turn both ways would be compiled.
        by_slot = slots * shape.block_n < choices.experts * max(choices.rows, shape.block_n)
        grid = (triton.cdiv(part.rows, shape.block_m), slots if by_slot else tiles)
        count, each = pieces(part)
        view = out[:, part.first_row : part.first_row + part.rows]
        args: tuple[Any, ...] = (
            *(half, half.stride(0), part.columns, table, part.padded_rows, part.blocks, each),
            *(scale, view, view.stride(0), part.rows, space.slots, space.owners, space.starts, choices.experts),
        )
        constants = {"PIECES": count, "BY_SLOT": by_slot, "SLOTS_PER_ROW": slots_per_row, "BLOCK_M": shape.block_m}
        constants |= tile_constants(part, shape)
        registers = {"maxnreg": 255} if shape.warps == 4 else {}  # as in attention; large tiles spill because of it
        launch(_multiply, grid, *args, warps=shape.warps, stages=shape.stages, **registers, **constants)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slots"])
def _order(chosen, order, owners, starts, slots, CHUNK: tl.constexpr, PDL: tl.constexpr = False):  # type: ignore[no-untyped-def]
    """The slots of one expert, in their order, behind those of all lower experts."""
    wait_for_earlier(PDL)
    expert = tl.program_id(0)
    lanes = tl.arange(0, CHUNK)
    lower = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, slots, CHUNK):
        choice = tl.load(chosen + first + lanes, mask=first + lanes < slots, other=2147483647)
        lower += (choice < expert).to(tl.int32)
    place = tl.sum(lower, 0)
    tl.store(starts + expert, place)
    for first in range(0, slots, CHUNK):
        choice = tl.load(chosen + first + lanes, mask=first + lanes < slots, other=2147483647)
        mine = choice == expert
        places = place + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + places, first + lanes, mask=mine)
        tl.store(owners + places, expert, mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, place)


@triton.jit(do_not_specialize=["experts"])
def _multiply(half, x_stride, K, table, R, blocks, each, scale, out, out_stride, N,  # type: ignore[no-untyped-def]
              order, owners, starts, experts, PIECES: tl.constexpr, BY_SLOT: tl.constexpr, SLOTS_PER_ROW: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE_K: tl.constexpr, GROUPS: tl.constexpr,
              FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, PDL: tl.constexpr = False):  # fmt: skip
    """Up to BLOCK_N slots of one expert. BY_SLOT: those from place ``program_id(1)`` on, if a tile begins there."""
    wait_for_earlier(PDL)
    if BY_SLOT:
        first = tl.program_id(1)
        expert = tl.load(owners + first)
        last = tl.load(starts + expert + 1)
        wanted = (first - tl.load(starts + expert)) % BLOCK_N == 0
    else:
        expert = tl.program_id(1) % experts
        first = tl.load(starts + expert) + tl.program_id(1) // experts * BLOCK_N
        last = tl.load(starts + expert + 1)
        wanted = first < last
    if wanted:
        place = first + tl.arange(0, BLOCK_N)
        here = place < last
        slot = tl.load(order + place, mask=here, other=0)
        source = slot // SLOTS_PER_ROW
        weights = tl.multiple_of(tl.load(table + expert).to(tl.pointer_type(tl.uint8)), 16)
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        sums = add_up(weights, R, row, half + source.to(tl.int64) * x_stride, here, None, K, blocks,
                      each, PIECES, BLOCK_M, BLOCK_N, WHOLE_K, GROUPS, FORMAT, BITS, ROW_BYTES)  # fmt: skip
        y = scaled(sums, weights, tl.load(scale + source, mask=here, other=1.0)[None, :])
        at = out + slot.to(tl.int64)[None, :] * out_stride + row[:, None]
        tl.store(at, y, mask=here[None, :] & (row[:, None] < N))


@triton.jit(do_not_specialize=["slots"])
def _gate(gate_up, half, scale, width, slots,  # type: ignore[no-untyped-def]
          ACTIVATION: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr = False):  # fmt: skip
    """activation(gate) * up of slots, as float16 and the power of two that each was divided by."""
    wait_for_earlier(PDL)
    slot, there = rows_of_program(slots, ROWS)
    gate = gate_up + slot * 2 * width
    largest = tl.zeros((ROWS, CHUNK), tl.float32)
    for first in range(0, width, CHUNK):
        largest = tl.maximum(largest, tl.abs(_gated(gate, width, first, ACTIVATION, CHUNK)))
    power, inverse = half_scale(tl.max(largest, 1, keep_dims=True))
    tl.store(scale + slot, power, mask=there)
    for first in range(0, width, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        y = _gated(gate, width, first, ACTIVATION, CHUNK) * inverse
        tl.store(half + slot * width + column, y.to(tl.float16), mask=(column < width) & there)


@triton.jit
def _gated(gate, width, first, ACTIVATION: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = first + tl.arange(0, CHUNK)[None, :]
    mask = column < width
    up = tl.load(gate + width + column, mask=mask, other=0.0)
    return activate(tl.load(gate + column, mask=mask, other=0.0), ACTIVATION) * up


@triton.jit(do_not_specialize=["rows"])
def _combine(down, weights, residual, stride, width, rows,  # type: ignore[no-untyped-def]
             USED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr = False):  # fmt: skip
    """Some columns of rows."""
    wait_for_earlier(PDL)
    row, there = rows_of_program(rows, ROWS)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)[None, :]
    mask = column < width
    total = tl.load(residual + row * stride + column, mask=mask, other=0.0)
    for place in tl.static_range(USED):
        slot = row * USED + place
        total += tl.load(weights + slot) * tl.load(down + slot * width + column, mask=mask, other=0.0)
    tl.store(residual + row * stride + column, total, mask=mask & there)
