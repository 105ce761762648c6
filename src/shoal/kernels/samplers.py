"""What may happen to a row of logits before a token is drawn from it: data for `SampleRows.samplers`, applied in order.

A sampler changes logits, or leaves fewer candidates: the others become -infinity. The *weight* of a candidate is exp(logit - best), its
probability the weight over the sum of all. Where candidates rank, the best come first and the lowest id among equals. Those with
``min_keep`` leave at least so many candidates, if there are so many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Ids = NDArray[np.int32]
_Bits = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Bias:
    """``values`` (float32) are added to the logits of ``ids``."""

    ids: _Ids
    values: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Penalties:
    """What has been seen becomes less likely. ``ids`` are different from each other; ``counts`` says how often each counts (maybe 0).

    A positive logit is divided by ``repetition`` and another multiplied; then it loses ``frequency`` for each time, and once
    ``presence`` if that is any time at all.
    """

    ids: _Ids
    counts: _Ids
    repetition: float
    frequency: float
    presence: float


@dataclass(frozen=True, slots=True)
class Breakers:
    """Token sequences over which no repetition reaches. Bit t % 32 of word t // 32 is set in ``single`` where token t is one by itself,
    in ``heads`` where any begins with it. ``longer``: the others, each as its length and its tokens, one behind the other."""

    single: _Bits
    heads: _Bits
    longer: _Ids


@dataclass(frozen=True, slots=True)
class Dry:
    """DRY ("don't repeat yourself"): a token that would go on with a repetition of something in ``history`` loses multiplier *
    base^(n - allowed_length), where n >= ``allowed_length`` is the length of what has been repeated so far. Tokens that are
    breakers lose nothing."""

    history: _Ids
    multiplier: float
    base: float
    allowed_length: int
    breakers: Breakers


@dataclass(frozen=True, slots=True)
class TopNSigma:
    """Keep logits of at least best - n * (standard deviation of all candidates')."""

    n: float


@dataclass(frozen=True, slots=True)
class Temperature:
    """Divide logits by ``value``. With a ``spread``, by what lies between value - spread (no less than 0) and value + spread, at
    (entropy / largest possible entropy) ^ ``exponent`` of the way. 0 keeps the best alone."""

    value: float
    spread: float = 0.0
    exponent: float = 1.0


@dataclass(frozen=True, slots=True)
class Typical:
    """Locally typical sampling (Meister et al. 2022): rank by how far -log(probability) is from the entropy, the closest first,
    and keep until their probability is more than ``p``."""

    p: float
    min_keep: int = 0


@dataclass(frozen=True, slots=True)
class MinP:
    """Keep weights of at least ``p``."""

    p: float
    min_keep: int = 0


@dataclass(frozen=True, slots=True)
class TopK:
    """Keep the ``k`` best."""

    k: int


@dataclass(frozen=True, slots=True)
class TopP:
    """Keep the best until their probability is at least ``p``."""

    p: float
    min_keep: int = 0


@dataclass(frozen=True, slots=True)
class XTC:
    """Exclude top choices: with this ``probability``, drop all candidates that have at least the probability ``threshold``, but for the
    last of them, unless less than ``min_keep`` would be left."""

    probability: float
    threshold: float
    min_keep: int = 0


@dataclass(frozen=True, slots=True)
class Mirostat:
    """Mirostat (Basu et al. 2021): keep what surprises by no more than ``mu`` bits. Version 2 looks at each candidate's surprise,
    version 1 estimates from the 100 best how many to keep. Comes last."""

    version: int
    mu: float


Sampler = Bias | Penalties | Dry | TopNSigma | Temperature | Typical | MinP | TopK | TopP | XTC | Mirostat

MIROSTAT_BEST = 100  # candidates from which version 1 estimates
LARGEST_PENALTY = 3e38  # of DRY: what float32 can hold
