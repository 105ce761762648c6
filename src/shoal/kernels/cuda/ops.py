"""What the network calls when it is bound: each operation takes workspace and appends to a program instead of computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.kernels.base import (
    LOGIT_ROWS,
    PAGE_SIZE,
    Activation,
    AttentionShape,
    Experts,
    Heads,
    Linear,
    Norm,
    Rope,
    StepLimits,
)
from shoal.kernels.cuda import attention, elementwise, embed, rotary
from shoal.kernels.cuda import experts as mixture
from shoal.kernels.cuda.attention import AttentionSpace, attention_space, record_count
from shoal.kernels.cuda.cache import PagedCache
from shoal.kernels.cuda.launch import Tensor, device
from shoal.kernels.cuda.pack import PackedMatrix
from shoal.kernels.cuda.recording import Recording, Rows
from shoal.kernels.cuda.rotary import RopeTable
from shoal.kernels.cuda.routing import choose
from shoal.kernels.cuda.step import StagedStep


class StepMemory:
    """What all programs of a network share: the pages, a step's numbers, the workspace of attention."""

    def __init__(self, cache: PagedCache, limits: StepLimits) -> None:
        self.cache, self.limits = cache, limits
        self.step = StagedStep(limits, cache.scratch_pages)
        self.space: AttentionSpace | None = None
        self._heads = self._head_dim = 0  # the most of any layer

    def expect(self, shape: AttentionShape) -> None:
        """There is a layer of this shape."""
        self._heads, self._head_dim = max(self._heads, shape.heads), max(self._head_dim, shape.head_dim)

    def reserve(self) -> None:
        """Make room for what all layers expect."""
        self.step.records = record_count(self.limits, self._heads, self._head_dim)
        self.space = attention_space(self.step.records, self._heads, self._head_dim)


