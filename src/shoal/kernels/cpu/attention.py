"""Attention over the pages of the KV cache: causal, or (encoders) of every row to all of its sequence.

A page holds 16 positions of every KV head; the *unit* of one KV head is

    K   [head_dim][16 positions]     scores of 16 positions come from broadcasts and FMAs
    V   [16 positions][head_dim]     (head_dim rounded up to 16)

as float16, float32 or (q8_0) int8; the latter with a float16 scale for 32 dims of a position, as llama.cpp's type of that name, in
front: [head_dim / 32][16 positions]. Arithmetic is float32 in every case.

KV is cut into pieces of 256 positions, counted from the start of the sequence. A piece gives each query a *record*: the largest
score, the sum of exp(score - largest), and the V rows weighted so. Records are folded in the order of the pieces. As a record
depends on query and piece alone, it does not matter who makes it: one task walks all pieces of its queries, or each piece is a
task of its own and `merge` folds what they leave in the workspace. What lies past a query's position adds exact zeros.

With a sliding window nothing is read before the page of the first position that a tile sees: those pages may belong to others by
then. What lies between there and a query's own window adds exact zeros too, and a piece that is all hidden is folded away without
a trace, so that it makes no difference which rows share a tile.

Queries are worked on in *tiles* that share every load of K and V: the query heads of a KV head for a single row, neighbouring
rows of one query head otherwise. A tile that is not full computes what lies behind its last query, and drops it: so a few rows
(drafts, the end of a prompt) are worked on one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from shoal.kernels.cpu.isa import HAS
from shoal.kernels.cpu.jit import Lazy, inline, kernel, specialised
from shoal.kernels.cpu.simd import (
    Address,
    Scalar,
    Shape,
    add,
    call_kernel,
    count_from,
    div,
    exp,
    fma,
    hide,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i8x16,
    load_i32,
    load_i64,
    max_lanes,
    maximum,
    mul,
    prefetch,
    scratch,
    splat,
    store_f32,
    store_f32x16,
    store_i32,
    store_i64,
    sub,
    sum_lanes,
    tanh,
    tile_fma,
    tile_fma_lanes,
    tile_hide,
    tile_load,
    tile_maximum,
    tile_splat,
    tile_store,
    tile_zero,
    to_f32,
)

PAGE = 16
PIECE = 256
_AHEAD = 4 * PAGE  # KV is asked for so many positions ahead: 8 KiB of K for a head of 64
MAX_HEAD_DIM = 576  # of latent attention: 64 rotated and 512 others
# Queries in a tile of rows, and the most in a tile of heads: their sums, two vectors of 16 lanes each, fit the registers.
MAX_TILE = 8 if HAS.vectors >= 32 else 3
QUERY_BLOCK = 24  # rows of one task
UNBOUNDED = 1 << 40  # more positions than there are

# Arguments, int64 each.
(
    STEP,  # address of the step header (below)
    QKV,  # float32 rows: q heads, k heads, v heads
    QKV_STRIDE,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    SCALE,  # address of the score scale, float32
    CAUSAL,  # 1: a query sees positions up to its own; 0: all of its sequence, all of whose rows are in the step
    WINDOW,  # positions that a query sees; UNBOUNDED: all up to its own
    PLAIN,  # how many of them, its own and those just before, need no `bend`
    CAP,  # address of the soft cap, float32; 0 in it: none
    SLOPES,  # float32 [heads]
    KV_GROUP,  # which of the step's page tables is this layer's
    K,  # this layer's first K page
    V,  # this layer's first V page
    UNIT_BYTES,
    DATA,  # where a unit's values begin, behind its scales
    VALUE_BYTES,
    RECORD_BYTES,
    COS,  # float32 [positions, table width] (see rotary.py)
    SIN,
    TABLE_WIDTH,
    PAIRS,  # 0: nothing turns
    NEOX,
    OUT,  # float32 rows: heads * head_dim
    OUT_STRIDE,
    TASKS,  # int32 [tasks, 8] (below)
    TASK_COUNT,  # address of the number of tasks
    MERGES,  # int32 [merges, 4] (below)
    MERGE_COUNT,  # address of the number of merges
    FEW,  # fewer neighbouring rows than this are single rows
    TASKS_WANTED,  # tasks of single rows, so that every thread has some
    SLOTS,  # workspace for records: how many slots, address of the first, bytes of one
    SLOT_START,
    SLOT_BYTES,
    ROW_TILE,  # for tasks of one row: queries in a tile, addresses of the kernels `score` and `weigh`
    ROW_SCORE,
    ROW_WEIGH,
    BLOCK_SCORE,  # for tasks of several rows
    BLOCK_WEIGH,
    BEND,  # address of the kernel `bend`, if the layer needs it
) = (8 * i for i in range(41))
ATTENTION_FIELDS = 41

# The step header: first the row space, then addresses and sizes of what the step is made of.
(ROWS, ROWS_PER_CHUNK, ROW_CHUNKS, SEQS, TOKENS, POSITIONS, ROW_START, KV_LEN) = (8 * i for i in range(8))
# The page tables, and the bytes from one KV group to the next, from one sequence to the next.
(PAGE_TABLE, GROUP_STRIDE, SEQUENCE_STRIDE) = (8 * i for i in range(8, 11))
STEP_FIELDS = 11

# A task: all query heads of some KV heads in one row, or one query head in several rows; and all pieces, or some of them in a row:
# their records go to slots.
(SEQUENCE, HEAD, HEAD_COUNT, ROW, ROW_COUNT, FIRST, PIECES, SLOT) = (4 * i for i in range(8))
TASK_BYTES = 32
# A merge: the pieces of one row and KV head lie in neighbouring slots.
(MERGE_ROW, MERGE_HEAD, MERGE_SLOT, MERGE_PIECES) = (4 * i for i in range(4))
MERGE_BYTES = 16
# A record: largest score, sum, and from the next cache line on the dims.
SUM, DIMS = 4, 64
# Memory of a task, in KiB: what follows here, scores, records of a tile.
_WORK, _SCORES, _RECORDS = (0,), (0,) * 9, (0,) * -(-MAX_TILE * (DIMS + 4 * MAX_HEAD_DIM) // 1024)

# What a task works on, int64 each: a tile of queries (query t sees the first SEEN + t * MORE positions, or the last WINDOW of
# them) and a piece of KV.
(
    QUERIES,  # address of the tile's first query
    QUERY_STRIDE,
    RESULTS,  # where its attention goes
    RESULT_STRIDE,
    TILE,  # queries in a full tile
    COUNT,  # queries in this one
    LEFT,  # queries left, this tile's too
    SEEN,
    MORE,
    OWN,  # the first query's own position, and what the next one's is more
    OWN_MORE,
    SLOPE,  # address of the first query's slope
    SLOPE_STRIDE,
    BEGIN,  # the first position of the piece that is scored
    END,  # one past its last
    START,  # the first position of the first page that the tile sees
    LAST,  # the last position that the tile sees
    BENT,  # scores of positions before it need `bend`
    TABLE,  # the sequence's page table
    KEYS,  # the KV head's K unit in page 0
    VALUES,  # ... and its V unit
    PAGE_BYTES,
    SCORES,  # scores [queries, 256], and behind them the largest of each query, lane by lane
    RECORDS,  # where the piece's records go
    SCORE_KERNEL,
    WEIGH_KERNEL,
) = (8 * i for i in range(26))
_SCORE_STRIDE = 4 * PIECE
_BEST = 8 * _SCORE_STRIDE
_SCALED = _BEST + 8 * 64  # weights of a page times scales of V
_LOWEST = -1e30  # the largest score where nothing is seen: exp(-infinity - it) is 0

GROUP = 32  # dims that share a scale
PAIR = 2 * PAGE  # positions that are scored together
F16, F32, Q8 = range(3)


@dataclass(frozen=True, slots=True)
class Storage:
    """How values lie in a unit. ``scale_bytes`` is the scale of 32 dims of a position."""

    kind: int
    value_bytes: int
    scale_bytes: int

    def data(self, head_dim: int) -> int:
        """Where the values begin."""
        return PAGE * self.scale_bytes * -(-head_dim // GROUP)

    def unit_bytes(self, head_dim: int) -> int:
        """Size of a unit."""
        return self.data(head_dim) + PAGE * self.value_bytes * (-(-head_dim // 16) * 16)


STORAGE = {"f16": Storage(F16, 2, 0), "f32": Storage(F32, 4, 0), "q8_0": Storage(Q8, 1, 2)}


@inline
def padded(head_dim: int) -> Any:
    """Head size in the cache."""
    return (head_dim + 15) // 16 * 16


# --- which queries go together ---------------------------------------------------------------------------------------


@inline
def _add_task(args: Address, sequence: int, head: int, heads: int, row: int, rows: int) -> Any:
    """A task of all pieces; its address."""
    count = load_i64(args + TASK_COUNT)
    task = load_i64(args + TASKS) + TASK_BYTES * load_i64(count)
    store_i64(count, load_i64(count) + 1)
    store_i32(task + SEQUENCE, sequence)
    store_i32(task + HEAD, head)
    store_i32(task + HEAD_COUNT, heads)
    store_i32(task + ROW, row)
    store_i32(task + ROW_COUNT, rows)
    store_i32(task + PIECES, 0)
    return task


@inline
def _add_merge(args: Address, row: int, head: int, slot: int, pieces: int) -> None:
    count = load_i64(args + MERGE_COUNT)
    merge = load_i64(args + MERGES) + MERGE_BYTES * load_i64(count)
    store_i64(count, load_i64(count) + 1)
    store_i32(merge + MERGE_ROW, row)
    store_i32(merge + MERGE_HEAD, head)
    store_i32(merge + MERGE_SLOT, slot)
    store_i32(merge + MERGE_PIECES, pieces)


@inline
def _position(args: Address, row: int) -> Any:
    """The position of a row."""
    return load_i32(load_i64(load_i64(args + STEP) + POSITIONS) + 4 * row)


@inline
def _first_piece(args: Address, row: int) -> Any:
    """The first piece that a row sees."""
    return max(0, _position(args, row) + 1 - load_i64(args + WINDOW)) // PIECE


@inline
def _pieces(args: Address, row: int) -> Any:
    """How many pieces a row sees."""
    return _position(args, row) // PIECE + 1 - _first_piece(args, row)


@inline
def _plan_row(args: Address, sequence: int, row: int, longest: int, slot: int) -> Any:
    """Tasks of a single row, each of about ``longest`` pieces: several heads, or parts of one if there are slots for all its
    pieces. The first slot that is free after it."""
    kv_heads, pieces = load_i64(args + KV_HEADS), _pieces(args, row)
    heads, parts = max(1, longest // pieces), (pieces + longest - 1) // longest
    for h in range(0, kv_heads, heads):
        if parts == 1 or slot + pieces > load_i64(args + SLOTS):
            _add_task(args, sequence, h, min(heads, kv_heads - h), row, 1)
            continue
        _add_merge(args, row, h, slot, pieces)
        for part in range(parts):
            first, last = pieces * part // parts, pieces * (part + 1) // parts
            task = _add_task(args, sequence, h, 1, row, 1)
            store_i32(task + FIRST, _first_piece(args, row) + first)
            store_i32(task + PIECES, last - first)
            store_i32(task + SLOT, slot + first)
        slot += pieces
    return slot


@inline
def _longest(args: Address) -> Any:
    """The most pieces of a task, so that there are about as many tasks of single rows as are wanted."""
    step, total, few = load_i64(args + STEP), 0, load_i64(args + FEW)
    for s in range(load_i64(step + SEQS)):
        first, last = load_i32(load_i64(step + ROW_START) + 4 * s), load_i32(load_i64(step + ROW_START) + 4 * s + 4)
        if last - first < few:
            for row in range(first, last):
                total += load_i64(args + KV_HEADS) * _pieces(args, row)
    return max(1, total // load_i64(args + TASKS_WANTED))


@kernel
def plan(args: Address, chunk: int) -> None:
    """List the attention tasks of the step, and what is to be merged after them."""
    step = load_i64(args + STEP)
    store_i64(load_i64(args + TASK_COUNT), 0)
    store_i64(load_i64(args + MERGE_COUNT), 0)
    longest, few, slot = _longest(args), load_i64(args + FEW), 0
    for s in range(load_i64(step + SEQS)):
        first, last = load_i32(load_i64(step + ROW_START) + 4 * s), load_i32(load_i64(step + ROW_START) + 4 * s + 4)
        for row in range(first, last, QUERY_BLOCK):
            if last - row < few:
                for one in range(row, last):
                    slot = _plan_row(args, s, one, longest, slot)
            else:
                for h in range(load_i64(args + HEADS)):
                    _add_task(args, s, h, 1, row, min(QUERY_BLOCK, last - row))


# --- a piece ---------------------------------------------------------------------------------------------------------


@inline
def _read(kind: int, address: Address) -> Any:
    """16 values, without their scale."""
    if kind == F16:
        return load_f16x16(address)
    if kind == F32:
        return load_f32x16(address)
    return load_i8x16(address)


@inline
def _page(work: Address, units: Address, position: int) -> Any:
    """The unit of a position's page; of the last page for what lies past the last position."""
    page = min(position, load_i64(work + LAST)) // PAGE
    return units + load_i32(load_i64(work + TABLE) + 4 * page) * load_i64(work + PAGE_BYTES)


