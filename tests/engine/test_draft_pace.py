"""How much is drafted, on machines that are pretended: what a step takes is a function of its rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from shoal.engine.draft import Speculation, Wanted
from shoal.engine.draft_pace import DraftPace
from shoal.engine.engine import Request
from shoal.kernels.base import StepInput
from shoal.params import SamplingParams
from tests.engine.toy import Guesses, ToyBackend, run, solo, tokens, toy_engine

Cost = Callable[[int], float]

MEMORY_BOUND: Cost = lambda rows: 0.010 + 0.0002 * rows  # noqa: E731
COMPUTE_BOUND: Cost = lambda rows: 0.001 * rows  # noqa: E731
IN_TILES: Cost = lambda rows: 0.004 * -(-rows // 8)  # noqa: E731


class Decoding:
    """Sequences that decode at a pace, each with drafts of which so large a share is right, token by token."""

    def __init__(self, cost: Cost, right: list[float], longest: int = 6, *, noise: bool = False) -> None:
        self.pace = DraftPace()
        self.rng = random.Random(1)
        self.cost, self.right, self.longest, self.noise = cost, right, longest, noise
        self.chances = [0.5] * len(right)
        self.seconds, self.tokens, self.drafted = 0.0, 0, 0

    def step(self) -> list[int]:
        size = len(self.right)
        counts = self.pace.counts(self.chances, [self.longest] * size, 512 - size)
        rows = size + sum(counts)
        seconds = self.cost(rows)
        if self.noise:
            seconds *= self.rng.choice([1.0, 1.0, 1.0, 1.02, 1.1, 5.0])
        self.pace.record(size, rows, seconds)
        for index, count in enumerate(counts):
            kept = 0
            while kept < count and self.rng.random() < self.right[index]:
                kept += 1
            if count:
                self.chances[index] = self.pace.learned(self.chances[index], count, kept)
            else:
                self.chances[index] = self.pace.forgotten(self.chances[index])
            self.tokens += 1 + kept
        self.seconds += self.cost(rows)
        self.drafted += sum(counts)
        return counts

    def run(self, steps: int) -> Decoding:
        for _ in range(steps):
            self.step()
        return self

    @property
    def gain(self) -> float:
        """Over as many steps without drafts, on a machine that nothing disturbs."""
        return self.tokens / self.seconds * self.cost(len(self.right)) / len(self.right)


def test_the_first_step_is_one_without_drafts() -> None:
    decoding = Decoding(MEMORY_BOUND, [1.0])
    assert decoding.step() == [0]
    assert decoding.step()[0] > 0


@pytest.mark.parametrize(("right", "gain"), [(1.0, 5.0), (0.9, 3.7), (0.7, 2.3), (0.5, 1.6)])
@pytest.mark.parametrize("noise", [False, True])
def test_a_row_that_costs_little_is_used(right: float, gain: float, noise: bool) -> None:
    assert Decoding(MEMORY_BOUND, [right], noise=noise).run(1500).gain > gain


def test_the_first_further_row_may_cost_more_than_those_after_it() -> None:
    """As where one row alone takes another path."""

    def cost(rows: int) -> float:
        return 0.010 if rows == 1 else 0.014 + 0.0002 * rows

    assert Decoding(cost, [0.9]).run(1000).gain > 2.8


@pytest.mark.parametrize("right", [0.0, 0.03])
@pytest.mark.parametrize("size", [1, 8, 32])
@pytest.mark.parametrize("noise", [False, True])
def test_guesses_that_fail_end_and_cost_next_to_nothing(right: float, size: int, noise: bool) -> None:
    decoding = Decoding(MEMORY_BOUND, [right] * size, noise=noise).run(1000)
    assert decoding.gain > 0.985
    assert decoding.drafted < 1000


def test_one_whose_guesses_become_right_is_found() -> None:
    decoding = Decoding(MEMORY_BOUND, [0.0]).run(500)
    decoding.right = [1.0]
    decoding.run(100)
    assert sum(decoding.step()[0] for _ in range(40)) > 200


@pytest.mark.parametrize("right", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("noise", [False, True])
def test_a_step_that_is_full_of_arithmetic_has_no_drafts(right: float, size: int, noise: bool) -> None:
    assert Decoding(COMPUTE_BOUND, [right] * size, noise=noise).run(1000).gain > 0.99


def test_rows_that_fill_a_tile_are_used() -> None:
    assert Decoding(IN_TILES, [0.9] * 3).run(500).gain > 1.8


def test_sequences_with_better_chances_come_first() -> None:
    decoding = Decoding(IN_TILES, [0.95, 0.0, 0.0, 0.95]).run(400)
    counts = [decoding.step() for _ in range(30)]
    assert sum(count[0] + count[3] for count in counts) > 10 * sum(count[1] + count[2] for count in counts)


def test_it_follows_a_machine_that_changes() -> None:
    decoding = Decoding(MEMORY_BOUND, [0.9] * 4).run(300)
    decoding.cost = lambda rows: 0.004 * rows
    decoding.run(100)
    assert sum(sum(decoding.step()) for _ in range(100)) < 20
    decoding.cost = MEMORY_BOUND
    decoding.run(1500)
    assert sum(sum(decoding.step()) for _ in range(100)) > 1000


def test_a_target_for_the_step_holds_for_drafts_too() -> None:
    pace = DraftPace(target=0.0115)
    for rows in (1, 2, 4, 8):
        pace.record(1, rows, MEMORY_BOUND(rows))
    pace.record(1, 1, MEMORY_BOUND(1))
    assert 5 <= pace.counts([0.95], [20], 500)[0] <= 6


def test_what_a_draft_costs_before_the_step_counts() -> None:
    now = 0.0
    pace = DraftPace(clock=lambda: now)
    for rows in (1, 8, 1):
        pace.record(1, rows, MEMORY_BOUND(rows))
    assert pace.counts([0.8], [6], 500) == [6]
    for _ in range(40):
        with pace.drafting(4):
            now += 4 * 0.0095  # nearly a step for each token
    assert pace.counts([0.8], [6], 500) == [0]


@pytest.mark.parametrize("held_up", [{0}, {100}, set(range(4))])
def test_a_drafter_that_was_held_up_is_asked_again(held_up: set[int]) -> None:
    """Once, or from the first time on for a while; however long that was."""
    now, asked, times = 0.0, 0, 0
    pace = DraftPace(clock=lambda: now)
    for _ in range(3000):
        (count,) = pace.counts([0.9], [6], 500)
        if count:
            with pace.drafting(count):
                now += 1.0 if asked in held_up else 1e-5
            asked += 1
        pace.record(1, 1 + count, MEMORY_BOUND(1 + count))
        times += bool(count)
    assert times > 2000


def test_whatever_it_decides_tokens_are_the_same() -> None:
    """On a clock that jumps at random."""
    params = SamplingParams(temperature=0.8, max_tokens=60)
    requests = [Request(f"r{i}", (i, i + 1), params, seed=i) for i in range(6)]
    rng, now = random.Random(5), 0.0

    def tick(step: StepInput) -> None:
        nonlocal now
        now += rng.choice([0.001, 0.002, 0.1]) * len(step.token_ids)

    speculation = Speculation(Guesses(), DraftPace(clock=lambda: now))
    engine = toy_engine(backend=ToyBackend(before_step=tick), clock=lambda: now, speculation=speculation)
    assert tokens(run(engine, requests)) == solo(requests)
    assert engine.stats().spec_decode_num_draft_tokens > 0


class Asked:
    """Guesses nothing, and notes for how many sequences it was asked."""

    longest = 4

    def __init__(self) -> None:
        self.asked: list[int] = []

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        self.asked.append(len(wanted))
        return [[] for _ in wanted]

    def ended(self, key: object, output: list[int]) -> None:
        return None


def test_a_drafter_that_is_not_worth_it_is_not_asked() -> None:
    now = 0.0

    def tick(step: StepInput) -> None:
        nonlocal now
        now += 0.001 * len(step.token_ids)

    drafter = Asked()
    speculation = Speculation(drafter, DraftPace(clock=lambda: now))
    engine = toy_engine(backend=ToyBackend(before_step=tick), clock=lambda: now, speculation=speculation)
    run(engine, [Request(f"r{i}", (i,), SamplingParams(temperature=0, max_tokens=60)) for i in range(8)])
    steps = engine.stats().steps
    assert len(drafter.asked) < steps
