"""The samplers of a row (kernels/samplers.py), each a few passes over its copy of the logits; the twin is reference_sampling.py.

A candidate's *distance* is how far it is from the best place to be: best - logit, or for locally typical sampling the distance of that
from its mean. Candidates are kept in the order of their distances without being sorted: how far to go is found by bisection on the bits
of a distance. Logarithms and powers are our own, like exp: libm's differ from one machine to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack, unpack
from typing import Any

import numpy as np
from numpy import float32, float64, floor, int64, sqrt
from numpy.typing import NDArray

from shoal.kernels.cpu.jit import inline, kernel, shared
from shoal.kernels.cpu.recording import address_of
from shoal.kernels.cpu.sample_row import (
    BLOCK,
    BLOCK_BYTES,
    COIN,
    LEAST,
    MINUS_INFINITY,
    SAMPLERS,
    SAMPLERS_START,
    SURPRISE,
    TOKENS,
    VOCAB,
    Row,
    best_of,
    fill_up,
    first_of,
    row_at,
    row_draw,
)
from shoal.kernels.cpu.simd import (
    Address,
    Scalar,
    add,
    div,
    equal_lanes,
    exp,
    f32_of_bits,
    fma,
    keep_bits,
    keep_from,
    keep_where,
    lanes_from,
    load_f32,
    load_f32x16,
    load_f64,
    load_i32,
    load_i64,
    load_u32,
    lowest_bit,
    maximum,
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
from shoal.kernels.samplers import (
    LARGEST_PENALTY,
    MIROSTAT_BEST,
    XTC,
    Bias,
    Dry,
    MinP,
    Mirostat,
    Penalties,
    Sampler,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
)

# A sampler is a record of 8-byte fields: what it is, addresses and counts (int64), numbers (float64).
KIND, COUNT, FIRST, SECOND, THIRD, FOURTH, FIFTH, FIFTH_COUNT, A, B, C = (8 * i for i in range(11))
FIELDS = 11
RECORD = 8 * FIELDS

(BIAS, PENALTIES, DRY, TOP_N_SIGMA, TEMPERATURE, TYPICAL, MIN_P, TOP_K, TOP_P, XTC_, MIROSTAT) = range(11)

_LOWEST = float32(-3.4e38)  # no candidate's logit is below
_FAR = float32(-88.0)  # a weight at this distance is 0
_LARGEST_BITS = 0x7F7FFFFF  # of a finite float32
_BEYOND = 1.0 + 2.0**-52  # makes "more than" of "at least"
_NARROW = 64  # as in sample.py
_LN2 = 0.6931471805599453
_SQRT2 = 1.4142135623730951


# --- records ---------------------------------------------------------------------------------------------------------


class Records:
    """The samplers of some rows as the kernel reads them: ``starts`` int32 [rows + 1] and ``records`` int64 [samplers, FIELDS].

    ``keep`` holds what they point to; it must live until the kernel has run.
    """

    def __init__(self, rows: Sequence[tuple[Sampler, ...] | None]) -> None:
        self.keep: list[NDArray[Any]] = []
        counts = [0 if samplers is None else len(samplers) for samplers in rows]
        self.starts = np.cumsum([0, *counts], dtype=np.int32)
        records = [self._record(sampler) for samplers in rows if samplers is not None for sampler in samplers]
        self.records = np.array(records, np.int64).reshape(len(records), FIELDS)

    def _record(self, sampler: Sampler) -> tuple[int, ...]:
        at = self._at
        match sampler:
            case Bias():
                return _fields(BIAS, len(sampler.ids), at(sampler.ids), at(sampler.values))
            case Penalties():
                numbers = (sampler.repetition, sampler.frequency, sampler.presence)
                return _fields(PENALTIES, len(sampler.ids), at(sampler.ids), at(sampler.counts), numbers=numbers)
            case Dry():
                return self._dry(sampler)
            case TopNSigma():
                return _fields(TOP_N_SIGMA, numbers=(sampler.n,))
            case Temperature():
                return _fields(TEMPERATURE, numbers=(sampler.value, sampler.spread, sampler.exponent))
            case Typical():
                return _fields(TYPICAL, sampler.min_keep, numbers=(sampler.p,))
            case MinP():
                return _fields(MIN_P, sampler.min_keep, numbers=(sampler.p,))
            case TopK():
                return _fields(TOP_K, sampler.k)
            case TopP():
                return _fields(TOP_P, sampler.min_keep, numbers=(sampler.p,))
            case XTC():
                return _fields(XTC_, sampler.min_keep, numbers=(sampler.probability, sampler.threshold))
            case Mirostat():
                return _fields(MIROSTAT, sampler.version, numbers=(sampler.mu,))

    def _dry(self, sampler: Dry) -> tuple[int, ...]:
        at, breakers, matches = self._at, sampler.breakers, np.empty(len(sampler.history), np.int32)
        record = _fields(
            DRY,
            len(sampler.history),
            at(sampler.history),
            at(matches),
            at(breakers.single),
            at(breakers.heads),
            numbers=(sampler.multiplier, sampler.base, sampler.allowed_length),
        )
        return (*record[: FIFTH // 8], at(breakers.longer), len(breakers.longer), *record[A // 8 :])

    def _at(self, array: NDArray[Any]) -> int:
        self.keep.append(array)
        return address_of(array)


def _fields(kind: int, count: int = 0, *addresses: int, numbers: tuple[float, ...] = ()) -> tuple[int, ...]:
    addresses += (0,) * (6 - len(addresses))
    bits = unpack("=3q", pack("=3d", *numbers, *(0.0,) * (3 - len(numbers))))
    return (kind, count, *addresses, *bits)


# --- numbers ---------------------------------------------------------------------------------------------------------


@shared
def _log(x: float) -> Any:
    """The natural logarithm of a positive, finite float64."""
    power = 0
    while x > _SQRT2:
        x *= 0.5
        power += 1
    while x < 0.5 * _SQRT2:
        x *= 2.0
        power -= 1
    ratio = (x - 1.0) / (x + 1.0)
    square, term, total = ratio * ratio, ratio, 0.0
    for i in range(13):
        total += term / (2.0 * i + 1.0)
        term *= square
    return 2.0 * total + power * _LN2


@shared
def _exp(x: float) -> Any:
    """e^x of a float64 in +-700."""
    power = floor(x / _LN2 + 0.5)
    rest = x - power * _LN2
    total = 1.0
    for i in range(18, 0, -1):
        total = 1.0 + total * rest / i
    factor = 2.0 if power > 0 else 0.5
    for _ in range(abs(int64(power))):
        total *= factor
    return total


@inline
def _power(base: float, exponent: int) -> Any:
    """base^exponent of a natural number, no more than LARGEST_PENALTY; base >= 1."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result = min(result * base, LARGEST_PENALTY)
        base = min(base * base, LARGEST_PENALTY)
        exponent >>= 1
    return result


