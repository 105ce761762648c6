"""Batch equals solo, bit for bit: tokens and log-probabilities of a request do not depend on who else runs, in which order,
in what chunks, on how many threads, or on losing its pages half-way. Through the public API alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.llm import LLM, Logprob, RequestOutput
from shoal.params import SamplingParams
from tests.support.gguf_builder import GGUFBuilder

NUM_REQUESTS = {"random weights": 64, "SmolLM2": 14}  # a real model takes its time
LENGTHS = (1, 7, 17, 33, 600)  # these are among the prompts: one token, partial tails, and the longest
GUESSES = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
ITSELF = {"method": "draft_model", "model": "itself", "num_speculative_tokens": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "chunks of 16, one thread": {"max_num_batched_tokens": 16, "threads": 1},
    "chunks of 64, two threads": {"max_num_batched_tokens": 64, "threads": 2},
    "chunks of 512, few at a time": {"max_num_batched_tokens": 512, "max_num_seqs": 3},
    "guesses from n-grams": {"speculative_config": GUESSES},
    "guesses of the model itself": {"speculative_config": ITSELF},
    "guesses, few at a time, one thread": {"speculative_config": GUESSES, "max_num_seqs": 2, "threads": 1},
}
FORMATS = {
    "token_embd": "Q8_0",
    "attn_q": "Q4_K",
    "attn_k": "Q4_K",
    "attn_v": "Q6_K",
    "attn_output": "Q5_K",
    "ffn_gate": "Q4_1",
    "ffn_up": "Q4_1",
    "ffn_down": "Q4_0",
}
VOCAB, WIDTH, LAYERS = 320, 256, 2

Request = tuple[dict[str, list[int]], SamplingParams]
Answer = tuple[list[int], list[dict[int, Logprob] | None] | None]


def mixed_requests(vocab: int, count: int) -> list[Request]:
    """Prompts of 1 to 600 tokens, half of them greedy, half sampled in different ways with seeds; a third are scored too."""
    rng = np.random.default_rng(7)
    lengths = [*LENGTHS, *(int(2 ** rng.uniform(0, 8)) for _ in range(count - len(LENGTHS)))]
    requests = []
    for i, length in enumerate(lengths):
        ids = rng.integers(3, vocab, length).tolist()
        params = SamplingParams(
            temperature=0.0 if i % 2 else 0.9,
            top_k=(0, 40)[i // 2 % 2],
            top_p=(1.0, 0.9)[i // 4 % 2],
            min_p=(0.0, 0.05)[i // 8 % 2],
            seed=1000 + i,
            max_tokens=8 + i % 5,
            prompt_logprobs=1 if i % 3 == 0 else None,
            ignore_eos=True,
        )
        requests.append(({"prompt_token_ids": ids}, params))
    return requests


def generate(llm: LLM, requests: Sequence[Request]) -> list[Answer]:
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [answer(output) for output in outputs]


def answer(output: RequestOutput) -> Answer:
    return output.outputs[0].token_ids, output.prompt_logprobs


def write_mixed_model(path: Path) -> Path:
    """A llama of two layers with random weights in six formats, and two query heads for each KV head."""
    builder, rng = GGUFBuilder(), np.random.default_rng(3)
    builder.add("general.architecture", "llama")
    numbers = {
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": 2 * WIDTH,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "context_length": 1024,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    for key, value in numbers.items():
        builder.add(f"llama.{key}", value)
    builder.add("tokenizer.ggml.model", "gpt2")  # for draft models, whose vocabulary is compared
    builder.add("tokenizer.ggml.tokens", [str(token) for token in range(VOCAB)])
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH // 2, WIDTH),
        "attn_v": (WIDTH // 2, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (2 * WIDTH, WIDTH),
        "ffn_up": (2 * WIDTH, WIDTH),
        "ffn_down": (WIDTH, 2 * WIDTH),
    }
    builder.add_random_tensor("token_embd.weight", (VOCAB, WIDTH), FORMATS["token_embd"], rng, std=0.3)
    builder.add_tensor("output_norm.weight", np.ones(WIDTH))
    for i in range(LAYERS):
        for name, shape in shapes.items():
            builder.add_random_tensor(f"blk.{i}.{name}.weight", shape, FORMATS[name], rng, std=0.1)
        for norm in ("attn_norm", "ffn_norm"):
            builder.add_tensor(f"blk.{i}.{norm}.weight", np.ones(WIDTH))
    return builder.write(path)


class Case:
    """A model, its requests, and the answer to each request when it runs alone."""

    def __init__(self, path: Path, vocab: int, num_requests: int) -> None:
        self.path = path
        self.requests = mixed_requests(vocab, num_requests)
        with self.open() as llm:
            self.solo = [generate(llm, [request])[0] for request in self.requests]

    def open(self, **flags: Any) -> LLM:
        if flags.get("speculative_config") == ITSELF:
            flags["speculative_config"] = {**ITSELF, "model": self.path}
        return LLM(self.path, **{"device": "cpu", "max_model_len": 1024, "skip_tokenizer_init": True, **flags})


@pytest.fixture(scope="module", params=list(NUM_REQUESTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    count = NUM_REQUESTS[request.param]
    if request.param == "SmolLM2":
        return Case(request.getfixturevalue("smollm2_path"), 49152, count)
    return Case(write_mixed_model(tmp_path_factory.mktemp("mixed") / "mixed.gguf"), VOCAB, count)


def test_requests_differ_and_so_do_their_tokens(case: Case) -> None:
    """What the other tests compare is not the same token over and over."""
    assert {len(prompt["prompt_token_ids"]) for prompt, _ in case.requests} >= set(LENGTHS)
    assert len({tuple(tokens) for tokens, _ in case.solo}) > len(case.requests) * 0.9
    assert len({token for tokens, _ in case.solo for token in tokens}) > 50
    scored = [places for _, places in case.solo if places is not None]
    assert len(scored) > len(case.requests) * 0.3
    assert max(map(len, scored)) > 100


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_at_once_gives_the_answer_to_each_alone(case: Case, variant: str) -> None:
    with case.open(**VARIANTS[variant]) as llm:
        assert generate(llm, case.requests) == case.solo


def test_with_int8_pages_too(case: Case) -> None:
    some = case.requests[:12]  # the longest prompt among them
    with case.open(kv_cache_dtype="q8_0") as llm:
        solo = [generate(llm, [request])[0] for request in some]
    with case.open(kv_cache_dtype="q8_0", threads=1, max_num_batched_tokens=100) as llm:
        assert generate(llm, some) == solo


def test_any_order_gives_the_same_answers(case: Case) -> None:
    order = np.random.default_rng(5).permutation(len(case.requests)).tolist()
    with case.open() as llm:
        answers = generate(llm, [case.requests[i] for i in order])
    assert answers == [case.solo[i] for i in order]


def test_late_arrivals_change_nothing(case: Case) -> None:
    """Every request joins one step after the one before, in the middle of the others."""
    answers: dict[str, Answer] = {}
    with case.open() as llm:
        for i, (prompt, params) in enumerate(case.requests):
            llm.submit(prompt, params, request_id=str(i))
            answers |= {output.request_id: answer(output) for output in llm.step()}
        while llm.has_work:
            answers |= {output.request_id: answer(output) for output in llm.step()}
    assert [answers[str(i)] for i in range(len(case.requests))] == case.solo


@pytest.mark.parametrize("speculative_config", [None, GUESSES, ITSELF], ids=["plain", "ngram", "draft_model"])
def test_preemption_changes_nothing(case: Case, speculative_config: dict[str, Any] | None) -> None:
    with case.open() as llm:
        page = sum(group.page_bytes for group in llm.engine.memory_plan.groups)
    models = 2 if speculative_config is ITSELF else 1
    sizes = {"kv_cache_memory": models * 40 * page, "max_model_len": 640}  # 640 tokens for all of them
    with case.open(**sizes, speculative_config=speculative_config) as llm:
        assert generate(llm, case.requests) == case.solo
        stats = llm.engine.stats()
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, (40,))
