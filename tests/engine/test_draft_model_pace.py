"""How much is guessed with a second model, on machines that are pretended: nothing it does may cost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from shoal.engine.draft_model_pace import ModelPace
from shoal.engine.pace import LEAST_ROWS

Cost = Callable[[int], float]

MEMORY_BOUND: Cost = lambda rows: 0.010 + 0.0002 * rows  # noqa: E731
COMPUTE_BOUND: Cost = lambda rows: 0.001 * rows  # noqa: E731


class Decoding:
    """Sequences that decode at a pace, one answer after the other, each with a prompt that has to be read before there are guesses. A
    draft model takes ``share`` of the time of a step, and ``right`` of its guesses are."""

    def __init__(
        self,
        cost: Cost,
        right: float,
        *,
        share: float = 0.1,
        sequences: int = 1,
        prompt: int = 100,
        answer: int = 100,
        longest: int = 6,
        noise: bool = False,
    ) -> None:
        self.now = 0.0
        self.pace = ModelPace(clock=lambda: self.now)
        self.rng = random.Random(1)
        self.cost, self.right, self.share, self.noise = cost, right, share, noise
        self.prompt, self.answer, self.longest = prompt, answer, longest
        self.chances, self.left = [0.5] * sequences, [answer] * sequences
        self.lack = [prompt] * sequences
        self.seconds, self.tokens, self.read, self.drafted = 0.0, 0, 0, 0

    def spend(self, seconds: float) -> None:
        """As long as it takes on a machine that nothing disturbs; the pace sees another."""
        self.seconds += seconds
        self.now += seconds * (self.rng.choice([1.0, 1.0, 1.0, 1.02, 1.1, 5.0]) if self.noise else 1.0)

    def step(self) -> list[int]:
        size = len(self.left)
        counts = self.pace.counts(self.chances, [min(self.longest, left - 1) for left in self.left], 512 - size)
        counts = self.draft(counts)
        rows, start = size + sum(counts), self.now
        self.spend(self.cost(rows))
        kept = [self.num_kept(count) for count in counts]
        for index, count in enumerate(counts):
            if count:
                self.chances[index] = self.pace.learned(self.chances[index], count, kept[index])
            else:
                self.chances[index] = self.pace.forgotten(self.chances[index])
                self.lack[index] += 1
        self.pace.record(size, rows, self.now - start)
        self.tokens += size + sum(kept)
        for index in range(size):
            self.left[index] -= 1 + kept[index]
            if self.left[index] <= 0:
                self.left[index], self.lack[index], self.chances[index] = self.answer, self.prompt, 0.5
        return counts

    def draft(self, counts: list[int]) -> list[int]:
        """As ModelDrafter does: who lacks much is read, the others are guessed on."""
        behind = [index for index, count in enumerate(counts) if count and self.lack[index] > self.longest + 1]
        if behind and self.pace.may_begin:
            rows = sum(self.lack[index] - 1 for index in behind)
            with self.pace.reading(rows):
                self.spend(self.share * self.cost(rows))
            self.read += rows
            for index in behind:
                self.lack[index] = 1
        ready = [count if self.lack[index] <= self.longest + 1 else 0 for index, count in enumerate(counts)]
        if any(ready):
            with self.pace.rounds(max(ready)):
                for place in range(max(ready)):
                    self.spend(self.share * self.cost(sum(count > place for count in ready)))
            self.lack = [1 if count else lack for count, lack in zip(ready, self.lack, strict=True)]
        self.drafted += sum(ready)
        return ready

    def num_kept(self, count: int) -> int:
        kept = 0
        while kept < count and self.rng.random() < self.right:
            kept += 1
        return kept

    def run(self, steps: int) -> Decoding:
        for _ in range(steps):
            self.step()
        return self

    @property
    def gain(self) -> float:
        """Over as many tokens without drafts."""
        size = len(self.left)
        return self.tokens / self.seconds * self.cost(size) / size


@pytest.mark.parametrize(("right", "gain"), [(1.0, 3.0), (0.9, 2.2), (0.7, 1.4)])
@pytest.mark.parametrize("noise", [False, True])
def test_a_small_model_that_is_often_right_is_used(right: float, gain: float, noise: bool) -> None:
    assert Decoding(MEMORY_BOUND, right, noise=noise).run(1500).gain > gain


def test_all_sequences_are_guessed_on_together() -> None:
    """A round for eight costs little more than one for one of them."""
    alone, eight = Decoding(MEMORY_BOUND, 0.8), Decoding(MEMORY_BOUND, 0.8, sequences=8)
    assert eight.run(1000).gain > 1.35
    assert alone.run(1000).gain > 1.9


@pytest.mark.parametrize("right", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("cost", [MEMORY_BOUND, COMPUTE_BOUND], ids=["memory", "compute"])
@pytest.mark.parametrize("sequences", [1, 8, 32])
def test_it_never_costs(right: float, share: float, cost: Cost, sequences: int) -> None:
    """Once it has been tried: that is some prompts, read once."""
    decoding = Decoding(cost, right, share=share, sequences=sequences).run(100)
    decoding.seconds, decoding.tokens = 0.0, 0
    assert decoding.run(1000).gain > 0.97


@pytest.mark.parametrize(("right", "answer"), [(0.3, 5), (0.8, 5), (0.3, 20)])
def test_prompts_that_are_longer_than_their_answers_are_worth(right: float, answer: int) -> None:
    """To read 2000 tokens takes four steps, and a few tokens never bring that back."""
    decoding = Decoding(MEMORY_BOUND, right, prompt=2000, answer=answer).run(3000)
    assert decoding.gain > 0.97
    assert decoding.read < 0.2 * 2000 * decoding.tokens / answer


def test_a_long_answer_is_worth_a_long_prompt() -> None:
    assert Decoding(MEMORY_BOUND, 0.9, prompt=2000, answer=2000).run(1500).gain > 2.0


@pytest.mark.parametrize("noise", [False, True])
def test_a_model_that_becomes_right_is_found(noise: bool) -> None:
    decoding = Decoding(MEMORY_BOUND, 0.0, noise=noise).run(1000)
    decoding.right = 0.95
    decoding.run(3000)
    before = decoding.tokens, decoding.seconds
    decoding.run(500)
    assert (decoding.tokens - before[0]) / (decoding.seconds - before[1]) > 1.8 / MEMORY_BOUND(1)


def test_a_target_for_the_step_holds_for_what_is_read_and_guessed() -> None:
    now = 0.0
    pace = ModelPace(target=0.015, clock=lambda: now)
    assert pace.rows_to_read(512) == LEAST_ROWS
    for rows in (1, 2, 4, 8, 1):
        pace.record(1, rows, 0.010)
    with pace.reading(100):
        now += 0.005
    assert pace.rows_to_read(512) in (99, 100)
    assert pace.rows_to_read(50) == 50
    with pace.rounds(4):
        now += 0.008
    assert pace.counts([0.95], [20], 500) == [2]


def test_what_was_read_in_vain_is_paid_for_by_later_steps() -> None:
    now = 0.0
    pace = ModelPace(clock=lambda: now)
    pace.record(1, 1, 0.010)
    assert pace.may_begin
    with pace.reading(100):
        now += 0.010
    assert not pace.may_begin
    for _ in range(98):  # each puts a hundredth aside, as the first did
        pace.record(1, 1, 0.010)
    assert not pace.may_begin
    for _ in range(3):
        pace.record(1, 1, 0.010)
    assert pace.may_begin
