"""What a program does with the paged cache: K and V stored with rotary positions, and attention over them.

Here the arguments of the kernels in rotary.py and attention.py are put together. Tasks of attention are planned once a step for
all layers of the same heads and window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.base import PAGE_SIZE, AttentionShape, Rope, StepLimits
from shoal.kernels.cpu import attention, rotary
from shoal.kernels.cpu.jit import Lazy

# Room for records beyond one sequence of greatest length: tasks of one piece are of use until every thread has many.
_SLOTS_PER_THREAD = 64
_TASKS_PER_THREAD = 8  # where single rows see much

Operation = tuple[Lazy, NDArray[np.int64], int]  # kernel, arguments, address of the number of chunks
_Fields = Mapping[int, int]  # arguments by their offset


@dataclass(frozen=True, slots=True)
class PagedCache:
    """K and V pages of all layers (layout: attention.py), ``page_bytes`` each; for each layer its KV group, and where its pages
    begin."""

    k: NDArray[np.uint8]
    v: NDArray[np.uint8]
    dtype: str
    group: dict[int, int]
    start: dict[int, int]
    page_bytes: int

    def copy(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """In all layers of a group, copy for each pair the first page onto the second."""
        size = self.page_bytes
        for start in (self.start[layer] for layer, index in self.group.items() if index == group):
            for pages in (self.k, self.v):
                for source, target in pairs:
                    pages[start + target * size :][:size] = pages[start + source * size :][:size]


class Rows(Protocol):
    """float32 rows in memory."""

    address: int
    stride: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the tasks of some layers are listed."""

    fields: _Fields
    task_count: int
    merge_count: int


