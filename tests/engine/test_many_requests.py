"""A thousand requests of all kinds on a pool for eight: everybody gets one end and what he would get alone, and nothing leaks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from shoal.engine.engine import Engine, Request
from shoal.kernels.base import StepInput
from shoal.params import SamplingParams
from tests.engine.steps import Steps
from tests.engine.toy import PAGE_BYTES, Result, ToyBackend, collect, samples, solo, toy_engine

POOL = 8
FAMILIES = [tuple(range(start, start + 40)) for start in (0, 7, 19)]  # what prompts begin with


def drawn(number: int, rng: Random) -> Request:
    """A request with everything at random; of 75 tokens at most with its answer, so that each fits into the pool."""
    prompt = (*rng.choice(FAMILIES)[: rng.randrange(41)], *(rng.randrange(61) for _ in range(rng.randrange(1, 20))))
    scored = rng.random() < 0.1
    params = SamplingParams(
        n=rng.choice([1] * 12 + [2, 3, 16]),
        temperature=rng.choice([0, 0.7, 1.5]),
        top_p=rng.choice([1, 0.9]),
        top_k=rng.choice([0, 5]),
        min_p=rng.choice([0, 0.05]),
        max_tokens=0 if scored and rng.random() < 0.3 else rng.randrange(1, 16),
        stop_token_ids=rng.sample(range(61), rng.choice([0, 0, 3])),
        logprobs=rng.choice([None, None, 2]),
        repetition_penalty=rng.choice([1, 1, 1.2]),
        presence_penalty=rng.choice([0, 0, 0.5]),
        logit_bias=rng.choice([None, None, {7: 3.0}]),
        allowed_token_ids=rng.choice([None] * 5 + [list(range(40))]),
        dry_multiplier=rng.choice([0, 0, 0.8]),
        mirostat=rng.choice([0] * 6 + [1, 2]),
        xtc_probability=rng.choice([0, 0, 0.5]),
        prompt_logprobs=1 if scored else None,
    )
    ends = frozenset({5}) if rng.random() < 0.3 else frozenset[int]()
    return Request(
        f"r{number}",
        prompt,
        params,
        eos_ids=ends,
        seed=number,
        priority=rng.choice([0, 0, 1, -1]),
        timeout=rng.choice([None] * 8 + [10.0, 100.0]),
        queue_timeout=rng.choice([None] * 8 + [5.0, 50.0]),
        want_logits=False,
        constraint=_constraint(rng) if ends and rng.random() < 0.5 else None,
    )


def _constraint(rng: Random) -> Steps:
    """A few tokens to choose among at each of some places; a tenth breaks a limit on the way."""
    sets = tuple(tuple(rng.sample(range(61), rng.randrange(1, 9))) for _ in range(rng.randrange(1, 12)))
    broken_at = rng.randrange(12) if rng.random() < 0.1 else None
    return Steps(sets, frozenset(rng.sample(range(1, 12), 2)), end=5, broken_at=broken_at)


def run_all(engine: Engine, requests: list[Request], rng: Random, results: dict[str, Result], *, resized: bool) -> None:
    """Add them a few at a time, abort some, change the size now and then, until all have ended."""
    to_come = requests[::-1]
    while to_come or engine.has_work:
        for _ in range(min(len(to_come), rng.randrange(8))):
            engine.add(to_come.pop())
        if rng.random() < 0.3:
            engine.abort(rng.choice(requests).request_id)
        if resized and rng.random() < 0.02:
            pages = rng.choice([POOL, POOL, 11, 30])
            engine.resize(
                replace(
                    engine.config,
                    kv_cache_memory=pages * PAGE_BYTES,
                    max_num_seqs=rng.choice([2, 5, 64]),
                    max_num_batched_tokens=rng.choice([20, 64, 512]),
                )
            )
        collect(engine.step(), results)  # which asserts that nothing comes after an end


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize(
    ("count", "preempt", "target", "resized", "prefix_caching"),
    [(1000, False, None, False, True), (200, True, 20, True, True), (200, True, None, True, False)],
)
def test_a_thousand_requests_on_a_pool_for_eight(
    count: int, preempt: bool, target: float | None, resized: bool, prefix_caching: bool
) -> None:
    rng = Random(f"{preempt} {target}")
    requests = [drawn(number, rng) for number in range(count)]
    now = 0.0

    def tick(step: StepInput) -> None:
        nonlocal now
        now += rng.random() / 10

    engine = toy_engine(
        backend=ToyBackend(before_step=tick),
        clock=lambda: now,
        pages=POOL,
        preempt_for_priority=preempt,
        target_step_ms=target,
        prefix_caching=prefix_caching,
    )
    results: dict[str, Result] = {}
    run_all(engine, requests, rng, results, resized=resized)
    assert results.keys() == {one.request_id for request in requests for one in samples(request)}
    assert all(sum(output.finished for output in result.outputs) == 1 for result in results.values())
    ends = Counter(result.end[0] for result in results.values())
    assert ends.keys() == {"stop", "length", "abort", "timeout", "error"}  # NaN is an id like others
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_pages) == (0, 0, engine.num_pages)
    assert stats.preemptions > 0
    _hold_tokens([request for request in requests if rng.random() < 0.15], results)


def _hold_tokens(requests: list[Request], results: dict[str, Result]) -> None:
    """Those that ran to their end have the tokens of a run alone, the others the beginning of these."""
    for name, expected in solo([replace(request, timeout=None, queue_timeout=None) for request in requests]).items():
        result = results[name]
        cut = result.end[0] in ("abort", "timeout")
        assert result.token_ids == (expected[: len(result.token_ids)] if cut else expected)
