"""Attention over the pages of the KV cache: causal, or (encoders) of every row to all of its sequence.

KV is cut into *pieces* of 256 positions, counted from the start of the sequence, and a piece into *tiles* of 64. A piece gives each
query a *record*: the largest score, the sum of exp(score - largest), and the V rows weighted so, which tile after tile adds to.
Records are folded in the order of the pieces. As a record depends on query and piece alone, it does not matter who makes it: rows
of sequences with one row in the step (*singles*) or a few (*shorts*) have pieces worked on by programs side by side, which leave
records in a workspace; programs for more rows (*chunks*) walk all pieces and fold as they go. What a query does not see adds exact
zeros to its record, and a piece that is all hidden is folded away without a trace.

Of programs that share queries whoever is done last folds (last_program.py): always in the order of the pieces, all of them read back
from the workspace, so the bits do not depend on who it was. Where no program can leave records to another, all is chunks that has
more than one piece.

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
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from shoal.kernels import reference
from shoal.kernels.base import PAGE_SIZE, AttentionShape, StepLimits
from shoal.kernels.cuda.activation import half_scale, tanh
from shoal.kernels.cuda.cache import PagedCache, scale_count
from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.last_program import is_last
from shoal.kernels.cuda.launch import Tensor, device, launch
from shoal.kernels.cuda.linear import chip
from shoal.kernels.cuda.step import CHUNK_ROWS, SHORT_ROWS, StepArrays

_SPACE_BYTES = 64 << 20  # for records, or more where one sequence of greatest length needs it
_PROGRAMS = 2048  # as many as keep a device busy
_WIDE_BLOCK = 64  # wide heads are multiplied so many dims at a time
_NARROW_SLICE = 64  # the fewest dims of a large head that a program adds up

PIECE: tl.constexpr = tl.constexpr(reference.PIECE)
TILE: tl.constexpr = tl.constexpr(reference.TILE)
_SCALED: tl.constexpr = tl.constexpr(reference.KV_GROUP)
_PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)
_LOWEST: tl.constexpr = tl.constexpr(-1e30)  # the largest score where nothing is seen: exp(-infinity - it) is 0


class Constants(NamedTuple):
    """What kernels are compiled for, whatever the tile: heads of D dims, of which queries load BLOCK at a time, BLOCKS times, and
    of which a program adds up SLICE, one of SLICES; SCALES of a stored head (0: none), SCALE_BLOCK that a program loads; whether
    products take HALF precision; SCALE, CAP, SLOPED, WINDOW and CAUSAL of an AttentionShape; and which page table, of how many, is
    the layer's."""

    HEADS: int
    KV_HEADS: int
    D: int
    BLOCK: int
    BLOCKS: int
    SLICE: int
    SLICES: int
    SCALES: int
    SCALE_BLOCK: int
    HALF: bool
    SCALE: float
    CAP: float
    SLOPED: bool
    WINDOW: int
    CAUSAL: bool
    GROUP: int
    GROUPS: int


@dataclass(frozen=True, slots=True)
class AttentionSpace:
    """Workspace for ``count`` records of all query heads: ``tops`` float32 [count, heads, 2] holds largest scores and sums, ``sums``
    float32 [count, heads, head_dim] weighted V. ``arrived`` int32 [count, heads * slices] counts the programs that are done with
    queries whose first record this is: 0 before and after each launch."""

    tops: Tensor
    sums: Tensor
    arrived: Tensor


