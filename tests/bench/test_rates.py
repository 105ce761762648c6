"""Speeds and ratios over rounds."""

from __future__ import annotations

from shoal.bench.rates import Ratio, Speed


def test_speed_is_the_median_with_its_range() -> None:
    speed = Speed.of(100, [1.0, 4.0, 2.0])
    assert speed == Speed(median=50.0, low=25.0, high=100.0)
    assert str(speed) == "50 (25-100)"


def test_a_peer_with_fewer_rounds_is_compared_in_those() -> None:
    assert Ratio.of([1.0, 2.0, 4.0], [2.0, 3.0]) == Ratio(1.25, 1.5, 2.0)