@inline
def _score(kind: int, shape: Shape, args: Address, work: Address) -> None:
    """Scores, two pages at a time, so that sums overlap (the second may be past the end: all hidden; the first may be before the
    window: `bend` hides it)."""
    q, stride, keys = load_i64(work + QUERIES), load_i64(work + QUERY_STRIDE), load_i64(work + KEYS)
    seen, more, start = load_i64(work + SEEN), load_i64(work + MORE), load_i64(work + START)
    begin, end = load_i64(work + BEGIN), load_i64(work + END)
    dims, data, column = load_i64(args + HEAD_DIM), load_i64(args + DATA), PAGE * load_i64(args + VALUE_BYTES)
    best = tile_splat(shape, _LOWEST)
    for position in range(begin, end, PAIR):
        k0, k1 = _page(work, keys, max(position, start)), _page(work, keys, position + PAGE)
        units, ahead = keys, position + _AHEAD
        if ahead >= end:  # then comes V
            units, ahead = load_i64(work + VALUES), ahead - end + begin
        ahead0, ahead1 = _page(work, units, ahead), _page(work, units, ahead + PAGE)
        a, b = tile_zero(shape), tile_zero(shape)
        for group in range(0, dims, GROUP):
            c, d = (tile_zero(shape), tile_zero(shape)) if kind == Q8 else (a, b)
            for dim in range(group, min(group + GROUP, dims)):
                at = data + dim * column
                prefetch(ahead0 + at)
                prefetch(ahead1 + at)
                c = tile_fma(c, _read(kind, k0 + at), q + 4 * dim, stride)
                d = tile_fma(d, _read(kind, k1 + at), q + 4 * dim, stride)
            if kind == Q8:  # scales of a group are 16 times 2 bytes
                c = tile_fma_lanes(a, c, load_f16x16(k0 + group))
                d = tile_fma_lanes(b, d, load_f16x16(k1 + group))
            a, b = c, d
        a, b = tile_hide(a, seen - position, more), tile_hide(b, seen - position - PAGE, more)
        best = tile_maximum(b, tile_maximum(a, best))
        scores = load_i64(work + SCORES) + 4 * (position - begin)
        tile_store(a, scores, _SCORE_STRIDE)
        tile_store(b, scores + 4 * PAGE, _SCORE_STRIDE)
    tile_store(best, load_i64(work + SCORES) + _BEST, 64)


