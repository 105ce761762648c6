"""One token for each row of logits: temperature, then min_p, top_k and top_p, then one draw.

Weights are exp((logit - best) / temperature). Survivors of top_k and top_p are taken from a heap of packed (weight, id) keys, so
ties go to the lowest id; a histogram over the weights' exponents keeps that heap small.
"""

from __future__ import annotations

from typing import Any

from numpy import float32

from shoal.kernels.cpu.jit import inline, kernel
from shoal.kernels.cpu.simd import (
    Address,
    Scalar,
    div,
    equal_lanes,
    exp,
    f32_of_bits,
    first_lanes,
    largest_magnitude,
    load_f32,
    load_f32x16,
    load_f64,
    load_i32,
    load_i64,
    load_u32,
    magnitude,
    max_lanes,
    maximum,
    maximum_i32,
    splat,
    store_f32,
    store_f32x16,
    store_f64,
    store_i32,
    store_i64,
    sub,
)

# Arguments, int64 each.
(
    ROWS,  # address of the number of rows
    CHUNKS,  # chunk c takes rows c, c + CHUNKS, ...
    LOGITS,  # float32 [rows, vocab]
    LOGIT_STRIDE,
    VOCAB,
    TEMPERATURE,  # float32 [rows]
    TOP_K,  # int32 [rows]
    TOP_P,  # float32 [rows]
    MIN_P,  # float32 [rows]
    SEED,  # uint64 [rows]
    SAMPLE,  # uint32 [rows]
    POSITION,  # uint32 [rows]
    BANNED_START,  # int32 [rows + 1]: where a row's ids begin in BANNED
    BANNED,  # address of the address of int32 ids
    TOKENS,  # int32 [rows]: the answer
    SCRATCH,  # [chunks, SCRATCH_STRIDE]
    SCRATCH_STRIDE,
) = (8 * i for i in range(17))
SAMPLE_FIELDS = 17

_BINS = 256  # weights of 2^-n: bin = exponent bits of the float32
_HISTOGRAM = 16 * _BINS  # bytes: (mass float64, count int64) a bin
_LEAST = float32(1e-38)
_INFINITY = float32(float("inf"))
_MINUS_INFINITY = float32(-float("inf"))


def scratch_bytes(vocab: int) -> int:
    """Memory a chunk needs: histogram, weights [vocab] and keys [vocab]."""
    return _HISTOGRAM + 4 * (vocab + 16) + 8 * vocab + 64


@inline
def philox(seed: int, sample: int, position: int) -> Any:
    """A number in [0, 1) from these three alone: Philox4x32-10 (Salmon et al. 2011)."""
    mask = 0xFFFFFFFF
    k0, k1 = seed & mask, (seed >> 32) & mask
    c0, c1, c2, c3 = position & mask, sample & mask, 0, 0
    for _ in range(10):
        high, low = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((low >> 32) & mask) ^ c1 ^ k0, low & mask, ((high >> 32) & mask) ^ c3 ^ k1, high & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return ((c0 << 21) | (c1 >> 11)) * 2.0**-53


@inline
def _copy(logits: Address, work: Address, vocab: int) -> None:
    """The row's logits into scratch, the tail filled up with -infinity."""
    for i in range(0, vocab, 16):
        x = load_f32x16(logits + 4 * i)
        store_f32x16(work + 4 * i, first_lanes(x, vocab - i, _MINUS_INFINITY))


@inline
def _ban(args: Address, row: int, work: Address, vocab: int) -> None:
    starts, ids = load_i64(args + BANNED_START) + 4 * row, load_i64(load_i64(args + BANNED))
    for i in range(load_i32(starts), load_i32(starts + 4)):
        token = load_i32(ids + 4 * i)
        if 0 <= token < vocab:
            store_f32(work + 4 * token, _MINUS_INFINITY)


@inline
def _best(work: Address, vocab: int) -> Any:
    """The largest logit; NaN if any is."""
    best, size = splat(_MINUS_INFINITY), magnitude(splat(float32(0.0)))
    for i in range(0, 4 * vocab, 64):
        x = load_f32x16(work + i)
        best, size = maximum(x, best), maximum_i32(magnitude(x), size)
    largest = largest_magnitude(size)
    return largest if largest != largest else max_lanes(best)


@inline
def _first_equal(work: Address, vocab: int, value: Scalar) -> Any:
    """The lowest id whose logit is ``value``."""
    for i in range(0, vocab, 16):
        same = equal_lanes(load_f32x16(work + 4 * i), value)
        if same != 0:
            lane = 0
            while (same >> lane) & 1 == 0:
                lane += 1
            return i + lane
    return -1


@inline
def _to_weights(work: Address, vocab: int, best: Scalar, temperature: Scalar) -> None:
    t, peak = splat(temperature), splat(best)
    for i in range(0, 4 * vocab, 64):
        store_f32x16(work + i, exp(div(sub(load_f32x16(work + i), peak), t)))


@inline
def _draw_all(work: Address, vocab: int, least: Scalar, u: Scalar) -> Any:
    """Draw among all weights of at least ``least``, in id order."""
    total = 0.0
    for i in range(vocab):
        w = load_f32(work + 4 * i)
        if w >= least:
            total += w
    target, mass, last = u * total, 0.0, -1
    for i in range(vocab):
        w = load_f32(work + 4 * i)
        if w >= least:
            mass += w
            last = i
            if mass > target:
                break
    return last


@inline
def _count_bins(histogram: Address, work: Address, vocab: int, least: Scalar) -> None:
    for b in range(_BINS):
        store_f64(histogram + 16 * b, 0.0)
        store_i64(histogram + 16 * b + 8, 0)
    for i in range(vocab):
        w = load_f32(work + 4 * i)
        if w >= least:
            b = histogram + 16 * (load_u32(work + 4 * i) >> 23)
            store_f64(b, load_f64(b) + w)
            store_i64(b + 8, load_i64(b + 8) + 1)


