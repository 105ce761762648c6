"""Architectures with sliding windows: what they generate does not depend on where their KV lies or whose it was before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.requests.outputs import RequestOutput

WINDOWS = {"gemma2": 8, "gemma3": 6, "cohere2": 7}
CONTEXT = 128
LENGTH = 120  # of all sequences, prompt and output
NUM_TOKENS = 96


def open_model(path: Path, device: str, **settings: object) -> LLM:
    return LLM(path, device=device, max_model_len=CONTEXT, skip_tokenizer_init=True, **settings)  # type: ignore[arg-type]


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of all prompts at once."""
    params = [SamplingParams(temperature=0, max_tokens=LENGTH - len(prompt), ignore_eos=True) for prompt in prompts]
    outputs: list[RequestOutput] = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", WINDOWS)
def test_pages_that_change_hands_change_nothing(golden: Path, name: str, device: str) -> None:
    path = golden / f"archs/{name}.gguf"
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, NUM_TOKENS, length).tolist() for length in (1, 20, 60, 100)]
    with open_model(path, device) as llm:
        alone = [generate(llm, [prompt])[0] for prompt in prompts]
        assert generate(llm, prompts) == alone
        logits = llm.logits(prompts[-1])
        plan = llm.engine.memory_plan
    assert [group.use.window for group in plan.groups] == [WINDOWS[name], 0]
    for chunk, seqs in ((64, 1.3), (7, 1.7)):  # memory for so many sequences of greatest length
        seq_bytes = sum(replace(g.use, chunk=chunk).most_pages(CONTEXT) * g.page_bytes for g in plan.groups)
        with open_model(path, device, max_num_batched_tokens=chunk, kv_cache_memory=int(seqs * seq_bytes)) as llm:
            windowed, whole = llm.engine.num_pages
            assert windowed < whole
            assert generate(llm, prompts) == alone
            again = llm.logits(prompts[-1])
            stats = llm.engine.stats()
            assert stats.preemptions > 0
            assert stats.free_pages == (windowed, whole)
        assert np.array_equal(again, logits)