@kernel
def bend(args: Address, work: Address) -> None:
    """Soft cap, ALiBi and window, for what the scores of a piece lack of them; then the largest of each query anew."""
    begin, end, cap = load_i64(work + BEGIN), load_i64(work + END), load_f32(load_i64(args + CAP))
    for t in range(load_i64(work + COUNT)):
        scores, seen = load_i64(work + SCORES) + _SCORE_STRIDE * t, load_i64(work + SEEN) + load_i64(work + MORE) * t
        slope = splat(load_f32(load_i64(work + SLOPE) + load_i64(work + SLOPE_STRIDE) * t))
        first, best = seen - load_i64(args + WINDOW), splat(_LOWEST)
        for position in range(begin, end, PAGE):
            at = scores + 4 * (position - begin)
            x = load_f32x16(at)
            if cap > 0.0:
                x = mul(tanh(div(x, splat(cap))), splat(cap))
            x = fma(to_f32(count_from(position - seen + 1)), slope, x)
            x = hide(x, first - position, seen - position)
            best = maximum(x, best)
            store_f32x16(at, x)
        store_f32x16(load_i64(work + SCORES) + _BEST + 64 * t, best)


@kernel
def bend_around(args: Address, work: Address) -> None:
    """ALiBi where queries see what lies before and behind them: the slope counts the distance either way."""
    begin, end, seen = load_i64(work + BEGIN), load_i64(work + END), load_i64(work + SEEN)
    for t in range(load_i64(work + COUNT)):
        scores, own = load_i64(work + SCORES) + _SCORE_STRIDE * t, load_i64(work + OWN) + load_i64(work + OWN_MORE) * t
        slope = splat(load_f32(load_i64(work + SLOPE) + load_i64(work + SLOPE_STRIDE) * t))
        zero, best = splat(0.0), splat(_LOWEST)
        for position in range(begin, end, PAGE):
            at = scores + 4 * (position - begin)
            behind = to_f32(count_from(position - own))
            distance = maximum(behind, sub(zero, behind))
            x = hide(fma(sub(zero, distance), slope, load_f32x16(at)), 0, seen - position)
            best = maximum(x, best)
            store_f32x16(at, x)
        store_f32x16(load_i64(work + SCORES) + _BEST + 64 * t, best)


