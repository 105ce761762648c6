"""Attention over the pages of the KV cache: causal, or (encoders) of every row to all of its sequence.

KV is cut into *pieces* of 256 positions, counted from the start of the sequence, and a piece into *tiles* of 64. A piece gives each
query a *record*: the largest score, the sum of exp(score - largest), and the V rows weighted so, which tile after tile adds to.
Records are folded in the order of the pieces. As a record depends on query and piece alone, it does not matter who makes it: rows
of sequences with one row in the step (*singles*) have pieces worked on by programs side by side, which leave records in a
workspace, and `_merge` folds them; programs for several rows (*chunks*) walk all pieces and fold as they go. What a query does not
see adds exact zeros to its record, and a piece that is all hidden is folded away without a trace.

A program has up to N queries of one KV head, row by row, and in a row head by head. Matrix products take float16: q divided by a
power of two above its head's largest magnitude, which its scores are multiplied by again; K and V as stored; weights rounded once.
Positions of q8_0 become float16 as rows of activations do, each divided by a power of two that goes to its score, and to its
weight. With float32 pages everything is float32. The twin is reference.attend_half.

Queries are columns, in both products: scores [positions, queries] = K q, and [dims, queries] = V^T weights. So the shape of what is
multiplied, the instruction, and the order of sums over positions do not depend on how many queries there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from shoal.kernels import reference
from shoal.kernels.base import PAGE_SIZE, AttentionShape, StepLimits
from shoal.kernels.cuda.cache import PagedCache, scale_count
from shoal.kernels.cuda.launch import Tensor, device, launch
from shoal.kernels.cuda.step import CHUNK_ROWS, StepArrays

_SPACE_BYTES = 64 << 20  # for records, or more where one sequence of greatest length needs it
_PROGRAMS = 2048  # as many as keep a device busy
_WIDE_BLOCK = 64  # wide heads are multiplied so many dims at a time

PIECE: tl.constexpr = tl.constexpr(reference.PIECE)
TILE: tl.constexpr = tl.constexpr(reference.TILE)
_SCALED: tl.constexpr = tl.constexpr(reference.KV_GROUP)
_PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)
_LOWEST: tl.constexpr = tl.constexpr(-1e30)  # the largest score where nothing is seen: exp(-infinity - it) is 0


@dataclass(frozen=True, slots=True)
class AttentionSpace:
    """Workspace for ``count`` records of all query heads: ``tops`` float32 [count, heads, 2] holds largest scores and sums, ``sums``
    float32 [count, heads, head_dim] weighted V."""

    tops: Tensor
    sums: Tensor


def record_count(limits: StepLimits, heads: int, head_dim: int) -> int:
    """How many records there is room for, for layers of up to so many heads of such a size: what all sequences at once can need,
    or what fits the memory set aside."""
    pieces = -(-limits.max_pages_per_seq * PAGE_SIZE // reference.PIECE)
    fitting = _SPACE_BYTES // (4 * max(heads, 1) * (head_dim + 2))
    return min(limits.max_seqs * pieces, max(pieces, fitting))


def attention_space(records: int, heads: int, head_dim: int) -> AttentionSpace:
    """Workspace for a step at a time, of layers of up to so many heads of such a size."""
    sizes = (records * heads * 2, records * heads * head_dim)
    return AttentionSpace(*(torch.empty(size, dtype=torch.float32, device=device()) for size in sizes))


def attention(
    q: Tensor,
    out: Tensor,
    cache: PagedCache,
    layer: int,
    shape: AttentionShape,
    step: StepArrays,
    space: AttentionSpace,
) -> None:
    """Attention of each row of q (float32 [rows, heads * head_dim], more columns may follow) over its sequence's pages of ``layer``,
    into ``out`` (likewise). Rows of sequences that hold nothing get zeros."""
    options = {**_options(cache.dtype, shape.head_dim), **_constants(cache, layer, shape, step.groups)}
    memory = _memory(q, out, cache, layer, shape, step)
    group = shape.heads // shape.kv_heads

    tile = _single_tile(cache.dtype, group, shape.head_dim)
    across = shape.kv_heads * -(-group // tile) * options["SLICES"]
    splits = _splits(step.num_singles * across, shape.window, step.max_pieces)
    grid = (step.num_singles, across, splits)
    launch(_split, grid, *memory, step.singles, space.tops, space.sums, N=tile, **options)
    if step.max_pieces > 1:
        _launch_merge(out, shape, step, space)

    tile = _chunk_tile(cache.dtype, shape.head_dim)
    across = shape.kv_heads * -(-group * CHUNK_ROWS // tile) * options["SLICES"]
    launch(_walk, (step.num_chunks, across), *memory, step.chunks, N=tile, ROWS=CHUNK_ROWS, **options)


def _splits(programs: int, window: int, max_pieces: int) -> int:
    """How many programs share the pieces of a sequence: enough to keep a device busy, by numbers that a recorded graph has."""
    visible = min(max_pieces, -(-window // reference.PIECE) + 1) if window else max_pieces
    return max(1, min(visible, _PROGRAMS // max(1, programs)))


def _launch_merge(out: Tensor, shape: AttentionShape, step: StepArrays, space: AttentionSpace) -> None:
    launch(
        _merge,
        (step.num_singles, shape.heads),
        out,
        out.stride(0),
        step.positions,
        step.kv_len,
        step.singles,
        space.tops,
        space.sums,
        HEADS=shape.heads,
        D=shape.head_dim,
        WINDOW=shape.window,
        CAUSAL=shape.causal,
        BLOCK=triton.next_power_of_2(shape.head_dim),
        warps=1 if shape.head_dim <= 256 else 4,
    )


def _single_tile(dtype: str, group: int, head_dim: int) -> int:
    """Queries of a program that has one row of ``group`` heads of each KV head."""
    return 16 if group <= 16 else _chunk_tile(dtype, head_dim)


def _chunk_tile(dtype: str, head_dim: int) -> int:
    """Queries of a program that has several rows: as many as registers hold."""
    return 32 if dtype == "f16" and head_dim in (32, 64, 128) else 16


def _is_wide(dtype: str, head_dim: int) -> bool:
    """Whether queries are not kept in registers."""
    return head_dim > {"f16": 256, "q8_0": 128, "f32": 64}[dtype]


def _slice(dtype: str, head_dim: int) -> int:
    """Dims of V that a program adds up; scores are computed for each slice again."""
    return 64 if dtype == "f32" or head_dim > 256 else 128


def _options(dtype: str, head_dim: int) -> dict[str, int]:
    """Warps, how many tiles are under way, and on NVIDIA the registers of a thread: left to itself, ptxas moves some to memory so that
    more programs fit a processor."""
    stages = 2 if dtype == "f16" and head_dim <= 128 else 1
    return {"warps": 8 if dtype == "f32" else 4, "stages": stages, "maxnreg": 255}


def _constants(cache: PagedCache, layer: int, shape: AttentionShape, groups: int) -> dict[str, Any]:
    d = shape.head_dim
    padded = max(reference.KV_GROUP, triton.next_power_of_2(d))
    block = _WIDE_BLOCK if _is_wide(cache.dtype, d) else padded
    width = min(_slice(cache.dtype, d), padded)
    return {
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "D": d,
        "BLOCK": block,
        "BLOCKS": -(-d // block),
        "SLICE": width,
        "SLICES": -(-d // width),
        "SCALES": scale_count(d) if cache.dtype == "q8_0" else 0,
        "SCALE_BLOCK": triton.next_power_of_2(scale_count(d)),
        "HALF": cache.dtype != "f32",
        "SCALE": shape.scale,
        "CAP": shape.soft_cap,
        "SLOPED": shape.slopes is not None,
        "WINDOW": shape.window,
        "CAUSAL": shape.causal,
        "GROUP": cache.group[layer],
        "GROUPS": groups,
    }


def _memory(
    q: Tensor, out: Tensor, cache: PagedCache, layer: int, shape: AttentionShape, step: StepArrays
) -> tuple[Tensor | int, ...]:
    pages = cache.layers[layer]
    slopes = q if shape.slopes is None else _slopes(shape.slopes)
    numbers = step.positions, step.kv_len, step.table_stride, step.page_table
    return q, q.stride(0), out, out.stride(0), slopes, pages.k, pages.v, pages.k_scales, pages.v_scales, *numbers


@cache
def _slopes(slopes: tuple[float, ...]) -> Tensor:
    return torch.tensor(slopes, dtype=torch.float32, device=device())


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _fold(top, total, sums, next_top, next_total, next_sums):  # type: ignore[no-untyped-def]
    """A record and that of a later piece as one: largest scores and sums [n], weighted V [dims, n]."""
    largest = tl.maximum(top, next_top)
    a, b = tl.exp(top - largest), tl.exp(next_top - largest)
    return largest, total * a + next_total * b, sums * a[None, :] + next_sums * b[None, :]


@triton.jit
def _attended(total, sums):  # type: ignore[no-untyped-def]
    """What a record means: zeros where nothing is seen."""
    return sums / tl.where(total == 0.0, 1.0, total)[None, :]


@triton.jit
def _seen(first, last, length, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The positions that rows at positions ``first`` ... ``last`` see of a sequence of this length: from, and up to."""
    begin = tl.maximum(first - WINDOW + 1, 0) if WINDOW > 0 else first * 0
    end = tl.minimum(last + 1, length) if CAUSAL else length
    return begin, end


