"""Many small products in one launch: those of latent attention, which has one for each head.

    out_i[:, :n] = x_i [.., k] @ matrix_i [n, k].T          for all i of a group; n, k and the type are the same

``x`` is rounded to float16 within the kernel, each row of each product by itself: by a power of two above its largest magnitude
(``reference.linear_half``). A sum goes through k in order, 32 columns at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from shoal.kernels.cuda.activation import half_scale
from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.launch import Tensor, device, launch
from shoal.kernels.cuda.pack import GROUP, PackedMatrix, PackedPart
from shoal.kernels.cuda.unpack import decode

_GROUP = tl.constexpr(GROUP)
_TILE = 64  # rows of a matrix that a program multiplies
_FIELDS = tl.constexpr(5)  # of a product in the table


@dataclass(slots=True)
class Group:
    """Products that are computed at once: none reads from an array that another writes to. They may write to one, side by side."""

    _products: list[tuple[Tensor, PackedPart, Tensor]] = field(default_factory=list)
    _table: Tensor | None = None

    def add(self, x: Tensor, matrix: PackedMatrix, out: Tensor) -> bool:
        """One product more: x, out float32 [.., k], [.., n]. False, and nothing is added, where it does not belong to the others."""
        if len(matrix.parts) != 1 or (self._products and not self._fits(x, matrix.parts[0], out)):
            return False
        self._products.append((x, matrix.parts[0], out))
        self._table = None
        return True

    def _fits(self, x: Tensor, part: PackedPart, out: Tensor) -> bool:
        first, outs = self._products[0][1], [out for _, _, out in self._products]
        same = (part.layout, part.rows, part.columns) == (first.layout, first.rows, first.columns)
        read = {_memory(x), *(_memory(x) for x, _, _ in self._products)}
        twice = out.data_ptr() in [other.data_ptr() for other in outs]
        return same and not twice and not read & {_memory(out), *map(_memory, outs)}

    def table(self) -> Tensor:
        """int64 [products, 5]: addresses of x, weights and out, row strides of x and out."""
        if self._table is None:
            lines = [
                (x.data_ptr(), part.data.data_ptr(), out.data_ptr(), x.stride(0), out.stride(0))
                for x, part, out in self._products
            ]
            self._table = torch.tensor(lines, dtype=torch.int64, device=device())
        return self._table

    def __len__(self) -> int:
        return len(self._products)

    @property
    def part(self) -> PackedPart:
        """The weights of the first product: in sizes and type those of all."""
        return self._products[0][1]


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage().data_ptr())


def products(group: Group, rows: int) -> None:
    """All products of a group."""
    part, tokens = group.part, _tokens(rows)
    grid = (triton.cdiv(rows, tokens), triton.cdiv(part.rows, _TILE), len(group))
    sizes = {"N": part.rows, "K": part.columns, "R": part.padded_rows, "TILE": _TILE, "TOKENS": tokens}
    launch(_products, grid, group.table(), rows, **sizes, **part.layout.constants, stages=1)


def _tokens(rows: int) -> int:
    """Rows of x that a program multiplies: makes no difference to their sums."""
    return 16 if rows <= 16 else 32


@triton.jit(do_not_specialize=["rows"])
def _products(  # type: ignore[no-untyped-def]
    table,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_earlier(PDL)
    table += tl.program_id(2) * _FIELDS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    x = tl.load(table).to(tl.pointer_type(tl.float32)) + token.to(tl.int64)[None, :] * tl.load(table + 3)
    weights = tl.multiple_of(tl.load(table + 1).to(tl.pointer_type(tl.uint8)), 16)
    out = tl.load(table + 2).to(tl.pointer_type(tl.float32)) + token.to(tl.int64)[None, :] * tl.load(table + 4)

    largest = tl.zeros([TOKENS], tl.float32)
    for first in range(0, K, _GROUP):
        largest = tl.maximum(largest, tl.max(tl.abs(_columns(x, token, rows, first, K)), 0))
    power, inverse = half_scale(largest)

    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    header = weights.to(tl.pointer_type(tl.float32))
    factor = tl.load(header + 1)
    sums = tl.zeros([TILE, TOKENS], tl.float32)
    for block in range((K + 255) // 256):
        for group in tl.static_range(8):
            if group * 32 < K:  # of a single block, not all groups need be there
                weight = decode(weights, R, block, row, factor, group, FORMAT, BITS, ROW_BYTES)
                values = _columns(x, token, rows, block * 256 + group * 32, K) * inverse[None, :]
                sums = tl.dot(weight.to(tl.float16), values.to(tl.float16), sums)
    sums = sums * tl.load(header) * power[None, :]
    tl.store(out + row[:, None], sums, mask=(row[:, None] < N) & (token[None, :] < rows))


@triton.jit
def _columns(x, token, rows, first, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns ``first`` ... of rows of x [1, tokens]: [32, tokens]."""
    column = first + tl.arange(0, _GROUP)[:, None]
    return tl.load(x + column, mask=(column < K) & (token[None, :] < rows), other=0.0)
