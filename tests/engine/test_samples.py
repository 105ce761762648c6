"""Several samples of one request: one prompt, shared pages, and tokens as if each were alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.engine import Request
from shoal.kernels.base import LOGIT_ROWS, StepInput
from shoal.params import SamplingParams
from tests.engine.toy import (
    NAN_TOKEN,
    Result,
    ToyBackend,
    collect,
    drain,
    mixed_requests,
    run,
    solo,
    tokens,
    toy_engine,
)


def sampled(name: str, prompt: int, n: int, max_tokens: int = 6, **fields: object) -> Request:
    params = SamplingParams(n=n, max_tokens=max_tokens, temperature=0.9, **fields)  # type: ignore[arg-type]
    return Request(name, tuple(i % 50 for i in range(prompt)), params, seed=prompt + 100)


def rows(backend: ToyBackend) -> int:
    """Tokens computed so far."""
    return sum(len(step.token_ids) for step in backend.steps)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 50, 64])
def test_the_prompt_is_computed_once(prompt: int, prefix_caching: bool) -> None:
    """And each token but the last of each sample."""
    backend = ToyBackend()
    engine = toy_engine(backend=backend, budget=20, prefix_caching=prefix_caching)
    request = sampled("r", prompt, 5)
    results = run(engine, [request])
    assert tokens(results) == solo([request])
    assert rows(backend) == prompt + 5 * 5
    assert (engine.stats().prompt_tokens, engine.stats().generation_tokens) == (prompt, 5 * 6)
    assert len({tuple(result.token_ids) for result in results.values()}) > 1


def test_all_begin_in_the_step_that_completes_the_prompt() -> None:
    engine = toy_engine(budget=20)
    engine.add(sampled("r", 30, 4))
    assert engine.step() == []
    assert [output.sample for output in engine.step()] == [0, 1, 2, 3]
    assert engine.stats().running == 4


def test_full_pages_are_shared_and_the_last_one_is_not() -> None:
    """40 tokens are 2 full pages and half a page: 2 + 4 pages for 4 samples."""
    engine = toy_engine()
    engine.add(sampled("r", 40, 4))
    engine.step()
    assert engine.num_pages[0] - engine.stats().free_pages[0] == 2 + 4


def test_samples_come_before_a_prompt_that_is_not_complete() -> None:
    engine = toy_engine(budget=16)
    engine.add(sampled("r", 10, 4, max_tokens=50))
    engine.add(sampled("long", 200, 1))
    engine.step()
    for _ in range(5):
        assert [output.sample for output in engine.step()] == [0, 1, 2, 3]


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("seqs", [1, 2, 3, 64])
@pytest.mark.parametrize("pages", [4, 7, 1000])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_those_without_room_wait(seqs: int, pages: int, prefix_caching: bool) -> None:
    requests = [sampled("a", 30, 5), sampled("b", 16, 3, 30), sampled("c", 40, 16, 2), sampled("d", 3, 2)]
    engine = toy_engine(seqs=seqs, pages=pages, prefix_caching=prefix_caching)
    assert tokens(run(engine, requests)) == solo(requests)


@pytest.mark.usefixtures("drafting")
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    budget=st.integers(1, 40),
    pages=st.integers(8, 30),
    seqs=st.integers(1, 8),
    windows=st.sampled_from([(0,), (30, 0), (10,)]),
    prefix_caching=st.booleans(),
)
def test_samples_equal_solo_whatever_comes_and_goes(
    data: st.DataObject, budget: int, pages: int, seqs: int, windows: tuple[int, ...], prefix_caching: bool
) -> None:
    requests = [
        replace(request, params=replace(request.params, n=data.draw(st.integers(1, 5))))
        for request in mixed_requests(8, np.random.default_rng(data.draw(st.integers(0, 5))))
    ]
    aborted = data.draw(st.sets(st.sampled_from(requests), max_size=3))
    engine = toy_engine(
        budget=budget, pages=pages * len(windows), seqs=seqs, windows=windows, prefix_caching=prefix_caching
    )
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
        for _ in range(data.draw(st.integers(0, 3))):
            collect(engine.step(), results)
    for request in aborted:
        engine.abort(request.request_id)
    drain(engine, results)
    alone = solo(requests, windows)
    assert results.keys() == alone.keys()
    for name, expected in alone.items():
        result = results[name]
        if result.end[0] == "abort":
            assert name.split("/")[0] in {request.request_id for request in aborted}
            assert result.token_ids == expected[: len(result.token_ids)]
        else:
            assert result.token_ids == expected
    assert engine.stats().free_pages == engine.num_pages


SAMPLERS: list[dict[str, object]] = [
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"dry_multiplier": 0.8, "dry_allowed_length": 1},
    {"mirostat": 2},
    {"mirostat": 1},
    {"xtc_probability": 0.5, "xtc_threshold": 0.01},
    {"typical_p": 0.8, "top_n_sigma": 2.0, "logit_bias": {3: 2.0}, "min_tokens": 3},
]


@pytest.mark.parametrize("seqs", [3, 64])
@pytest.mark.parametrize("pages", [7, 1000])
def test_each_sample_remembers_its_own_tokens(seqs: int, pages: int) -> None:
    requests = [sampled(f"r{i}", 20 + i, 4, 12, **fields) for i, fields in enumerate(SAMPLERS)]
    assert tokens(run(toy_engine(seqs=seqs, pages=pages), requests)) == solo(requests)


def test_more_samples_than_rows_of_the_head() -> None:
    requests = [sampled(f"r{i}", 5 + i, 16, 2) for i in range(8)]
    assert len(requests) * 16 > LOGIT_ROWS
    assert tokens(run(toy_engine(seqs=8), requests)) == solo(requests)


def test_an_abort_ends_all_of_them_wherever_they_are() -> None:
    engine = toy_engine(seqs=2, budget=20)
    for steps in (0, 1, 2, 3):  # in the queue, in the prompt, two running and two waiting
        engine.add(sampled("r", 30, 4, 50))
        results: dict[str, Result] = {}
        for _ in range(steps):
            collect(engine.step(), results)
        assert engine.abort("r")
        assert not engine.abort("r")
        collect(engine.step(), results)
        assert {name: result.end for name, result in results.items()} == dict.fromkeys(
            ("r", "r/1", "r/2", "r/3"), ("abort", None)
        )
        assert not engine.has_work
        assert engine.stats().free_pages == engine.num_pages


def test_one_sample_can_be_ended_alone() -> None:
    request = sampled("r", 20, 3)
    engine = toy_engine()
    engine.add(request)
    results: dict[str, Result] = {}
    collect(engine.step(), results)
    assert engine.abort("r", 1)
    assert not engine.abort("r", 1)
    assert not engine.abort("r", 7)
    drain(engine, results)
    alone = solo([request])
    assert {name: result.end[0] for name, result in results.items()} == {"r": "length", "r/1": "abort", "r/2": "length"}
    assert (results["r"].token_ids, results["r/2"].token_ids) == (alone["r"], alone["r/2"])


def test_time_is_up_for_all_of_them() -> None:
    now = 0.0

    def tick(step: StepInput) -> None:
        nonlocal now
        now += 1

    engine = toy_engine(backend=ToyBackend(before_step=tick), clock=lambda: now, seqs=2)
    begun = replace(sampled("begun", 5, 3, 50), timeout=4.0, queue_timeout=1.0)  # one sample waits: not in the queue
    results: dict[str, Result] = {}
    engine.add(begun)
    collect(engine.step(), results)
    engine.add(replace(sampled("late", 5, 2, 50), queue_timeout=2.5))
    drain(engine, results)
    assert {name: (result.end[0], len(result.token_ids)) for name, result in results.items()} == {
        "begun": ("timeout", 4),
        "begun/1": ("timeout", 4),
        "begun/2": ("timeout", 1),
        "late": ("timeout", 0),
        "late/1": ("timeout", 0),
    }


@pytest.mark.parametrize("budget", [512, 7])
def test_nan_in_the_prompt_fails_all_of_them_and_nobody_else(budget: int) -> None:
    bad = replace(sampled("bad", 20, 3), prompt_token_ids=(*range(19), NAN_TOKEN))
    good = sampled("good", 20, 3)
    results = run(toy_engine(budget=budget), [bad, good])
    assert all(results[name].end[0] == "error" for name in ("bad", "bad/1", "bad/2"))
    assert "position 19" in results["bad/2"].error
    assert {name: result.token_ids for name, result in results.items() if "good" in name} == solo([good])


def test_prompt_logprobs_come_once() -> None:
    request = sampled("r", 20, 3, prompt_logprobs=2)
    results = run(toy_engine(seqs=2, prefix_caching=False), [request])
    found = [[output.prompt_logprobs is not None for output in result.outputs] for result in results.values()]
    assert [sum(each) for each in found] == [1, 0, 0]
    assert found[0][0]
    assert tokens(results) == solo([request])


@pytest.mark.parametrize("bad", [True, False])
def test_a_prompt_that_is_only_scored_has_as_many_ends(bad: bool) -> None:
    request = sampled("r", 20, 3, max_tokens=0, prompt_logprobs=0)
    if bad:
        request = replace(request, prompt_token_ids=(NAN_TOKEN, *request.prompt_token_ids[1:]))
    results = run(toy_engine(), [request])
    assert [result.end[0] for result in results.values()] == ["error" if bad else "length"] * 3


def test_a_step_that_fails_ends_all_samples_of_its_prompts() -> None:
    def fail(step: StepInput) -> None:
        if (step.positions == 49).any():
            raise FloatingPointError("poison")

    poison, good = sampled("poison", 50, 3), sampled("good", 20, 3)
    results = run(toy_engine(backend=ToyBackend(before_step=fail)), [poison, good])
    assert {name: result.end[0] for name, result in results.items()} == {
        **dict.fromkeys(("poison", "poison/1", "poison/2"), "error"),
        **dict.fromkeys(("good", "good/1", "good/2"), "length"),
    }


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_step_after_a_fork_may_be_computed_again(failures: int) -> None:
    backend = ToyBackend()

    def fail(step: StepInput) -> None:
        if 1 < len(backend.steps) <= 1 + failures:
            raise FloatingPointError("once")

    backend.before_step = fail
    requests = [sampled("a", 20, 4), sampled("b", 21, 4)]
    assert tokens(run(toy_engine(backend=backend), requests)) == solo(requests)
