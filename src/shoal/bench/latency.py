"""Latency: how long one batch takes from start to end, as ``vllm bench latency`` measures it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.bench.drafts import Drafts
from shoal.bench.workload import Prompt, answers
from shoal.llm import LLM
from shoal.params import SamplingParams

PERCENTAGES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """Seconds that each iteration took. ``drafts``: of all of them together."""

    latencies: tuple[float, ...]
    drafts: Drafts | None = None

    @property
    def average(self) -> float:
        """Mean, in seconds."""
        return float(np.mean(self.latencies))

    @property
    def percentiles(self) -> dict[int, float]:
        """Seconds for each of ``PERCENTAGES``, interpolated linearly."""
        return dict(zip(PERCENTAGES, np.percentile(self.latencies, PERCENTAGES).tolist(), strict=True))

    def as_json(self) -> dict[str, Any]:
        """vLLM's keys, and what was drafted."""
        found = {"avg_latency": self.average, "latencies": list(self.latencies), "percentiles": self.percentiles}
        return found if self.drafts is None else found | self.drafts.as_json()

    def __str__(self) -> str:
        lines = [f"Avg latency: {self.average} seconds"]
        lines += [f"{share}% percentile latency: {seconds} seconds" for share, seconds in self.percentiles.items()]
        if self.drafts is not None:
            lines.append(str(self.drafts))
        return "\n".join(lines)


def measure_latency(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, *, warmup: int, iterations: int
) -> LatencyResult:
    """Answer the batch ``warmup`` times untimed, then ``iterations`` times."""
    for _ in range(warmup):
        answers(llm, prompts, params)
    before = llm.engine.stats()
    latencies = tuple(_seconds(llm, prompts, params) for _ in range(iterations))
    return LatencyResult(latencies, Drafts.since(llm, before))


def _seconds(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams) -> float:
    start = time.perf_counter()
    answers(llm, prompts, params)
    return time.perf_counter() - start