@triton.jit
def _power_above(largest, LOW: tl.constexpr, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^e above a magnitude and 1 / 2^e, with LOW <= e <= HIGH."""
    bits = (largest.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    bits = tl.minimum(tl.maximum(bits, (127 + LOW) << 23), (127 + HIGH) << 23)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    t = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, t - 1.0, 1.0 - t) / (1.0 + t)


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    q, stride, positions, base, rows, kv_head, tile, G: tl.constexpr, D: tl.constexpr, N: tl.constexpr
):
    """The queries of a tile of rows ``base`` ...: which there are, their rows and heads, their positions (-1: none, it sees nothing)
    and where they begin, all [N]."""
    flat = tile * N + tl.arange(0, N)
    valid = flat // G < rows
    row, head = base + flat // G, kv_head * G + flat % G
    own = tl.load(positions + row, mask=valid, other=-1)
    return valid, row, head, own, q + row.to(tl.int64) * stride + head * D


@triton.jit
def _tile_rows(first, rows, tile, G: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The positions of the first and the last row of a tile, if the first of all rows is at position ``first``."""
    return first + tile * N // G, first + tl.minimum(rows - 1, (tile * N + N - 1) // G)


@triton.jit
def _magnitudes(at, valid, D: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitude of each query."""
    largest = tl.zeros([N], tl.float32)
    for block in tl.static_range(BLOCKS):
        d = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(at[None, :] + d[:, None], mask=valid[None, :] & (d < D)[:, None], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0))
    return largest


@triton.jit
def _query_block(  # type: ignore[no-untyped-def]
    at, valid, inverse, block, D: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr
):
    """Some dims of the queries as products take them: [BLOCK, N]."""
    d = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(at[None, :] + d[:, None], mask=valid[None, :] & (d < D)[:, None], other=0.0)
    return (x * inverse[None, :]).to(tl.float16) if HALF else x


@triton.jit
def _scales(scales, place, readable, group, SCALES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of some groups of 32 dims, float32 [TILE, groups]; and 2^e above their places' magnitudes, with its inverse, [TILE]."""
    mask = readable[:, None] & (group < SCALES)[None, :]
    scale = tl.load(scales + place[:, None] * SCALES + group[None, :], mask=mask, other=0.0).to(tl.float32)
    power, inverse = _power_above(tl.max(scale, axis=1) * 128.0, -30, 24)
    return scale, power, inverse


@triton.jit
def _from_codes(codes, place, readable, scale, inverse, group, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of q8_0 times ``inverse``, float16 [TILE, WIDTH]."""
    d = group[:, None] * _SCALED + tl.arange(0, _SCALED)[None, :]
    mask = readable[:, None, None] & (d < D)[None, :, :]
    q = tl.load(codes + place[:, None, None] * D + d[None, :, :], mask=mask, other=0)
    x = ((q.to(tl.int32) + 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0  # exact, and no conversion
    return tl.reshape((x * scale[:, :, None] * inverse[:, None, None]).to(tl.float16), [TILE, WIDTH])


@triton.jit
def _values(values, place, readable, first, D: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values from dim ``first`` on, as they are stored: [TILE, WIDTH]. What must not be read is 0."""
    d = first + tl.arange(0, WIDTH)
    mask = readable[:, None] & (d < D)[None, :]
    return tl.load(values + place[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _product(a, b, sums, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.dot(a, b, sums) if HALF else tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    q,
    q_at,
    valid,
    q_inverse,
    keys,
    scales,
    place,
    readable,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    N: tl.constexpr,
):
    """Products of the keys of a tile and queries: [TILE, N]. Heads that are wide have their queries loaded again, block by block."""
    products = tl.zeros([TILE, N], tl.float32)
    if SCALES > 0:
        scale, power, inverse = _scales(scales, place, readable, tl.arange(0, SCALE_BLOCK), SCALES)
    for block in tl.static_range(BLOCKS):
        if BLOCKS > 1:
            q = _query_block(q_at, valid, q_inverse, block, D, BLOCK, HALF)
        if SCALES > 0:
            group = block * (BLOCK // _SCALED) + tl.arange(0, BLOCK // _SCALED)
            if BLOCKS > 1:
                scale, _, _ = _scales(scales, place, readable, group, SCALES)
            k = _from_codes(keys, place, readable, scale, inverse, group, D, BLOCK)
        else:
            k = _values(keys, place, readable, block * BLOCK, D, BLOCK)
        products = _product(k, q, products, HALF)
    return products * power[:, None] if SCALES > 0 else products


@triton.jit
def _weighted(  # type: ignore[no-untyped-def]
    weights,
    sums,
    values,
    scales,
    place,
    readable,
    first,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    SCALES: tl.constexpr,
    HALF: tl.constexpr,
):
    """``sums`` [SLICE, N] and the tile's values from dim ``first`` on, weighted."""
    if SCALES > 0:
        group = first // _SCALED + tl.arange(0, SLICE // _SCALED)
        scale, power, inverse = _scales(scales, place, readable, group, SCALES)
        v = _from_codes(values, place, readable, scale, inverse, group, D, SLICE)
        weights *= power[:, None]  # 0 for what a query does not see: its largest is of what it does see
        largest, inverse = _power_above(tl.max(weights, axis=0), -126, 126)
        sums += tl.dot(tl.trans(v), (weights * inverse[None, :]).to(tl.float16)) * largest[None, :]
    else:
        v = _values(values, place, readable, first, D, SLICE)
        sums = _product(tl.trans(v), weights.to(tl.float16) if HALF else weights, sums, HALF)
    return sums


@triton.jit
def _bent(scores, at, own, slope, CAP: tl.constexpr, SLOPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a layer makes of its scores."""
    if CAP > 0:
        scores = _tanh(scores / CAP) * CAP
    if SLOPED:
        scores = scores - slope[None, :] * tl.abs(at[:, None] - own[None, :]).to(tl.float32)
    return scores


@triton.jit
def _piece(  # type: ignore[no-untyped-def]
    piece,
    begin,
    end,
    q,
    q_at,
    valid,
    q_inverse,
    factor,
    slope,
    own,
    pages,
    kv_head,
    first,
    keys,
    values,
    k_scales,
    v_scales,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICE: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    CAP: tl.constexpr,
    SLOPED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    N: tl.constexpr,
):
    """The record of a piece, over positions ``begin`` ... ``end`` - 1 alone: [N], [N] and, for dims from ``first`` on, [SLICE, N]."""
    top = tl.full([N], _LOWEST, tl.float32)
    total = tl.zeros([N], tl.float32)
    sums = tl.zeros([SLICE, N], tl.float32)
    from_tile = tl.maximum(piece * PIECE, begin // TILE * TILE)
    for start in range(from_tile, tl.minimum(piece * PIECE + PIECE, end), TILE):
        at = start + tl.arange(0, TILE)
        readable = (at >= begin) & (at < end)
        page = tl.load(pages + at // _PAGE, mask=readable, other=0).to(tl.int64)
        place = (page * KV_HEADS + kv_head) * _PAGE + at % _PAGE
        scores = _scores(
            q, q_at, valid, q_inverse, keys, k_scales, place, readable, D, BLOCK, BLOCKS, SCALES, SCALE_BLOCK, HALF, N
        )
        scores = _bent(scores * factor[None, :], at, own, slope, CAP, SLOPED)
        seen = readable[:, None] & (own >= 0)[None, :]
        if CAUSAL:
            seen &= at[:, None] <= own[None, :]
        if WINDOW > 0:
            seen &= at[:, None] > own[None, :] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        largest = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp(scores - largest[None, :])
        shrink = tl.exp(top - largest)
        total = total * shrink + tl.sum(weights, axis=0)
        sums = _weighted(
            weights, sums * shrink[None, :], values, v_scales, place, readable, first, D, SLICE, SCALES, HALF
        )
        top = largest
    return top, total, sums


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    out,
    out_stride,
    slopes,
    keys,
    values,
    k_scales,
    v_scales,
    positions,
    kv_len,
    table_stride,
    page_table,
    items,
    tops,
    records,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    SLOPED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
):
    """Some pieces of a single, for up to N of its heads and SLICE dims: to records, or to ``out`` if there is one piece. The programs
    along the last axis take turns; how many there are is no constant, or each number of singles would have a kernel of its own."""
    G: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (G + N - 1) // N
    item, across = items + 4 * tl.program_id(0), tl.program_id(1)
    kv_head, tile, first = across // SLICES // TILES, across // SLICES % TILES, across % SLICES * SLICE
    sequence, base, record = tl.load(item), tl.load(item + 1), tl.load(item + 3).to(tl.int64)
    valid, row, head, own, q_at = _queries(q, q_stride, positions, base, 1, kv_head, tile, G, D, N)
    position = tl.load(positions + base)
    begin, end = _seen(position, position, tl.load(kv_len + sequence), WINDOW, CAUSAL)
    power, inverse = _power_above(_magnitudes(q_at, valid, D, BLOCK, BLOCKS, N), -126, 126)
    block = _query_block(q_at, valid, inverse, 0, D, BLOCK, HALF)
    factor = power * SCALE if HALF else tl.full([N], SCALE, tl.float32)
    slope = tl.load(slopes + head, mask=valid, other=0.0) if SLOPED else factor
    pages = page_table + (sequence * GROUPS + GROUP) * tl.load(table_stride)
    d = first + tl.arange(0, SLICE)
    mask = valid[None, :] & (d < D)[:, None]
    last_piece = tl.maximum(begin, end - 1) // PIECE
    for piece in range(begin // PIECE + tl.program_id(2), last_piece + 1, tl.num_programs(2)):
        top, total, sums = _piece(
            piece,
            begin,
            end,
            block,
            q_at,
            valid,
            inverse,
            factor,
            slope,
            own,
            pages,
            kv_head,
            first,
            keys,
            values,
            k_scales,
            v_scales,
            KV_HEADS,
            D,
            BLOCK,
            BLOCKS,
            SLICE,
            SCALES,
            SCALE_BLOCK,
            HALF,
            CAP,
            SLOPED,
            WINDOW,
            CAUSAL,
            N,
        )
        if record < 0:
            out_at = out + row.to(tl.int64) * out_stride + head * D
            tl.store(out_at[None, :] + d[:, None], _attended(total, sums), mask=mask)
        else:
            place = (record + piece) * HEADS + head
            tl.store(records + place[None, :] * D + d[:, None], sums, mask=mask)
            tl.store(tops + 2 * place, top, mask=valid)
            tl.store(tops + 2 * place + 1, total, mask=valid)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out,
    out_stride,
    positions,
    kv_len,
    items,
    tops,
    records,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The records of a single's head, folded in order."""
    item, head = items + 4 * tl.program_id(0), tl.program_id(1)
    sequence, row, record = tl.load(item), tl.load(item + 1), tl.load(item + 3).to(tl.int64)
    if record >= 0:
        position = tl.load(positions + row)
        begin, end = _seen(position, position, tl.load(kv_len + sequence), WINDOW, CAUSAL)
        one, d = tl.arange(0, 1), tl.arange(0, BLOCK)
        top = tl.full([1], _LOWEST, tl.float32)
        total = tl.zeros([1], tl.float32)
        sums = tl.zeros([BLOCK, 1], tl.float32)
        for piece in range(begin // PIECE, (end + PIECE - 1) // PIECE):
            place = (record + piece) * HEADS + head + one
            piece_sums = tl.load(records + place[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0.0)
            top, total, sums = _fold(
                top, total, sums, tl.load(tops + 2 * place), tl.load(tops + 2 * place + 1), piece_sums
            )
        at = out + row.to(tl.int64) * out_stride + head * D + d
        tl.store(at[:, None], _attended(total, sums), mask=(d < D)[:, None])


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    out,
    out_stride,
    slopes,
    keys,
    values,
    k_scales,
    v_scales,
    positions,
    kv_len,
    table_stride,
    page_table,
    items,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    SLOPED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """All pieces for up to N queries of a chunk and SLICE dims, folded as they come."""
    G: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = (G * ROWS + N - 1) // N
    item, across = items + 4 * tl.program_id(0), tl.program_id(1)
    kv_head, tile, first = across // SLICES // TILES, across // SLICES % TILES, across % SLICES * SLICE
    sequence, base, rows = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    if tile * N < rows * G:
        valid, row, head, own, q_at = _queries(q, q_stride, positions, base, rows, kv_head, tile, G, D, N)
        first_seeing, last_seeing = _tile_rows(tl.load(positions + base), rows, tile, G, N)
        begin, end = _seen(first_seeing, last_seeing, tl.load(kv_len + sequence), WINDOW, CAUSAL)
        power, inverse = _power_above(_magnitudes(q_at, valid, D, BLOCK, BLOCKS, N), -126, 126)
        block = _query_block(q_at, valid, inverse, 0, D, BLOCK, HALF)
        factor = power * SCALE if HALF else tl.full([N], SCALE, tl.float32)
        slope = tl.load(slopes + head, mask=valid, other=0.0) if SLOPED else factor
        pages = page_table + (sequence * GROUPS + GROUP) * tl.load(table_stride)
        top = tl.full([N], _LOWEST, tl.float32)
        total = tl.zeros([N], tl.float32)
        sums = tl.zeros([SLICE, N], tl.float32)
        for piece in range(begin // PIECE, (end + PIECE - 1) // PIECE):
            piece_top, piece_total, piece_sums = _piece(
                piece,
                begin,
                end,
                block,
                q_at,
                valid,
                inverse,
                factor,
                slope,
                own,
                pages,
                kv_head,
                first,
                keys,
                values,
                k_scales,
                v_scales,
                KV_HEADS,
                D,
                BLOCK,
                BLOCKS,
                SLICE,
                SCALES,
                SCALE_BLOCK,
                HALF,
                CAP,
                SLOPED,
                WINDOW,
                CAUSAL,
                N,
            )
            top, total, sums = _fold(top, total, sums, piece_top, piece_total, piece_sums)
        d = first + tl.arange(0, SLICE)
        out_at = out + row.to(tl.int64) * out_stride + head * D
        tl.store(out_at[None, :] + d[:, None], _attended(total, sums), mask=valid[None, :] & (d < D)[:, None])
