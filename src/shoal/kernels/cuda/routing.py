"""Which experts a token goes to, and with what weights: ``reference.choose_experts``."""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.base import Routing
from shoal.kernels.cuda.elementwise import sigmoid
from shoal.kernels.cuda.launch import Tensor, launch


def choose(logits: Tensor, routing: Routing, bias: Tensor | None, chosen: Tensor, weights: Tensor, rows: int) -> None:
    """Of router logits [.., experts] (and the bias [experts] for choosing alone) the ids of the chosen experts, best first: int32
    [.., used], and their weights: float32 [.., used], both without gaps between rows. Ids are in range whatever the logits."""
    size = logits.shape[1] // routing.groups
    args = (logits, logits.stride(0), bias, chosen, weights, routing.scale)
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
    launch(_choose, (rows,), *args, **sizes, **options, warps=1)


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    bias,
    chosen,
    weights,
    scale,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    ALL_GROUPS: tl.constexpr,
    WHOLE_SIZE: tl.constexpr,
    GROUPS_USED: tl.constexpr,
    USED: tl.constexpr,
    SLOTS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    """A row as [groups, experts of a group]."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, ALL_GROUPS)
    place = tl.arange(0, WHOLE_SIZE)[None, :]
    free = (group[:, None] < GROUPS) & (place < SIZE)
    ids = group[:, None] * SIZE + place
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

    slots = tl.arange(0, SLOTS)
    picked, shares = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.float32)
    for slot in range(USED):
        best = _max(score)
        pick = _min(tl.where(free & (score == best), ids, 1 << 30))
        picked = tl.where(slots == slot, pick, picked)
        shares = tl.where(slots == slot, _sum(tl.where(ids == pick, value, 0.0)), shares)
        free = free & (ids != pick)
        score = tl.where(free, score, float("-inf"))
    if RENORMALISE:
        shares = shares / tl.sum(shares, 0)
    tl.store(chosen + row * USED + slots, picked, mask=slots < USED)
    tl.store(weights + row * USED + slots, shares * scale, mask=slots < USED)


@triton.jit
def _of_best_groups(  # type: ignore[no-untyped-def]
    score, group, place, GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUPS_USED: tl.constexpr
):
    """Scores, -inf but in the groups whose two best have the largest sums."""
    total = tl.max(score, 1)
    if SIZE > 1:
        first = tl.min(tl.where(score == total[:, None], place, 1 << 30), 1)
        total += tl.max(tl.where(place == first[:, None], float("-inf"), score), 1)
    free = group < GROUPS
    kept = group < 0
    for _ in range(GROUPS_USED):
        best = tl.max(tl.where(free, total, float("-inf")), 0)
        pick = tl.min(tl.where(free & (total == best), group, 1 << 30), 0)
        kept = kept | (group == pick)
        free = free & (group != pick)
    return tl.where(kept[:, None], score, float("-inf"))


@triton.jit
def _max(x):  # type: ignore[no-untyped-def]
    return tl.max(tl.max(x, 1), 0)


@triton.jit
def _min(x):  # type: ignore[no-untyped-def]
    return tl.min(tl.min(x, 1), 0)


@triton.jit
def _sum(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, 1), 0)
