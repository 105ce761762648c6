from __future__ import annotations

from pathlib import Path

from shoal.bench.sampling import WAYS, measure_sampling_cost
from shoal.llm import LLM
from shoal.params import SamplingParams
from tests.support.tiny_model import write_tiny_model


def test_every_way_is_measured_beside_greedy(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    with LLM(path, device="reference", max_num_seqs=2, skip_tokenizer_init=True) as llm:
        cost = measure_sampling_cost(llm, sequences=2, steps=3, rounds=2)
        assert not llm.has_work
        assert llm.engine.stats().generation_tokens == 3 * len(WAYS) * 2 * 4  # rounds, ways, rows, tokens
    assert list(cost.step_seconds) == list(cost.times_greedy) == list(WAYS)
    assert all(seconds > 0 for seconds in cost.step_seconds.values())
    assert cost.times_greedy["greedy"] == 1.0
    assert cost.as_markdown().count("\n") == 1 + len(WAYS)


def test_rows_are_sampled_in_ways_of_their_own() -> None:
    for way, fields in WAYS.items():
        params = [SamplingParams(**fields(row)) for row in range(32)]
        assert len({str(each) for each in params}) == (1 if way == "greedy" else 32)
