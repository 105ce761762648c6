"""Who comes first, and who makes way."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.engine import Engine, Request
from shoal.engine.sequence import Sequence
from tests.engine.toy import Result, collect, drain, greedy, mixed_requests, run, solo, tokens, toy_engine


def ranked(name: str, priority: int, prompt: int = 5, max_tokens: int = 8) -> Request:
    return replace(greedy(name, range(prompt), max_tokens), priority=priority)


def ends(engine: Engine) -> list[str]:
    """Who ends, in order."""
    found = []
    while engine.has_work:
        found += [output.request_id for output in engine.step() if output.finished]
    return found


def test_the_lowest_number_first_and_in_order_of_arrival_among_equals() -> None:
    engine = toy_engine(seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -7), ("e", 0)):
        engine.add(ranked(name, priority))
    assert ends(engine) == ["d", "b", "e", "a", "c"]


def test_among_equals_the_lowest_turn_comes_first() -> None:
    engine = toy_engine(seqs=1)
    for name, priority, turn in (("a", 0, 9), ("b", 0, 3), ("c", 1, 0), ("d", 0, 3)):
        engine.add(replace(ranked(name, priority), turn=turn))
    assert ends(engine) == ["b", "d", "a", "c"]


def test_those_that_run_go_on_unless_they_may_be_preempted() -> None:
    for preempt, expected in ((False, ["low", "high"]), (True, ["high", "low"])):
        engine = toy_engine(seqs=1, preempt_for_priority=preempt)
        engine.add(ranked("low", 1))
        engine.step()
        engine.add(ranked("high", 0))
        assert ends(engine) == expected
        assert engine.stats().preemptions == preempt


def test_equals_are_not_preempted() -> None:
    engine = toy_engine(seqs=1, preempt_for_priority=True)
    engine.add(ranked("first", 1))
    engine.step()
    engine.add(ranked("second", 1))
    assert ends(engine) == ["first", "second"]
    assert engine.stats().preemptions == 0


def test_no_more_make_way_than_is_needed_and_the_last_of_the_lowest_first() -> None:
    engine = toy_engine(seqs=3, preempt_for_priority=True)
    for name, priority in (("a", 2), ("b", 2), ("c", 1)):
        engine.add(ranked(name, priority, max_tokens=4))
    engine.step()
    engine.add(ranked("high", 0, max_tokens=4))
    engine.step()
    assert (engine.stats().running, engine.stats().preemptions) == (3, 1)
    assert ends(engine) == ["c", "a", "high", "b"]


def test_pages_are_made_free_too() -> None:
    """Each of the two needs more than half of the pool."""
    for preempt in (False, True):
        engine = toy_engine(pages=5, preempt_for_priority=preempt)
        low = ranked("low", 1, 40, 5)
        high = replace(low, request_id="high", prompt_token_ids=(7,) * 45, priority=0)
        engine.add(low)
        results: dict[str, Result] = {}
        collect(engine.step(), results)
        engine.add(high)
        for _ in range(2):
            collect(engine.step(), results)
        assert ("high" in results) == preempt
        drain(engine, results)
        assert tokens(results) == solo([low, high])


def test_where_pages_run_out_the_lowest_priority_loses_its_own_though_it_came_first() -> None:
    engine = toy_engine(pages=4)
    low = replace(greedy("low", (3,) * 14, 20), priority=1)
    high = greedy("high", (5,) * 16, 40)
    engine.add(low)
    results: dict[str, Result] = {}
    collect(engine.step(), results)
    engine.add(high)
    drain(engine, results)
    assert tokens(results) == solo([low, high])
    metrics = {name: result.last.metrics for name, result in results.items() if result.last is not None}
    assert {result.end[0] for result in results.values()} == {"length"}
    assert (metrics["low"].num_preemptions, metrics["high"].num_preemptions) == (1, 0)


@pytest.mark.usefixtures("drafting")
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    budget=st.integers(1, 40),
    pages=st.integers(8, 30),
    seqs=st.integers(1, 6),
    windows=st.sampled_from([(0,), (30, 0), (10,)]),
    preempt=st.booleans(),
)
def test_priorities_change_no_token(
    data: st.DataObject, budget: int, pages: int, seqs: int, windows: tuple[int, ...], preempt: bool
) -> None:
    requests = [
        replace(
            request,
            priority=data.draw(st.integers(-1, 1)),
            params=replace(request.params, n=data.draw(st.sampled_from([1, 1, 3]))),
        )
        for request in mixed_requests(10, np.random.default_rng(data.draw(st.integers(0, 5))))
    ]
    engine = toy_engine(
        budget=budget, pages=pages * len(windows), seqs=seqs, windows=windows, preempt_for_priority=preempt
    )
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
        for _ in range(data.draw(st.integers(0, 3))):
            collect(engine.step(), results)
    drain(engine, results)
    assert tokens(results) == solo(requests, windows)
    assert engine.stats().free_pages == engine.num_pages


def test_requests_that_end_in_time_leave_nothing_behind() -> None:
    """Each has time enough for all of them."""
    engine = toy_engine(seqs=2)
    for number in range(500):
        run(engine, [replace(ranked(str(number), 0, max_tokens=1), timeout=1e6)])
    assert sum(type(item) is Sequence for item in gc.get_objects()) < 150


@pytest.mark.parametrize("where", ["queue", "running"])
def test_a_request_that_takes_the_name_of_one_that_has_ended_has_its_own_time(where: str) -> None:
    now = 0.0
    engine = toy_engine(seqs=1, clock=lambda: now)
    if where == "queue":
        engine.add(ranked("other", -1, max_tokens=100))
        engine.step()
    engine.add(replace(ranked("r", 0), timeout=5.0))
    engine.abort("r")
    engine.step()
    engine.add(replace(ranked("r", 0, max_tokens=100), timeout=50.0))
    now = 10.0
    assert not any(output.finished for output in engine.step())
    now = 51.0
    (ended,) = (output for output in engine.step() if output.finished)
    assert (ended.request_id, ended.finish_reason) == ("r", "timeout")