@inline
def _lowest_bin(histogram: Address, top_k: int, top_p: Scalar) -> Any:
    """The highest bin such that it and those above hold all survivors."""
    total = 0.0
    for b in range(_BINS):
        total += load_f64(histogram + 16 * b)
    mass, count, b = 0.0, 0, _BINS
    while b > 0:
        b -= 1
        mass += load_f64(histogram + 16 * b)
        count += load_i64(histogram + 16 * b + 8)
        if top_k > 0:
            if count >= top_k:
                break
        elif mass >= top_p * total:
            break
    return b, total


@inline
def _sink(heap: Address, i: int, size: int) -> None:
    """Restore the heap below node i."""
    key = load_i64(heap + 8 * i)
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and load_i64(heap + 8 * (child + 1)) > load_i64(heap + 8 * child):
            child += 1
        if load_i64(heap + 8 * child) <= key:
            break
        store_i64(heap + 8 * i, load_i64(heap + 8 * child))
        i = child
    store_i64(heap + 8 * i, key)


@inline
def _gather(heap: Address, work: Address, vocab: int, least: Scalar, lowest: int) -> Any:
    """Keys of the weights in bins from ``lowest`` up, as a heap: weight bits high, inverted id low. Their number."""
    size = 0
    for i in range(vocab):
        bits = load_u32(work + 4 * i)
        if bits >> 23 >= lowest and load_f32(work + 4 * i) >= least:
            store_i64(heap + 8 * size, (bits << 32) | (0xFFFFFFFF - i))
            size += 1
    for i in range(size // 2 - 1, -1, -1):
        _sink(heap, i, size)
    return size


@inline
def _pop(heap: Address, size: int) -> Any:
    """Move the largest key behind the heap's end."""
    key = load_i64(heap)
    store_i64(heap, load_i64(heap + 8 * (size - 1)))
    _sink(heap, 0, size - 1)
    store_i64(heap + 8 * (size - 1), key)
    return key


@inline
def _survivors(heap: Address, size: int, limit: int, enough: Scalar) -> Any:
    """Pop at most ``limit`` keys, until their mass is ``enough``; (how many, their mass). They lie behind the heap, best last."""
    count, mass = 0, 0.0
    while count < limit and mass < enough:
        mass += f32_of_bits(_pop(heap, size - count) >> 32)
        count += 1
    return count, mass


@inline
def _prefix(heap: Address, size: int, count: int, enough: Scalar) -> Any:
    """How many of the ``count`` best reach a mass of ``enough``, and that mass."""
    taken, mass = 0, 0.0
    while taken < count and (taken == 0 or mass < enough):
        mass += f32_of_bits(load_i64(heap + 8 * (size - 1 - taken)) >> 32)
        taken += 1
    return taken, mass


@inline
def _draw_best(
    histogram: Address, work: Address, heap: Address, vocab: int, least: Scalar, top_k: int, top_p: Scalar, u: Scalar
) -> Any:
    """Draw among the survivors of top_k and then top_p, best first."""
    _count_bins(histogram, work, vocab, least)
    lowest, total = _lowest_bin(histogram, top_k, top_p)
    size = _gather(heap, work, vocab, least, lowest)
    if top_k > 0:
        count, mass = _survivors(heap, size, min(top_k, size), float("inf"))
        if top_p < 1.0:
            count, mass = _prefix(heap, size, count, top_p * mass)
    else:
        count, mass = _survivors(heap, size, size, top_p * total)
    target, passed = u * mass, 0.0
    for i in range(count):
        key = load_i64(heap + 8 * (size - 1 - i))
        passed += f32_of_bits(key >> 32)
        if passed > target or i == count - 1:
            return 0xFFFFFFFF - (key & 0xFFFFFFFF)
    return -1


@inline
def _choose(args: Address, row: int, memory: Address) -> Any:
    """The token of one row, or -1."""
    vocab = load_i64(args + VOCAB)
    work = memory + _HISTOGRAM
    _copy(load_i64(args + LOGITS) + row * load_i64(args + LOGIT_STRIDE), work, vocab)
    _ban(args, row, work, vocab)
    best = _best(work, vocab)
    if not (_MINUS_INFINITY < best < _INFINITY):
        return -1
    temperature = load_f32(load_i64(args + TEMPERATURE) + 4 * row)
    if temperature == 0:
        return _first_equal(work, vocab, best)
    _to_weights(work, vocab, best, temperature)
    u = philox(
        load_i64(load_i64(args + SEED) + 8 * row),
        load_u32(load_i64(args + SAMPLE) + 4 * row),
        load_u32(load_i64(args + POSITION) + 4 * row),
    )
    least = max(load_f32(load_i64(args + MIN_P) + 4 * row), _LEAST)
    top_k, top_p = load_i32(load_i64(args + TOP_K) + 4 * row), load_f32(load_i64(args + TOP_P) + 4 * row)
    if top_k <= 0 and top_p >= 1.0:
        return _draw_all(work, vocab, least, u)
    heap = work + 4 * (vocab + 16)
    return _draw_best(memory, work, heap, vocab, least, top_k, top_p, u)


@kernel
def sample(args: Address, chunk: int) -> None:
    """Rows chunk, chunk + CHUNKS, ...: one token each."""
    memory = load_i64(args + SCRATCH) + chunk * load_i64(args + SCRATCH_STRIDE)
    for row in range(chunk, load_i64(load_i64(args + ROWS)), load_i64(args + CHUNKS)):
        store_i32(load_i64(args + TOKENS) + 4 * row, _choose(args, row, memory))
