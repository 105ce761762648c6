"""Rotary positions, the KV cache, and causal attention over its pages.

    K page   [kv head][head_dim][16 positions]     scores of 16 positions come from broadcasts and FMAs
    V page   [kv head][16 positions][head_dim]     (head_dim rounded up to 16)

Queries are worked on in tiles: the heads that share a KV head when decoding, neighbouring tokens in a prefill chunk. KV is walked in
pieces of 512 positions, counted from the start of the sequence; a piece has its own maximum, and pieces are folded in
order. What a query gets depends on its own position alone: later positions of the same piece add exact zeros.
"""

from __future__ import annotations

from typing import Any

from shoal.kernels.cpu.jit import Lazy, inline, kernel, shared
from shoal.kernels.cpu.simd import (
    Address,
    Function,
    Scalar,
    Shape,
    add,
    div,
    exp,
    fma,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    max_lanes,
    mul,
    rotate_pairs,
    scratch,
    splat,
    store_f16,
    store_f32,
    store_f32x16,
    store_i32,
    store_i64,
    sub,
    sum_lanes,
    tile_fma,
    tile_hide,
    tile_load,
    tile_maximum,
    tile_splat,
    tile_store,
    tile_zero,
)

Work = tuple[Address, int, int, int]  # step header, sequence, columns of a page, first column of the KV head
Span = tuple[int, int, int, int]  # first position, last + 1; query t sees the first (third + t * fourth) positions
PAGE = 16
PIECE = 512
QUERY_BLOCK = 16  # tokens of one task

# Arguments, int64 each.
(
    STEP,  # address of the step header (below)
    QKV,  # float32 rows: q heads, k heads, v heads
    QKV_STRIDE,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    SCALE,  # address of the score scale, float32
    K,  # this layer's first K page
    V,  # this layer's first V page
    COS,  # float32 [positions, table width] (see `rope_table`)
    SIN,
    TABLE_WIDTH,
    PAIRS,
    NEOX,
    OUT,  # float32 rows: heads * head_dim
    OUT_STRIDE,
    TASKS,  # int32 [tasks, 4]: sequence, kv head, first row, rows
    TASK_COUNT,  # address of the number of tasks
) = (8 * i for i in range(18))
ATTENTION_FIELDS = 18

# The step header: first the row space, then addresses and sizes of what the step is made of.
(ROWS, ROWS_PER_CHUNK, ROW_CHUNKS, SEQS, TOKENS, POSITIONS, ROW_START, KV_LEN, PAGE_TABLE, PAGE_TABLE_STRIDE) = (
    8 * i for i in range(10)
)
STEP_FIELDS = 10

_T8, _T4, _T3, _T2, _T1 = (0,) * 8, (0,) * 4, (0,) * 3, (0,) * 2, (0,)
MAX_HEAD_DIM = 256
_MINUS_INFINITY = -float("inf")
# Memory of one tile: scores [8 queries, 512], and its state: (maximum, sum) of 8 queries, best lanes [8, 16], dims [8, 256].
_SCORES, _STATE = (0,) * 16, (0,) * 9  # KiB
_BLOCKED = 4 * PIECE  # bytes of one query's scores
_BEST, _DIMS, _DIMS_STRIDE = 64, 64 + 8 * 64, 4 * MAX_HEAD_DIM


@inline
def _padded(head_dim: int) -> Any:
    return (head_dim + 15) // 16 * 16


