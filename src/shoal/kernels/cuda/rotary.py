"""Rotary positions, and k and v into the pages of the cache: one launch.

A program has some heads of a row. Those of q are turned in place: a pair's two values are read and written by the same
thread. Those of k are turned on their way into the cache, where each value is stored by itself and reads its partner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from shoal.kernels.base import PAGE_SIZE, AttentionShape, Rope
from shoal.kernels.cuda.cache import PagedCache, scale_count
from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.launch import Tensor, device, launch
from shoal.kernels.cuda.rows import row_tiles, rows_of_program
from shoal.kernels.cuda.step import StepArrays
from shoal.kernels.reference import KV_GROUP, TINY

_HEAD_BLOCK = 8  # most heads of a program
_TINY: tl.constexpr = tl.constexpr(float(TINY))
_ROUND: tl.constexpr = tl.constexpr(1.5 * 2.0**23)  # next to it float32 has whole numbers alone


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin of every position, float32 [positions, pairs], times the rope's scale."""

    cos: Tensor
    sin: Tensor
    neox: bool

    @property
    def pairs(self) -> int:
        """How many pairs of a head turn."""
        return int(self.cos.shape[1])


def rope_table(rope: Rope, positions: int) -> RopeTable:
    """Made once, on the host, for positions below ``positions``."""
    angle = np.arange(positions)[:, None] * rope.inv_freq.astype(np.float64)
    cos, sin = ((turn(angle) * rope.scale).astype(np.float32) for turn in (np.cos, np.sin))
    return RopeTable(torch.from_numpy(cos).to(device()), torch.from_numpy(sin).to(device()), rope.neox)


