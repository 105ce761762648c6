"""Rotary positions, storage and attention on the device's tensors, for steps of tests/kernels/ragged.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.kernels import reference
from shoal.kernels.base import PAGE_SIZE, AttentionShape, KVGroup, Rope, StepInput, StepLimits
from shoal.kernels.cuda.attention import attention, attention_space, largest_parts
from shoal.kernels.cuda.cache import kv_cache
from shoal.kernels.cuda.rotary import rope_store, rope_table
from shoal.kernels.cuda.step import StagedStep
from tests.kernels.ragged import Case

F32 = NDArray[np.float32]


class PagedRun:
    """One layer's cache, and the operations on it. The layer is the second of its group, in the second group."""

    layer = 7

    def __init__(self, case: Case, dtype: str, max_rows: int = 256, records: int = 100) -> None:
        self.shape, self.rope = case.shape, case.rope
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

    def fill(self, step: StepInput, k: F32, v: F32) -> None:
        """Put k and v [rows, kv_heads, head_dim] into the pages, as `rope_store` would, all rows at once."""
        seq = np.repeat(np.arange(len(step.kv_len)), np.diff(step.row_start))
        page, offset = step.page_table[0, seq, step.positions // PAGE_SIZE], step.positions % PAGE_SIZE
        pages = self.cache.layers[self.layer]
        for x, values, scales in ((k, pages.k, pages.k_scales), (v, pages.v, pages.v_scales)):
            if self.cache.dtype == "q8_0":
                codes, scale = codes_of(x)
                values.numpy()[page, :, offset], scales.numpy()[page, :, offset] = codes, scale
            else:
                with np.errstate(over="ignore"):
                    values.numpy()[page, :, offset] = x

    def run(self, step: StepInput, qkv: F32, bucket: int | None = None) -> torch.Tensor:
        """Attention of the step's rows, whose k and v are filled in by NumPy: [rows, heads * head_dim]. Half the interpreter's time is
        saved; `store` and `attend` are the kernels."""
        q, k, v = split_heads(qkv, self.shape, step.positions, self.rope)
        self.fill(step, k, v)
        arrays = self.staged.set(self.both_groups(step), bucket)
        rows = torch.zeros(arrays.rows, qkv.shape[1])
        rows[: len(q), : q[0].size] = torch.from_numpy(q.reshape(len(q), -1))
        return self.attend(rows)

    def attend(self, rows: torch.Tensor) -> torch.Tensor:
        """Attention of the step that was set last; q is in the first columns of ``rows``."""
        width = self.shape.heads * self.shape.head_dim
        room = torch.full((len(rows) + 3, width + 5), torch.nan)
        out = room[: len(rows), 2:-3]
        largest = torch.full((largest_parts(self.shape, self.cache.dtype), len(rows) + 3), torch.nan)
        attention(rows[:, :width], out, self.cache, self.layer, self.shape, self.staged.arrays, self.space, largest)
        assert room[len(rows) :].isnan().all()
        assert room[:, :2].isnan().all()
        assert room[:, -3:].isnan().all()
        assert largest[:, len(rows) :].isnan().all()
        finite = out.isfinite().all(dim=1)
        assert torch.equal(largest[:, : len(rows)].amax(dim=0)[finite], out.abs().amax(dim=1)[finite])
        assert not self.space.arrived.any()
        return out

    @staticmethod
    def both_groups(step: StepInput) -> StepInput:
        table = np.concatenate(
            [np.full_like(step.page_table, 1 << 20), step.page_table]
        )  # nothing is in the first group
        return replace(step, page_table=table)


def codes_of(x: F32) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """int8 codes of heads [..., head_dim] and the scale of each 32, as reference.store_as has them."""
    width = x.shape[-1]
    groups = np.zeros((*x.shape[:-1], -(-width // 32), 32), np.float32)
    groups.reshape(*x.shape[:-1], -1)[..., :width] = x
    largest = np.abs(groups).max(axis=-1)
    with np.errstate(all="ignore"):
        inverse = np.where(largest > reference.TINY, np.float32(127) / largest, np.float32(0)).astype(np.float32)
        codes = np.nan_to_num(np.rint(groups * inverse[..., None])).astype(np.int8)
        scale = (largest * np.float32(1 / 127)).astype(np.float16)
    return codes.reshape(*x.shape[:-1], -1)[..., :width], scale


def split_heads(x: F32, shape: AttentionShape, positions: NDArray[np.int32], rope: Rope | None) -> list[F32]:
    """q, k and v [rows, heads, head_dim] of a qkv; q and k turned."""
    heads = x.reshape(len(x), -1, shape.head_dim)
    q, k, v = np.split(heads, [shape.heads, shape.heads + shape.kv_heads], axis=1)
    if rope is not None:
        q, k = (reference.rotate(x, positions, rope) for x in (q, k))
    return [q, k, v]


def twin(case: Case, s: int, dtype: str, rows: list[int] | None = None) -> F32:
    """What the kernels should make of a sequence's rows: [rows, heads * head_dim]."""
    positions = np.arange(case.lengths[s], dtype=np.int32)
    q, k, v = split_heads(case.qkv[s], case.shape, positions, case.rope)
    k, v = (reference.store_as(x, dtype) for x in (k, v))
    chosen = positions if rows is None else positions[rows]
    attend = reference.attend if dtype == "f32" else reference.attend_half
    return attend(q[chosen], k, v, chosen, case.shape).reshape(len(chosen), -1)


def nmse(a: F32, r: F32) -> float:
    """The squared error of a, as a share of r's squares."""
    return float(np.sum((a.astype(np.float64) - r) ** 2) / np.sum(r.astype(np.float64) ** 2))