# --- samplers that change few logits ---------------------------------------------------------------------------------


@shared
def _bias(record: Address, row: Row) -> None:
    ids, values = load_i64(record + FIRST), load_i64(record + SECOND)
    for i in range(0, 4 * load_i64(record + COUNT), 4):
        place = row.copy + 4 * load_i32(ids + i)
        store_f32(place, load_f32(place) + load_f32(values + i))


@shared
def _penalties(record: Address, row: Row) -> None:
    ids, counts = load_i64(record + FIRST), load_i64(record + SECOND)
    repetition, frequency = float32(load_f64(record + A)), float32(load_f64(record + B))
    presence = float32(load_f64(record + C))
    for i in range(0, 4 * load_i64(record + COUNT), 4):
        place, count = row.copy + 4 * load_i32(ids + i), load_i32(counts + i)
        x = load_f32(place)
        x = x / repetition if x > 0 else x * repetition
        x = x - frequency * float32(count)
        if count > 0:
            x = x - presence
        store_f32(place, x)


@inline
def _has_bit(bits: Address, token: int) -> Any:
    return (load_u32(bits + 4 * (token >> 5)) >> (token & 31)) & 1 != 0


@shared
def _breaker_length(record: Address, start: int) -> Any:
    """The length of the longest breaker that begins with token ``start`` of the history; 0 if none does."""
    history, size = load_i64(record + FIRST), load_i64(record + COUNT)
    token = load_i32(history + 4 * start)
    if not _has_bit(load_i64(record + FOURTH), token):
        return 0
    longest = 1 if _has_bit(load_i64(record + THIRD), token) else 0
    longer = load_i64(record + FIFTH)
    end = longer + 4 * load_i64(record + FIFTH_COUNT)
    while longer < end:
        length, same = load_i32(longer), 0
        if length > longest and start + length <= size:
            while same < length and load_i32(longer + 4 + 4 * same) == load_i32(history + 4 * (start + same)):
                same += 1
            if same == length:
                longest = length
        longer += 4 + 4 * length
    return longest


