"""One token for each row of logits: what the row's samplers do (sample_steps.py), then temperature, min_p, top_k and top_p, then one
draw.

Weights are exp((logit - best) / temperature). One pass over the logits, in place, finds the best and the maxima of blocks; with
these, later passes skip the blocks that cannot matter. Only a plain draw, or top_p without top_k, needs the mass of all weights
and so a second pass. Candidates for top_k and top_p are gathered, but never sorted: a rank, a nucleus and a draw are each found by
bisection on the bits of a weight. Equal weights rank by id.
"""

from __future__ import annotations

from math import log
from typing import Any, NamedTuple

from numpy import ceil, float32, float64, int64

from shoal.kernels.cpu.jit import inline, kernel, shared
from shoal.kernels.cpu.sample_row import (
    ADJUST,
    BLOCK,
    BLOCK_BYTES,
    CHUNKS,
    DRAW,
    INFINITY,
    LEAST,
    MEASURE,
    MIN_P,
    MINUS_INFINITY,
    ONE,
    ONE_BITS,
    ROWS,
    TEMPERATURE,
    TOKENS,
    TOP_K,
    TOP_P,
    VOCAB,
    Row,
    ban,
    best_of,
    block_at,
    copy_row,
    fill_up,
    first_of,
    has_samplers,
    mask_row,
    row_at,
    row_draw,
)
from shoal.kernels.cpu.simd import (
    Address,
    Register,
    Scalar,
    add,
    bits_of_f32,
    call_kernel,
    count_from,
    equal_lanes,
    exp,
    f32_of_bits,
    keep_from,
    lanes_from,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    lowest_bit,
    max_lanes,
    mul,
    ones,
    pack_lanes,
    splat,
    store_f32,
    store_f32x16,
    store_i32,
    sub,
    sum_lanes,
)

_SMALL_NUCLEUS = 64  # top_p without top_k first looks among so many of the best
_BOUND_STEPS = 24
_NARROW = 64  # a search copies what is left to search when that is fewer than so many candidates a block
_LARGEST = float32(3e38)


class _Scale(NamedTuple):
    """How logits become weights: exp((logit - best) * inverse), none below ``least`` (float32, but for ``lowest``)."""

    best: Any
    temperature: Any
    inverse: Any
    least: Any
    lowest: Any  # float64: the logit whose weight is ``least``


class _Cut(NamedTuple):
    """Where the ranked candidates end: the bits of the last one's weight, how many of its equals rank before it, and the mass."""

    bits: int
    tie: float
    mass: float


# --- weights ---------------------------------------------------------------------------------------------------------


@inline
def _weights(x: Register, scale: _Scale) -> Any:
    """The weights of 16 logits; 0 where that is too little."""
    return keep_from(exp(mul(sub(x, splat(scale.best)), splat(scale.inverse))), scale.least)


@inline
def _reach(logit: float, scale: _Scale) -> Any:
    """A little less than ``logit``, so that a logit below it has a smaller weight than one at ``logit``, for all the rounding.

    The three roundings of (logit - best) * inverse and the error of exp, for both logits, come to less than 4e-7 of each term.
    """
    return float32(logit - 1e-6 * (scale.best - logit + scale.temperature))


@shared
def _floor(scale: _Scale, low: Scalar) -> Any:
    """The weight that matters least when the candidates reach down to ``low`` (see `_reach`)."""
    return max(max_lanes(_weights(splat(low), scale)), LEAST)


@shared
def _mass(row: Row, scale: _Scale) -> Any:
    """The mass of all weights; writes those of the blocks to ``rest``."""
    total, low = 0.0, _reach(scale.lowest, scale)
    for block in range(row.blocks):
        mass = splat(0.0)
        if lanes_from(load_f32x16(row.maxima + 64 * block), low) != 0:
            logits = block_at(row, block)
            for i in range(0, BLOCK_BYTES, 64):
                mass = add(mass, _weights(load_f32x16(logits + i), scale))
        store_f32(row.rest + 4 * block, sum_lanes(mass))
        total += load_f32(row.rest + 4 * block)
    return total


@shared
def _gather(row: Row, scale: _Scale, low: Scalar) -> Any:
    """Make the logits of at least ``low`` the candidates; the number of blocks they fill, the last one up with weights of 0."""
    size = 0
    for block in range(row.blocks):
        if lanes_from(load_f32x16(row.maxima + 64 * block), low) != 0:
            logits = block_at(row, block)
            for i in range(0, BLOCK, 16):
                x = load_f32x16(logits + 4 * i)
                lanes = lanes_from(x, low)
                if lanes != 0:
                    pack_lanes(row.weights + 4 * size, x, lanes)
                    pack_lanes(row.ids + 4 * size, count_from(BLOCK * block + i), lanes)
                    size += ones(lanes)
    blocks = fill_up(row.weights, size, MINUS_INFINITY)
    for i in range(0, BLOCK_BYTES * blocks, 64):
        store_f32x16(row.weights + i, _weights(load_f32x16(row.weights + i), scale))
    return blocks