class PagedOps:
    """The operations of one program. ``step`` is the address of the step header. What it returns lives as long as it does."""

    def __init__(self, cache: PagedCache, step: int, limits: StepLimits, threads: int) -> None:
        self._cache, self._step, self._limits, self._threads = cache, step, limits, threads
        self._storage = attention.STORAGE[cache.dtype]
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._tables: dict[int, tuple[Rope, _Fields]] = {}
        self._kept: list[NDArray[np.generic]] = []

    def rope_store(
        self, qkv: Rows, layer: int, shape: AttentionShape, rope: Rope | None
    ) -> tuple[Lazy, NDArray[np.int64]]:
        """Kernel and arguments that turn q and k in place, scale q, and store k and v: to be run for each row."""
        fields = {} if rope is None else self._table(rope)
        return rotary.ROPE_STORE[self._cache.dtype], self._arguments(self._layer(qkv, layer, shape), fields)

    def attention(self, q: Rows, out: Rows, layer: int, shape: AttentionShape) -> list[Operation]:
        """Attention of q into ``out``; before it the plan, if this is the first layer of its kind."""
        ops: list[Operation] = []
        key = (shape.heads, shape.kv_heads, shape.head_dim, shape.window)
        if key not in self._plans:
            self._plans[key] = self._plan(shape)
            args = self._arguments(self._heads(shape), self._plans[key].fields)
            ops.append((attention.plan, args, self._keep(np.ones(1, np.int64))))
        plan = self._plans[key]
        place = {attention.OUT: out.address, attention.OUT_STRIDE: out.stride}
        args = self._arguments(
            self._layer(q, layer, shape), place, plan.fields, self._kernels(shape), self._bent(shape)
        )
        return [*ops, (attention.attention, args, plan.task_count), (attention.merge, args, plan.merge_count)]

    def _heads(self, shape: AttentionShape) -> _Fields:
        return {
            attention.STEP: self._step,
            attention.HEADS: shape.heads,
            attention.KV_HEADS: shape.kv_heads,
            attention.HEAD_DIM: shape.head_dim,
            attention.CAUSAL: int(shape.causal),
            attention.WINDOW: shape.window or attention.UNBOUNDED,
        }

    def _layer(self, qkv: Rows, layer: int, shape: AttentionShape) -> _Fields:
        k, v = (pages.ctypes.data + self._cache.start[layer] for pages in (self._cache.k, self._cache.v))
        return {
            **self._heads(shape),
            attention.QKV: qkv.address,
            attention.QKV_STRIDE: qkv.stride,
            attention.SCALE: self._keep(np.array([shape.scale], np.float32)),
            attention.KV_GROUP: self._cache.group[layer],
            attention.K: k,
            attention.V: v,
            attention.UNIT_BYTES: self._storage.unit_bytes(shape.head_dim),
            attention.DATA: self._storage.data(shape.head_dim),
            attention.VALUE_BYTES: self._storage.value_bytes,
        }

    def _kernels(self, shape: AttentionShape) -> _Fields:
        kind, tile = self._storage.kind, attention.row_tile(shape.heads // shape.kv_heads)
        return {
            attention.ROW_TILE: tile,
            attention.ROW_SCORE: attention.score(kind, tile).address,
            attention.ROW_WEIGH: attention.weigh(kind, tile).address,
            attention.BLOCK_SCORE: attention.score(kind, attention.MAX_TILE).address,
            attention.BLOCK_WEIGH: attention.weigh(kind, attention.MAX_TILE).address,
        }

    def _bent(self, shape: AttentionShape) -> _Fields:
        """Which scores are more than products, and what they are then."""
        slopes = np.array(shape.slopes or (0.0,) * shape.heads, np.float32)
        everywhere = shape.soft_cap > 0 or shape.slopes is not None
        assert shape.causal or not (shape.window or shape.soft_cap), "encoders have neither"
        bend = attention.bend if shape.causal else attention.bend_around
        return {
            attention.PLAIN: 0 if everywhere else shape.window or attention.UNBOUNDED,
            attention.CAP: self._keep(np.array([shape.soft_cap], np.float32)),
            attention.SLOPES: self._keep(slopes),
            attention.BEND: bend.address if everywhere or shape.window else 0,
        }

    def _plan(self, shape: AttentionShape) -> _Plan:
        group, limits = shape.heads // shape.kv_heads, self._limits
        record_bytes = attention.record_bytes(shape.head_dim)
        pieces = -(-limits.max_pages_per_seq * PAGE_SIZE // attention.PIECE)
        slots = shape.kv_heads * pieces + _SLOTS_PER_THREAD * self._threads
        tile = attention.row_tile(group)
        slot_bytes = -(-group // tile) * tile * record_bytes
        few = attention.few_rows(group, shape.causal)
        per_block = max(shape.heads, few * shape.kv_heads)  # of neighbouring rows, or of single ones
        tasks = per_block * (limits.max_rows // attention.QUERY_BLOCK + limits.max_seqs) + slots
        task_count, merge_count = (self._keep(np.zeros(1, np.int64)) for _ in range(2))
        fields = {
            attention.TASKS: self._keep(np.zeros(tasks * attention.TASK_BYTES, np.uint8)),
            attention.TASK_COUNT: task_count,
            attention.MERGES: self._keep(np.zeros(slots * attention.MERGE_BYTES, np.uint8)),
            attention.MERGE_COUNT: merge_count,
            attention.RECORD_BYTES: record_bytes,
            attention.FEW: few,
            attention.TASKS_WANTED: _TASKS_PER_THREAD * self._threads,
            attention.SLOTS: slots,
            attention.SLOT_START: self._keep(np.zeros(slots * slot_bytes, np.uint8)),
            attention.SLOT_BYTES: slot_bytes,
        }
        return _Plan(fields, task_count, merge_count)

    def _table(self, rope: Rope) -> _Fields:
        """cos and sin of every position (layout: rotary.py), made once."""
        if id(rope) not in self._tables:
            angle = np.arange(self._limits.max_pages_per_seq * PAGE_SIZE)[:, None] * rope.inv_freq.astype(np.float64)
            cos = (np.cos(angle) * rope.scale).astype(np.float32)
            sin = (np.sin(angle) * rope.scale).astype(np.float32)
            if not rope.neox:
                cos = np.repeat(cos, 2, axis=1)
                sin = np.stack([-sin, sin], axis=2).reshape(len(sin), -1)
            fields = {
                attention.COS: self._keep(cos),
                attention.SIN: self._keep(sin),
                attention.TABLE_WIDTH: cos.shape[1],
                attention.PAIRS: len(rope.inv_freq),
                attention.NEOX: int(rope.neox),
            }
            self._tables[id(rope)] = rope, fields  # kept, or another could get its id
        return self._tables[id(rope)][1]

    def _arguments(self, *parts: _Fields) -> NDArray[np.int64]:
        args = np.zeros(attention.ATTENTION_FIELDS, np.int64)
        for fields in parts:
            for offset, value in fields.items():
                args[offset // 8] = value
        self._kept.append(args)
        return args

    def _keep(self, array: NDArray[np.generic]) -> int:
        self._kept.append(array)
        return array.ctypes.data
