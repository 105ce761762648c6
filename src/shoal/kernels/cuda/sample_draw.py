"""A token from each row of scores: temperature, min_p, top_k and top_p, then one draw; and the logits that masks and banned ids change.

Candidates rank by weight. Where there are few in the bins that matter, they are gathered first, in the order of ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.sample_row import (
    BIN_SHIFT,
    BINS,
    BY_WEIGHT,
    DRAW,
    INFINITY,
    LEAST,
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    best_of,
    bin_of,
    count_keys,
    cut,
    is_finite,
    key_weight,
    keys_of,
    load_scores,
    param,
    random,
    real_param,
    row_base,
)

GREEDY, PLAIN, RANKED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what the rows of a batch need at most
GATHERED = tl.constexpr(4096)  # room for candidates


@triton.jit
def copy_scores(  # type: ignore[no-untyped-def]
    rows, masks, words, logits, scratch, stride,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Copy the logits of some rows, with -infinity where their mask (one of ``words`` [masks, WORDS]; -1 is none) has no bit."""
    row, mask = tl.load(rows + tl.program_id(0)), tl.load(masks + tl.program_id(0))
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = load_scores(logits + row * stride, at, VOCAB)
    masked = tl.where(mask >= 0, VOCAB, 0)
    word = tl.load(words + mask * WORDS + at // 32, mask=at < masked, other=-1)
    x = tl.where(((word >> (at % 32)) & 1) != 0, x, -INFINITY)
    tl.store(scratch + row * WIDTH + at, x, mask=at < VOCAB)


@triton.jit(do_not_specialize=["size"])
def ban_ids(rows, ids, scratch, size, WIDTH: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """-infinity for pairs of a row and an id."""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    row = tl.load(rows + at, mask=at < size, other=0)
    place = scratch + row * WIDTH + tl.load(ids + at, mask=at < size, other=0)
    tl.store(place, tl.zeros([COUNT], tl.float32) - INFINITY, mask=at < size)


@triton.jit
def weigh_chunk(  # type: ignore[no-untyped-def]
    asked, logits, scratch, stride, bests, firsts, sums, counts, masses,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, MODE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The mass of each chunk of the rows that draw, to ``sums``, and where a row ranks the bins of its keys."""
    wait_for_earlier(PDL)
    row, chunk = tl.program_id(0), tl.program_id(1)
    temperature = real_param(asked, row, TEMPERATURE)
    best, _ = best_of(bests, firsts, row, CHUNKS)
    if (temperature > 0) & is_finite(best):
        base = row_base(asked, row, logits, scratch, stride, WIDTH)
        least = tl.maximum(real_param(asked, row, MIN_P), LEAST)
        x = load_scores(base, chunk * CHUNK + tl.arange(0, CHUNK), VOCAB)
        keys, weights = keys_of(x, best, temperature, least, BY_WEIGHT)
        tl.store(sums + row * CHUNKS + chunk, tl.sum(weights))
        if MODE == RANKED:
            bins, own = keys >> BIN_SHIFT, row * 2 * BINS
            if (param(asked, row, TOP_K) > 0) | (real_param(asked, row, TOP_P) < 1):
                count_keys(counts + own, masses + own, bins, weights, bins < BINS - 1)


@triton.jit
def _drawn(u, mass):  # type: ignore[no-untyped-def]
    """Where in the mass a draw falls: 0 to below the mass."""
    return tl.minimum((u * mass.to(tl.float64)).to(tl.int64), mass - 1)


@triton.jit
def _draw_any(of, sums, u, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Draw among all candidates, in the order of ids: first the chunk, then the id."""
    base, size, best, temperature, least = of
    parts = tl.load(sums + tl.arange(0, CHUNKS))
    drawn = _drawn(u, tl.sum(parts))
    passed = tl.cumsum(parts) <= drawn
    chunk = tl.sum(passed.to(tl.int32))
    drawn -= tl.sum(tl.where(passed, parts, 0))
    x = load_scores(base, chunk * CHUNK + tl.arange(0, CHUNK), size)
    _, weights = keys_of(x, best, temperature, least, BY_WEIGHT)
    return chunk * CHUNK + tl.sum((tl.cumsum(weights) <= drawn).to(tl.int32))


@triton.jit
def _nucleus_mass(top_p, mass):  # type: ignore[no-untyped-def]
    """The least mass that a nucleus must have."""
    wanted = tl.ceil(top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(wanted, mass), 1)


@triton.jit
def _gather(of, last, found, ids, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write to ``found`` and ``ids`` the scores and ids of candidates in bins up to ``last``, in the order of ids."""
    base, size, best, temperature, least = of
    kept = 0
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = load_scores(base, at, size)
        keys, _ = keys_of(x, best, temperature, least, BY_WEIGHT)
        inside = (keys >> BIN_SHIFT) <= last
        number = tl.sum(inside.to(tl.int32))
        if number > 0:
            place = kept + tl.cumsum(inside.to(tl.int32)) - 1
            tl.store(found + place, x, mask=inside)
            tl.store(ids + place, at, mask=inside)
        kept += number
    tl.debug_barrier()


@triton.jit
def _place_of(of, key, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The place of the candidate with this key that has ``n`` of them before it."""
    base, size, best, temperature, least = of
    first, place, passed = 0, 0, 0
    while first < size:  # as in `cut`
        at = first + tl.arange(0, BLOCK)
        keys, _ = keys_of(load_scores(base, at, size), best, temperature, least, BY_WEIGHT)
        equal = (keys == key).to(tl.int32)
        number = tl.sum(equal)
        if (passed <= n) & (n < passed + number):
            place = tl.sum(tl.where((equal != 0) & (passed + tl.cumsum(equal) - equal == n), at, 0))
        passed += number
        first += BLOCK
    return place


@triton.jit
def _draw_ranked(of, counts, masses, lists, tops, u, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Draw, best first, among what top_k and then top_p leave."""
    base, size, best, temperature, least = of
    top_k, top_p = tops
    bins, one, nothing = tl.arange(0, BINS), tl.full([], 1, tl.int32), tl.full([], 0, tl.int64)
    numbers = tl.load(counts + bins)
    count, mass = tl.sum(numbers), tl.sum(tl.load(masses + bins))
    limited = (top_k > 0) & (top_k < count)
    wanted, target = tl.where(limited, top_k, one), tl.where(limited, nothing, _nucleus_mass(top_p, mass))
    last, _, _ = bin_of(counts, masses, 0, nothing, wanted, target)
    near = tl.sum(tl.where(bins <= last, numbers, 0))
    found, ids = lists
    few = near <= GATHERED
    if few:
        _gather(of, last, found, ids, BLOCK)
    base, size = tl.where(few, found, base), tl.where(few, near, size)
    of = (base, size, best, temperature, least)
    if limited:
        key, before, above = cut(of, counts, masses, (top_k, nothing), BY_WEIGHT, BLOCK)
        mass = above + (top_k - before) * key_weight(key)
    if top_p < 1:
        target = _nucleus_mass(top_p, mass)
        key, before, above = cut(of, counts, masses, (one, target), BY_WEIGHT, BLOCK)
        mass = above + tl.cdiv(target - above, key_weight(key)) * key_weight(key)
    target = _drawn(u, mass) + 1
    key, before, above = cut(of, counts, masses, (one, target), BY_WEIGHT, BLOCK)
    place = _place_of(of, key, tl.cdiv(target - above, key_weight(key)) - 1, BLOCK)
    return tl.where(few, tl.load(ids + place, mask=few, other=0), place)


@triton.jit
def choose(  # type: ignore[no-untyped-def]
    tokens, asked, logits, scratch, stride, bests, firsts, sums, counts, masses, found, ids,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    MODE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The token of each row; -1 where a score is NaN or the best is infinite."""
    wait_for_earlier(PDL)
    row = tl.program_id(0)
    best, token = best_of(bests, firsts, row, CHUNKS)
    if MODE != GREEDY:
        temperature = real_param(asked, row, TEMPERATURE)
        if (temperature > 0) & is_finite(best):
            base = row_base(asked, row, logits, scratch, stride, WIDTH)
            least = tl.maximum(real_param(asked, row, MIN_P), LEAST)
            of = (base, VOCAB, best, temperature, least)
            u = random(asked, row, DRAW)
            top_k, top_p = param(asked, row, TOP_K), real_param(asked, row, TOP_P)
            ranks = (top_k > 0) | (top_p < 1)
            if MODE == RANKED:
                bins, lists = row * 2 * BINS, (found + row * GATHERED, ids + row * GATHERED)
                if ranks:
                    token = _draw_ranked(of, counts + bins, masses + bins, lists, (top_k, top_p), u, BLOCK)
            if ranks == 0:
                token = _draw_any(of, sums + row * CHUNKS, u, CHUNKS, CHUNK)
    tl.store(tokens + row, tl.where(is_finite(best), token, -1))


@triton.jit
def measure_surprise(  # type: ignore[no-untyped-def]
    rows, tokens, surprise, scratch, bests, firsts, sums,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """By how many bits the token of some rows surprises: ``sums`` are the masses of their chunks."""
    row = tl.load(rows + tl.program_id(0))
    token = tl.load(tokens + row)
    if token >= 0:
        best, _ = best_of(bests, firsts, row, CHUNKS)
        mass = tl.sum(tl.load(sums + row * CHUNKS + tl.arange(0, CHUNKS))).to(tl.float64) * (2.0**-43)
        energy = (best - tl.load(scratch + row * WIDTH + token)).to(tl.float64)
        tl.store(surprise + row, ((tl.log(mass) + energy) * 1.4426950408889634).to(tl.float32))