@inline
def _soften(work: Address, record: int) -> None:
    """exp(score - largest) in place; largest and sum go to the records. Scores come in blocks of 32."""
    positions = load_i64(work + END) - load_i64(work + BEGIN)
    for t in range(load_i64(work + COUNT)):
        scores, into = load_i64(work + SCORES) + _SCORE_STRIDE * t, load_i64(work + RECORDS) + record * t
        best = max_lanes(load_f32x16(load_i64(work + SCORES) + _BEST + 64 * t))
        total, peak = splat(0.0), splat(best)
        for i in range(0, 4 * positions, 128):
            left, right = exp(sub(load_f32x16(scores + i), peak)), exp(sub(load_f32x16(scores + i + 64), peak))
            store_f32x16(scores + i, left)
            store_f32x16(scores + i + 64, right)
            total = add(total, add(left, right))
        store_f32(into, best)
        store_f32(into + SUM, sum_lanes(total))


@inline
def _weigh(kind: int, shape: Shape, args: Address, work: Address) -> None:
    """Sums of weight * v into the records, 32 dims at a time, so that sums overlap."""
    begin, end, values = load_i64(work + BEGIN), load_i64(work + END), load_i64(work + VALUES)
    start = load_i64(work + START)
    columns, data, size = padded(load_i64(args + HEAD_DIM)), load_i64(args + DATA), load_i64(args + VALUE_BYTES)
    scores, records, record = load_i64(work + SCORES), load_i64(work + RECORDS), load_i64(args + RECORD_BYTES)
    for c in range(0, columns, 32):
        beside = min(c + 16, columns - 16) - c  # 0 for a last single block, which is then computed twice
        left, right = tile_zero(shape), tile_zero(shape)
        for position in range(max(begin, start), end, PAGE):
            units, soon = values, position + _AHEAD
            if soon >= end:  # then come the keys of the next piece, or those of the next KV head
                units = load_i64(work + KEYS)
                if end > load_i64(work + LAST):
                    units, soon = units + load_i64(args + UNIT_BYTES), soon - end + start
            v, ahead = _page(work, values, position), _page(work, units, soon)
            weights, stride = scores + 4 * (position - begin), _SCORE_STRIDE
            if kind == Q8:  # weights times scales
                tile = tile_fma_lanes(tile_zero(shape), tile_load(shape, weights, stride), load_f16x16(v + c))
                weights, stride = scores + _SCALED, 64
                tile_store(tile, weights, stride)
            at = data + size * c
            for _ in range(min(PAGE, end - position)):
                prefetch(ahead + at)
                prefetch(ahead + at + 64)
                left = tile_fma(left, _read(kind, v + at), weights, stride)
                right = tile_fma(right, _read(kind, v + at + size * beside), weights, stride)
                at, weights = at + size * columns, weights + 4
        tile_store(left, records + DIMS + 4 * c, record)
        tile_store(right, records + DIMS + 4 * (c + beside), record)