@shared
def _repeat_limit(record: Address) -> Any:
    """How many tokens follow the last breaker."""
    size = load_i64(record + COUNT)
    for start in range(size - 1, -1, -1):
        length = _breaker_length(record, start)
        if length > 0:
            return size - start - length
    return size


@shared
def _match_ends(record: Address) -> None:
    """Write for each k > 0 how many tokens before the last k are those that the history ends with (the Z array of the history,
    backwards: Gusfield 1997)."""
    size, matches = load_i64(record + COUNT), load_i64(record + SECOND)
    last = load_i64(record + FIRST) + 4 * (size - 1)
    left, right = 0, 0
    for k in range(1, size):
        same = 0
        if k < right:
            same = min(right - k, load_i32(matches + 4 * (k - left)))
        while k + same < size and load_i32(last - 4 * same) == load_i32(last - 4 * (k + same)):
            same += 1
        store_i32(matches + 4 * k, same)
        if k + same > right:
            left, right = k, k + same


@shared
def _dry(record: Address, row: Row) -> None:
    size, matches, allowed = load_i64(record + COUNT), load_i64(record + SECOND), int64(load_f64(record + C))
    limit = _repeat_limit(record)
    if size <= allowed or limit < allowed:
        return
    _match_ends(record)
    end, longest = load_i64(record + FIRST) + 4 * size, row.weights  # of each token that would go on with a repetition
    for k in range(1, size):
        store_i32(longest + 4 * load_i32(end - 4 * k), -1)
    for k in range(1, size):
        repeated, place = min(load_i32(matches + 4 * k), limit), longest + 4 * load_i32(end - 4 * k)
        if repeated >= allowed and repeated > load_i32(place):
            store_i32(place, repeated)
    for k in range(1, size):
        token = load_i32(end - 4 * k)
        repeated = load_i32(longest + 4 * token)
        if repeated >= 0:
            store_i32(longest + 4 * token, -1)  # once for each token
            if not _has_bit(load_i64(record + THIRD), token):
                penalty = load_f64(record + A) * _power(load_f64(record + B), repeated - allowed)
                x = load_f32(row.copy + 4 * token)
                store_f32(row.copy + 4 * token, x - float32(min(penalty, LARGEST_PENALTY)))


# --- masses and cuts -------------------------------------------------------------------------------------------------


@shared
def _mass(row: Row, best: Scalar) -> Any:
    """The sum of all weights, and of weight times distance."""
    mass, energy = 0.0, 0.0
    for first in range(row.copy, row.copy + BLOCK_BYTES * row.blocks, BLOCK_BYTES):
        some, more = splat(0.0), splat(0.0)
        for i in range(first, first + BLOCK_BYTES, 64):
            x = maximum(sub(load_f32x16(i), splat(best)), splat(_FAR))
            w = exp(x)
            some, more = add(some, w), fma(w, x, more)
        mass += sum_lanes(some)
        energy -= sum_lanes(more)
    return mass, energy


@shared
def _number(row: Row) -> Any:
    """How many candidates there are."""
    count = 0
    for i in range(row.copy, row.copy + BLOCK_BYTES * row.blocks, 64):
        count += ones(lanes_from(load_f32x16(i), _LOWEST))
    return count


@inline
def _drop_below(row: Row, least: Scalar) -> None:
    """Keep logits of at least ``least``."""
    for i in range(row.copy, row.copy + BLOCK_BYTES * row.blocks, 64):
        x = load_f32x16(i)
        store_f32x16(i, keep_bits(x, lanes_from(x, least), MINUS_INFINITY))


@shared
def _keep_one(row: Row, token: int) -> None:
    """Keep one token."""
    x = load_f32(row.copy + 4 * token)
    for i in range(row.copy, row.copy + BLOCK_BYTES * row.blocks, 64):
        store_f32x16(i, splat(MINUS_INFINITY))
    store_f32(row.copy + 4 * token, x)


@shared
def _measure(row: Row, best: Scalar, centre: Scalar) -> None:
    """Write to ``weights`` minus the distance of each candidate's energy, best - logit, from ``centre`` (-infinity for no
    candidate), and to ``ids`` its weight."""
    for i in range(0, BLOCK_BYTES * row.blocks, 64):
        x = load_f32x16(row.copy + i)
        energy = sub(splat(best), x)
        away = sub(energy, splat(centre))
        away = maximum(away, sub(splat(0.0), away))
        store_f32x16(row.weights + i, sub(splat(0.0), away))
        store_f32x16(row.ids + i, exp(sub(x, splat(best))))


