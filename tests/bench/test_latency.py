"""Latency: percentiles, vLLM's keys and words, how often the batch runs."""

from __future__ import annotations

import pytest

from shoal.bench.drafts import Drafts
from shoal.bench.latency import LatencyResult, measure_latency
from shoal.bench.workload import fixed_length, random_prompts
from shoal.llm import LLM


def test_percentiles_are_interpolated() -> None:
    result = LatencyResult(tuple(float(n) for n in range(101)))
    assert result.average == 50.0
    assert result.percentiles == pytest.approx({10: 10, 25: 25, 50: 50, 75: 75, 90: 90, 99: 99})
    assert LatencyResult((1.0, 2.0)).percentiles[75] == pytest.approx(1.75)


def test_the_result_has_vllms_keys_and_words() -> None:
    result = LatencyResult((1.0, 2.0, 3.0))
    assert list(result.as_json()) == ["avg_latency", "latencies", "percentiles"]
    lines = str(result).splitlines()
    assert lines[0] == "Avg latency: 2.0 seconds"
    assert lines[3] == "50% percentile latency: 2.0 seconds"
    assert len(lines) == 7


def test_drafts_are_shown_where_there_are_any() -> None:
    result = LatencyResult((1.0,), Drafts(40, 30))
    assert result.as_json()["spec_decode_num_draft_tokens"] == 40
    assert result.as_json()["spec_decode_num_accepted_tokens"] == 30
    assert str(result).splitlines()[-1] == "Drafted tokens: 40, of which 30 (75%) were right"


def test_only_the_iterations_are_timed(llm: LLM) -> None:
    result = measure_latency(llm, random_prompts(llm, 2, 4), fixed_length(3), warmup=2, iterations=3)
    assert len(result.latencies) == 3
    assert min(result.latencies) > 0
    assert llm.engine.stats().generation_tokens == (2 + 3) * 2 * 3