@shared
def _tally(values: Address, blocks: int, low: Scalar) -> Any:
    """The sum and the number of the values that are at least ``low``."""
    mass, count = 0.0, 0
    for first in range(values, values + BLOCK_BYTES * blocks, BLOCK_BYTES):
        part = splat(0.0)
        for i in range(first, first + BLOCK_BYTES, 128):
            x, y = load_f32x16(i), load_f32x16(i + 64)
            part = add(part, add(keep_from(x, low), keep_from(y, low)))
            count += ones(lanes_from(x, low) | (lanes_from(y, low) << 16))
        mass += sum_lanes(part)
    return mass, count


@inline
def _bound(row: Row, scale: _Scale, wanted: int) -> Any:
    """A logit below which none of the ``wanted`` best lies: at least so many of the maxima reach it, and seldom over four times
    as many. (If there are fewer maxima: one below which all weights are 0.)"""
    low, high = scale.lowest, scale.best
    for _ in range(_BOUND_STEPS):
        middle = float32(0.5 * (low + high))
        count = _tally(row.maxima, (row.blocks + 15) // 16, middle)[1]
        if count < wanted:
            high = middle
        else:
            low = middle
            if count <= 4 * wanted:
                break
    return _reach(low, scale)


@shared
def _narrow(values: Address, blocks: int, low: int, high: int, out: Address) -> Any:
    """Copy the weights whose bits are from ``low`` to below ``high``, filled up with 0; how many blocks. ``out`` may be ``values``."""
    size = 0
    for i in range(values, values + BLOCK_BYTES * blocks, 64):
        x = load_f32x16(i)
        lanes = lanes_from(x, f32_of_bits(low)) & ~lanes_from(x, f32_of_bits(high))
        if lanes != 0:
            pack_lanes(out + 4 * size, x, lanes)
            size += ones(lanes)
    return fill_up(out, size, 0.0)


@shared
def _rank(row: Row, blocks: int, low: int, mass: float, count: int) -> Any:
    """The bits of the largest weight, from ``low`` on, such that the candidates of at least that weight have this mass (or all
    there is) and are this many; also the mass and the number of those above it.

    Sums are grouped otherwise once the search has narrowed: a mass that is hit to the last bit may lead to no candidate's weight.
    """
    high, above, larger = ONE_BITS + 1, 0.0, 0
    # Where to look, and the mass and number of those above that a narrowing has left out there.
    values, gone, removed = row.weights, 0.0, 0
    total, number = _tally(values, blocks, f32_of_bits(low))
    mass = min(mass, total)
    while high - low > 1:
        if blocks > 1 and number - larger < _NARROW * blocks:
            blocks = _narrow(values, blocks, low, high, row.rest)
            values, gone, removed = row.rest, above, larger
        middle = (low + high) >> 1
        more, others = _tally(values, blocks, f32_of_bits(middle))
        if gone + more >= mass and removed + others >= count:
            low, number = middle, removed + others
        else:
            high, above, larger = middle, gone + more, removed + others
    return low, above, larger


@inline
def _cut_after(row: Row, blocks: int, cut: _Cut, count: int) -> Any:
    """The cut that leaves the ``count`` best candidates, of more than so many."""
    bits, above, number = _rank(row, blocks, cut.bits, 0.0, count)
    return _Cut(bits, count - number - 1.0, above + (count - number) * f32_of_bits(bits))


@shared
def _cut_at(row: Row, blocks: int, cut: _Cut, mass: float) -> Any:
    """The cut after the candidate with which the mass, best first, reaches ``mass``; not beyond ``cut``."""
    bits, above, _ = _rank(row, blocks, cut.bits, mass, int64(0))
    weight = f32_of_bits(bits)
    tie = max(ceil((mass - above) / weight) - 1.0, 0.0)
    if bits == cut.bits:
        tie = min(tie, cut.tie)
    return _Cut(bits, tie, above + (tie + 1.0) * weight)


# --- draws -----------------------------------------------------------------------------------------------------------


@inline
def _draw_all(row: Row, scale: _Scale, u: float) -> Any:
    """Draw among all weights, in id order: first the block, then the id."""
    target, before, passed, chosen = u * _mass(row, scale), 0.0, 0.0, 0
    for block in range(row.blocks):
        mass = load_f32(row.rest + 4 * block)
        if mass > 0:
            chosen, before = block, passed
            passed += mass
            if passed > target:
                break
    return BLOCK * chosen + _draw_inside(row, scale, block_at(row, chosen), target - before)


@inline
def _draw_inside(row: Row, scale: _Scale, logits: Address, target: float) -> Any:
    """The first of a block's logits whose weight takes the mass past ``target``; should rounding let none, the last with any."""
    for i in range(0, BLOCK_BYTES, 64):
        store_f32x16(row.weights + i, _weights(load_f32x16(logits + i), scale))
    last, passed = 0, 0.0
    for i in range(BLOCK):
        weight = load_f32(row.weights + 4 * i)
        if weight > 0:
            last = i
            passed += weight
            if passed > target:
                break
    return last


@inline
def _nucleus_reach(row: Row, scale: _Scale, total: float, top_p: Scalar) -> Any:
    """A logit below which nothing is in the nucleus.

    The n logits or fewer whose weights are below (1 - top_p) * total / n have less than (1 - top_p) * total together. All others
    rank before them and have more than top_p * total: the nucleus ends among those.
    """
    logit = scale.best + scale.temperature * log((1.0 - top_p) * total / (BLOCK * row.blocks))
    return _reach(max(logit, scale.lowest), scale)


@inline
def _last(row: Row, blocks: int, cut: _Cut) -> Any:
    """The id of the last candidate before the cut; -1 if rounding led to a weight that none has (see `_rank`)."""
    left, last = cut.tie, -1
    for i in range(0, BLOCK * blocks, 16):
        lanes = equal_lanes(load_f32x16(row.weights + 4 * i), f32_of_bits(cut.bits))
        while lanes != 0:
            last = load_i32(row.ids + 4 * (i + lowest_bit(lanes)))
            if left < 1.0:
                return last
            left -= 1.0
            lanes &= lanes - 1
    return last


@inline
def _draw_best(row: Row, scale: _Scale, top_k: int, top_p: Scalar, u: float) -> Any:
    """Draw among what top_k and then top_p leave, best first."""
    low = _bound(row, scale, top_k if top_k > 0 else _SMALL_NUCLEUS)
    blocks = _gather(row, scale, low)
    mass, count = _tally(row.weights, blocks, _floor(scale, low))
    if top_k <= 0:
        total = _mass(row, scale)
        if mass < top_p * total:
            low = _nucleus_reach(row, scale, total, top_p)
            blocks = _gather(row, scale, low)
        mass = total
    cut = _Cut(bits_of_f32(_floor(scale, low)), float64(count), mass)
    if 0 < top_k < count:
        cut = _cut_after(row, blocks, cut, top_k)
    if top_p < 1.0:
        cut = _cut_at(row, blocks, cut, top_p * cut.mass)
    return _last(row, blocks, _cut_at(row, blocks, cut, u * cut.mass))


@inline
def _scale(args: Address, index: int, best: Scalar, temperature: Scalar) -> Any:
    least = max(load_f32(load_i64(args + MIN_P) + 4 * index), LEAST)
    lowest = best + temperature * log(float64(least))
    return _Scale(best, temperature, min(ONE / temperature, _LARGEST), least, lowest)


@inline
def _draw(args: Address, index: int, row: Row, scale: _Scale) -> Any:
    u = row_draw(args, index, DRAW)
    top_k, top_p = load_i32(load_i64(args + TOP_K) + 4 * index), load_f32(load_i64(args + TOP_P) + 4 * index)
    if top_k <= 0 and top_p >= 1.0:
        return _draw_all(row, scale, u)
    return _draw_best(row, scale, top_k, top_p, u)


@shared
def _choose(args: Address, index: int) -> Any:
    """The token of one row, or -1."""
    row, vocab = row_at(args, index), load_i64(args + VOCAB)
    copy_row(row, vocab)
    mask_row(args, index, row, vocab)
    ban(args, index, row, vocab)
    best = best_of(row)
    if has_samplers(args, index) and MINUS_INFINITY < best < INFINITY:
        call_kernel(load_i64(args + ADJUST), args, index)
        best = best_of(row)
    if not (MINUS_INFINITY < best < INFINITY):
        return -1
    first = first_of(row, best)
    temperature = load_f32(load_i64(args + TEMPERATURE) + 4 * index)
    if temperature == 0:
        return first
    token = _draw(args, index, row, _scale(args, index, best, temperature))
    return token if token >= 0 else first


@kernel
def sample(args: Address, chunk: int) -> None:
    """Rows chunk, chunk + CHUNKS, ...: one token each."""
    for row in range(chunk, load_i64(load_i64(args + ROWS)), load_i64(args + CHUNKS)):
        token = _choose(args, row)
        store_i32(load_i64(args + TOKENS) + 4 * row, token)
        if token >= 0 and has_samplers(args, row):
            call_kernel(load_i64(args + MEASURE), args, row)
