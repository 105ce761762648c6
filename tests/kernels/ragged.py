"""Ragged attention steps over random q, k and v, and what the NumPy twins make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.kernels import reference
from shoal.kernels.base import PAGE_SIZE, AttentionShape, Rope, StepInput

F32 = NDArray[np.float32]


@dataclass
class Case:
    """Sequences with random q, k, v for each position, and pages dealt out of order."""

    shape: AttentionShape
    rope: Rope | None
    lengths: list[int]
    qkv: list[F32]
    tables: NDArray[np.int32]
    pages: int

    def bent(self, **changes: Any) -> Case:
        """The same with other fields of the shape."""
        return replace(self, shape=replace(self.shape, **changes))

    def step(self, spans: list[tuple[int, int, int]]) -> tuple[StepInput, F32]:
        """The step that computes positions first ... last - 1 of some sequences: (sequence, first, last)."""
        counts = [last - first for _, first, last in spans]
        step = StepInput(
            token_ids=np.zeros(sum(counts), np.int32),
            positions=np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in spans]),
            row_start=np.cumsum([0, *counts]).astype(np.int32),
            kv_len=np.array([last for _, _, last in spans], np.int32),
            page_table=self.tables[None, [s for s, _, _ in spans]],
        )
        return step, np.concatenate([self.qkv[s][a:b] for s, a, b in spans])

    def whole(self) -> tuple[StepInput, F32]:
        """The step that computes all of all sequences."""
        return self.step([(s, 0, n) for s, n in enumerate(self.lengths)])

    def expected(self, s: int, dtype: str, every: int = 1) -> F32:
        """Attention of sequence s from the twins: of each ``every``-th row."""
        shape, n = self.shape, self.lengths[s]
        heads = self.qkv[s].reshape(n, -1, shape.head_dim)
        q, k, v = np.split(heads, [shape.heads, shape.heads + shape.kv_heads], axis=1)
        positions = np.arange(n, dtype=np.int32)
        if self.rope is not None:
            q, k = (reference.rotate(x, positions, self.rope) for x in (q, k))
        k, v = (reference.store_as(x, dtype) for x in (k, v))
        out = reference.attend(q[::every], k, v, positions[::every], shape)
        return out.reshape(len(out), -1)

    def all_expected(self, dtype: str) -> F32:
        """Attention of all sequences from the twins."""
        return np.concatenate([self.expected(s, dtype) for s in range(len(self.lengths))])


def make_case(
    heads: int, kv_heads: int, head_dim: int, lengths: list[int], *, neox: bool = False, rope_dim: int | None = None
) -> Case:
    """Sequences of these lengths; ``rope_dim``: how much of a head turns (all of it)."""
    shape = AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5)
    rng = np.random.default_rng(head_dim + len(lengths))
    pairs = (rope_dim or head_dim) // 2
    rope = Rope((10000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32), neox)
    width = (heads + 2 * kv_heads) * head_dim
    per_sequence = -(-max(lengths) // PAGE_SIZE)
    order = rng.permutation(len(lengths) * per_sequence).astype(np.int32)
    qkv = [rng.standard_normal((n, width)).astype(np.float32) for n in lengths]
    return Case(shape, rope, lengths, qkv, order.reshape(len(lengths), -1), len(order))
