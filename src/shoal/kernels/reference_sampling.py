"""The specification of sampling: a token from a row of logits, in obvious NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.base import SampleRows
from shoal.kernels.samplers import (
    LARGEST_PENALTY,
    MIROSTAT_BEST,
    XTC,
    Bias,
    Breakers,
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

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
COIN = 1  # the third counter word of XTC's random numbers


def philox(seed: int, sample: int, position: int, stream: int = 0) -> float:
    """A number in [0, 1) that depends on these alone: Philox4x32-10 (Salmon et al. 2011), key = seed."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    counter = [position & 0xFFFFFFFF, sample & 0xFFFFFFFF, stream, 0]
    for _ in range(10):
        high = 0xD2511F53 * counter[0]
        low = 0xCD9E8D57 * counter[2]
        counter = [
            (low >> 32) ^ counter[1] ^ key[0],
            low & 0xFFFFFFFF,
            (high >> 32) ^ counter[3] ^ key[1],
            high & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return float((counter[0] << 32 | counter[1]) >> 11) * 2.0**-53


def row_draw(how: SampleRows, row: int, stream: int = 0) -> float:
    """The random number of one row."""
    return philox(int(how.seed[row]), int(how.sample[row]), int(how.position[row]), stream)


def sample_row(logits: F32, how: SampleRows, row: int) -> int:
    """One token from logits [vocab]: the row's samplers, then temperature, then min_p, top_k and top_p as in vLLM; ties go to
    the lowest id.

    -1 where a logit is NaN or the best is infinite (also: no token is left).
    """
    scores = adjusted(logits, how, row)
    if not np.isfinite(scores.max()):
        return -1
    token = _choose(scores, how, row)
    samplers = how.samplers[row] if how.samplers is not None else None
    if how.surprise is not None and samplers and isinstance(samplers[-1], Mirostat):
        weights = _weights(scores)
        how.surprise[row] = np.log2(weights.sum() / weights[token])
    return token


def _choose(scores: F32, how: SampleRows, row: int) -> int:
    if how.temperature[row] == 0:
        return int(np.argmax(scores))
    weights = np.exp((scores - scores.max()) / how.temperature[row]).astype(np.float64)
    kept = np.flatnonzero(weights >= max(how.min_p[row], np.float32(1e-38)))
    if how.top_k[row] > 0 or how.top_p[row] < 1:
        kept = kept[np.lexsort((kept, -weights[kept]))]  # best first; otherwise in id order
    if how.top_k[row] > 0:
        kept = kept[: how.top_k[row]]
    mass = np.cumsum(weights[kept])
    if how.top_p[row] < 1:
        kept = kept[: int(np.searchsorted(mass, float(how.top_p[row]) * mass[-1])) + 1]
        mass = mass[: len(kept)]
    draw = row_draw(how, row) * mass[-1]
    return int(kept[min(int(np.searchsorted(mass, draw, side="right")), len(kept) - 1)])


def adjusted(logits: F32, how: SampleRows, row: int) -> F32:
    """The logits after mask, banned ids and samplers. NaN and +infinity stay."""
    scores = logits.astype(np.float32)
    if how.mask is not None and (mask := how.mask[row]) is not None:
        scores[~bits(mask, len(scores))] = -np.inf
    banned = how.banned[row]
    if banned is not None:
        scores[banned] = -np.inf
    if not np.isfinite(scores.max()):
        return scores
    for sampler in (how.samplers[row] if how.samplers is not None else None) or ():
        scores = apply(sampler, scores, row_draw(how, row, COIN))
    return scores


def bits(words: NDArray[np.uint32], count: int) -> NDArray[np.bool_]:
    """The first ``count`` bits of uint32 words, lowest first."""
    return np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")[:count].astype(bool)


def apply(sampler: Sampler, scores: F32, coin: float) -> F32:
    """The logits after one sampler; ``coin`` is XTC's random number. Some are finite, none is NaN or +infinity."""
    if isinstance(sampler, XTC):
        return _xtc(sampler, scores, coin)
    return _APPLY[type(sampler)](sampler, scores)


def _weights(scores: F32) -> F64:
    """exp(logit - best); what is too small for a float32 is 0."""
    with np.errstate(under="ignore"):
        weights = np.exp(scores - scores.max())
    return np.where(weights >= np.float32(1e-38), weights, 0).astype(np.float64)


def _keep(scores: F32, kept: Any) -> F32:
    """Only the candidates ``kept`` (ids or booleans)."""
    out = np.full_like(scores, -np.inf)
    out[kept] = scores[kept]
    return out


def _keep_first(scores: F32, distance: F32, mass: float, count: int, *, beyond: bool = False) -> F32:
    """Of the candidates in the order of ``distance``, lowest ids first, keep until they have this weight together (``beyond``: more
    than this) and are this many."""
    ids = np.flatnonzero(scores > -np.inf)
    ids = ids[np.lexsort((ids, distance[ids]))]
    masses = np.cumsum(_weights(scores)[ids])
    needed = int(np.searchsorted(masses, mass, side="right" if beyond else "left")) + 1
    return _keep(scores, ids[: max(needed, count)])


def _best_first(scores: F32, mass: float, count: int) -> F32:
    return _keep_first(scores, scores.max() - scores, mass, count)


def _bias(sampler: Bias, scores: F32) -> F32:
    scores[sampler.ids] += sampler.values
    return scores


def _penalties(sampler: Penalties, scores: F32) -> F32:
    repetition, frequency, presence = map(np.float32, (sampler.repetition, sampler.frequency, sampler.presence))
    x = scores[sampler.ids]
    x = np.where(x > 0, x / repetition, x * repetition)
    x = x - frequency * sampler.counts.astype(np.float32)
    scores[sampler.ids] = x - presence * (sampler.counts > 0)
    return scores


def _dry(sampler: Dry, scores: F32) -> F32:
    history, allowed = sampler.history.tolist(), sampler.allowed_length
    single = bits(sampler.breakers.single, len(scores))
    limit = _repeat_limit(history, single, longer_breakers(sampler.breakers))
    if len(history) <= allowed or limit < allowed:
        return scores
    longest: dict[int, int] = {}
    for end in range(len(history) - 1):
        repeated = min(_common_end(history, end), limit)
        if repeated >= allowed:
            following = history[end + 1]
            longest[following] = max(longest.get(following, 0), repeated)
    for token, repeated in longest.items():
        if not single[token]:
            with np.errstate(over="ignore"):
                penalty = sampler.multiplier * np.float64(sampler.base) ** (repeated - allowed)
            scores[token] -= np.float32(min(penalty, LARGEST_PENALTY))
    return scores


def longer_breakers(breakers: Breakers) -> list[list[int]]:
    """The breakers of more than one token."""
    flat, found = breakers.longer.tolist(), []
    while flat:
        found.append(flat[1 : 1 + flat[0]])
        flat = flat[1 + flat[0] :]
    return found


def _repeat_limit(history: list[int], single: NDArray[np.bool_], longer: list[list[int]]) -> int:
    """How many tokens follow the last breaker."""
    for start in reversed(range(len(history))):
        lengths = [1] if single[history[start]] else []
        lengths += [len(tokens) for tokens in longer if history[start : start + len(tokens)] == tokens]
        if lengths:
            return len(history) - start - max(lengths)
    return len(history)


def _common_end(history: list[int], end: int) -> int:
    """How many tokens up to ``end`` are those that the history ends with."""
    length = 0
    while length <= end and history[end - length] == history[-1 - length]:
        length += 1
    return length


def _top_n_sigma(sampler: TopNSigma, scores: F32) -> F32:
    candidates = scores[scores > -np.inf].astype(np.float64)
    return _keep(scores, scores >= np.float32(candidates.max() - sampler.n * candidates.std()))


def _temperature(sampler: Temperature, scores: F32) -> F32:
    value = sampler.value
    if sampler.spread > 0:
        value = _dynamic_temperature(sampler, scores)
    if value <= 0:
        return _keep(scores, [int(np.argmax(scores))])
    return scores / np.float32(value)


def _dynamic_temperature(sampler: Temperature, scores: F32) -> float:
    count = np.count_nonzero(scores > -np.inf)
    if count < 2:
        return sampler.value
    low, high = max(0.0, sampler.value - sampler.spread), sampler.value + sampler.spread
    probabilities = _weights(scores) / _weights(scores).sum()
    some = probabilities[probabilities > 0]
    entropy = -float((some * np.log(some)).sum())
    ratio = min(max(entropy / np.log(count), 0.0), 1.0)
    return float(low + (high - low) * ratio**sampler.exponent)


def _typical(sampler: Typical, scores: F32) -> F32:
    weights, energies = _weights(scores), scores.max() - scores
    # -log p = energy + log(sum of weights), and so is the entropy with the mean energy.
    mean = float((weights * np.where(weights > 0, energies, 0)).sum() / weights.sum())
    distance = np.abs(energies - np.float32(mean))
    return _keep_first(scores, distance, sampler.p * weights.sum(), max(sampler.min_keep, 1), beyond=True)


def _min_p(sampler: MinP, scores: F32) -> F32:
    kept = _weights(scores) >= np.float32(sampler.p)
    if np.count_nonzero(kept) < sampler.min_keep:
        return _best_first(scores, 0.0, sampler.min_keep)
    return _keep(scores, kept & (scores > -np.inf))


def _top_k(sampler: TopK, scores: F32) -> F32:
    return _best_first(scores, 0.0, sampler.k)


def _top_p(sampler: TopP, scores: F32) -> F32:
    return _best_first(scores, sampler.p * _weights(scores).sum(), max(sampler.min_keep, 1))


def _xtc(sampler: XTC, scores: F32, coin: float) -> F32:
    weights = _weights(scores)
    top = np.flatnonzero(weights >= max(np.float32(sampler.threshold * weights.sum()), np.float32(1e-38)))
    left = np.count_nonzero(scores > -np.inf) - (len(top) - 1)
    if coin >= sampler.probability or sampler.threshold > 0.5 or len(top) < 2 or left < sampler.min_keep:
        return scores
    scores = scores.copy()
    scores[top[np.lexsort((top, -scores[top]))][:-1]] = -np.inf
    return scores


def _mirostat(sampler: Mirostat, scores: F32) -> F32:
    weights = _weights(scores)
    if sampler.version == 2:
        most = np.float32(sampler.mu * np.log(2) - np.log(weights.sum()))
        energies = scores.max() - scores
        return _keep(scores, energies <= max(most, np.float32(0)))
    return _best_first(scores, 0.0, _mirostat_count(sampler.mu, scores))


def _mirostat_count(mu: float, scores: F32) -> int:
    """How many to keep by version 1: the exponent of a Zipf law is fitted to the best."""
    best = np.sort(scores[scores > -np.inf])[::-1][:MIROSTAT_BEST].astype(np.float64)
    if len(best) < 2:
        return 1
    steps = np.log(np.arange(2, len(best) + 1) / np.arange(1, len(best)))
    exponent = max(float((steps * -np.diff(best)).sum() / (steps**2).sum()), 1e-6)
    size, epsilon = np.log(len(scores)), exponent - 1
    share = 1 / size if abs(epsilon) < 1e-6 else epsilon / -np.expm1(-epsilon * size)
    count = np.exp(min((np.log(share) + mu * np.log(2)) / exponent, size + 1e-6))  # no more than there are
    return max(int(count), 1)


_APPLY: dict[type, Callable[[Any, F32], F32]] = {
    Bias: _bias,
    Penalties: _penalties,
    Dry: _dry,
    TopNSigma: _top_n_sigma,
    Temperature: _temperature,
    Typical: _typical,
    MinP: _min_p,
    TopK: _top_k,
    TopP: _top_p,
    Mirostat: _mirostat,
}
