"""Benchmarks without what makes their figures good: a test looks at what is measured, not at how well."""

from __future__ import annotations

import pytest

from shoal.bench import machine, timing, turns


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for threads to settle, what is timed runs once a round, and little memory is read for the bandwidth."""
    monkeypatch.setattr(turns, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)
