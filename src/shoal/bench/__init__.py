"""Benchmarks: throughput and latency as vLLM measures them, and other programs side by side on the same file (docs/benchmarks.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.bench.factor import throughput_factor

__all__ = ["throughput_factor"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a worker process need not load what it does not run."""
    if name != "throughput_factor":
        raise AttributeError(f"module 'shoal.bench' has no attribute {name!r}")
    from shoal.bench import factor

    return factor.throughput_factor