KIND, SHAPE = 0, (0,)  # set for each kernel


def _score_tile(args: Address, work: Address) -> None:
    _score(KIND, SHAPE, args, work)


def _weigh_tile(args: Address, work: Address) -> None:
    _weigh(KIND, SHAPE, args, work)


@cache
def score(kind: int, tile: int) -> Lazy:
    """The kernel that scores a piece for a tile of so many queries: void f(arguments, work)."""
    return kernel(specialised(_score_tile, f"score_{kind}_{tile}", KIND=kind, SHAPE=(0,) * tile))


@cache
def weigh(kind: int, tile: int) -> Lazy:
    """The kernel that adds up V for a tile of so many queries: void f(arguments, work)."""
    return kernel(specialised(_weigh_tile, f"weigh_{kind}_{tile}", KIND=kind, SHAPE=(0,) * tile))


@inline
def _piece(args: Address, work: Address, piece: int, records: Address) -> None:
    """The records of the tile's queries for a piece. Scores begin at a whole pair of pages, wherever the window does: the order in
    which they are summed up must not depend on it."""
    begin = max(piece * PIECE, load_i64(work + START) // PAIR * PAIR)
    store_i64(work + BEGIN, begin)
    store_i64(work + END, min((piece + 1) * PIECE, load_i64(work + LAST) + 1))
    store_i64(work + RECORDS, records)
    call_kernel(load_i64(work + SCORE_KERNEL), args, work)
    if begin < load_i64(work + BENT):
        call_kernel(load_i64(args + BEND), args, work)
    _soften(work, load_i64(args + RECORD_BYTES))
    call_kernel(load_i64(work + WEIGH_KERNEL), args, work)


# --- records ---------------------------------------------------------------------------------------------------------


@inline
def _exp1(x: Scalar) -> Any:
    """exp of one float32."""
    return max_lanes(exp(splat(x)))


@inline
def _fold(records: Address, later: Address, count: int, record: int) -> None:
    """Take the records of a later piece into those of the pieces before it."""
    for t in range(0, count * record, record):
        a, b = records + t, later + t
        best = max(load_f32(a), load_f32(b))
        old, new = _exp1(load_f32(a) - best), _exp1(load_f32(b) - best)
        store_f32(a, best)
        store_f32(a + SUM, load_f32(a + SUM) * old + load_f32(b + SUM) * new)
        for i in range(DIMS, record, 64):
            store_f32x16(a + i, fma(load_f32x16(b + i), splat(new), mul(load_f32x16(a + i), splat(old))))


@inline
def _finish(args: Address, records: Address, count: int, out: Address, stride: int) -> None:
    """dims / sum of every query."""
    head_dim, record = load_i64(args + HEAD_DIM), load_i64(args + RECORD_BYTES)
    whole = 4 * (head_dim // 16 * 16)
    for t in range(count):
        dims, result, share = records + DIMS, out + stride * t, 1.0 / load_f32(records + SUM)
        for i in range(0, whole, 64):
            store_f32x16(result + i, mul(load_f32x16(dims + i), splat(share)))
        for i in range(whole, 4 * head_dim, 4):
            store_f32(result + i, load_f32(dims + i) * share)
        records += record


# --- tasks -----------------------------------------------------------------------------------------------------------


@inline
def _heads(args: Address, task: Address, head: int, work: Address) -> Any:
    """The query heads of KV head ``head``, in one row; that KV head."""
    group, head_bytes = load_i64(args + HEADS) // load_i64(args + KV_HEADS), 4 * load_i64(args + HEAD_DIM)
    row, first = load_i32(task + ROW), head * group * head_bytes
    store_i64(work + QUERIES, load_i64(args + QKV) + row * load_i64(args + QKV_STRIDE) + first)
    store_i64(work + RESULTS, load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE) + first)
    store_i64(work + QUERY_STRIDE, head_bytes)
    store_i64(work + RESULT_STRIDE, head_bytes)
    store_i64(work + TILE, load_i64(args + ROW_TILE))
    store_i64(work + LEFT, group)
    store_i64(work + MORE, 0)
    store_i64(work + OWN_MORE, 0)
    store_i64(work + SLOPE, load_i64(args + SLOPES) + 4 * head * group)
    store_i64(work + SLOPE_STRIDE, 4)
    store_i64(work + SCORE_KERNEL, load_i64(args + ROW_SCORE))
    store_i64(work + WEIGH_KERNEL, load_i64(args + ROW_WEIGH))
    return head


@inline
def _rows(args: Address, task: Address, head: int, work: Address) -> Any:
    """Query head ``head`` of the task's rows; its KV head."""
    row, first = load_i32(task + ROW), head * 4 * load_i64(args + HEAD_DIM)
    store_i64(work + QUERIES, load_i64(args + QKV) + row * load_i64(args + QKV_STRIDE) + first)
    store_i64(work + RESULTS, load_i64(args + OUT) + row * load_i64(args + OUT_STRIDE) + first)
    store_i64(work + QUERY_STRIDE, load_i64(args + QKV_STRIDE))
    store_i64(work + RESULT_STRIDE, load_i64(args + OUT_STRIDE))
    store_i64(work + TILE, MAX_TILE)
    store_i64(work + LEFT, load_i32(task + ROW_COUNT))
    store_i64(work + MORE, load_i64(args + CAUSAL))
    store_i64(work + OWN_MORE, 1)
    store_i64(work + SLOPE, load_i64(args + SLOPES) + 4 * head)
    store_i64(work + SLOPE_STRIDE, 0)
    store_i64(work + SCORE_KERNEL, load_i64(args + BLOCK_SCORE))
    store_i64(work + WEIGH_KERNEL, load_i64(args + BLOCK_WEIGH))
    return head // (load_i64(args + HEADS) // load_i64(args + KV_HEADS))


@inline
def page_table(args: Address, sequence: int) -> Address:
    """Where the pages of a sequence are listed for this layer."""
    step = load_i64(args + STEP)
    group = load_i64(step + PAGE_TABLE) + load_i64(args + KV_GROUP) * load_i64(step + GROUP_STRIDE)
    table: Address = group + sequence * load_i64(step + SEQUENCE_STRIDE)
    return table


@inline
def _begin(args: Address, task: Address, head: int, work: Address) -> None:
    """One of the task's heads, and its first tile."""
    kv_head = _heads(args, task, head, work) if load_i32(task + ROW_COUNT) == 1 else _rows(args, task, head, work)
    unit = load_i64(args + UNIT_BYTES)
    store_i64(work + TABLE, page_table(args, load_i32(task + SEQUENCE)))
    store_i64(work + KEYS, load_i64(args + K) + kv_head * unit)
    store_i64(work + VALUES, load_i64(args + V) + kv_head * unit)
    store_i64(work + PAGE_BYTES, load_i64(args + KV_HEADS) * unit)
    store_i64(work + SCORES, scratch(_SCORES))
    store_i64(work + OWN, _position(args, load_i32(task + ROW)))
    store_i64(work + SEEN, load_i64(work + OWN) + 1)
    if load_i64(args + CAUSAL) == 0:
        step = load_i64(args + STEP)
        store_i64(work + SEEN, load_i32(load_i64(step + KV_LEN) + 4 * load_i32(task + SEQUENCE)))
    _size_tile(args, work)


@inline
def _size_tile(args: Address, work: Address) -> None:
    """How many queries the tile has, and what they see."""
    count, seen = min(load_i64(work + TILE), load_i64(work + LEFT)), load_i64(work + SEEN)
    last = seen + (count - 1) * load_i64(work + MORE) - 1
    store_i64(work + COUNT, count)
    store_i64(work + START, max(0, seen - load_i64(args + WINDOW)) // PAGE * PAGE)
    store_i64(work + LAST, last)
    store_i64(work + BENT, last + 1 - load_i64(args + PLAIN))


@inline
def _next_tile(args: Address, work: Address) -> None:
    done = load_i64(work + COUNT)
    store_i64(work + QUERIES, load_i64(work + QUERIES) + done * load_i64(work + QUERY_STRIDE))
    store_i64(work + RESULTS, load_i64(work + RESULTS) + done * load_i64(work + RESULT_STRIDE))
    store_i64(work + SEEN, load_i64(work + SEEN) + done * load_i64(work + MORE))
    store_i64(work + OWN, load_i64(work + OWN) + done * load_i64(work + OWN_MORE))
    store_i64(work + SLOPE, load_i64(work + SLOPE) + done * load_i64(work + SLOPE_STRIDE))
    store_i64(work + LEFT, load_i64(work + LEFT) - done)
    _size_tile(args, work)


@inline
def _tile(args: Address, task: Address, work: Address, slots: Address) -> None:
    """A tile's pieces one after another: their records go to ``slots``, or are folded at once if that is 0."""
    records, later = scratch(_RECORDS), scratch(_RECORDS)
    first, last, into = load_i64(work + START) // PIECE, load_i64(work + LAST) // PIECE + 1, records
    if slots != 0:
        first, into = load_i32(task + FIRST), slots
        last = first + load_i32(task + PIECES)
    for piece in range(first, last):
        _piece(args, work, piece, into)
        if slots != 0:
            into += load_i64(args + SLOT_BYTES)
        elif piece == first:
            into = later
        else:
            _fold(records, later, load_i64(work + COUNT), load_i64(args + RECORD_BYTES))
    if slots == 0:
        _finish(args, records, load_i64(work + COUNT), load_i64(work + RESULTS), load_i64(work + RESULT_STRIDE))


@inline
def _head(args: Address, task: Address, head: int, work: Address) -> None:
    """One of the task's heads, tile by tile."""
    _begin(args, task, head, work)
    slots = 0
    if load_i32(task + PIECES) > 0:
        slots = load_i64(args + SLOT_START) + load_i32(task + SLOT) * load_i64(args + SLOT_BYTES)
    while load_i64(work + LEFT) > 0:
        _tile(args, task, work, slots)
        if slots != 0:
            slots += load_i64(work + COUNT) * load_i64(args + RECORD_BYTES)
        _next_tile(args, work)


@kernel
def attention(args: Address, chunk: int) -> None:
    """One task of the plan."""
    task, work = load_i64(args + TASKS) + TASK_BYTES * chunk, scratch(_WORK)
    for i in range(load_i32(task + HEAD_COUNT)):
        _head(args, task, load_i32(task + HEAD) + i, work)


@kernel
def merge(args: Address, chunk: int) -> None:
    """Fold the records of all pieces of a row and KV head, in order."""
    merge, slot_bytes = load_i64(args + MERGES) + MERGE_BYTES * chunk, load_i64(args + SLOT_BYTES)
    records = load_i64(args + SLOT_START) + load_i32(merge + MERGE_SLOT) * slot_bytes
    group, head_dim = load_i64(args + HEADS) // load_i64(args + KV_HEADS), load_i64(args + HEAD_DIM)
    for piece in range(1, load_i32(merge + MERGE_PIECES)):
        _fold(records, records + piece * slot_bytes, group, load_i64(args + RECORD_BYTES))
    first = 4 * load_i32(merge + MERGE_HEAD) * group * head_dim
    out = load_i64(args + OUT) + load_i32(merge + MERGE_ROW) * load_i64(args + OUT_STRIDE) + first
    _finish(args, records, group, out, 4 * head_dim)


def record_bytes(head_dim: int) -> int:
    """Size of a record."""
    return DIMS + 4 * (-(-head_dim // 16) * 16)


def row_tile(group: int) -> int:
    """Queries in a tile where ``group`` query heads share a KV head: they are dealt out evenly to as few tiles as can be."""
    return -(-group // -(-group // MAX_TILE))


def few_rows(group: int, causal: bool) -> int:
    """From how many neighbouring rows on it takes less time to work on them together than one by one, at most MAX_TILE + 1. Rows of
    an encoder see more than a single row does."""
    return next(
        n for n in range(2, MAX_TILE + 2) if not causal or n * _group_time(group) >= group * _tile_time(MAX_TILE)
    )


def _group_time(group: int) -> int:
    tile = row_tile(group)
    return -(-group // tile) * _tile_time(tile)


def _tile_time(tile: int) -> int:
    """Of a tile, for each dim: so many multiplications, or the wait for one's sum (lab log)."""
    return max(4 if MAX_TILE == 8 else 2, tile)
