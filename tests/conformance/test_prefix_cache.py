"""With the prefix cache on or off every request gets the same answer, bit for bit: tokens, log-probabilities, and those of prompts.

On the CPU backend, whose results do not depend on chunks, through the public API alone.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine.memory_plan import MemoryPlan
from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.requests.outputs import RequestOutput
from tests.conformance import test_batch_invariance as without_windows
from tests.engine import random_network as with_windows

NUM_REQUESTS = {"random weights": 16, "random weights, windows": 16, "SmolLM2": 10}  # a real model takes its time
SYSTEM = 100  # tokens that all prompts begin with: 6 pages and a part
CHUNK = 64

Request = tuple[dict[str, list[int]], SamplingParams]


def requests_of(vocab: int, count: int) -> list[Request]:
    """A system prompt, then something of one's own, twice the same now and then; greedy and sampled, some of them scored."""
    rng = np.random.default_rng(11)
    system = rng.integers(3, vocab, SYSTEM).tolist()
    questions = [rng.integers(3, vocab, int(rng.integers(1, 60))).tolist() for _ in range(count - 4)]
    return [
        (
            {"prompt_token_ids": system + question},
            SamplingParams(
                temperature=0.9 if i % 2 else 0.0,
                seed=i,
                max_tokens=8 + i % 20,
                logprobs=2,
                prompt_logprobs=1 if i % 6 == 5 else None,
                ignore_eos=True,
            ),
        )
        for i, question in enumerate([*questions, *questions[:4]])
    ]


def answers(llm: LLM, requests: list[Request]) -> list[Any]:
    prompts, params = zip(*requests, strict=True)
    outputs: list[RequestOutput] = llm.generate(prompts, params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs, o.prompt_logprobs) for o in outputs]


class Case:
    """A model and its requests."""

    def __init__(self, path: Path, vocab: int, num_requests: int) -> None:
        self.path, self.requests = path, requests_of(vocab, num_requests)

    @cache  # noqa: B019 - a few cases, of one test module
    def without_cache(self, dtype: str) -> tuple[list[Any], MemoryPlan]:
        """What the others are compared with, and the memory it was computed in."""
        with self.open(kv_cache_dtype=dtype, enable_prefix_caching=False) as llm:
            expected = answers(llm, self.requests)
            assert llm.engine.stats().cached_tokens == 0
            return expected, llm.engine.memory_plan

    def open(self, **flags: Any) -> LLM:
        settings = {"device": "cpu", "max_model_len": 256, "max_num_batched_tokens": CHUNK, "skip_tokenizer_init": True}
        return LLM(self.path, **{**settings, **flags})


@pytest.fixture(scope="module", params=list(NUM_REQUESTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    count = NUM_REQUESTS[request.param]
    if request.param == "SmolLM2":
        return Case(request.getfixturevalue("smollm2_path"), 49152, count)
    path = tmp_path_factory.mktemp("prefix") / "random.gguf"
    if request.param == "random weights":
        return Case(without_windows.write_mixed_model(path), without_windows.VOCAB, count)
    return Case(with_windows.write_network(path, "gemma2"), with_windows.VOCAB, count)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_answers_are_the_same_with_and_without(case: Case, dtype: str) -> None:
    expected = case.without_cache(dtype)[0]
    with case.open(kv_cache_dtype=dtype) as llm:
        assert answers(llm, case.requests) == expected
        pages = SYSTEM // 16 * 16
        assert llm.engine.stats().cached_tokens > 0.5 * len(case.requests) * pages
        assert answers(llm, case.requests[::-1]) == expected[::-1]  # now of the questions too
        assert llm.engine.stats().cached_tokens > 1.5 * len(case.requests) * pages
    assert len({tuple(tokens) for tokens, _, _ in expected}) > len(case.requests) / 2


def test_answers_are_the_same_on_a_few_pages(case: Case) -> None:
    """Too few for all: sequences lose their pages, and what is known makes way for what is needed."""
    expected, plan = case.without_cache("f16")
    few = sum(group.use.most_pages(256) * group.page_bytes for group in plan.groups) * 3 // 2
    with case.open(kv_cache_memory=few) as llm:
        assert answers(llm, case.requests) == expected
        stats = llm.engine.stats()
    assert stats.preemptions > 0
    assert stats.cached_tokens > 0
    assert stats.free_pages == stats.num_pages
