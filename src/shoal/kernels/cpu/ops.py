"""What the network calls when it is bound: each operation allocates workspace and appends to a program instead of computing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UnsupportedError
from shoal.kernels.base import LOGIT_ROWS, Activation, AttentionShape, Experts, Heads, Linear, Norm, Rope, StepLimits
from shoal.kernels.cpu import attention, elementwise, embed, groups, linear
from shoal.kernels.cpu.experts import Choices, record_experts
from shoal.kernels.cpu.pack import GROUP, PackedMatrix
from shoal.kernels.cpu.paged import PagedCache, PagedOps
from shoal.kernels.cpu.recording import Recording, Rows, address_of


class CPUOps(Recording):
    """``shoal.kernels.base.Ops`` (whose docstrings say what each does) as operations of a program. ``space`` is the address of the row
    space that its rows come from, ``step`` the step header."""

    def __init__(
        self, threads: int, cache: PagedCache, step: NDArray[np.int64], space: int, limits: StepLimits
    ) -> None:
        super().__init__(threads, space, limits.max_rows)
        self.paged = PagedOps(cache, address_of(step), limits, threads)
        self._step = address_of(step)
        self.inbox: Rows | None = None
        self._choices: dict[tuple[int, int], Choices] = {}

    def embed(self, table: PackedMatrix) -> Rows:
        return self._table_rows(table, attention.TOKENS)

    def positions(self, table: PackedMatrix) -> Rows:
        return self._table_rows(table, attention.POSITIONS)

    def received(self, width: int) -> Rows:
        self.inbox = self.new_rows(width)  # kept: nothing else is ever written there
        return self.inbox

    def norm(self, x: Rows, norm: Norm) -> Rows:
        out = self.new_rows(x.width)
        args = self._norm_args(x, out, norm)
        args[elementwise.INDEX // 8] = x.index
        return self.produce(out, elementwise.layer_norm if norm.centred else elementwise.rms_norm, args)

    def norm_heads(self, x: Rows, heads: Heads, norm: Norm) -> None:
        part = self.columns(x, heads.first, heads.width)
        args = self._norm_args(part, part, norm)
        args[elementwise.HEADS // 8] = heads.count
        self.each_row(elementwise.layer_norm_heads if norm.centred else elementwise.rms_norm_heads, args)
        x.changed()

    def linear_add(self, residual: Rows, x: Rows, linear: Linear) -> None:
        if linear.scale is not None:
            self.add(residual, self.linear(x, linear))
            return
        self.multiply_into(residual, x, linear.matrix, add=True)
        residual.changed()
        if linear.bias is not None:
            self.change(elementwise.add_bias, residual, columns=linear.bias)

    def add(self, residual: Rows, x: Rows) -> None:
        self.change(elementwise.add_rows, residual, other=x)

    def add_vector(self, x: Rows, vector: NDArray[np.float32]) -> None:
        self.change(elementwise.add_bias, x, columns=vector)

    def multiply(self, x: Rows, factor: float) -> None:
        self.change(elementwise.multiply, x, constant=factor)

    def soft_cap(self, x: Rows, cap: float) -> None:
        self.change(elementwise.soft_cap, x, constant=cap)

    def clamp(self, x: Rows, limit: float) -> None:
        self.change(elementwise.clamp, x, constant=limit)

    def activate(self, x: Rows, activation: Activation) -> Rows:
        out = self.new_rows(x.width)
        return self.produce(out, elementwise.ACTIVATE[activation], self.row_args(x, out))

    def gate_rows(self, x: Rows, h: Rows, gate: Linear) -> None:
        self.each_row(elementwise.gate_rows, self.row_args(self.linear(h, gate), x))
        x.changed()

    def experts(self, residual: Rows, x: Rows, experts: Experts) -> None:
        record_experts(self, self._choices, residual, x, experts)

    def concat(self, parts: Sequence[Rows]) -> Rows:
        out, first = self.new_rows(sum(part.width for part in parts)), 0
        for part in parts:
            self.each_row(elementwise.copy, self.row_args(part, self.columns(out, first, part.width)))
            first += part.width
        return out

    def rope_store(self, qkv: Rows, layer: int, shape: AttentionShape, rope: Rope | None) -> Rows:
        self.each_row(*self.paged.rope_store(qkv, layer, shape, rope))
        return qkv

    def attention(self, q: Rows, layer: int, shape: AttentionShape) -> Rows:
        out = self.new_rows(shape.heads * shape.head_dim)
        self.ops += self.paged.attention(q, out, layer, shape)
        return out

    def logit_rows(self, x: Rows) -> Rows:
        self.logit_index = np.zeros(LOGIT_ROWS, np.int32)
        pointer = np.array([self.kept(self.logit_index)], np.int64)
        return Rows(x.buffer, x.address, x.stride, x.width, index=self.kept(pointer))

    def _table_rows(self, table: PackedMatrix, numbers: int) -> Rows:
        """The rows of ``table`` that the step's array of this field names."""
        if len(table.parts) != 1:
            raise UnsupportedError("an embedding of more than one tensor type")
        part = table.parts[0]
        x = self.new_rows(table.columns)
        args = self.fields(embed.EMBED_FIELDS)
        args[:6] = self.row_args(x, x)[:6]
        shift = None if part.layout.is_float else groups.GROUPS[part.layout.name].shift
        kind = embed.FLOATS if part.layout.is_float else embed.AFFINE if shift is None else embed.CENTRED
        for field, value in (
            (embed.DECODE, linear.DECODE[part.layout.name].address),
            (embed.STRIPS, address_of(part.data)),
            (embed.STRIP_BYTES, part.data.shape[1]),
            (embed.COLUMNS_PER_BLOCK, GROUP * part.layout.groups_per_block),
            (embed.SCALE, address_of(part.scale)),
            (embed.OFFSET, 1 << (shift or 0)),
            (embed.KIND, kind),
            (embed.TOKENS, self._step + numbers),
        ):
            args[field // 8] = value
        self.each_row(embed.embed, args)
        return x

    def _norm_args(self, x: Rows, out: Rows, norm: Norm) -> NDArray[np.int64]:
        args = self.row_args(x, out)
        args[elementwise.EXTRA // 8] = self.kept(norm.weight)
        args[elementwise.EPS // 8] = self.kept(np.array([norm.eps], np.float32))
        args[elementwise.BIAS // 8] = 0 if norm.bias is None else self.kept(norm.bias)
        return args