@shared
def _tally(nearness: Address, weights: Address, blocks: int, least: Scalar) -> Any:
    """The mass and the number of what is at least as near as ``least``."""
    mass, count = 0.0, 0
    for first in range(0, BLOCK_BYTES * blocks, BLOCK_BYTES):
        part = splat(0.0)
        for i in range(first, first + BLOCK_BYTES, 64):
            near = load_f32x16(nearness + i)
            part = add(part, keep_where(load_f32x16(weights + i), near, least))
            count += ones(lanes_from(near, least))
        mass += sum_lanes(part)
    return mass, count


@shared
def _narrow(nearness: Address, weights: Address, blocks: int, low: Scalar, high: Scalar, row: Row) -> Any:
    """Copy to ``rest`` and ``maxima`` what is from ``low`` to below ``high``; how many blocks."""
    size = 0
    for i in range(0, BLOCK_BYTES * blocks, 64):
        near = load_f32x16(nearness + i)
        lanes = lanes_from(near, low) & ~lanes_from(near, high)
        if lanes != 0:
            w = load_f32x16(weights + i)
            pack_lanes(row.rest + 4 * size, near, lanes)
            pack_lanes(row.maxima + 4 * size, w, lanes)
            size += ones(lanes)
    fill_up(row.maxima, size, float32(0.0))
    return fill_up(row.rest, size, MINUS_INFINITY)


@shared
def _cut(row: Row, mass: float, count: int) -> None:
    """Keep the nearest (see `_measure`), lowest ids first, until they have this mass together and are this many."""
    # Distances of bits up to ``high`` are enough, those up to ``low`` are not: they have ``above`` and are ``nearer``.
    low, high, above, nearer = -1, _LARGEST_BITS, 0.0, 0
    nearness, weights, blocks = row.weights, row.ids, row.blocks
    total, number = _tally(nearness, weights, blocks, _LOWEST)
    mass, count = min(mass, total), min(count, number)
    gone, removed = 0.0, 0
    while high - low > 1:
        if blocks > 1 and number - nearer < _NARROW * blocks:
            nearest = -f32_of_bits(low) if low >= 0 else float32(1.0)
            blocks = _narrow(nearness, weights, blocks, -f32_of_bits(high), nearest, row)
            nearness, weights, gone, removed = row.rest, row.maxima, above, nearer
        middle = (low + high) >> 1
        some, others = _tally(nearness, weights, blocks, -f32_of_bits(middle))
        if gone + some >= mass and removed + others >= count:
            high, number = middle, removed + others
        else:
            low, above, nearer = middle, gone + some, removed + others
    _keep_nearest(row, -f32_of_bits(high), mass - above, count - nearer)


@shared
def _keep_nearest(row: Row, least: Scalar, mass: float, count: int) -> None:
    """Keep what is nearer than ``least``, and of what is just so near the lowest ids, until they have this mass and are this many."""
    for i in range(0, BLOCK_BYTES * row.blocks, 64):
        near = load_f32x16(row.weights + i)
        keep = lanes_from(near, least)
        equal = equal_lanes(near, least)
        while equal != 0:
            if mass <= 0 and count <= 0:
                keep &= ~equal
                break
            mass -= load_f32(row.ids + i + 4 * lowest_bit(equal))
            count -= 1
            equal &= equal - 1
        store_f32x16(row.copy + i, keep_bits(load_f32x16(row.copy + i), keep, MINUS_INFINITY))


# --- samplers that keep some -----------------------------------------------------------------------------------------


@shared
def _top_n_sigma(record: Address, row: Row) -> None:
    best, count, total = best_of(row), _number(row), 0.0
    for first in range(row.copy, row.copy + BLOCK_BYTES * row.blocks, BLOCK_BYTES):
        part = splat(0.0)
        for i in range(first, first + BLOCK_BYTES, 64):
            part = add(part, keep_from(load_f32x16(i), _LOWEST))
        total += sum_lanes(part)
    mean, squares = float32(total / count), 0.0
    for first in range(row.copy, row.copy + BLOCK_BYTES * row.blocks, BLOCK_BYTES):
        part = splat(0.0)
        for i in range(first, first + BLOCK_BYTES, 64):
            x = load_f32x16(i)
            away = sub(x, splat(mean))
            part = add(part, keep_where(mul(away, away), x, _LOWEST))
        squares += sum_lanes(part)
    _drop_below(row, float32(best - load_f64(record + A) * sqrt(squares / count)))


