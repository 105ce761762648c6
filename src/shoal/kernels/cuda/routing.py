"""Which experts a token goes to, and with what weights: ``reference.choose_experts``."""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.base import Routing
from shoal.kernels.cuda.activation import sigmoid
from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.launch import Tensor, launch
from shoal.kernels.cuda.rows import row_tiles, rows_of_program


def choose(logits: Tensor, routing: Routing, bias: Tensor | None, chosen: Tensor, weights: Tensor, rows: int) -> None:
    """Of router logits [.., experts] (and the bias [experts] for choosing alone) the ids of the chosen experts, best first: int32
    [.., used], and their weights: float32 [.., used], both without gaps between rows. Ids are in range whatever the logits."""
    size = logits.shape[1] // routing.groups
    programs, together = row_tiles(rows)
    args = (logits, logits.stride(0), bias, chosen, weights, routing.scale, rows)
    sizes = {
        "GROUPS": routing.groups,
        "SIZE": size,
        "ALL_GROUPS": triton.next_power_of_2(routing.groups),
        "WHOLE_SIZE": triton.next_power_of_2(size),
        "GROUPS_USED": routing.groups_used,
        "USED": routing.used,
        "SLOTS": triton.next_power_of_2(routing.used),
    }
    options = {"SOFTMAX": routing.gating == "softmax", "RENORMALISE": routing.renormalise}
    launch(_choose, (programs,), *args, **sizes, **options, **together, warps=1)


@triton.jit(do_not_specialize=["rows"])
def _choose(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    bias,
    chosen,
    weights,
    scale,
    rows,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    WHOLE_SIZE: tl.constexpr,
    GROUPS_USED: tl.constexpr,
    USED: tl.constexpr,
    SLOTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Rows as [rows, groups, experts of a group]."""
    wait_for_earlier(PDL)
    row, there = rows_of_program(rows, ROWS)
    row, there = row[:, :, None], there[:, :, None]
    group = tl.arange(0, ALL_GROUPS)[None, :, None]
    place = tl.arange(0, WHOLE_SIZE)[None, None, :]
    free = tl.broadcast_to((group < GROUPS) & (place < SIZE), [ROWS, ALL_GROUPS, WHOLE_SIZE])
    ids = group * SIZE + place
    value = tl.load(logits + row * logits_stride + ids, mask=free, other=float("-inf"))
    if SOFTMAX:
        value = tl.where(free, tl.exp(value - _max(value)), 0.0)
        value = value / _sum(value)
    else:
        value = sigmoid(value)
    score = value
    if bias is not None:
        score += tl.load(bias + ids, mask=free, other=0.0)
    score = tl.where(free & (score == score), score, float("-inf"))  # NaN is last
    if GROUPS > 1:
        score = _of_best_groups(score, group, place, GROUPS, SIZE, GROUPS_USED)

    slots = tl.arange(0, SLOTS)[None, None, :]
    picked, shares = tl.zeros([ROWS, 1, SLOTS], tl.int32), tl.zeros([ROWS, 1, SLOTS], tl.float32)
    for slot in range(USED):
        best = _max(score)
        pick = _min(tl.where(free & (score == best), ids, 1 << 30))
        picked = tl.where(slots == slot, pick, picked)
        shares = tl.where(slots == slot, _sum(tl.where(ids == pick, value, 0.0)), shares)
        free = free & (ids != pick)
        score = tl.where(free, score, float("-inf"))
    if RENORMALISE:
        shares = shares / tl.sum(shares, 2, keep_dims=True)
    tl.store(chosen + row * USED + slots, picked, mask=(slots < USED) & there)
    tl.store(weights + row * USED + slots, shares * scale, mask=(slots < USED) & there)


@triton.jit
def _of_best_groups(  # type: ignore[no-untyped-def]
    score, group, place, GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUPS_USED: tl.constexpr
):
    """Scores, -inf but in the groups whose two best have the largest sums."""
    total = tl.max(score, 2, keep_dims=True)
    if SIZE > 1:
        first = tl.min(tl.where(score == total, place, 1 << 30), 2, keep_dims=True)
        total += tl.max(tl.where(place == first, float("-inf"), score), 2, keep_dims=True)
    free = tl.broadcast_to(group < GROUPS, total.shape)
    kept = tl.broadcast_to(group < 0, total.shape)
    for _ in range(GROUPS_USED):
        best = tl.max(tl.where(free, total, float("-inf")), 1, keep_dims=True)
        pick = tl.min(tl.where(free & (total == best), group, 1 << 30), 1, keep_dims=True)
        kept = kept | (group == pick)
        free = free & (group != pick)
    return tl.where(kept, score, float("-inf"))


@triton.jit
def _max(x):  # type: ignore[no-untyped-def]
    return tl.max(tl.max(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _min(x):  # type: ignore[no-untyped-def]
    return tl.min(tl.min(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _sum(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, 2, keep_dims=True), 1, keep_dims=True)
