"""Requests with a time limit, on a clock that every step of the toy moves on by a second."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from shoal.engine.engine import Engine, Request
from shoal.kernels.base import StepInput
from shoal.params import SamplingParams
from tests.engine.toy import (
    Result,
    ToyBackend,
    collect,
    drain,
    greedy,
    mixed_requests,
    run,
    solo,
    tokens,
    toy_engine,
)


class Clock:
    """Counts how often it is read."""

    def __init__(self) -> None:
        self.now = 100.0
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.now

    def tick(self, step: StepInput) -> None:
        self.now += 1


def timed_engine(clock: Clock, *, pages: int = 1000, seqs: int = 64, budget: int = 512) -> Engine:
    return toy_engine(backend=ToyBackend(before_step=clock.tick), clock=clock, pages=pages, seqs=seqs, budget=budget)


def test_what_was_generated_in_time_is_kept() -> None:
    clock = Clock()
    free, late = greedy("free", [4, 5], 20), replace(greedy("late", [1, 2, 3], 20), timeout=5.0)
    engine = timed_engine(clock)
    results = run(engine, [free, late])
    last = results["late"].last
    assert last is not None
    assert (results["late"].end, last.error, last.metrics.finished_time) == (("timeout", None), None, 105.0)
    assert results["late"].token_ids == solo([late])["late"][:5]
    assert results["free"].token_ids == solo([free])["free"]


def test_what_ends_in_time_does_not_notice() -> None:
    request = replace(greedy("r", [1, 2, 3], 5), timeout=5.0, queue_timeout=1.0)
    result = run(timed_engine(Clock()), [request])["r"]
    assert (result.end[0], result.token_ids) == ("length", solo([request])["r"])


def test_a_queue_timeout_ends_those_that_wait_and_no_others() -> None:
    requests = [
        greedy("first", [1], 10),
        replace(greedy("impatient", [2], 10), queue_timeout=3.0),
        replace(greedy("patient", [3], 10), queue_timeout=10.5),  # begins after 10 s, and takes another 10
        replace(greedy("late", [4], 10), timeout=25.0, queue_timeout=1000.0),
    ]
    engine = timed_engine(Clock(), seqs=1)
    results = run(engine, requests)
    alone = solo(requests)
    assert {name: result.end[0] for name, result in results.items()} == {
        "first": "length",
        "impatient": "timeout",
        "patient": "length",
        "late": "timeout",
    }
    assert tokens(results) == {**alone, "impatient": [], "late": alone["late"][:5]}
    times = {name: result.last.metrics.finished_time for name, result in results.items() if result.last}
    assert times == {"first": 110.0, "impatient": 103.0, "patient": 120.0, "late": 125.0}


def test_who_has_run_is_no_longer_in_the_queue_even_if_it_waits_again() -> None:
    requests = [replace(greedy(f"r{i}", range(i, i + 16), 60), queue_timeout=0.5) for i in range(4)]
    engine = timed_engine(Clock(), pages=8)
    results = run(engine, requests)
    assert engine.stats().preemptions > 0
    assert tokens(results) == solo(requests)
    assert "timeout" not in {result.end[0] for result in results.values()}


@pytest.mark.parametrize("wants", [{}, {"want_logits": True}, {"params": SamplingParams(prompt_logprobs=1)}])
def test_a_prompt_that_takes_too_long_ends_between_two_chunks(wants: dict[str, object]) -> None:
    clock = Clock()
    engine = timed_engine(clock, budget=8)
    long = replace(greedy("long", range(50)), timeout=3.0, **wants)  # type: ignore[arg-type]
    after = greedy("after", [1, 2])
    engine.add(long)
    engine.add(after)
    results: dict[str, Result] = {}
    for _ in range(4):
        collect(engine.step(), results)
    assert results["long"].end == ("timeout", None)
    assert results["long"].token_ids == []
    drain(engine, results)
    assert results["after"].token_ids == solo([after])["after"]
    assert engine.stats().free_pages == engine.num_pages


def test_what_is_aborted_after_its_time_is_reported_once() -> None:
    clock = Clock()
    engine = timed_engine(clock)
    for name in "ab":
        engine.add(replace(greedy(name, [1, 2]), timeout=1.0))
    clock.now += 5
    assert engine.abort("a")
    assert [(output.request_id, output.finish_reason) for output in engine.step()] == [("a", "abort"), ("b", "timeout")]
    assert not engine.has_work
    assert engine.step() == []


def test_without_limits_nobody_looks_at_the_clock_for_them() -> None:
    clock = Clock()
    engine = timed_engine(clock)
    run(engine, [greedy("a", [1], 7), greedy("b", [2], 3)])
    assert clock.readings == 2 + 1 + 7  # arrivals, the step in which both begin, and one commit for each step
    run(engine, [replace(greedy("r", [1], 7), timeout=3.0)])
    run(engine, [greedy("a", [1], 7)])
    clock.readings = 0
    run(engine, [greedy("a", [1], 7)])
    assert clock.readings == 1 + 1 + 7


@pytest.mark.parametrize("seed", range(4))
def test_many_with_many_limits(seed: int) -> None:
    """Each ends as it would alone, or at the first step after its deadline with what it had by then."""
    draw = random.Random(seed)
    clock = Clock()
    requests: list[Request] = [
        replace(
            request,
            timeout=draw.choice([None, draw.uniform(1, 60)]),
            queue_timeout=draw.choice([None, draw.uniform(1, 20)]),
        )
        for request in mixed_requests(60, np.random.default_rng(seed))
    ]
    engine = timed_engine(clock, pages=12, seqs=6, budget=50)
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
        for _ in range(draw.randint(0, 1)):
            collect(engine.step(), results)
    drain(engine, results)
    alone = solo(requests)
    reasons = set()
    for request in requests:
        result = results[request.request_id]
        reasons.add(result.end[0])
        assert result.last is not None
        metrics = result.last.metrics
        assert metrics.finished_time is not None
        age = metrics.finished_time - metrics.arrival_time
        if result.end[0] == "timeout":
            assert result.token_ids == alone[request.request_id][: len(result.token_ids)]
            limits = {request.timeout} if metrics.first_token_time else {request.timeout, request.queue_timeout}
            assert any(limit is not None and limit <= age < limit + 1 for limit in limits)
        else:
            assert result.token_ids == alone[request.request_id]
            assert request.timeout is None or age < request.timeout + 1
    assert reasons >= {"timeout", "length"}
    assert engine.stats().free_pages == engine.num_pages