class CudaOps(Recording):
    """``shoal.kernels.base.Ops`` (whose docstrings say what each does) as calls of a program over the rows of ``step`` or, after the
    layers, over those of its rows that ``index`` says."""

    def __init__(self, memory: StepMemory, max_rows: int) -> None:
        super().__init__(max_rows)
        self._memory, self._step = memory, memory.step.arrays
        self.inbox: Rows | None = None
        self.index = torch.zeros(LOGIT_ROWS, dtype=torch.int32, device=device())
        self._tables: dict[int, tuple[Rope, RopeTable]] = {}
        self._experts_spaces: dict[tuple[int, ...], mixture.ExpertsSpace] = {}

    def embed(self, table: PackedMatrix) -> Rows:
        return self._table_rows(table, self._step.token_ids)

    def positions(self, table: PackedMatrix) -> Rows:
        return self._table_rows(table, self._step.positions)

    def received(self, width: int) -> Rows:
        self.inbox = self.new_rows(width)  # kept: nothing else is ever written there
        return self.inbox

    def norm(self, x: Rows, norm: Norm) -> Rows:
        return self.produce(self.new_rows(x.width), elementwise.norm, x=x.data, norm=norm)

    def norm_heads(self, x: Rows, heads: Heads, norm: Norm) -> None:
        self.change(x, elementwise.norm_heads, heads=heads, norm=norm)

    def linear(self, x: Rows, linear: Linear) -> Rows:
        return self.product(x, linear)

    def linear_add(self, residual: Rows, x: Rows, linear: Linear) -> None:
        self.product_add(residual, x, linear)

    def add(self, residual: Rows, x: Rows) -> None:
        self.change(residual, elementwise.add, y=x.data)

    def add_vector(self, x: Rows, vector: Tensor) -> None:
        self.change(x, elementwise.add_vector, vector=vector)

    def multiply(self, x: Rows, factor: float) -> None:
        self.change(x, elementwise.multiply, factor=factor)

    def soft_cap(self, x: Rows, cap: float) -> None:
        self.change(x, elementwise.soft_cap, cap=cap)

    def clamp(self, x: Rows, limit: float) -> None:
        self.change(x, elementwise.clamp, limit=limit)

    def activate(self, x: Rows, activation: Activation) -> Rows:
        return self.produce(self.new_rows(x.width), elementwise.activate, x=x.data, activation=activation)

    def gate_rows(self, x: Rows, h: Rows, gate: Linear) -> None:
        gates = self.linear(h, gate)
        self.change(x, elementwise.gate_rows, gate=gates.data)

    def experts(self, residual: Rows, x: Rows, experts: Experts) -> None:
        logits, used = self.linear(x, experts.router), experts.routing.used
        chosen, weights = self.new((used,), torch.int32), self.new((used,), torch.float32)
        routing = {"routing": experts.routing, "bias": experts.choice_bias, "chosen": chosen, "weights": weights}
        self.call(choose, logits=logits.data, **routing)
        half, scale = self.half_of(x).tensors
        tables, space = mixture.expert_tables(experts), self._experts_space(experts)
        choices = {"half": half, "scale": scale, "chosen": chosen, "weights": weights, "tables": tables, "space": space}
        self.call(mixture.experts, residual=residual.data, **choices)
        residual.changed()

    def _experts_space(self, experts: Experts) -> mixture.ExpertsSpace:
        """One for all layers of a kind."""
        sizes = experts.routing.used, experts.down[0].columns, experts.down[0].rows, len(experts.down)
        if sizes not in self._experts_spaces:
            self._experts_spaces[sizes] = mixture.experts_space(self.max_rows, experts)
        return self._experts_spaces[sizes]

    def columns(self, x: Rows, first: int, width: int) -> Rows:
        return Rows(x.buffer, x.data[:, first : first + width], part=True)

    def concat(self, parts: Sequence[Rows]) -> Rows:
        out = self.new_rows(sum(part.width for part in parts))
        self.call(elementwise.concat, parts=elementwise.side_by_side([part.data for part in parts]), out=out.data)
        return out

    def rope_store(self, qkv: Rows, layer: int, shape: AttentionShape, rope: Rope | None) -> Rows:
        table = None if rope is None else self._table(rope)
        place = {"cache": self._memory.cache, "layer": layer, "shape": shape, "step": self._step}
        self.call(_rope_store, qkv=qkv.data, table=table, **place)
        qkv.changed()
        return self.columns(qkv, 0, shape.heads * shape.head_dim)

    def attention(self, q: Rows, layer: int, shape: AttentionShape) -> Rows:
        out = self.new_rows(shape.heads * shape.head_dim)
        self._memory.expect(shape)
        parts = attention.largest_parts(shape, self._memory.cache.dtype)
        layers = {"layer": layer, "shape": shape, "memory": self._memory}
        return self.produce_largest(out, parts, _attention, q=q.data, **layers)

    def logit_rows(self, x: Rows) -> Rows:
        out = self.new_rows(x.width)
        self.call(_gather, x=x.data, index=self.index, out=out.data)
        return out

    def _table_rows(self, table: PackedMatrix, ids: Tensor) -> Rows:
        x = self.new_rows(table.columns)
        self.call(embed.embed, table=table, ids=ids, out=x.data)
        return x

    def _table(self, rope: Rope) -> RopeTable:
        if id(rope) not in self._tables:
            positions = self._memory.limits.max_pages_per_seq * PAGE_SIZE
            self._tables[id(rope)] = rope, rotary.rope_table(rope, positions)
        return self._tables[id(rope)][1]  # the rope is kept, or another could get its id


def _gather(x: Tensor, index: Tensor, out: Tensor, rows: int) -> None:
    torch.index_select(x, 0, index[:rows], out=out[:rows])


def _rope_store(rows: int, **arguments: Any) -> None:  # the step's arrays say how many
    rotary.rope_store(**arguments)


def _attention(rows: int, memory: StepMemory, **arguments: Any) -> None:
    assert memory.space is not None, "reserved after all layers are known"
    attention.attention(cache=memory.cache, step=memory.step.arrays, space=memory.space, **arguments)
