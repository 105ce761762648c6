"""What the samplers of a row do to its copy of the scores; the twin is reference_sampling.py.

Each kernel takes the rows of a batch that have this sampler next, and of each row four float64 ``numbers``. The best score of each
chunk, and where it is needed the mass, are those of the row as the sampler finds it. Rows whose best is not finite stay as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.cuda.sample_row import (
    BIN_SHIFT,
    BINS,
    BY_DISTANCE,
    COIN,
    INFINITY,
    LEAST,
    NONE,
    UNIT,
    best_of,
    count_keys,
    cut,
    is_finite,
    keys_of,
    load_scores,
    random,
    unit_weight,
)
from shoal.kernels.samplers import MIROSTAT_BEST

KEEP_COUNT, KEEP_MASS, KEEP_NEAR, KEEP_WEIGHT = (tl.constexpr(i) for i in range(4))
KEEP_SIGMA, KEEP_SURPRISE = tl.constexpr(0), tl.constexpr(1)
_BEST = tl.constexpr(MIROSTAT_BEST)
_ROOM = tl.constexpr(128)  # no less than MIROSTAT_BEST
_LN2 = tl.constexpr(0.6931471805599453)


# --- samplers that change few scores ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["size"])
def add_to_ids(rows, ids, values, scratch, size, WIDTH: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add values to the scores of pairs of a row and an id, all different."""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = at < size
    place = tl.load(rows + at, mask=inside, other=0) * WIDTH + tl.load(ids + at, mask=inside, other=0)
    x = tl.load(scratch + place, mask=inside, other=0.0)
    tl.store(scratch + place, x + tl.load(values + at, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["size"])
def penalise_ids(  # type: ignore[no-untyped-def]
    rows, ids, seen, factors, scratch, size, WIDTH: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """Penalties for pairs of a row and an id, all different. ``factors`` float32 [rows, 3]: repetition, frequency, presence."""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    inside = at < size
    row, count = tl.load(rows + at, mask=inside, other=0), tl.load(seen + at, mask=inside, other=0)
    place = scratch + row * WIDTH + tl.load(ids + at, mask=inside, other=0)
    repetition = tl.load(factors + row * 3, mask=inside, other=1.0)
    frequency = tl.load(factors + row * 3 + 1, mask=inside, other=0.0)
    presence = tl.load(factors + row * 3 + 2, mask=inside, other=0.0)
    x = tl.load(place, mask=inside, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    x = x - frequency * count.to(tl.float32)
    tl.store(place, x - tl.where(count > 0, presence, 0.0), mask=inside)


# --- sums over candidates --------------------------------------------------------------------------------------------


@triton.jit
def _row_sum(sums, row, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.load(sums + row * CHUNKS + tl.arange(0, CHUNKS)))


@triton.jit
def _real_mass(sums, row, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's mass, or mass of energies, as a float64."""
    return _row_sum(sums, row, CHUNKS).to(tl.float64) * (2.0**-43)


@triton.jit
def sum_chunk(  # type: ignore[no-untyped-def]
    rows, scratch, bests, firsts, candidates, sums, energies, counts, masses,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    CENTRED: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """For each chunk its candidates, their mass, and the mass times their energies, best - score. Keys are distances from the best,
    or CENTRED from the mean energy: then the sums are there, and only keys are counted."""
    row, chunk = tl.load(rows + tl.program_id(0)), tl.program_id(1)
    best, _ = best_of(bests, firsts, row, CHUNKS)
    if is_finite(best):
        x = load_scores(scratch + row * WIDTH, chunk * CHUNK + tl.arange(0, CHUNK), VOCAB)
        centre = tl.zeros([], tl.float32)
        if CENTRED:
            centre += (_real_mass(energies, row, CHUNKS) / _real_mass(sums, row, CHUNKS)).to(tl.float32)
        keys, weights = keys_of(x, best, centre, LEAST, BY_DISTANCE)
        if COUNT:
            bins, own = keys >> BIN_SHIFT, row * 2 * BINS
            count_keys(counts + own, masses + own, bins, weights, bins < BINS - 1)
        if not CENTRED:
            weight = unit_weight(x, best)
            energy = tl.where(weight > 0, best - x, 0.0).to(tl.float64) * weight.to(tl.float64)
            at = row * CHUNKS + chunk
            tl.store(candidates + at, tl.sum((x > -INFINITY).to(tl.int32)))
            tl.store(sums + at, tl.sum(weights))
            tl.store(energies + at, tl.sum((energy * UNIT).to(tl.int64)))


@triton.jit
def spread_chunk(  # type: ignore[no-untyped-def]
    rows, scratch, bests, firsts, candidates, distances, squares,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each chunk its candidates, the sum of their distances from the best and of the squares of these, float64."""
    row, chunk = tl.load(rows + tl.program_id(0)), tl.program_id(1)
    best, _ = best_of(bests, firsts, row, CHUNKS)
    if is_finite(best):
        x = load_scores(scratch + row * WIDTH, chunk * CHUNK + tl.arange(0, CHUNK), VOCAB)
        distance = tl.where(x > -INFINITY, best.to(tl.float64) - x.to(tl.float64), 0.0)
        at = row * CHUNKS + chunk
        tl.store(candidates + at, tl.sum((x > -INFINITY).to(tl.int32)))
        tl.store(distances + at, tl.sum(distance))
        tl.store(squares + at, tl.sum(distance * distance))


# --- samplers that change or keep scores by what these are -----------------------------------------------------------


@triton.jit
def scale_chunk(  # type: ignore[no-untyped-def]
    rows, numbers, scratch, bests, firsts, candidates, sums, energies,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Temperature: value, spread, exponent. The sums are there for rows with a spread."""
    row, chunk = tl.load(rows + tl.program_id(0)), tl.program_id(1)
    numbers += 4 * tl.program_id(0)
    value, spread, exponent = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    best, token = best_of(bests, firsts, row, CHUNKS)
    if is_finite(best):
        if spread > 0:
            count = _row_sum(candidates, row, CHUNKS).to(tl.float64)
            if count >= 2:
                mass = _real_mass(sums, row, CHUNKS)
                entropy = tl.log(mass) + _real_mass(energies, row, CHUNKS) / mass
                ratio = tl.minimum(tl.maximum(entropy / tl.log(count), 0.0), 1.0)
                power = tl.exp(tl.maximum(exponent * tl.log(tl.maximum(ratio, 1e-300)), -700.0))
                power = tl.where((ratio > 0) | (exponent == 0), power, 0.0)
                low = tl.maximum(value - spread, 0.0)
                value = low + (value + spread - low) * power
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = load_scores(scratch + row * WIDTH, at, VOCAB)
        divisor = tl.where(value > 0, value, 1.0).to(tl.float32)
        kept = at == tl.where(value > 0, at, token)
        tl.store(scratch + row * WIDTH + at, tl.where(kept, tl.div_rn(x, divisor), -INFINITY), mask=at < VOCAB)


@triton.jit
def keep_near_chunk(  # type: ignore[no-untyped-def]
    rows, numbers, scratch, bests, firsts, candidates, sums, distances, squares,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Keep what is not too far from the best: KEEP_SIGMA so many standard deviations, KEEP_SURPRISE what surprises by so many bits."""
    row, chunk = tl.load(rows + tl.program_id(0)), tl.program_id(1)
    most = tl.load(numbers + 4 * tl.program_id(0))
    best, _ = best_of(bests, firsts, row, CHUNKS)
    if is_finite(best):
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = load_scores(scratch + row * WIDTH, at, VOCAB)
        if KIND == KEEP_SIGMA:
            count = _row_sum(candidates, row, CHUNKS).to(tl.float64)
            mean = _row_sum(distances, row, CHUNKS) / count
            variance = tl.maximum(_row_sum(squares, row, CHUNKS) / count - mean * mean, 0.0)
            kept = x >= (best.to(tl.float64) - most * tl.sqrt(variance)).to(tl.float32)
        else:
            energy = (most * _LN2 - tl.log(_real_mass(sums, row, CHUNKS))).to(tl.float32)
            kept = best - x <= tl.maximum(energy, 0.0)
        tl.store(scratch + row * WIDTH + at, tl.where(kept, x, -INFINITY), mask=at < VOCAB)


# --- samplers that keep the first of an order ------------------------------------------------------------------------


@triton.jit
def _goal(p, least, count, mass, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many candidates to keep at least, and what mass they must have."""
    wanted = tl.minimum(tl.maximum(least, 1.0), count.to(tl.float64)).to(tl.int32)
    share = p * mass.to(tl.float64)
    if KIND == KEEP_MASS:
        target = tl.minimum(tl.ceil(share).to(tl.int64), mass)
    elif KIND == KEEP_NEAR:
        target = tl.minimum(share.to(tl.int64) + 1, mass)
    else:
        target = tl.full([], 0, tl.int64)
    return wanted, target


@triton.jit
def keep_first(  # type: ignore[no-untyped-def]
    rows, numbers, scratch, bests, firsts, sums, energies, counts, masses,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Keep the nearest, lowest ids first, until they are as many as the last number says, and have the mass that KIND and the first
    do. KEEP_NEAR: nearest to the mean energy, else to the best. KEEP_WEIGHT: and whatever has at least this weight."""
    row = tl.load(rows + tl.program_id(0))
    numbers += 4 * tl.program_id(0)
    best, _ = best_of(bests, firsts, row, CHUNKS)
    if is_finite(best):
        bins, base, p = row * 2 * BINS, scratch + row * WIDTH, tl.load(numbers)
        count = tl.sum(tl.load(counts + bins + tl.arange(0, BINS)))
        mass = tl.sum(tl.load(masses + bins + tl.arange(0, BINS)))
        goal = _goal(p, tl.load(numbers + 3), count, mass, KIND)
        centre = tl.zeros([], tl.float32)
        if KIND == KEEP_NEAR:
            centre += (_real_mass(energies, row, CHUNKS) / _real_mass(sums, row, CHUNKS)).to(tl.float32)
        of = (base, VOCAB, best, centre, LEAST)
        last, before, above = cut(of, counts + bins, masses + bins, goal, BY_DISTANCE, BLOCK)
        wanted, target = goal
        for first in range(0, VOCAB, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = load_scores(base, at, VOCAB)
            keys, weights = keys_of(x, best, centre, LEAST, BY_DISTANCE)
            kept, ties = keys < last, keys == last
            number, weight = ties.to(tl.int32), tl.where(ties, weights, 0)
            if tl.sum(number) > 0:
                few = before + tl.cumsum(number) - number < wanted
                light = above + tl.cumsum(weight) - weight < target
                kept = kept | (ties & (few | light))
            before += tl.sum(number)
            above += tl.sum(weight)
            if KIND == KEEP_WEIGHT:
                kept = kept | (unit_weight(x, best) >= p.to(tl.float32))
            tl.store(base + at, tl.where(kept, x, -INFINITY), mask=at < VOCAB)


@triton.jit
def drop_top(  # type: ignore[no-untyped-def]
    rows, numbers, asked, scratch, bests, firsts, candidates, sums,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """XTC: probability, threshold, nothing, how many to leave at least."""
    row = tl.load(rows + tl.program_id(0))
    numbers += 4 * tl.program_id(0)
    threshold, base = tl.load(numbers + 1), scratch + row * WIDTH
    best, _ = best_of(bests, firsts, row, CHUNKS)
    if is_finite(best) & (random(asked, row, COIN) < tl.load(numbers)) & (threshold <= 0.5):
        least = tl.maximum((threshold * _real_mass(sums, row, CHUNKS)).to(tl.float32), LEAST)
        # Of the top: how many, and as one number the lowest score and of its ids the highest.
        number, worst = 0, tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for first in range(0, VOCAB, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = load_scores(base, at, VOCAB)
            top = unit_weight(x, best) >= least
            number += tl.sum(top.to(tl.int32))
            bits = (x + 0.0).to(tl.int32, bitcast=True)
            rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) * (1 << 32) + (-at + NONE)
            worst = tl.minimum(worst, tl.min(tl.where(top, rank, 0x7FFFFFFFFFFFFFFF)))
        left = _row_sum(candidates, row, CHUNKS) - (number - 1)
        if (number >= 2) & (left.to(tl.float64) >= tl.load(numbers + 3)):
            last = -(worst & 0xFFFFFFFF).to(tl.int32) + NONE
            for first in range(0, VOCAB, BLOCK):
                at = first + tl.arange(0, BLOCK)
                x = load_scores(base, at, VOCAB)
                kept = (unit_weight(x, best) < least) | (at == last)
                tl.store(base + at, tl.where(kept, x, -INFINITY), mask=at < VOCAB)


# --- mirostat, version 1 ---------------------------------------------------------------------------------------------


@triton.jit
def _collect_best(of, last, before, found, wanted, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the best scores to ``found``, in the order of ids: ``wanted`` of them, ``before`` with a smaller key than ``last``."""
    base, size, best, centre, least = of
    kept = 0
    for first in range(0, size, BLOCK):
        x = load_scores(base, first + tl.arange(0, BLOCK), size)
        keys, _ = keys_of(x, best, centre, least, BY_DISTANCE)
        ties = (keys == last).to(tl.int32)
        inside = (keys < last) | ((ties != 0) & (before + tl.cumsum(ties) - ties < wanted))
        tl.store(found + kept + tl.cumsum(inside.to(tl.int32)) - 1, x, mask=inside)
        before += tl.sum(ties)
        kept += tl.sum(inside.to(tl.int32))
    tl.debug_barrier()


@triton.jit
def _sort(found, size):  # type: ignore[no-untyped-def]
    """Sort a few scores, the best first, into the second half of ``found`` [2, ROOM]."""
    one = tl.arange(0, _ROOM)
    x = tl.load(found + one, mask=one < size, other=-INFINITY, volatile=True)
    before = (x[None, :] > x[:, None]) | ((x[None, :] == x[:, None]) & (one[None, :] < one[:, None]))
    tl.store(found + _ROOM + tl.sum(before.to(tl.int32), axis=1), x)
    tl.debug_barrier()


@triton.jit
def _zipf_count(found, size, mu, VOCAB: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many to keep so that the surprise is ``mu`` bits, by a Zipf law fitted to the sorted best."""
    one = tl.arange(0, _ROOM)
    inside = one < size - 1
    x = tl.load(found + _ROOM + one, mask=inside, other=0.0, volatile=True).to(tl.float64)
    y = tl.load(found + _ROOM + one + 1, mask=inside, other=0.0, volatile=True).to(tl.float64)
    step = tl.log((one.to(tl.float64) + 2.0) / (one.to(tl.float64) + 1.0))
    fit, squares = tl.sum(tl.where(inside, step * (x - y), 0.0)), tl.sum(tl.where(inside, step * step, 0.0))
    exponent = tl.maximum(fit / squares, 1e-6)
    log_size, epsilon = tl.log(tl.full([], VOCAB, tl.float64)), exponent - 1.0
    near_one = tl.abs(epsilon) < 1e-6
    safe = tl.where(near_one, 1.0, epsilon)
    share = tl.where(near_one, 1.0 / log_size, safe / (1.0 - tl.exp(tl.minimum(-safe * log_size, 700.0))))
    log_count = tl.minimum((tl.log(share) + mu * _LN2) / exponent, log_size + 1e-6)
    return tl.maximum(tl.floor(tl.exp(tl.maximum(log_count, -1.0))), 1.0)


@triton.jit
def count_by_zipf(  # type: ignore[no-untyped-def]
    rows, numbers, scratch, bests, firsts, counts, masses, found,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write how many to keep for the surprise that is the first number to the last. ``found`` float32 [rows, ROOM] is for the best."""
    row = tl.load(rows + tl.program_id(0))
    numbers += 4 * tl.program_id(0)
    best, _ = best_of(bests, firsts, row, CHUNKS)
    if is_finite(best):
        bins, of = row * 2 * BINS, (scratch + row * WIDTH, VOCAB, best, tl.zeros([], tl.float32), LEAST)
        size = tl.minimum(tl.sum(tl.load(counts + bins + tl.arange(0, BINS))), _BEST)
        goal = (size, tl.full([], 0, tl.int64))
        last, before, _mass = cut(of, counts + bins, masses + bins, goal, BY_DISTANCE, BLOCK)
        keep = tl.full([], 1.0, tl.float64)
        if size >= 2:
            _collect_best(of, last, before, found + row * ROOM, size, BLOCK)
            _sort(found + row * ROOM, size)
            keep = _zipf_count(found + row * ROOM, size, tl.load(numbers), VOCAB)
        tl.store(numbers + 3, keep)
