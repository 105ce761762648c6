"""Rotary positions, storage and attention on the device's tensors, for steps of tests/kernels/ragged.py."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.kernels import reference
from shoal.kernels.base import KVGroup, StepInput, StepLimits
from shoal.kernels.cuda.attention import attention, attention_space
from shoal.kernels.cuda.cache import kv_cache
from shoal.kernels.cuda.rotary import rope_store, rope_table
from shoal.kernels.cuda.step import StagedStep
from tests.kernels.ragged import Case

F32 = NDArray[np.float32]


class PagedRun:
    """One layer's cache, and the operations on it. The layer is the second of its group, in the second group."""

    layer = 7

    def __init__(self, case: Case, dtype: str, max_rows: int = 256, records: int = 100) -> None:
        self.shape = case.shape
        groups = [KVGroup((0, 1), 2), KVGroup((2, self.layer), case.pages)]
        self.cache = kv_cache(groups, case.shape, dtype)
        pages_per_seq = case.tables.shape[1]
        limits = StepLimits(max_rows, len(case.lengths), pages_per_seq)
        self.staged = StagedStep(limits, self.cache.scratch_pages, records)
        self.space = attention_space(records, case.shape.heads, case.shape.head_dim)
        self.space.sums.fill_(torch.nan)
        self.space.tops.fill_(torch.nan)
        self.table = None if case.rope is None else rope_table(case.rope, 16 * pages_per_seq)

    def store(self, step: StepInput, qkv: F32, bucket: int | None = None) -> torch.Tensor:
        """The step's qkv with q turned; k and v stored."""
        table = np.concatenate(
            [np.full_like(step.page_table, 1 << 20), step.page_table]
        )  # nothing is in the first group
        both = StepInput(step.token_ids, step.positions, step.row_start, step.kv_len, table)
        arrays = self.staged.set(both, bucket)
        room = torch.full((arrays.rows + 3, qkv.shape[1] + 5), torch.nan)
        room[: len(qkv), 2:-3] = torch.from_numpy(qkv)
        room[len(qkv) : arrays.rows] = 0.5
        rows = room[: arrays.rows, 2:-3]
        rope_store(rows, self.cache, self.layer, self.shape, self.table, arrays)
        assert room[arrays.rows :].isnan().all()
        assert room[: len(qkv), :2].isnan().all()
        assert room[: len(qkv), -3:].isnan().all()
        return rows

    def run(self, step: StepInput, qkv: F32, bucket: int | None = None) -> torch.Tensor:
        """Attention of the step's rows after they were stored, [rows, heads * head_dim]."""
        rows, arrays = self.store(step, qkv, bucket), self.staged.arrays
        width = self.shape.heads * self.shape.head_dim
        room = torch.full((len(rows) + 3, width + 5), torch.nan)
        out = room[: len(rows), 2:-3]
        attention(rows[:, :width], out, self.cache, self.layer, self.shape, arrays, self.space)
        assert room[len(rows) :].isnan().all()
        assert room[:, :2].isnan().all()
        assert room[:, -3:].isnan().all()
        return out


def twin(case: Case, s: int, dtype: str, rows: list[int] | None = None) -> F32:
    """What the kernels should make of a sequence's rows: [rows, heads * head_dim]."""
    shape, n = case.shape, case.lengths[s]
    heads = case.qkv[s].reshape(n, -1, shape.head_dim)
    q, k, v = np.split(heads, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    positions = np.arange(n, dtype=np.int32)
    if case.rope is not None:
        q, k = (reference.rotate(x, positions, case.rope) for x in (q, k))
    k, v = (reference.store_as(x, dtype) for x in (k, v))
    chosen = positions if rows is None else positions[rows]
    attend = reference.attend if dtype == "f32" else reference.attend_half
    return attend(q[chosen], k, v, chosen, shape).reshape(len(chosen), -1)


def nmse(a: F32, r: F32) -> float:
    """The squared error of a, as a share of r's squares."""
    return float(np.sum((a.astype(np.float64) - r) ** 2) / np.sum(r.astype(np.float64) ** 2))
