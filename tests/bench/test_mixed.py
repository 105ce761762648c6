"""Mixed load: which gaps and tokens count."""

from __future__ import annotations

import itertools

import pytest

from shoal.bench.mixed import MixedLoad, MixedResult, measure_mixed
from shoal.llm import LLM


def test_the_words_and_the_numbers() -> None:
    result = MixedResult(tuple(0.001 * n for n in range(101)), 500, 2.0)
    assert str(result).startswith("inter-token latency p50 50.0 ms, p90 90.0 ms, p99 99.0 ms; 250.0 tokens/s")
    assert result.as_json()["inter_token_latency"] == pytest.approx({50: 0.05, 90: 0.09, 99: 0.099})


def test_all_long_prompts_are_answered_and_only_what_decodes_is_timed(llm: LLM) -> None:
    """On a clock that moves on by one whenever it is read: twice a step."""
    before = llm.engine.stats()
    load = MixedLoad(decoding=3, input_len=4, output_len=5, prefills=4, prefill_len=40, interval=3.0)
    result = measure_mixed(llm, load, itertools.count(0.0).__next__)
    stats = llm.engine.stats()
    assert stats.prompt_tokens - before.prompt_tokens >= 4 * 40 + 3 * 4
    assert result.tokens > 4 * 41
    assert set(result.gaps) == {2.0}
    assert result.seconds >= 3 * 3.0


@pytest.mark.parametrize("output_len", [5, 200])
def test_fixed_work_is_the_same_whichever_ends_first(llm: LLM, output_len: int) -> None:
    load = MixedLoad(decoding=3, input_len=4, output_len=output_len, prefills=4, prefill_len=40, fixed_work=True)
    result = measure_mixed(llm, load, itertools.count(0.0).__next__)
    assert result.tokens == 4 * 41 + 3 * (output_len - 1)  # the first of each comes before the clock runs
    assert llm.engine.stats().running == 0
