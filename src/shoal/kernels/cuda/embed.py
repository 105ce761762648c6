"""Rows of a packed table, dequantised: what tokens and positions begin with."""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.errors import UnsupportedError
from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.launch import INTERPRETED, Tensor, launch
from shoal.kernels.cuda.pack import BLOCK, GROUP, PackedMatrix
from shoal.kernels.cuda.unpack import decode

_BLOCK = tl.constexpr(BLOCK)
_GROUP = tl.constexpr(GROUP)
_ROWS = 64 if INTERPRETED else 4  # of a program: one for each warp


def embed(table: PackedMatrix, ids: Tensor, out: Tensor, rows: int) -> None:
    """out[r] = row ``ids[r]`` of the table, exactly: int32 [at least rows] -> float32 [.., columns]. Ids must be rows of the table."""
    if len(table.parts) != 1:
        raise UnsupportedError("an embedding of more than one tensor type")
    part = table.parts[0]
    args = (part.data, part.padded_rows, ids, out, out.stride(0), rows)
    grid = (triton.cdiv(rows, _ROWS), part.blocks)
    launch(_embed, grid, *args, COLUMNS=part.columns, ROWS=_ROWS, **part.layout.constants)


@triton.jit(do_not_specialize=["rows"])
def _embed(  # type: ignore[no-untyped-def]
    weights,
    padded_rows,
    ids,
    out,
    out_stride,
    rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A block of columns of some rows."""
    wait_for_earlier(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    chosen = tl.load(ids + row, mask=row < rows, other=0)
    out += row.to(tl.int64)[:, None] * out_stride
    for group in tl.static_range(8):
        value = decode(weights, padded_rows, block, chosen, 1.0, group, FORMAT, BITS, ROW_BYTES)
        column = block * _BLOCK + group * _GROUP + tl.arange(0, _GROUP)[None, :]
        tl.store(out + column, value, mask=(row[:, None] < rows) & (column < COLUMNS))