def record_count(limits: StepLimits, heads: int, head_dim: int) -> int:
    """How many records there is room for, for layers of up to so many heads of such a size: what all sequences at once can need,
    or what fits the memory set aside. None where no program can leave a record to another."""
    if not chip().side_by_side:
        return 0
    pieces = -(-limits.max_pages_per_seq * PAGE_SIZE // reference.PIECE)
    rows = min(limits.max_seqs * SHORT_ROWS, limits.max_rows)
    fitting = _SPACE_BYTES // (4 * max(heads, 1) * (head_dim + 2))
    return min(rows * pieces, max(pieces, fitting))


def attention_space(records: int, heads: int, head_dim: int) -> AttentionSpace:
    """Workspace for a step at a time, of layers of up to so many heads of such a size."""
    most_slices = -(-head_dim // _NARROW_SLICE)
    return AttentionSpace(
        tops=torch.empty(records * heads * 2, dtype=torch.float32, device=device()),
        sums=torch.empty(records * heads * head_dim, dtype=torch.float32, device=device()),
        arrived=torch.zeros(records * heads * most_slices, dtype=torch.int32, device=device()),
    )


def largest_parts(shape: AttentionShape, dtype: str) -> int:
    """In how many parts ``attention`` says how large a row is; ``dtype`` is that of the pages."""
    return shape.heads * _slices(dtype, shape.head_dim)


def attention(
    q: Tensor,
    out: Tensor,
    cache: PagedCache,
    layer: int,
    shape: AttentionShape,
    step: StepArrays,
    space: AttentionSpace,
    largest: Tensor | None = None,
) -> None:
    """Attention of each row of q (float32 [rows, heads * head_dim], more columns may follow) over its sequence's pages of ``layer``,
    into ``out`` (likewise). Rows of sequences that hold nothing get zeros. ``largest`` float32 [``largest_parts``, at least rows] gets
    the largest magnitude of each part of a row: the largest of them is the row's."""
    constants, options = _constants(cache, layer, shape, step.groups), _options(cache.dtype, shape.head_dim)
    memory, workspace = _memory(q, out, largest, cache, layer, shape, step), (space.tops, space.sums, space.arrived)
    group = shape.heads // shape.kv_heads
    for items, count, rows in ((step.singles, step.num_singles, 1), (step.shorts, step.num_shorts, SHORT_ROWS)):
        tile = _few_tile(cache.dtype, group * rows, shape.head_dim)
        across = _across(constants, tile, rows)
        grid = (count, across, _splits(count * across, shape.window, step.max_pieces))
        fold = min(8, triton.next_power_of_2(group * rows))
        launch(_split, grid, *memory, items, *workspace, C=constants, N=tile, ROWS=rows, FOLD=fold, **options)
    tile = _chunk_tile(cache.dtype, shape.head_dim)
    across = _across(constants, tile, CHUNK_ROWS)
    launch(_walk, (step.num_chunks, across), *memory, step.chunks, C=constants, N=tile, ROWS=CHUNK_ROWS, **options)


def _across(constants: Constants, tile: int, rows: int) -> int:
    """How many programs it takes for so many rows, with ``tile`` queries each."""
    queries = constants.HEADS // constants.KV_HEADS * rows
    return constants.KV_HEADS * -(-queries // tile) * constants.SLICES


def _splits(programs: int, window: int, max_pieces: int) -> int:
    """How many programs share the pieces of a sequence: enough to keep a device busy, by numbers that a recorded graph has."""
    visible = min(max_pieces, -(-window // reference.PIECE) + 1) if window else max_pieces
    return max(1, min(visible, _PROGRAMS // max(1, programs)))


def _few_tile(dtype: str, queries: int, head_dim: int) -> int:
    """Queries of a program where there are so many of a KV head."""
    return 16 if queries <= 16 else _chunk_tile(dtype, head_dim)


def _chunk_tile(dtype: str, head_dim: int) -> int:
    """Queries of a program that has several rows: as many as registers hold."""
    return 32 if dtype == "f16" and head_dim in (32, 64, 128) else 16


def _is_wide(dtype: str, head_dim: int) -> bool:
    """Whether queries are not kept in registers."""
    return head_dim > {"f16": 256, "q8_0": 128, "f32": 64}[dtype]


def _slice(dtype: str, head_dim: int) -> int:
    """Dims of V that a program adds up; scores are computed for each slice again."""
    width = _NARROW_SLICE if dtype == "f32" or head_dim > 256 else 128
    return min(width, _padded(head_dim))


def _slices(dtype: str, head_dim: int) -> int:
    return -(-head_dim // _slice(dtype, head_dim))


def _padded(head_dim: int) -> int:
    return max(reference.KV_GROUP, int(triton.next_power_of_2(head_dim)))


def _options(dtype: str, head_dim: int) -> dict[str, int]:
    """Warps, how many tiles are under way, and on NVIDIA the registers of a thread: left to itself, ptxas moves some to memory so that
    more programs fit a processor."""
    stages = 2 if dtype == "f16" and head_dim <= 128 else 1
    return {"warps": 8 if dtype == "f32" else 4, "stages": stages, "maxnreg": 255}


def _constants(cache: PagedCache, layer: int, shape: AttentionShape, groups: int) -> Constants:
    d, scaled = shape.head_dim, cache.dtype == "q8_0"
    block = _WIDE_BLOCK if _is_wide(cache.dtype, d) else _padded(d)
    return Constants(
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        D=d,
        BLOCK=block,
        BLOCKS=-(-d // block),
        SLICE=_slice(cache.dtype, d),
        SLICES=_slices(cache.dtype, d),
        SCALES=scale_count(d) if scaled else 0,
        SCALE_BLOCK=triton.next_power_of_2(scale_count(d)),
        HALF=cache.dtype != "f32",
        SCALE=shape.scale,
        CAP=shape.soft_cap,
        SLOPED=shape.slopes is not None,
        WINDOW=shape.window,
        CAUSAL=shape.causal,
        GROUP=cache.group[layer],
        GROUPS=groups,
    )


def _memory(
    q: Tensor,
    out: Tensor,
    largest: Tensor | None,
    cache: PagedCache,
    layer: int,
    shape: AttentionShape,
    step: StepArrays,
) -> tuple[Tensor | int | None, ...]:
    pages = cache.layers[layer]
    slopes = q if shape.slopes is None else _slopes(shape.slopes)
    rows = q, q.stride(0), out, out.stride(0), largest, 0 if largest is None else largest.stride(0)
    numbers = step.positions, step.kv_len, step.table_stride, step.page_table
    return *rows, slopes, pages.k, pages.v, pages.k_scales, pages.v_scales, *numbers


@cache
def _slopes(slopes: tuple[float, ...]) -> Tensor:
    return torch.tensor(slopes, dtype=torch.float32, device=device())


# --- kernels ---------------------------------------------------------------------------------------------------------
#
# They hand on values that belong together as tuples:
#   queries: those of a tile, as `_queries` says
#   kv: the row of the page table, KV head, keys, values, scales of keys, scales of values


@triton.jit
def _fold(top, total, sums, next_top, next_total, next_sums):  # type: ignore[no-untyped-def]
    """A record and that of a later piece as one: largest scores and sums, which go with each query's weighted V."""
    largest = tl.maximum(top, next_top)
    a, b = tl.exp(top - largest), tl.exp(next_top - largest)
    return largest, total * a + next_total * b, sums * a + next_sums * b


@triton.jit
def _attended(total, sums):  # type: ignore[no-untyped-def]
    """What a record means: zeros where nothing is seen."""
    return sums / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _work(items, C: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a program is for: an item's sequence, first row, how many rows, and first record; KV head, tile of queries, slice."""
    item, across = items + 4 * tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (C.HEADS // C.KV_HEADS * ROWS + N - 1) // N
    rows = 1 if ROWS == 1 else tl.load(item + 2)
    sequence, base, record = tl.load(item), tl.load(item + 1), tl.load(item + 3).to(tl.int64)
    kv_head, tile, part = across // C.SLICES // TILES, across // C.SLICES % TILES, across % C.SLICES
    return sequence, base, rows, record, kv_head, tile, part


@triton.jit
def _seen(first, rows, tile, length, C: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The positions that a tile's rows see of a sequence of this length, if the first of all rows is at ``first``: from, and up to."""
    G: tl.constexpr = C.HEADS // C.KV_HEADS
    from_row, to_row = first + tile * N // G, first + tl.minimum(rows - 1, (tile * N + N - 1) // G)
    begin = tl.maximum(from_row - C.WINDOW + 1, 0) if C.WINDOW > 0 else from_row * 0
    end = tl.minimum(to_row + 1, length) if C.CAUSAL else length
    return begin, end


@triton.jit
def _of_tile(base, rows, kv_head, tile, C: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The queries of a tile of rows ``base`` ...: which there are, their rows and heads, all [N]."""
    G: tl.constexpr = C.HEADS // C.KV_HEADS
    flat = tile * N + tl.arange(0, N)
    return flat // G < rows, base + flat // G, kv_head * G + flat % G


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    q, q_stride, positions, slopes, base, rows, kv_head, tile, C: tl.constexpr, N: tl.constexpr
):
    """The queries of a tile as `_piece` takes them: their dims, as many as it holds, [BLOCK, N]; and of each [N] where it begins,
    whether it is there, what its dims are multiplied by, what its scores are, its slope, and its position (-1: it sees nothing)."""
    valid, row, head = _of_tile(base, rows, kv_head, tile, C, N)
    own = tl.load(positions + row, mask=valid, other=-1)
    at = q + row.to(tl.int64) * q_stride + head * C.D
    power, inverse = half_scale(_magnitudes(at, valid, C, N))
    factor = power * C.SCALE if C.HALF else tl.full([N], C.SCALE, tl.float32)
    slope = tl.load(slopes + head, mask=valid, other=0.0) if C.SLOPED else factor
    return _query_block(at, valid, inverse, 0, C), at, valid, inverse, factor, slope, own


@triton.jit
def _magnitudes(at, valid, C: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitude of each query."""
    BLOCK: tl.constexpr = C.BLOCK
    BLOCKS: tl.constexpr = C.BLOCKS
    largest = tl.zeros([N], tl.float32)
    for block in tl.static_range(BLOCKS):
        d = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(at[None, :] + d[:, None], mask=valid[None, :] & (d < C.D)[:, None], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0))
    return largest


@triton.jit
def _query_block(at, valid, inverse, block, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some dims of the queries as products take them: [BLOCK, N]."""
    BLOCK: tl.constexpr = C.BLOCK
    d = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(at[None, :] + d[:, None], mask=valid[None, :] & (d < C.D)[:, None], other=0.0)
    return (x * inverse[None, :]).to(tl.float16) if C.HALF else x


@triton.jit
def _scales(scales, place, readable, group, SCALES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of some groups of 32 dims, float32 [TILE, groups]; and 2^e above their places' magnitudes, with its inverse, [TILE]."""
    mask = readable[:, None] & (group < SCALES)[None, :]
    scale = tl.load(scales + place[:, None] * SCALES + group[None, :], mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(scale, axis=1) * 128.0
    power, inverse = half_scale(tl.minimum(tl.maximum(largest, 2.0**-31), 2.0**23))
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
def _scores(queries, keys, scales, place, readable, C: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products of the keys of a tile and queries: [TILE, N]. Heads that are wide have their queries loaded again, block by block."""
    BLOCK: tl.constexpr = C.BLOCK
    BLOCKS: tl.constexpr = C.BLOCKS
    SCALE_BLOCK: tl.constexpr = C.SCALE_BLOCK
    q, at, valid, q_inverse, _factor, _slope, _own = queries
    products = tl.zeros([TILE, N], tl.float32)
    if C.SCALES > 0:
        scale, power, inverse = _scales(scales, place, readable, tl.arange(0, SCALE_BLOCK), C.SCALES)
    for block in tl.static_range(BLOCKS):
        if BLOCKS > 1:
            q = _query_block(at, valid, q_inverse, block, C)
        if C.SCALES > 0:
            group = block * (BLOCK // _SCALED) + tl.arange(0, BLOCK // _SCALED)
            if BLOCKS > 1:
                scale, _, _ = _scales(scales, place, readable, group, C.SCALES)
            k = _from_codes(keys, place, readable, scale, inverse, group, C.D, BLOCK)
        else:
            k = _values(keys, place, readable, block * BLOCK, C.D, BLOCK)
        products = _product(k, q, products, C.HALF)
    return products * power[:, None] if C.SCALES > 0 else products


@triton.jit
def _weighted(weights, sums, values, scales, place, readable, part, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """``sums`` [SLICE, N] and a slice of the tile's values, weighted."""
    SLICE: tl.constexpr = C.SLICE
    if C.SCALES > 0:
        group = part * (SLICE // _SCALED) + tl.arange(0, SLICE // _SCALED)
        scale, power, inverse = _scales(scales, place, readable, group, C.SCALES)
        v = _from_codes(values, place, readable, scale, inverse, group, C.D, SLICE)
        weights *= power[:, None]  # 0 for what a query does not see: its largest is of what it does see
        largest, inverse = half_scale(tl.max(weights, axis=0))
        sums += tl.dot(tl.trans(v), (weights * inverse[None, :]).to(tl.float16)) * largest[None, :]
    else:
        v = _values(values, place, readable, part * SLICE, C.D, SLICE)
        sums = _product(tl.trans(v), weights.to(tl.float16) if C.HALF else weights, sums, C.HALF)
    return sums


@triton.jit
def _bent(scores, at, own, slope, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a layer makes of its scores."""
    if C.CAP > 0:
        scores = tanh(scores / C.CAP) * C.CAP
    if C.SLOPED:
        scores = scores - slope[None, :] * tl.abs(at[:, None] - own[None, :]).to(tl.float32)
    return scores


@triton.jit
def _piece(piece, begin, end, queries, kv, part, C: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The record of a piece, over positions ``begin`` ... ``end`` - 1 alone: [N], [N] and, for slice ``part``, [SLICE, N]."""
    SLICE: tl.constexpr = C.SLICE
    _q, _q_at, _valid, _inverse, factor, slope, own = queries
    pages, kv_head, keys, values, k_scales, v_scales = kv
    top = tl.full([N], _LOWEST, tl.float32)
    total = tl.zeros([N], tl.float32)
    sums = tl.zeros([SLICE, N], tl.float32)
    from_tile = tl.maximum(piece * PIECE, begin // TILE * TILE)
    for start in range(from_tile, tl.minimum(piece * PIECE + PIECE, end), TILE):
        at = start + tl.arange(0, TILE)
        readable = (at >= begin) & (at < end)
        page = tl.load(pages + at // _PAGE, mask=readable, other=0).to(tl.int64)
        place = (page * C.KV_HEADS + kv_head) * _PAGE + at % _PAGE
        scores = _scores(queries, keys, k_scales, place, readable, C, N)
        scores = _bent(scores * factor[None, :], at, own, slope, C)
        seen = readable[:, None] & (own >= 0)[None, :]
        if C.CAUSAL:
            seen &= at[:, None] <= own[None, :]
        if C.WINDOW > 0:
            seen &= at[:, None] > own[None, :] - C.WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        largest = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp(scores - largest[None, :])
        shrink = tl.exp(top - largest)
        total = total * shrink + tl.sum(weights, axis=0)
        sums = _weighted(weights, sums * shrink[None, :], values, v_scales, place, readable, part, C)
        top = largest
    return top, total, sums


@triton.jit
def _store(out, out_stride, largest, largest_stride, result, valid, row, head, part, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Slice ``part`` of the output of some queries, [SLICE, n], and its largest magnitudes."""
    SLICE: tl.constexpr = C.SLICE
    d = part * SLICE + tl.arange(0, SLICE)
    at = out + row.to(tl.int64) * out_stride + head * C.D
    tl.store(at[None, :] + d[:, None], result, mask=valid[None, :] & (d < C.D)[:, None])
    if largest is not None:
        at = largest + (head * C.SLICES + part).to(tl.int64) * largest_stride + row
        tl.store(at, tl.max(tl.abs(result), axis=0), mask=valid)


@triton.jit
def _record(tops, records, place, there, d, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The record at each place [n, 1], for dims d [1, SLICE]; others wrote it: it is not read from a cache that may be older. One that
    is not there says that nothing is seen."""
    top = tl.load(tops + 2 * place, mask=there, other=_LOWEST, cache_modifier=".cg")
    total = tl.load(tops + 2 * place + 1, mask=there, other=0.0, cache_modifier=".cg")
    sums = tl.load(records + place * D + d, mask=there & (d < D), other=0.0, cache_modifier=".cg")
    return top, total, sums


@triton.jit
def _folded(tops, records, place, apart, valid, count, part, C: tl.constexpr, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """What ``count`` records of each query mean together, from ``place`` [FOLD] on, so far ``apart``, in their order: [SLICE, FOLD].
    Four are read at a time, so that memory is not waited for at each."""
    D: tl.constexpr = C.D
    SLICE: tl.constexpr = C.SLICE
    place, valid, d = place[:, None], valid[:, None], part * SLICE + tl.arange(0, SLICE)[None, :]
    end = place + count * apart
    top = tl.full([FOLD, 1], _LOWEST, tl.float32)
    total = tl.zeros([FOLD, 1], tl.float32)
    sums = tl.zeros([FOLD, SLICE], tl.float32)
    for i in range(0, count, 4):
        a = place + i * apart
        b, c, e = a + apart, a + 2 * apart, a + 3 * apart
        top_a, total_a, sums_a = _record(tops, records, a, valid, d, D)
        top_b, total_b, sums_b = _record(tops, records, b, valid & (b < end), d, D)
        top_c, total_c, sums_c = _record(tops, records, c, valid & (c < end), d, D)
        top_e, total_e, sums_e = _record(tops, records, e, valid & (e < end), d, D)
        top, total, sums = _fold(top, total, sums, top_a, total_a, sums_a)
        top, total, sums = _fold(top, total, sums, top_b, total_b, sums_b)
        top, total, sums = _fold(top, total, sums, top_c, total_c, sums_c)
        top, total, sums = _fold(top, total, sums, top_e, total_e, sums_e)
    return tl.trans(_attended(total, sums))


@triton.jit
def _split(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    out,
    out_stride,
    largest,
    largest_stride,
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
    arrived,
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    FOLD: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Some pieces for up to N queries of a single or a short and SLICE dims: to records, which the last program folds, FOLD queries
    at a time; or to ``out`` if there is one piece. The programs along the last axis take turns; how many there are is no constant,
    or each number of singles would have a kernel of its own."""
    wait_for_earlier(PDL)
    G: tl.constexpr = C.HEADS // C.KV_HEADS
    SLICE: tl.constexpr = C.SLICE
    sequence, base, rows, record, kv_head, tile, part = _work(items, C, N, ROWS)
    begin, end = _seen(tl.load(positions + base), rows, tile, tl.load(kv_len + sequence), C, N)
    first_piece, last_piece = begin // PIECE, tl.maximum(begin, end - 1) // PIECE
    pieces = last_piece - first_piece + 1
    programs = tl.minimum(pieces, tl.num_programs(2))
    if (tile * N < rows * G) & (tl.program_id(2) < programs):
        queries = _queries(q, q_stride, positions, slopes, base, rows, kv_head, tile, C, N)
        valid, row, head = _of_tile(base, rows, kv_head, tile, C, N)
        pages = page_table + (sequence * C.GROUPS + C.GROUP) * tl.load(table_stride)
        kv = pages, kv_head, keys, values, k_scales, v_scales
        for piece in range(first_piece + tl.program_id(2), last_piece + 1, programs):
            top, total, sums = _piece(piece, begin, end, queries, kv, part, C, N)
            if record < 0:
                result = _attended(total[None, :], sums)
                _store(out, out_stride, largest, largest_stride, result, valid, row, head, part, C)
            else:
                d = part * SLICE + tl.arange(0, SLICE)
                place = (record + piece * rows + row - base) * C.HEADS + head
                tl.store(records + place[None, :] * C.D + d[:, None], sums, mask=valid[None, :] & (d < C.D)[:, None])
                tl.store(tops + 2 * place, top, mask=valid)  # the same whichever slice it comes with
                tl.store(tops + 2 * place + 1, total, mask=valid)
        if record >= 0:  # not `and`: that would count where there is no record, too
            last = is_last(arrived + record * tl.num_programs(1) + tl.program_id(1), programs)
            if last:
                for flat in range(tile * N, tl.minimum(tile * N + N, rows * G), FOLD):
                    there, of_row, of_head = _of_tile(base, rows, kv_head, flat // FOLD, C, FOLD)
                    place = (record + first_piece * rows + of_row - base) * C.HEADS + of_head
                    result = _folded(tops, records, place, rows * C.HEADS, there, pieces, part, C, FOLD)
                    _store(out, out_stride, largest, largest_stride, result, there, of_row, of_head, part, C)


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    q,
    q_stride,
    out,
    out_stride,
    largest,
    largest_stride,
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
    C: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """All pieces for up to N queries of a chunk and SLICE dims, folded as they come."""
    wait_for_earlier(PDL)
    G: tl.constexpr = C.HEADS // C.KV_HEADS
    SLICE: tl.constexpr = C.SLICE
    sequence, base, rows, _record, kv_head, tile, part = _work(items, C, N, ROWS)
    if tile * N < rows * G:
        begin, end = _seen(tl.load(positions + base), rows, tile, tl.load(kv_len + sequence), C, N)
        queries = _queries(q, q_stride, positions, slopes, base, rows, kv_head, tile, C, N)
        pages = page_table + (sequence * C.GROUPS + C.GROUP) * tl.load(table_stride)
        kv = pages, kv_head, keys, values, k_scales, v_scales
        top = tl.full([1, N], _LOWEST, tl.float32)
        total = tl.zeros([1, N], tl.float32)
        sums = tl.zeros([SLICE, N], tl.float32)
        for piece in range(begin // PIECE, (end + PIECE - 1) // PIECE):
            next_top, next_total, next_sums = _piece(piece, begin, end, queries, kv, part, C, N)
            top, total, sums = _fold(top, total, sums, next_top[None, :], next_total[None, :], next_sums)
        valid, row, head = _of_tile(base, rows, kv_head, tile, C, N)
        result = _attended(total, sums)
        _store(out, out_stride, largest, largest_stride, result, valid, row, head, part, C)
