"""Requests for states on the toy network: each wanted state once, in order, whatever the steps, the memory and the neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shoal.engine.engine import Engine, Output, Request
from shoal.params import Pooling, SamplingParams
from tests.engine.toy import NAN_TOKEN, greedy, toy_engine

PROMPT = tuple(7 * i % 50 for i in range(77))
POOLINGS: tuple[Pooling, ...] = ("none", "mean", "cls", "last")


def pooled(name: str, prompt: tuple[int, ...] = PROMPT, pooling: Pooling = "none") -> Request:
    return Request(name, prompt, SamplingParams(), pooling=pooling)


def run(engine: Engine, *requests: Request) -> dict[str, list[Output]]:
    """All outputs of each request."""
    for request in requests:
        engine.add(request)
    found: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
    for outputs in found.values():
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return found


def states(outputs: list[Output]) -> Any:
    return np.concatenate([output.states for output in outputs if output.states is not None])


@pytest.fixture(scope="module")
def every_state() -> Any:
    return states(run(toy_engine(), pooled("all"))["all"])


WANTED = {"none": slice(0, None), "mean": slice(0, None), "cls": slice(0, 1), "last": slice(-1, None)}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("budget", [1, 7, 16, 512])
def test_each_wanted_state_comes_once_and_in_order(every_state: Any, pooling: Pooling, budget: int) -> None:
    engine = toy_engine(budget=budget, seqs=min(budget, 3))
    found = run(engine, greedy("a", range(20), 9), pooled("b", pooling=pooling), greedy("c", range(30), 9))
    assert np.array_equal(states(found["b"]), every_state[WANTED[pooling]])
    assert found["b"][-1].finish_reason == "stop"
    assert len(found["a"][-1].new_token_ids) == 1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_preemption_loses_nothing_and_repeats_nothing(every_state: Any, pooling: Pooling) -> None:
    """Seven pages, for one that grows to three and one that needs five: the latter loses them shortly before it is done."""
    engine = toy_engine(pages=7, budget=8, seqs=2)
    found = run(engine, greedy("a", range(30), 18), pooled("b", pooling=pooling))
    assert found["b"][-1].metrics.num_preemptions == (0 if pooling == "cls" else 1)
    assert np.array_equal(states(found["b"]), every_state[WANTED[pooling]])
    assert engine.stats().free_pages == engine.stats().num_pages


def test_the_first_state_is_enough_for_what_wants_no_more() -> None:
    engine = toy_engine(budget=8)
    run(engine, pooled("b", pooling="cls"))
    assert engine.stats().steps == 1


def test_only_positions_that_are_not_wanted_come_from_the_prefix_cache(every_state: Any) -> None:
    engine = toy_engine()
    run(engine, greedy("a", (*PROMPT, 5), 1))
    for pooling, cached in (("last", 64), ("mean", 0), ("none", 0), ("cls", 0)):
        (output,) = run(engine, pooled(pooling, pooling=pooling))[pooling]  # type: ignore[arg-type]
        assert output.metrics.num_cached == cached
        assert np.array_equal(states([output]), every_state[WANTED[pooling]])


def test_nobody_finds_pages_that_no_token_has_vouched_for() -> None:
    engine = toy_engine()
    run(engine, pooled("a"))
    assert run(engine, pooled("b", pooling="last"))["b"][0].metrics.num_cached == 0


def test_nan_among_the_states_ends_that_request_alone(every_state: Any) -> None:
    found = run(toy_engine(), pooled("bad", (5, 6, NAN_TOKEN, 7)), pooled("good"))
    assert found["bad"][-1].error == "the states at position 2 are not finite"
    assert np.array_equal(states(found["good"]), every_state)


def test_an_abort_half_way_leaves_nothing() -> None:
    engine = toy_engine(budget=8)
    engine.add(pooled("a"))
    engine.step()
    assert engine.abort("a")
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    assert engine.stats().free_pages == engine.stats().num_pages