@shared
def _dynamic(record: Address, row: Row) -> Any:
    """The temperature of a row (see `samplers.Temperature`)."""
    value, spread = load_f64(record + A), load_f64(record + B)
    count = _number(row)
    if spread <= 0 or count < 2:
        return value
    mass, energy = _mass(row, best_of(row))
    ratio = min(max((_log(mass) + energy / mass) / _log(float64(count)), 0.0), 1.0)
    exponent = load_f64(record + C)
    if ratio > 0:
        power = _exp(max(exponent * _log(ratio), -700.0))
    else:
        power = 1.0 if exponent == 0 else 0.0
    low = max(0.0, value - spread)
    return low + (value + spread - low) * power


@shared
def _temperature(record: Address, row: Row) -> None:
    value = _dynamic(record, row)
    if value <= 0:
        best = best_of(row)
        _keep_one(row, first_of(row, best))
    else:
        for i in range(row.copy, row.copy + BLOCK_BYTES * row.blocks, 64):
            store_f32x16(i, div(load_f32x16(i), splat(value)))


@shared
def _typical(record: Address, row: Row) -> None:
    best = best_of(row)
    mass, energy = _mass(row, best)
    _measure(row, best, float32(energy / mass))
    _cut(row, load_f64(record + A) * mass * _BEYOND, max(load_i64(record + COUNT), 1))


@shared
def _min_p(record: Address, row: Row) -> None:
    best = best_of(row)
    _measure(row, best, float32(0.0))
    least, keep = max(float32(load_f64(record + A)), LEAST), load_i64(record + COUNT)
    count = 0
    for i in range(row.ids, row.ids + BLOCK_BYTES * row.blocks, 64):
        count += ones(lanes_from(load_f32x16(i), least))
    if count < keep:
        _cut(row, 0.0, keep)
    else:
        for i in range(0, BLOCK_BYTES * row.blocks, 64):
            lanes = lanes_from(load_f32x16(row.ids + i), least)
            store_f32x16(row.copy + i, keep_bits(load_f32x16(row.copy + i), lanes, MINUS_INFINITY))


@shared
def _keep_best(row: Row, mass: float, count: int) -> None:
    """Keep the best until they have this mass and are this many."""
    _measure(row, best_of(row), float32(0.0))
    _cut(row, mass, count)


@shared
def _top_p(record: Address, row: Row) -> None:
    mass, _ = _mass(row, best_of(row))
    _keep_best(row, load_f64(record + A) * mass, max(load_i64(record + COUNT), 1))


@shared
def _xtc(record: Address, row: Row, coin: float) -> None:
    if coin >= load_f64(record + A) or load_f64(record + B) > 0.5:
        return
    best = best_of(row)
    mass, _ = _mass(row, best)
    _measure(row, best, float32(0.0))
    least = max(float32(load_f64(record + B) * mass), LEAST)
    top, last, lowest = 0, -1, float32(2.0)
    for i in range(0, BLOCK * row.blocks, 16):
        lanes = lanes_from(load_f32x16(row.ids + 4 * i), least)
        while lanes != 0:
            token = i + lowest_bit(lanes)
            near = load_f32(row.weights + 4 * token)
            if near <= lowest:
                last, lowest = token, near
            top += 1
            lanes &= lanes - 1
    if top < 2 or _number(row) - (top - 1) < load_i64(record + COUNT):
        return
    kept = load_f32(row.copy + 4 * last)
    for i in range(0, BLOCK_BYTES * row.blocks, 64):
        lanes = ~lanes_from(load_f32x16(row.ids + i), least)
        store_f32x16(row.copy + i, keep_bits(load_f32x16(row.copy + i), lanes, MINUS_INFINITY))
    store_f32(row.copy + 4 * last, kept)


# --- mirostat --------------------------------------------------------------------------------------------------------


@shared
def _mirostat(record: Address, row: Row, vocab: int) -> None:
    best, mu = best_of(row), load_f64(record + A)
    if load_i64(record + COUNT) == 2:
        mass, _ = _mass(row, best)
        _measure(row, best, float32(0.0))
        least = -max(float32(mu * _LN2 - _log(mass)), float32(0.0))
        for i in range(0, BLOCK_BYTES * row.blocks, 64):
            lanes = lanes_from(load_f32x16(row.weights + i), least)
            store_f32x16(row.copy + i, keep_bits(load_f32x16(row.copy + i), lanes, MINUS_INFINITY))
    else:
        _keep_best(row, 0.0, _zipf_count(row, mu, vocab))