def rope_store(
    qkv: Tensor, cache: PagedCache, layer: int, shape: AttentionShape, table: RopeTable | None, step: StepArrays
) -> None:
    """Turn the q heads of qkv (float32 [rows, (heads + 2 kv_heads) * head_dim]) in place and store k, turned, and v in the layer's
    pages. Without a ``table`` nothing turns."""
    pages = cache.layers[layer]
    q_block, kv_block = (min(_HEAD_BLOCK, triton.next_power_of_2(n)) for n in (shape.heads, shape.kv_heads))
    q_blocks = 0 if table is None else -(-shape.heads // q_block)
    programs, together = row_tiles(step.rows)
    launch(
        _rope_store,
        (programs, q_blocks + -(-shape.kv_heads // kv_block)),
        qkv,
        qkv.stride(0),
        qkv if table is None else table.cos,
        qkv if table is None else table.sin,
        pages.k,
        pages.v,
        pages.k_scales,
        pages.v_scales,
        step.positions,
        step.row_seq,
        step.table_stride,
        step.page_table,
        step.rows,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        D=shape.head_dim,
        SCALES=scale_count(shape.head_dim) if cache.dtype == "q8_0" else 0,
        PAIRS=0 if table is None else table.pairs,
        NEOX=table is not None and table.neox,
        Q_BLOCKS=q_blocks,
        GROUPS=step.groups,
        GROUP=cache.group[layer],
        Q_BLOCK=q_block,
        KV_BLOCK=kv_block,
        PAIR_BLOCK=1 if table is None else triton.next_power_of_2(table.pairs),
        SCALE_BLOCK=triton.next_power_of_2(scale_count(shape.head_dim)),
        SCALED=KV_GROUP,
        PAGE=PAGE_SIZE,
        **together,
        warps=4,
    )


@triton.jit
def _turn_queries(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    heads,
    there,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    NEOX: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Heads of rows at x, in place; cos and sin of their positions. All are [rows, heads, pairs]."""
    i = tl.arange(0, PAIR_BLOCK)[None, None, :]
    mask = (heads < HEADS) & (i < PAIRS)
    c, s = tl.load(cos + i, mask=i < PAIRS), tl.load(sin + i, mask=i < PAIRS)
    if NEOX:
        first, second = i, i + PAIRS
    else:
        first, second = 2 * i, 2 * i + 1
    a_at = x + (heads * D + first)
    b_at = x + (heads * D + second)
    a, b = tl.load(a_at, mask=mask), tl.load(b_at, mask=mask)
    tl.store(a_at, a * c - b * s, mask=mask & there)
    tl.store(b_at, a * s + b * c, mask=mask & there)


@triton.jit
def _turned(x_at, x, cos, sin, d, mask, PAIRS: tl.constexpr, NEOX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values x, read at x_at, which are dims d of their heads: each with its partner."""
    if NEOX:
        pair, is_first = d % PAIRS, d < PAIRS
        to_partner = tl.where(is_first, PAIRS, -PAIRS)
    else:
        pair, is_first = d // 2, d % 2 == 0
        to_partner = tl.where(is_first, 1, -1)
    turns = d < 2 * PAIRS
    partner = tl.load(x_at + to_partner, mask=mask & turns, other=0.0)
    c, s = tl.load(cos + pair, mask=turns, other=1.0), tl.load(sin + pair, mask=turns, other=0.0)
    return tl.where(turns, x * c + partner * tl.where(is_first, -s, s), x)


@triton.jit
def _store(x, values, scales, group, mask, SCALES: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [rows, heads, groups, 32] to ``values`` of that shape; with int8 values, the scale of each 32 to ``scales`` [.., groups, 1]."""
    if SCALES == 0:
        tl.store(values, x.to(values.dtype.element_ty), mask=mask)
    else:
        largest = tl.max(tl.abs(x), axis=3, keep_dims=True)
        inverse = tl.where(largest > _TINY, tl.div_rn(127.0, tl.maximum(largest, _TINY)), 0.0)
        codes = (x * inverse + _ROUND) - _ROUND
        codes = tl.where(codes == codes, codes, 0.0)  # NaN is no integer: the scale says it
        tl.store(values, codes.to(tl.int8), mask=mask)
        spoilt = tl.sum(
            x * 0.0, axis=3, keep_dims=True
        )  # NaN where a value is no number: a largest value may pass over it
        scale = largest * (1 / 127) + spoilt
        tl.store(scales, scale.to(tl.float16), mask=group)


@triton.jit(do_not_specialize=["rows"])
def _rope_store(  # type: ignore[no-untyped-def]
    qkv,
    stride,
    cos,
    sin,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    positions,
    row_seq,
    table_stride,
    page_table,
    rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    SCALES: tl.constexpr,
    PAIRS: tl.constexpr,
    NEOX: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    wait_for_earlier(PDL)
    row, there = rows_of_program(rows, ROWS)
    row, there, block = row[:, :, None], there[:, :, None], tl.program_id(1)
    position = tl.load(positions + row)
    x = qkv + row * stride
    cos += position.to(tl.int64) * PAIRS
    sin += position.to(tl.int64) * PAIRS
    if block < Q_BLOCKS:
        heads = block * Q_BLOCK + tl.arange(0, Q_BLOCK)[None, :, None]
        _turn_queries(x, cos, sin, heads, there, HEADS, D, PAIRS, NEOX, PAIR_BLOCK)
    else:  # [rows, heads, groups of dims, dims of a group]
        head = (block - Q_BLOCKS) * KV_BLOCK + tl.arange(0, KV_BLOCK)[None, :, None, None]
        pages = page_table + (tl.load(row_seq + row) * GROUPS + GROUP) * tl.load(table_stride)
        page = tl.load(pages + position // PAGE).to(tl.int64)[:, :, :, None]
        place = (page * KV_HEADS + head) * PAGE + (position % PAGE)[:, :, :, None]
        group = tl.arange(0, SCALE_BLOCK)[None, None, :, None]
        d = group * SCALED + tl.arange(0, SCALED)[None, None, None, :]
        mask = (head < KV_HEADS) & (d < D)
        k_at = x[:, :, :, None] + ((HEADS + head) * D + d)
        k = tl.load(k_at, mask=mask, other=0.0)
        if PAIRS > 0:
            k = _turned(k_at, k, cos[:, :, :, None], sin[:, :, :, None], d, mask, PAIRS, NEOX)
        v = tl.load(k_at + KV_HEADS * D, mask=mask, other=0.0)
        at = place * D + d
        scale_at = place * SCALES + group
        mask = mask & there[:, :, :, None]
        scaled = (head < KV_HEADS) & (group < SCALES) & there[:, :, :, None]
        _store(k, k_pages + at, k_scales + scale_at, scaled, mask, SCALES)
        _store(v, v_pages + at, v_scales + scale_at, scaled, mask, SCALES)
