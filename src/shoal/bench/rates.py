"""Tokens a second over some rounds, and how many times another's: what every report here is made of."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second over some rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> Speed:
        """From the seconds that each round took for ``tokens`` tokens."""
        rates = [tokens / taken for taken in seconds]
        return cls(statistics.median(rates), min(rates), max(rates))

    def __str__(self) -> str:
        return f"{self.median:.0f} ({self.low:.0f}-{self.high:.0f})"


@dataclass(frozen=True, slots=True)
class Ratio:
    """shoal's median over a peer's, with the least and most of it in any one round."""

    of_medians: float
    low: float
    high: float

    @classmethod
    def of(cls, shoal: Sequence[float], peer: Sequence[float]) -> Ratio:
        """From the seconds that each round took, the same rounds of both; a peer that failed has fewer of them."""
        rounds = [other / own for own, other in zip(shoal, peer, strict=False)]
        return cls(statistics.median(peer) / statistics.median(shoal), min(rounds), max(rounds))

    def __str__(self) -> str:
        return f"{self.of_medians:.2f} ({self.low:.2f}-{self.high:.2f})"