@shared
def _zipf_count(row: Row, mu: float, vocab: int) -> Any:
    """How many to keep by version 1: the exponent of a Zipf law is fitted to the best."""
    size = _sorted_best(row)
    if size < 2:
        return 1
    fit, squares = 0.0, 0.0
    for i in range(size - 1):
        step = _log((i + 2.0) / (i + 1.0))
        fit += step * (float64(load_f32(row.ids + 4 * i)) - load_f32(row.ids + 4 * i + 4))
        squares += step * step
    exponent, log_size = max(fit / squares, 1e-6), _log(float64(vocab))
    epsilon = exponent - 1.0
    if abs(epsilon) < 1e-6:
        share = 1.0 / log_size
    else:
        share = epsilon / (1.0 - _exp(-epsilon * log_size if epsilon * log_size < 700.0 else -700.0))
    log_count = (_log(share) + mu * _LN2) / exponent
    return max(int64(_exp(max(min(log_count, log_size + 1e-6), -1.0))), 1)


@shared
def _sorted_best(row: Row) -> Any:
    """Write the MIROSTAT_BEST best logits to ``ids``, the best first; how many."""
    size = 0
    for i in range(0, BLOCK * row.blocks, 16):
        x = load_f32x16(row.copy + 4 * i)
        least = load_f32(row.ids + 4 * (MIROSTAT_BEST - 1)) if size == MIROSTAT_BEST else _LOWEST
        lanes = lanes_from(x, least)
        while lanes != 0:
            size = _insert(row.ids, size, load_f32(row.copy + 4 * (i + lowest_bit(lanes))))
            lanes &= lanes - 1
    return size


@inline
def _insert(values: Address, size: int, value: Scalar) -> Any:
    """Put a value into a falling list of at most MIROSTAT_BEST; its new length."""
    place = min(size, MIROSTAT_BEST - 1)
    if size < MIROSTAT_BEST or load_f32(values + 4 * place) < value:
        while place > 0 and load_f32(values + 4 * place - 4) < value:
            store_f32(values + 4 * place, load_f32(values + 4 * place - 4))
            place -= 1
        store_f32(values + 4 * place, value)
        size = min(size + 1, MIROSTAT_BEST)
    return size


# --- all of them -----------------------------------------------------------------------------------------------------


@shared
def _apply(args: Address, index: int, record: Address, row: Row, vocab: int) -> None:
    kind = load_i64(record + KIND)
    if kind == BIAS:
        _bias(record, row)
    elif kind == PENALTIES:
        _penalties(record, row)
    elif kind == DRY:
        _dry(record, row)
    elif kind == TOP_N_SIGMA:
        _top_n_sigma(record, row)
    elif kind == TEMPERATURE:
        _temperature(record, row)
    elif kind == TYPICAL:
        _typical(record, row)
    elif kind == MIN_P:
        _min_p(record, row)
    elif kind == TOP_K:
        _keep_best(row, 0.0, load_i64(record + COUNT))
    elif kind == TOP_P:
        _top_p(record, row)
    elif kind == XTC_:
        _xtc(record, row, row_draw(args, index, COIN))
    elif kind == MIROSTAT:
        _mirostat(record, row, vocab)


@kernel
def adjust_row(args: Address, index: int) -> None:
    """Apply the samplers of a row to its copy."""
    row, vocab = row_at(args, index), load_i64(args + VOCAB)
    starts, records = load_i64(args + SAMPLERS_START) + 4 * index, load_i64(load_i64(args + SAMPLERS))
    for i in range(load_i32(starts), load_i32(starts + 4)):
        _apply(args, index, records + RECORD * i, row, vocab)


@kernel
def measure_row(args: Address, index: int) -> None:
    """Where a row ends with Mirostat, how many bits its token surprises by."""
    row, stop = row_at(args, index), load_i32(load_i64(args + SAMPLERS_START) + 4 * index + 4)
    if load_i64(load_i64(load_i64(args + SAMPLERS)) + RECORD * (stop - 1) + KIND) == MIROSTAT:
        token, best = load_i32(load_i64(args + TOKENS) + 4 * index), best_of(row)
        mass, _ = _mass(row, best)
        distance = float64(best) - load_f32(row.copy + 4 * token)
        store_f32(load_i64(args + SURPRISE) + 4 * index, (_log(mass) + distance) / _LN2)
