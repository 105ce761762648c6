"""A target for the time of a step, on a clock that the toy's steps move on as if they had a cost."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from shoal.engine.engine import Request
from shoal.engine.pace import LEAST_ROWS, TILE, StepPacer
from shoal.kernels.base import StepInput
from shoal.params import SamplingParams
from tests.engine.toy import Result, ToyBackend, collect, drain, mixed_requests, run, solo, tokens, toy_engine

PLAIN, ADDED = 0.010, 0.0005  # seconds of a step, and of each further row


def test_nothing_is_known_at_first() -> None:
    pacer = StepPacer(0.05)
    assert pacer.further_rows == LEAST_ROWS
    pacer.record(0, PLAIN)
    assert pacer.further_rows == LEAST_ROWS


@pytest.mark.parametrize("plain_first", [True, False])
def test_the_rows_that_fit_are_found(plain_first: bool) -> None:
    """Without a step that has no further rows, all is put down to the rows."""
    pacer = StepPacer(0.05)
    for rows in (*[0] * plain_first, 16, 40, 64):
        pacer.record(rows, PLAIN + ADDED * rows)
    expected = (0.05 - PLAIN) / ADDED if plain_first else 0.05 / (PLAIN / 40 + ADDED)
    assert pacer.further_rows == pytest.approx(expected, abs=TILE // 2 + 1)


def test_a_few_disturbed_steps_are_not_heeded() -> None:
    rng, pacer = random.Random(1), StepPacer(0.05)
    for step in range(200):
        rows = rng.choice([0, 20, 80])
        disturbed = 40.0 if step % 5 == 0 else 0.0
        pacer.record(rows, PLAIN + ADDED * rows + disturbed)
    assert pacer.further_rows == 79


def test_it_follows_a_change() -> None:
    pacer = StepPacer(0.05)
    for factor in (1, 2):
        for _ in range(40):
            pacer.record(0, PLAIN * factor)
            pacer.record(50, factor * (PLAIN + ADDED * 50))
        assert pacer.further_rows == {1: 79, 2: 31}[factor]


def test_prompts_advance_even_where_a_step_takes_too_long_without_them() -> None:
    pacer = StepPacer(0.05)
    pacer.record(0, 7.0)
    pacer.record(16, 9.0)
    assert pacer.further_rows == LEAST_ROWS


@pytest.mark.parametrize("added", [0.0003, 0.0007, 0.0011, 0.003])
def test_a_prompt_gets_whole_tiles(added: float) -> None:
    """With the row that every sequence has: a part of a tile would cost as much as all of it."""
    pacer = StepPacer(0.05)
    pacer.record(0, PLAIN)
    pacer.record(40, PLAIN + 40 * added)
    assert (pacer.further_rows + 1) % TILE == 0


def test_further_rows_without_a_cost_are_no_fault() -> None:
    pacer = StepPacer(0.05)
    pacer.record(0, 1.0)
    pacer.record(16, 0.5)
    assert pacer.further_rows >= LEAST_ROWS


class Machine:
    """The clock, and how long each step took and what it computed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[tuple[int, int]] = []  # sequences, further rows

    def __call__(self) -> float:
        return self.now

    def compute(self, step: StepInput) -> None:
        further = len(step.token_ids) - len(step.kv_len)
        self.steps.append((len(step.kv_len), further))
        self.now += PLAIN + ADDED * further


def sampled(name: str, prompt: int, max_tokens: int) -> Request:
    rng = np.random.default_rng(prompt)
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return Request(name, tuple(rng.integers(0, 50, prompt).tolist()), params)


def alone(requests: list[Request]) -> dict[str, list[int]]:
    return {one.request_id: tokens(run(toy_engine(longest=4000), [one]))[one.request_id] for one in requests}


def test_a_prompt_beside_others_is_cut_to_fit() -> None:
    machine = Machine()
    engine = toy_engine(
        backend=ToyBackend(before_step=machine.compute), clock=machine, target_step_ms=50, longest=4000, budget=512
    )
    requests = [sampled("a", 5, 200), sampled("b", 7, 200), sampled("long", 2000, 3)]
    results: dict[str, Result] = {}
    for request in requests[:2]:
        engine.add(request)
    for _ in range(20):
        collect(engine.step(), results)
    machine.steps.clear()
    engine.add(requests[2])
    drain(engine, results)
    chunks = [further for _, further in machine.steps if further]
    assert sum(chunks) + len(chunks) == 2000
    beside_others = [further for seqs, further in machine.steps if further and seqs > 1]
    assert max(PLAIN + ADDED * further for further in beside_others) <= 0.0501
    assert beside_others.count(79) > 10
    assert tokens(results) == alone(requests)


def test_alone_a_prompt_is_not_held_up() -> None:
    machine = Machine()
    backend = ToyBackend(before_step=machine.compute)
    engine = toy_engine(backend=backend, clock=machine, target_step_ms=50, longest=4000, budget=512)
    run(engine, [sampled("long", 2000, 3)])
    assert [further for _, further in machine.steps] == [511, 511, 511, 463, 0, 0]


def test_two_prompts_hold_up_nobody_either() -> None:
    machine = Machine()
    backend = ToyBackend(before_step=machine.compute)
    engine = toy_engine(backend=backend, clock=machine, target_step_ms=50, longest=4000, budget=512)
    run(engine, [sampled("a", 100, 1), sampled("b", 101, 1)])
    assert machine.steps == [(2, 199)]


@pytest.mark.parametrize("target", [0.001, 20, 1e6])
@pytest.mark.parametrize("pages", [8, 1000])
def test_it_changes_no_token(target: float, pages: int) -> None:
    requests = [
        replace(request, params=replace(request.params, n=1 + index % 3))
        for index, request in enumerate(mixed_requests(30, np.random.default_rng(3)))
    ]
    machine = Machine()
    backend = ToyBackend(before_step=machine.compute)
    engine = toy_engine(backend=backend, clock=machine, target_step_ms=target, pages=pages)
    assert tokens(run(engine, requests)) == solo(requests)


def test_a_step_that_fails_is_no_measure_for_long() -> None:
    machine = Machine()

    def compute(step: StepInput) -> None:
        machine.compute(step)
        if len(machine.steps) == 5:
            machine.now += 100
            raise FloatingPointError("once")

    engine = toy_engine(backend=ToyBackend(before_step=compute), clock=machine, target_step_ms=50, longest=4000)
    requests = [sampled("a", 5, 200), sampled("long", 2000, 3)]
    results: dict[str, Result] = {}
    engine.add(requests[0])
    for _ in range(20):
        collect(engine.step(), results)
    engine.add(requests[1])
    drain(engine, results)
    assert (2, 79) in machine.steps
    assert tokens(results) == alone(requests)
