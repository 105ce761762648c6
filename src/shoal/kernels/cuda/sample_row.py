"""What the kernels that sample share: a row's best, its candidates in their order, and where that order is cut.

Weights become whole numbers, w * 2^43 rounded down: their sums are exact, so they are the same bits in any order and by any number of
programs. The order of candidates is that of an int32 *key*, the least first, and of ids among equal keys. Nothing is sorted: keys are
counted into bins by their upper bits, which says in which bin a cut lies, and that bin is counted again by the bits below.

    key   30....20 | 19.....9 | 8....0
          bin        within     within      11, 11 and 9 bits
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.cuda.dependent import wait_for_earlier

CHUNK = 4096  # logits of one program where a row has many
BLOCK = 4096  # logits at a time where a row has one program
CHUNK_WARPS, ROW_WARPS, DRAW_WARPS = 8, 16, 8
BINS = tl.constexpr(2048)
BIN_SHIFT = tl.constexpr(20)
INNER_SHIFT = tl.constexpr(9)
NONE = tl.constexpr(0x7FFFFFFF)  # the key of what is no candidate
ONE_BITS = tl.constexpr(0x3F800000)
INFINITY = tl.constexpr(float("inf"))
LEAST = tl.constexpr(1e-38)  # a smaller weight is 0
UNIT = tl.constexpr(2.0**43)  # no more than 2^20 weights
LARGEST_VOCAB = 1 << 20

# Orders. BY_WEIGHT is of exp((logit - best) / ``measure``), those of at least ``least``: what a draw sees. BY_DISTANCE: all candidates,
# by how far best - logit is from ``measure``; their weights are exp(logit - best).
BY_WEIGHT, BY_DISTANCE = tl.constexpr(0), tl.constexpr(1)

# A row's parameters, int32 words.
PARAMS = tl.constexpr(16)
TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED_LOW, SEED_HIGH, SAMPLE, POSITION, CHANGED = (tl.constexpr(i) for i in range(9))
DRAW, COIN = tl.constexpr(0), tl.constexpr(1)  # the third counter words of a row's random numbers


@triton.jit
def param(asked, row, FIELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """An int32 parameter of a row."""
    return tl.load(asked + row * PARAMS + FIELD)


@triton.jit
def real_param(asked, row, FIELD: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float32 parameter of a row."""
    return param(asked, row, FIELD).to(tl.float32, bitcast=True)


