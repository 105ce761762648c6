"""A backend that raises: only requests that cannot be computed even alone fail, and nobody else's tokens change."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.engine import Engine, Request
from shoal.kernels.base import StepInput
from shoal.params import SamplingParams
from tests.engine.faulty import Fault, faulty
from tests.engine.toy import (
    NAN_TOKEN,
    Result,
    ToyBackend,
    drain,
    greedy,
    mixed_requests,
    run,
    solo,
    tokens,
    toy_engine,
)

Place = tuple[int, int]  # a token at a position

OPERATIONS = ("layers", "logits", "sample")


def engine_with(fault: Fault, *, pages: int = 1000, budget: int = 512, windows: tuple[int, ...] = (0,)) -> Engine:
    backend = faulty(ToyBackend(windows=windows), fault)
    return toy_engine(backend=backend, pages=pages, budget=budget, windows=windows)


def places(step: StepInput) -> set[Place]:
    return set(zip(step.token_ids.tolist(), step.positions.tolist(), strict=True))


def at_places(bad: set[Place], operation: str = "layers") -> Fault:
    """Steps that compute one of these places raise."""

    def fault(name: str, step: StepInput) -> None:
        if name == operation and not bad.isdisjoint(places(step)):
            raise FloatingPointError("unlucky")

    return fault


def mixed_company() -> list[Request]:
    """Requests that between them need all operations: tokens, log-probabilities of prompts, logits."""
    scored = SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=2, logprobs=1)
    wants = SamplingParams(temperature=0)
    return [
        *(greedy(f"greedy{i}", [i, i + 1, i + 2]) for i in range(5)),
        *(Request(f"scored{i}", tuple(range(i, i + 20)), scored) for i in range(3)),
        *(Request(f"logits{i}", tuple(range(i, i + 10)), wants, want_logits=True) for i in range(3)),
    ]


def whole(result: Result) -> list[tuple[object, ...]]:
    """Everything a request got, step by step, its times aside."""
    return [
        (output[2:8], None if output.logits is None else output.logits.tolist(), output.prompt_logprobs)
        for output in result.outputs
    ]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Result]:
    engine = toy_engine()
    return {request.request_id: run(engine, [request])[request.request_id] for request in mixed_company()}


# --- once


@pytest.mark.parametrize("nth", range(12))
@pytest.mark.parametrize("error", [FloatingPointError, MemoryError])
def test_a_fault_that_goes_away_is_not_seen(
    nth: int, error: type[Exception], undisturbed: dict[str, Result], caplog: pytest.LogCaptureFixture
) -> None:
    countdown = itertools.count(nth, -1)

    def fault(name: str, step: StepInput) -> None:
        if next(countdown) == 0:
            raise error("once")

    engine = engine_with(fault)
    results = run(engine, mixed_company())
    assert {name: whole(result) for name, result in results.items()} == {
        name: whole(result) for name, result in undisturbed.items()
    }
    assert engine.stats().broken is None
    assert next(countdown) < 0
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert "once" in str(record.exc_info[1])


# --- always


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_only_poison_fails(
    operation: str, count: int, undisturbed: dict[str, Result], caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=0)
    poison = [Request(f"poison{i}", (50, 51), params) for i in range(count)]
    company = mixed_company()
    requests = [*poison[:1], *company[:7], *poison[1:3], *company[7:], *poison[3:]]
    engine = engine_with(at_places({(50, 0)}, operation))
    results = run(engine, requests)
    for request in poison:
        failed = results.pop(request.request_id)
        assert failed.end == ("error", None)
        assert failed.error == "FloatingPointError: unlucky"
        assert len(failed.outputs) == 1
    assert {name: whole(result) for name, result in results.items()} == {
        name: whole(result) for name, result in undisturbed.items()
    }
    assert engine.stats().broken is None
    assert len(caplog.records) == 1  # although many parts of the step raised


def all_places(request: Request, generated: list[int]) -> list[Place]:
    """What is computed of a request: all but its last token."""
    known = [*request.prompt_token_ids, *generated]
    return [(token, position) for position, token in enumerate(known[:-1])]


@settings(max_examples=25)
@given(
    data=st.data(),
    budget=st.integers(3, 60),
    pages=st.integers(8, 30),
    windows=st.sampled_from([(0,), (30, 0), (10,)]),
    seed=st.integers(0, 5),
)
def test_a_request_fails_where_its_poison_lies_and_the_others_do_not(
    data: st.DataObject, budget: int, pages: int, windows: tuple[int, ...], seed: int
) -> None:
    requests = mixed_requests(10, np.random.default_rng(seed))
    engine = toy_engine(windows=windows)
    alone = {request.request_id: run(engine, [request])[request.request_id] for request in requests}
    computed = {request.request_id: all_places(request, alone[request.request_id].token_ids) for request in requests}
    bad = data.draw(st.sets(st.sampled_from([place for some in computed.values() for place in some]), max_size=3))
    engine = engine_with(at_places(bad), budget=budget, pages=pages * len(windows), windows=windows)
    results = run(engine, requests)
    for request in requests:
        result, expected = results[request.request_id], alone[request.request_id]
        own = computed[request.request_id]
        first = next((position for position, place in enumerate(own) if place in bad), None)
        if first is None:
            assert (result.end, result.token_ids) == (expected.end, expected.token_ids)
        else:
            known = max(0, first + 1 - len(request.prompt_token_ids))
            assert result.error == "FloatingPointError: unlucky"
            assert result.token_ids == expected.token_ids[:known]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fault_that_needs_company_fails_nobody(operation: str, undisturbed: dict[str, Result]) -> None:
    def fault(name: str, step: StepInput) -> None:
        if name == operation and len(step.kv_len) > 1:
            raise MemoryError

    engine = engine_with(fault)
    results = run(engine, mixed_company())
    assert {name: whole(result) for name, result in results.items()} == {
        name: whole(result) for name, result in undisturbed.items()
    }
    assert engine.stats().broken is None


def test_two_that_cannot_be_together_are_parted() -> None:
    def fault(name: str, step: StepInput) -> None:
        if {(50, 0), (51, 0)} <= places(step):
            raise FloatingPointError("together")

    sizes: list[int] = []

    def counted(name: str, step: StepInput) -> None:
        if name == "layers":
            sizes.append(len(step.kv_len))
        fault(name, step)

    requests = [greedy(f"r{i}", [first], 1) for i, first in enumerate([50, 1, 2, 51])]
    assert tokens(run(engine_with(counted), requests)) == solo(requests)
    assert sizes == [4, 4, 2, 2]


def test_a_request_that_fails_leaves_its_pages_to_others() -> None:
    """More requests than pages, every third one poison: those that wait get what the failed ones held."""
    good = mixed_requests(40, np.random.default_rng(1), longest_prompt=60)
    requests: list[Request] = []
    for i, request in enumerate(good):
        requests += [request, *([greedy(f"poison{i}", [50] * 30)] if i % 3 == 0 else [])]
    bad = {(50, 0)} - {place for request in good for place in all_places(request, [])}
    assert bad
    engine = engine_with(at_places(bad), pages=8, budget=64)
    results = run(engine, requests)
    assert all(results.pop(f"poison{i}").end[0] == "error" for i in range(0, 40, 3))
    assert tokens(results) == solo(good)
    assert engine.stats().preemptions > 0


# --- everybody


def test_an_engine_that_computes_nothing_is_broken_until_it_computes_something() -> None:
    broken = True

    def fault(name: str, step: StepInput) -> None:
        if broken:
            raise RuntimeError("no device")

    backend = faulty(ToyBackend(), fault)
    engine = toy_engine(backend=backend, seqs=4)
    assert engine.stats().broken is None
    results = run(engine, mixed_company())  # those that wait are tried, too
    assert {result.error for result in results.values()} == {"RuntimeError: no device"}
    assert len(results) == len(mixed_company())
    assert engine.stats().broken == "RuntimeError: no device"
    broken = False
    request = greedy("later", [1, 2, 3], 2)
    assert tokens(run(engine, [request])) == solo([request])
    assert engine.stats().broken is None


def test_one_request_alone_says_nothing_about_the_engine() -> None:
    engine = engine_with(at_places({(50, 0)}))
    assert run(engine, [greedy("r", [50])])["r"].error == "FloatingPointError: unlucky"
    assert engine.stats().broken is None


def test_a_step_in_which_all_fail_for_nan_is_not_a_broken_engine() -> None:
    def fault(name: str, step: StepInput) -> None:
        if len(step.kv_len) > 1:
            raise MemoryError

    engine = engine_with(fault)
    results = run(engine, [greedy(f"r{i}", [NAN_TOKEN]) for i in range(3)])
    assert all("NaN" in result.error for result in results.values())
    assert engine.stats().broken is None


# --- not an Exception


class Interrupts:
    """Every step raises for poison; one of all operations is interrupted."""

    def __init__(self, nth: int) -> None:
        self.countdown: Iterator[int] = itertools.count(nth, -1)
        self.poison = at_places({(50, 0)})

    def __call__(self, name: str, step: StepInput) -> None:
        if next(self.countdown) == 0:
            raise KeyboardInterrupt
        self.poison(name, step)


@pytest.mark.parametrize("nth", range(16))
def test_an_interrupt_amid_the_halves_loses_and_repeats_nothing(nth: int) -> None:
    good = mixed_requests(6, np.random.default_rng(3))
    engine = engine_with(Interrupts(nth))
    for request in [*good[:3], greedy("poison", [50]), *good[3:]]:
        engine.add(request)
    results: dict[str, Result] = {}
    with pytest.raises(KeyboardInterrupt):
        drain(engine, results)
    drain(engine, results)
    assert results.pop("poison").end[0] == "error"
    assert tokens(results) == solo(good)
    assert engine.stats().free_pages == engine.num_pages
