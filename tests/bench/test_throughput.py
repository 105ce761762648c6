"""Throughput: counts, rates, vLLM's keys and words."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from shoal.bench.throughput import ThroughputResult, busy_process, measure_throughput
from shoal.bench.workload import Prompt, fixed_length, random_prompts
from shoal.engine.draft_pace import DraftPace
from shoal.llm import LLM

VLLM_KEYS = ["elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"]


def test_rates_follow_from_counts() -> None:
    result = ThroughputResult(elapsed_time=2.0, num_requests=10, num_prompt_tokens=60, num_output_tokens=40)
    assert result.as_json() == dict(zip(VLLM_KEYS, [2.0, 10, 100, 5.0, 50.0], strict=True))
    assert str(result).splitlines() == [
        "Throughput: 5.00 requests/s, 50.00 total tokens/s, 20.00 output tokens/s",
        "Total num prompt tokens:  60",
        "Total num output tokens:  40",
    ]


def test_one_at_a_time_is_compared() -> None:
    result = ThroughputResult(2.0, 10, 60, 40, sequential_time=7.0)
    assert list(result.as_json()) == [*VLLM_KEYS, "sequential_time", "speedup"]
    assert result.as_json()["speedup"] == 3.5
    assert str(result).endswith("One at a time: 7.00 s, together 2.00 s: 3.50x")


def test_a_busy_neighbour_is_compared() -> None:
    result = ThroughputResult(2.0, 10, 60, 40, busy_time=5.0)
    assert list(result.as_json()) == [*VLLM_KEYS, "busy_time", "busy_share"]
    assert result.as_json()["busy_share"] == 0.4
    assert str(result).endswith("With a busy neighbour: 5.00 s, alone 2.00 s: 40% of tokens/s")


def test_drafts_are_those_of_the_measurement(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes has come before, and is guessed whatever it costs."""
    monkeypatch.setattr(DraftPace, "counts", lambda self, chances, most, room: [max(0, count) for count in most])
    guesses = {"method": "ngram", "prompt_lookup_max": 1}
    with LLM(tiny, device="reference", speculative_config=guesses, enable_prefix_caching=False) as llm:
        everything: list[Prompt] = [{"prompt_token_ids": list(range(llm.vocab_size))}]
        result = measure_throughput(llm, everything, fixed_length(10))
        stats = llm.engine.stats()
    assert result.drafts is not None
    assert 0 < result.drafts.drafted <= stats.spec_decode_num_draft_tokens
    assert result.as_json()["spec_decode_num_draft_tokens"] == result.drafts.drafted
    assert f"Drafted tokens: {result.drafts.drafted}," in str(result)


def test_the_neighbour_is_busy_and_goes() -> None:
    me = psutil.Process()
    with busy_process():
        (neighbour,) = [child for child in me.children() if "while True" in " ".join(child.cmdline())]
        before = sum(neighbour.cpu_times()[:2])
        while sum(neighbour.cpu_times()[:2]) == before:
            time.sleep(0.02)
    assert not neighbour.is_running()


@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("busy", [False, True])
def test_measured_requests_are_counted_once(llm: LLM, compare: bool, busy: bool) -> None:
    prompts = random_prompts(llm, 5, 7)
    result = measure_throughput(llm, prompts, fixed_length(3), compare_sequential=compare, busy_neighbour=busy)
    assert (result.num_requests, result.num_prompt_tokens, result.num_output_tokens) == (5, 35, 15)
    assert result.elapsed_time > 0
    assert (result.sequential_time is not None) == compare
    assert (result.busy_time is not None) == busy
    assert llm.engine.stats().generation_tokens == 3 * (1 + 5 + 5 * compare + 5 * busy)  # the first one warms up