@triton.jit
def random(asked, row, STREAM: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float64 in [0, 1) from a row's seed, sample and position: Philox4x32-10."""
    low = param(asked, row, SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = param(asked, row, SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    position = param(asked, row, POSITION).to(tl.uint32, bitcast=True)
    sample = param(asked, row, SAMPLE).to(tl.uint32, bitcast=True)
    stream, zero = tl.full([], STREAM, tl.uint32), tl.full([], 0, tl.uint32)
    c0, c1, _, _ = tl.philox(low | (high << 32), position, sample, stream, zero)
    bits = ((c0.to(tl.uint64) << 32) | c1.to(tl.uint64)) >> 11
    return bits.to(tl.int64).to(tl.float64) * (2.0**-53)


@triton.jit
def row_base(asked, row, logits, scratch, stride, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a row's scores lie: its logits, or the copy that something has changed."""
    return tl.where(param(asked, row, CHANGED) != 0, scratch + row * WIDTH, logits + row * stride)


@triton.jit
def load_scores(base, at, size):  # type: ignore[no-untyped-def]
    """Scores at places ``at``, -infinity past the last."""
    return tl.load(base + at, mask=at < size, other=-INFINITY)


@triton.jit
def best_of(bests, firsts, row, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's best score (NaN if any is) and the lowest id that has it, from those of its chunks."""
    at = row * CHUNKS + tl.arange(0, CHUNKS)
    best = tl.load(bests + at)
    broken = tl.max((best != best).to(tl.int32))
    top = tl.max(tl.where(best == best, best, -INFINITY))
    first = tl.min(tl.where(best == top, tl.load(firsts + at), NONE))
    return tl.where(broken != 0, float("nan"), top), first


@triton.jit
def is_finite(x):  # type: ignore[no-untyped-def]
    """Neither infinite nor NaN."""
    return (x > -INFINITY) & (x < INFINITY)


@triton.jit
def fixed(weight):  # type: ignore[no-untyped-def]
    """A weight of at most 1 as a whole number."""
    return (weight * UNIT).to(tl.int64)


@triton.jit
def unit_weight(x, best):  # type: ignore[no-untyped-def]
    """exp(score - best), 0 where that is too small."""
    weight = tl.minimum(tl.exp(x - best), 1.0)
    return tl.where(weight >= LEAST, weight, 0.0)


@triton.jit
def keys_of(x, best, measure, least, ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The keys of scores in an order, and their weights as whole numbers."""
    if ORDER == BY_WEIGHT:
        weight = tl.minimum(tl.exp(tl.div_rn(x - best, measure)), 1.0)
        kept = weight >= least
        key = -weight.to(tl.int32, bitcast=True) + ONE_BITS  # a constant on the left would not do for the interpreter
    else:
        weight = unit_weight(x, best)
        kept = x > -INFINITY
        key = tl.abs(best - x - measure).to(tl.int32, bitcast=True)
    return tl.where(kept, key, NONE), tl.where(kept, fixed(weight), 0)


@triton.jit
def key_weight(key):  # type: ignore[no-untyped-def]
    """The weight, as a whole number, of all that have this key BY_WEIGHT."""
    return fixed((-key + ONE_BITS).to(tl.float32, bitcast=True))


@triton.jit
def count_keys(counts, masses, bins, mass, inside):  # type: ignore[no-untyped-def]
    """Add candidates to the number and mass of their bins."""
    tl.atomic_add(counts + bins, 1, mask=inside, sem="relaxed")
    tl.atomic_add(masses + bins, mass, mask=inside & (mass > 0), sem="relaxed")


@triton.jit
def bin_of(counts, masses, count, mass, wanted, target):  # type: ignore[no-untyped-def]
    """The bin with which candidates become ``wanted`` and have ``target``; their number and mass before it. ``count`` and ``mass``
    are those before the first bin."""
    bins = tl.arange(0, BINS)
    number, weight = tl.load(counts + bins, volatile=True), tl.load(masses + bins, volatile=True)
    short = (count + tl.cumsum(number) < wanted) | (mass + tl.cumsum(weight) < target)
    found = tl.sum(short.to(tl.int32))
    count += tl.sum(tl.where(bins < found, number, 0))
    mass += tl.sum(tl.where(bins < found, weight, 0))
    return found, count, mass


@triton.jit
def _split_bin(  # type: ignore[no-untyped-def]
    of, bins, start, goal, UPPER: tl.constexpr, LOWER: tl.constexpr, ORDER: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What `bin_of` finds by the key's bits from LOWER on, among those whose bits from UPPER on are as ``start`` has them."""
    base, size, best, measure, least = of
    counts, masses = bins
    prefix, count, mass = start
    wanted, target = goal
    tl.debug_barrier()
    tl.store(counts + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
    tl.store(masses + tl.arange(0, BINS), tl.zeros([BINS], tl.int64))
    tl.debug_barrier()
    first = 0
    while first < size:  # not a range: Triton 3.6's interpreter wants its bounds to be constants
        x = load_scores(base, first + tl.arange(0, BLOCK), size)
        keys, weights = keys_of(x, best, measure, least, ORDER)
        digit = (keys >> LOWER) - (prefix << (UPPER - LOWER))
        count_keys(counts, masses, digit, weights, (keys >> UPPER) == prefix)
        first += BLOCK
    tl.debug_barrier()
    digit, count, mass = bin_of(counts, masses, count, mass, wanted, target)
    return (prefix << (UPPER - LOWER)) + digit, count, mass


@triton.jit
def cut(of, counts, masses, goal, ORDER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The key of the candidate with which, in this order, they are as many and have the mass of ``goal``; number and mass of those
    with a smaller key.

    ``of``: (scores, their number, best, measure, least). ``counts`` and ``masses`` [2, BINS]: the upper bits of all candidates'
    keys have been counted; the other half is for those of one bin. There are as many, with as much mass.
    """
    wanted, target = goal
    key, count, mass = bin_of(counts, masses, 0, tl.full([], 0, tl.int64), wanted, target)
    inner = (counts + BINS, masses + BINS)
    key, count, mass = _split_bin(of, inner, (key, count, mass), goal, BIN_SHIFT, INNER_SHIFT, ORDER, BLOCK)
    return _split_bin(of, inner, (key, count, mass), goal, INNER_SHIFT, 0, ORDER, BLOCK)


@triton.jit
def best_of_chunk(  # type: ignore[no-untyped-def]
    rows, asked, logits, scratch, stride, bests, firsts, counts, masses,
    VOCAB: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, CLEAR: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The best score of each chunk and the lowest id that has it. Clears the row's bins where they are to be used."""
    wait_for_earlier(PDL)
    row, chunk = tl.load(rows + tl.program_id(0)), tl.program_id(1)
    base = row_base(asked, row, logits, scratch, stride, WIDTH)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_scores(base, at, VOCAB)
    broken = tl.max((x != x).to(tl.int32))
    best = tl.max(tl.where(x == x, x, -INFINITY))
    tl.store(bests + row * CHUNKS + chunk, tl.where(broken != 0, float("nan"), best))
    tl.store(firsts + row * CHUNKS + chunk, tl.min(tl.where(x == best, at, NONE)))
    if CLEAR:
        bins = row * 2 * BINS + tl.arange(0, BINS)
        first = (tl.zeros([BINS], tl.int32) + chunk) == 0
        tl.store(counts + bins, tl.zeros([BINS], tl.int32), mask=first)
        tl.store(masses + bins, tl.zeros([BINS], tl.int64), mask=first)