@inline
def _page_of(step: Address, sequence: int, position: int) -> Any:
    table = load_i64(step + PAGE_TABLE) + sequence * load_i64(step + PAGE_TABLE_STRIDE)
    return load_i32(table + 4 * (position // PAGE))


# --- rotary positions and the cache ----------------------------------------------------------------------------------


@inline
def _rotate(args: Address, x: Address, position: int) -> None:
    """Turn one head in place."""
    pairs = load_i64(args + PAIRS)
    offset = 4 * position * load_i64(args + TABLE_WIDTH)
    cos, sin = load_i64(args + COS) + offset, load_i64(args + SIN) + offset
    if load_i64(args + NEOX) != 0:
        _rotate_halves(x, x + 4 * pairs, cos, sin, pairs)
    else:
        _rotate_neighbours(x, cos, sin, 2 * pairs)


@inline
def _rotate_neighbours(x: Address, cos: Address, sin: Address, dims: Address) -> None:
    """Pairs (2i, 2i + 1); the table holds c, c and -s, s for each."""
    whole = dims // 16 * 16
    for i in range(0, 4 * whole, 64):
        turned = rotate_pairs(load_f32x16(x + i), load_f32x16(cos + i), load_f32x16(sin + i))
        store_f32x16(x + i, turned)
    for i in range(4 * whole, 4 * dims, 8):
        a, b, c, s = load_f32(x + i), load_f32(x + i + 4), load_f32(cos + i), load_f32(sin + i + 4)
        store_f32(x + i, a * c - b * s)
        store_f32(x + i + 4, b * c + a * s)


@inline
def _rotate_halves(x: Address, y: Address, cos: Address, sin: Address, pairs: int) -> None:
    """Pairs (i, i + pairs); the table holds c and s once for each."""
    whole = pairs // 16 * 16
    for i in range(0, 4 * whole, 64):
        a, b, c, s = load_f32x16(x + i), load_f32x16(y + i), load_f32x16(cos + i), load_f32x16(sin + i)
        store_f32x16(x + i, sub(mul(a, c), mul(b, s)))
        store_f32x16(y + i, fma(a, s, mul(b, c)))
    for i in range(4 * whole, 4 * pairs, 4):
        a, b, c, s = load_f32(x + i), load_f32(y + i), load_f32(cos + i), load_f32(sin + i)
        store_f32(x + i, a * c - b * s)
        store_f32(y + i, b * c + a * s)


@inline
def _store_kv(store: Function, size: int, args: Address, k: Address, v: Address, page: int, offset: int) -> None:
    """One head's k down a column of its K page, its v along a row of its V page."""
    head_dim = load_i64(args + HEAD_DIM)
    row = load_i64(args + V) + size * (page * PAGE + offset * _padded(head_dim))
    column = load_i64(args + K) + size * (page * PAGE + offset)
    for d in range(head_dim):
        store(column + size * PAGE * d, load_f32(k + 4 * d))
        store(row + size * d, load_f32(v + 4 * d))


@inline
def _rope_row(store: Function, size: int, args: Address, row: int, sequence: int) -> None:
    """Turn and scale the q heads of a row, turn its k heads, and put k and v in the cache."""
    step, head_dim = load_i64(args + STEP), load_i64(args + HEAD_DIM)
    heads, kv_heads = load_i64(args + HEADS), load_i64(args + KV_HEADS)
    position = load_i32(load_i64(step + POSITIONS) + 4 * row)
    x = load_i64(args + QKV) + row * load_i64(args + QKV_STRIDE)
    for h in range(heads + kv_heads):
        _rotate(args, x + 4 * h * head_dim, position)
    scale = load_f32(load_i64(args + SCALE))
    for i in range(0, 4 * heads * head_dim, 4):
        store_f32(x + i, load_f32(x + i) * scale)
    # The unit of K and V pages is a column of 16 positions: page * kv_heads + head, times the padded head size.
    page = _page_of(step, sequence, position)
    k = x + 4 * heads * head_dim
    for h in range(kv_heads):
        unit = (page * kv_heads + h) * _padded(head_dim)
        _store_kv(store, size, args, k + 4 * h * head_dim, k + 4 * (kv_heads + h) * head_dim, unit, position % PAGE)


@inline
def _rope_store(store: Function, size: int, args: Address, chunk: int) -> None:
    step = load_i64(args + STEP)
    rows, per_chunk = load_i64(step + ROWS), load_i64(step + ROWS_PER_CHUNK)
    starts, sequence = load_i64(step + ROW_START), 0
    for row in range(chunk * per_chunk, min((chunk + 1) * per_chunk, rows)):
        while load_i32(starts + 4 * (sequence + 1)) <= row:
            sequence += 1
        _rope_row(store, size, args, row, sequence)


@kernel
def rope_store_f16(args: Address, chunk: int) -> None:
    """Rotary positions, and k and v into float16 pages."""
    _rope_store(store_f16, 2, args, chunk)


@kernel
def rope_store_f32(args: Address, chunk: int) -> None:
    """Rotary positions, and k and v into float32 pages."""
    _rope_store(store_f32, 4, args, chunk)


# --- which queries go together ---------------------------------------------------------------------------------------


@kernel
def plan(args: Address, chunk: int) -> None:
    """List the attention tasks of the step: for each sequence and KV head, blocks of up to 16 tokens."""
    step, task = load_i64(args + STEP), load_i64(args + TASKS)
    count = 0
    for s in range(load_i64(step + SEQS)):
        first, last = load_i32(load_i64(step + ROW_START) + 4 * s), load_i32(load_i64(step + ROW_START) + 4 * s + 4)
        for row in range(first, last, QUERY_BLOCK):
            for h in range(load_i64(args + KV_HEADS)):
                store_i32(task, s)
                store_i32(task + 4, h)
                store_i32(task + 8, row)
                store_i32(task + 12, min(QUERY_BLOCK, last - row))
                task += 16
                count += 1
    store_i64(load_i64(args + TASK_COUNT), count)


# --- attention of a tile of queries ----------------------------------------------------------------------------------
# A tile's query t sees the first ``seen + t * more`` positions: more = 1 for neighbouring tokens, 0 for heads of one token.


@inline
def _k_page(size: int, args: Address, work: Work, position: int) -> Any:
    """Address of the K page that holds a position."""
    step, sequence, unit_stride, unit = work
    return load_i64(args + K) + size * PAGE * (_page_of(step, sequence, position) * unit_stride + unit)


@inline
def _v_page(size: int, args: Address, work: Work, position: int) -> Any:
    """Address of the V page that holds a position."""
    step, sequence, unit_stride, unit = work
    return load_i64(args + V) + size * PAGE * (_page_of(step, sequence, position) * unit_stride + unit)


@inline
def _score_piece(
    load: Function,
    size: int,
    shape: Shape,
    args: Address,
    work: Work,
    q: Address,
    q_stride: Address,
    span: Span,
    scores: Address,
) -> Any:
    """Scores of a span's positions into ``scores`` [queries, 512], two pages at a time so that sums overlap; the largest of
    each query, lane by lane. What lies past a query's last position is -infinity (the second page may be all of that)."""
    first, last, seen, more = span
    best = tile_splat(shape, _MINUS_INFINITY)
    for position in range(first, last, 2 * PAGE):
        k0 = _k_page(size, args, work, position)
        k1 = _k_page(size, args, work, min(position + PAGE, last - 1))
        a, b = tile_zero(shape), tile_zero(shape)
        for d in range(load_i64(args + HEAD_DIM)):
            a = tile_fma(a, load(k0 + size * PAGE * d), q + 4 * d, q_stride)
            b = tile_fma(b, load(k1 + size * PAGE * d), q + 4 * d, q_stride)
        a, b = tile_hide(a, seen - position, more), tile_hide(b, seen - position - PAGE, more)
        best = tile_maximum(b, tile_maximum(a, best))
        tile_store(a, scores + 4 * (position - first), _BLOCKED)
        tile_store(b, scores + 4 * (position - first + PAGE), _BLOCKED)
    return best


@inline
def _soften(scores: Address, best: Scalar, count: int) -> Any:
    """exp(score - best) in place for ``count`` positions (a multiple of 32); their sum."""
    total, peak = splat(0.0), splat(best)
    for i in range(0, 4 * count, 64):
        e = exp(sub(load_f32x16(scores + i), peak))
        store_f32x16(scores + i, e)
        total = add(total, e)
    return sum_lanes(total)


@inline
def _weigh(
    load: Function, size: int, shape: Shape, args: Address, work: Work, span: Span, dims: Address, scores: Address
) -> None:
    """Add weight * v over a span's positions to ``dims`` [queries, head_dim], 32 dims at a time so that sums overlap."""
    first, last, _, _ = span
    columns = _padded(load_i64(args + HEAD_DIM))
    for c in range(0, columns, 32):
        beside = min(c + 16, columns - 16) - c  # 0 for a last single block, which is then computed twice
        left, right = (
            tile_load(shape, dims + 4 * c, _DIMS_STRIDE),
            tile_load(shape, dims + 4 * (c + beside), _DIMS_STRIDE),
        )
        for position in range(first, last, PAGE):
            v = _v_page(size, args, work, position) + size * c
            for i in range(min(PAGE, last - position)):
                weights = scores + 4 * (position - first + i)
                left = tile_fma(left, load(v + i * size * columns), weights, _BLOCKED)
                right = tile_fma(right, load(v + size * (i * columns + beside)), weights, _BLOCKED)
        tile_store(left, dims + 4 * c, _DIMS_STRIDE)
        tile_store(right, dims + 4 * (c + beside), _DIMS_STRIDE)


@inline
def _exp1(x: Scalar) -> Any:
    """exp of one float32."""
    return max_lanes(exp(splat(x)))


@shared
def _start(queries: int, state: Address, columns: int) -> None:
    """Nothing seen yet: maximum -infinity, sum 0, dims 0."""
    for t in range(queries):
        store_f32(state + 8 * t, _MINUS_INFINITY)
        store_f32(state + 8 * t + 4, 0.0)
        for i in range(0, 4 * columns, 64):
            store_f32x16(state + _DIMS + _DIMS_STRIDE * t + i, splat(0.0))


@shared
def _rescale(queries: int, state: Address, scores: Address, count: int, columns: int) -> None:
    """Take the maxima of a piece into the state: its scores become weights relative to each query's new maximum."""
    for t in range(queries):
        before = load_f32(state + 8 * t)
        peak = max(before, max_lanes(load_f32x16(state + _BEST + 64 * t)))
        total = _soften(scores + _BLOCKED * t, peak, count)
        old = _exp1(before - peak)
        store_f32(state + 8 * t, peak)
        store_f32(state + 8 * t + 4, load_f32(state + 8 * t + 4) * old + total)
        dims, factor = state + _DIMS + _DIMS_STRIDE * t, splat(old)
        for c in range(0, 4 * columns, 64):
            store_f32x16(dims + c, mul(load_f32x16(dims + c), factor))


@shared
def _finish(queries: int, state: Address, out: Address, out_stride: Address, head_dim: int) -> None:
    """dims / sum of every query."""
    whole = head_dim // 16 * 16
    for t in range(queries):
        dims, total = state + _DIMS + _DIMS_STRIDE * t, load_f32(state + 8 * t + 4)
        for i in range(0, 4 * whole, 64):
            store_f32x16(out + t * out_stride + i, div(load_f32x16(dims + i), splat(total)))
        for i in range(4 * whole, 4 * head_dim, 4):
            store_f32(out + t * out_stride + i, load_f32(dims + i) / total)


@inline
def _attend(
    load: Function,
    size: int,
    shape: Shape,
    args: Address,
    work: Work,
    q: Address,
    q_stride: Address,
    out: Address,
    out_stride: Address,
    seen: int,
    more: int,
) -> None:
    """Attention of a tile of len(shape) queries."""
    head_dim = load_i64(args + HEAD_DIM)
    columns, end = _padded(head_dim), seen + (len(shape) - 1) * more
    scores, state = scratch(_SCORES), scratch(_STATE)
    _start(len(shape), state, columns)
    for first in range(0, end, PIECE):
        span = (first, min(first + PIECE, end), seen, more)
        best = _score_piece(load, size, shape, args, work, q, q_stride, span, scores)
        tile_store(best, state + _BEST, 64)
        _rescale(len(shape), state, scores, (span[1] - first + 31) // 32 * 32, columns)
        _weigh(load, size, shape, args, work, span, state + _DIMS, scores)
    _finish(len(shape), state, out, out_stride, head_dim)


@inline
def _tiles(
    load: Function,
    size: int,
    args: Address,
    work: Work,
    q: Address,
    q_stride: Address,
    out: Address,
    out_stride: Address,
    count: int,
    seen: int,
    more: int,
) -> None:
    """Attention of ``count`` queries, in tiles."""
    while count > 0:
        if count >= 8:
            done = 8
            _attend(load, size, _T8, args, work, q, q_stride, out, out_stride, seen, more)
        elif count >= 4:
            done = 4
            _attend(load, size, _T4, args, work, q, q_stride, out, out_stride, seen, more)
        elif count == 3:
            done = 3
            _attend(load, size, _T3, args, work, q, q_stride, out, out_stride, seen, more)
        elif count == 2:
            done = 2
            _attend(load, size, _T2, args, work, q, q_stride, out, out_stride, seen, more)
        else:
            done = 1
            _attend(load, size, _T1, args, work, q, q_stride, out, out_stride, seen, more)
        q, out, seen, count = q + done * q_stride, out + done * out_stride, seen + done * more, count - done


@inline
def _task(load: Function, size: int, args: Address, chunk: int) -> None:
    """One task of the plan: the heads of one token, or neighbouring tokens head by head."""
    step, task = load_i64(args + STEP), load_i64(args + TASKS) + 16 * chunk
    sequence, kv_head, row, rows = load_i32(task), load_i32(task + 4), load_i32(task + 8), load_i32(task + 12)
    kv_heads, head_bytes = load_i64(args + KV_HEADS), 4 * load_i64(args + HEAD_DIM)
    padded = _padded(load_i64(args + HEAD_DIM))
    work = (step, sequence, kv_heads * padded, kv_head * padded)
    group = load_i64(args + HEADS) // kv_heads
    seen = load_i32(load_i64(step + POSITIONS) + 4 * row) + 1
    q_stride, out_stride = load_i64(args + QKV_STRIDE), load_i64(args + OUT_STRIDE)
    q = load_i64(args + QKV) + row * q_stride + kv_head * group * head_bytes
    out = load_i64(args + OUT) + row * out_stride + kv_head * group * head_bytes
    turns, more = group, 1
    if rows == 1:
        turns, more, rows, q_stride, out_stride = 1, 0, group, head_bytes, head_bytes
    for g in range(turns):
        _tiles(load, size, args, work, q + g * head_bytes, q_stride, out + g * head_bytes, out_stride, rows, seen, more)


@kernel
def attention_f16(args: Address, chunk: int) -> None:
    """One attention task over float16 pages."""
    _task(load_f16x16, 2, args, chunk)


@kernel
def attention_f32(args: Address, chunk: int) -> None:
    """One attention task over float32 pages."""
    _task(load_f32x16, 4, args, chunk)


ROPE_STORE: dict[str, Lazy] = {"f16": rope_store_f16, "f32": rope_store_f32}
ATTENTION: dict[str, Lazy] = {"f16": attention_f16, "f32": attention_f32}
