"""What DRY takes from which token: it follows from the history alone, so the host finds it (the twin is reference_sampling.py)."""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.samplers import LARGEST_PENALTY, Breakers, Dry

_Ids = NDArray[np.int32]
_Heads = dict[int, list[list[int]]]
_FEW = 16  # comparisons for each token of the history, after which another way is faster


def dry_penalties(sampler: Dry) -> tuple[_Ids, NDArray[np.float32]]:
    """Different ids, and what each loses."""
    history, allowed = sampler.history, sampler.allowed_length
    limit = _repeat_limit(history, sampler.breakers)
    if len(history) <= max(allowed, 1) or limit < allowed:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    repeated = _repeats(history, min(limit, allowed + _steps(sampler)))
    long = repeated >= allowed
    ids, which = np.unique(history[1:][long], return_inverse=True)
    longest = np.zeros(len(ids), np.int64)
    np.maximum.at(longest, which, repeated[long])
    losing = ~_has_bit(sampler.breakers.single, ids)
    with np.errstate(over="ignore"):
        lost = sampler.multiplier * np.float64(sampler.base) ** (longest[losing] - allowed)
    return ids[losing], np.minimum(lost, LARGEST_PENALTY).astype(np.float32)


def _steps(sampler: Dry) -> int:
    """By how many tokens a repetition may be longer than is allowed before that makes no more difference."""
    if sampler.base == 1 or sampler.multiplier == 0:
        return 0
    if sampler.base < 1 or sampler.multiplier < 0:
        return len(sampler.history)
    steps = log(LARGEST_PENALTY / sampler.multiplier) / log(sampler.base)
    return min(max(ceil(steps) + 1, 0), len(sampler.history))


def _repeats(history: _Ids, longest: int) -> NDArray[np.int64]:
    """For each token but the last, how many tokens up to it are those that the history ends with, but no more than ``longest``."""
    size, comparisons = len(history), 0
    repeated, ends = np.zeros(size - 1, np.int64), np.arange(size - 1)
    for length in range(longest):
        ends = ends[ends >= length]
        ends = ends[history[ends - length] == history[size - 1 - length]]
        repeated[ends] = length + 1
        comparisons += len(ends)
        if len(ends) == 0 or comparisons > _FEW * size:
            break
    if comparisons > _FEW * size:
        return np.minimum(_all_repeats(history.tolist()), longest)
    return repeated


def _all_repeats(history: list[int]) -> NDArray[np.int64]:
    """The same in linear time for a history that repeats itself much: the Z array of the history, backwards (Gusfield 1997)."""
    size, backwards = len(history), history[::-1]
    same = [0] * size
    left = right = 0
    for k in range(1, size):
        length = min(right - k, same[k - left]) if k < right else 0
        while k + length < size and backwards[length] == backwards[k + length]:
            length += 1
        same[k] = length
        if k + length > right:
            left, right = k, k + length
    return np.array(same[:0:-1], np.int64)


def _repeat_limit(history: _Ids, breakers: Breakers) -> int:
    """How many tokens follow the last breaker."""
    tokens, longer = history.tolist(), _by_head(breakers.longer.tobytes())
    single = _has_bit(breakers.single, history)
    for start in np.flatnonzero(_has_bit(breakers.heads, history) | single)[::-1].tolist():
        lengths = [1] if single[start] else []
        lengths += [len(b) for b in longer.get(tokens[start], ()) if tokens[start : start + len(b)] == b]
        if lengths:
            return int(len(tokens) - start - max(lengths))
    return len(tokens)


@lru_cache(maxsize=64)
def _by_head(longer: bytes) -> _Heads:
    """The breakers of more than one token by their first. They are the same for all steps of a request."""
    flat, found, at = np.frombuffer(longer, np.int32).tolist(), _Heads(), 0
    while at < len(flat):
        breaker = flat[at + 1 : at + 1 + flat[at]]
        found.setdefault(breaker[0], []).append(breaker)
        at += 1 + len(breaker)
    return found


def _has_bit(words: NDArray[np.uint32], ids: _Ids) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (words[ids >> 5] >> (ids & 31).astype(np.uint32)) & np.uint32(1) != 0
    return found
