"""The scheduler alone: a step is pretended to be computed, and tokens are made up."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.engine.page_pool import PagePool
from shoal.engine.scheduler import Scheduler, SchedulerLimits, StepBatch, StepResult
from shoal.engine.sequence import Output, Request, Sequence, Status
from shoal.errors import RequestError
from shoal.params import SamplingParams


def make(*, pages: int = 100, page_size: int = 4, seqs: int = 8, budget: int = 16, longest: int = 100) -> Scheduler:
    limits = SchedulerLimits(
        max_model_len=longest, max_num_seqs=seqs, max_num_batched_tokens=budget, page_size=page_size
    )
    return Scheduler(PagePool(pages), limits)


def request(name: str, prompt: int, max_tokens: int | None = 4, *, want_logits: bool = False) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, tuple(range(prompt)), params, want_logits=want_logits)


def step(scheduler: Scheduler, token: int = 7) -> tuple[StepBatch, list[Output]]:
    batch = scheduler.schedule()
    logits = [f"{seq.num_unscored} rows" for seq in batch.scoring]
    result = StepResult([token] * len(batch.sampling), [None] * len(batch.sampling), logits)
    outputs = scheduler.commit(batch, result, 0.0)
    scheduler.check()
    return batch, outputs


def shares(batch: StepBatch) -> list[tuple[str, int]]:
    return [(seq.request.request_id, seq.num_scheduled) for seq in batch.sequences]


def test_a_long_prompt_is_cut_into_chunks_and_the_rest_of_the_budget_goes_on() -> None:
    scheduler = make(budget=16)
    scheduler.add(request("long", 20), 0.0)
    scheduler.add(request("short", 3), 0.0)
    assert shares(step(scheduler)[0]) == [("long", 16)]
    assert shares(step(scheduler)[0]) == [("long", 4), ("short", 3)]
    assert shares(step(scheduler)[0]) == [("long", 1), ("short", 1)]


def test_rows_that_decode_come_before_a_prompt() -> None:
    scheduler = make(budget=6)
    scheduler.add(request("a", 3, 50), 0.0)
    scheduler.add(request("b", 2, 50), 0.0)
    step(scheduler)
    scheduler.add(request("long", 40, 50), 0.0)
    for _ in range(8):
        batch, outputs = step(scheduler)
        assert shares(batch)[:2] == [("a", 1), ("b", 1)]
        assert [output.request_id for output in outputs][:2] == ["a", "b"]


def test_more_sequences_than_rows_never_stand_still() -> None:
    scheduler = make(budget=2, seqs=8)
    for name in "abcd":
        scheduler.add(request(name, 1, 3), 0.0)
    for _ in range(3):
        assert shares(step(scheduler)[0]) == [("a", 1), ("b", 1)]
        assert [seq.request.request_id for seq in scheduler.waiting] == ["c", "d"]
    assert shares(step(scheduler)[0]) == [("c", 1), ("d", 1)]


def test_the_last_admitted_is_preempted_and_keeps_its_tokens() -> None:
    scheduler = make(pages=4, page_size=2)
    scheduler.add(request("a", 4, 5), 0.0)
    victim = scheduler.add(request("b", 2, 3), 0.0)
    scheduler.add(request("c", 1, 1), 0.0)
    scheduler.add(request("d", 8, 1), 0.0)
    step(scheduler)
    assert [seq.request.request_id for seq in scheduler.running] == ["a", "b"]
    step(scheduler)  # a takes the page that c left, b finds none
    assert victim.status is Status.WAITING
    assert [seq.request.request_id for seq in scheduler.waiting] == ["b", "d"]
    assert (victim.num_tokens, victim.num_computed, victim.pages) == (3, 0, [])
    assert victim.metrics.num_preemptions == scheduler.counters.preemptions == 1
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert victim.token_ids == [0, 1, 7, 7, 7]
    assert scheduler.counters.generation_tokens == 5 + 3 + 1 + 1
    assert scheduler.counters.prompt_tokens == 4 + 2 + 1 + 8


def test_a_dropped_step_is_scheduled_again() -> None:
    scheduler = make(budget=4)
    scheduler.add(request("a", 6), 0.0)
    first = shares(scheduler.schedule())
    scheduler.check()
    assert shares(scheduler.schedule()) == first == [("a", 4)]


def test_a_failed_step_ends_its_sequences_only() -> None:
    scheduler = make(budget=4)
    for name in ("a", "b"):
        scheduler.add(request(name, 4), 0.0)
    outputs = scheduler.fail(scheduler.schedule(), "ValueError: broken", 2.0)
    assert [(o.request_id, o.finish_reason, o.error) for o in outputs] == [("a", "error", "ValueError: broken")]
    assert outputs[0].metrics.finished_time == 2.0
    scheduler.check()
    assert shares(step(scheduler)[0]) == [("b", 4)]


def test_logits_are_reported_once_although_computed_twice() -> None:
    scheduler = make(pages=4, page_size=2, budget=5)
    scheduler.add(request("a", 4, 3), 0.0)
    seq = scheduler.add(request("logits", 4, want_logits=True), 0.0)
    batch, outputs = step(scheduler)
    assert shares(batch) == [("a", 4), ("logits", 1)]
    assert [o.logits for o in outputs] == [None, "1 rows"]
    seen = []
    while seq.status is not Status.FINISHED:
        seen += [o.logits for o in step(scheduler)[1] if o.request_id == "logits"]
    assert seq.metrics.num_preemptions == 1
    assert seen == ["3 rows"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (request("r", 0), "the prompt is empty"),
        (request("r", 20, 1), "the prompt has 20 tokens; max_model_len 20 leaves it 19"),
        (request("r", 21, want_logits=True), "the prompt has 21 tokens; max_model_len 20 leaves it 20"),
        (request("r", 10, 5), "needs KV memory for 14 tokens; the whole pool holds 12"),
        (request("r", 10, 99), "needs KV memory for 19 tokens; the whole pool holds 12"),
        (request("r", 13, None), "needs KV memory for 13 tokens; the whole pool holds 12"),
        (request("r", 13, want_logits=True), "needs KV memory for 13 tokens; the whole pool holds 12"),
    ],
)
def test_what_can_never_fit_is_refused_with_both_numbers(kind: Request, message: str) -> None:
    scheduler = make(pages=3, page_size=4, longest=20)
    with pytest.raises(RequestError, match=message):
        scheduler.add(kind, 0.0)
    assert not scheduler.waiting


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "length"),
    [(10, 3, 13), (12, 1, 13), (10, None, 13), (1, None, 13)],
)
def test_what_fits_exactly_runs_to_its_limit(prompt: int, max_tokens: int | None, length: int) -> None:
    scheduler = make(pages=3, page_size=4, longest=20)
    seq = scheduler.add(request("r", prompt, max_tokens), 0.0)
    outputs: list[Output] = []
    while seq.status is not Status.FINISHED:
        outputs += step(scheduler)[1]
    assert seq.num_tokens == length
    assert outputs[-1].finish_reason == "length"
    assert [o.finished for o in outputs[:-1]] == [False] * (length - prompt - 1)


def test_the_context_limit_ends_the_output() -> None:
    scheduler = make(longest=10)
    seq = scheduler.add(request("r", 8, 50), 0.0)
    while seq.status is not Status.FINISHED:
        step(scheduler)
    assert seq.num_tokens == 10


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go at random; each step keeps the promises; in the end all are done and nothing leaks."""

    @initialize(pages=st.integers(3, 12), seqs=st.integers(1, 6), budget=st.integers(1, 12))
    def start(self, pages: int, seqs: int, budget: int) -> None:
        self.scheduler = make(pages=pages, page_size=2, seqs=seqs, budget=budget, longest=30)
        self.alive: dict[str, Sequence] = {}
        self.admitted: list[str] = []
        self.wanted: dict[str, int] = {}
        self.produced: dict[str, int] = {}
        self.count = 0

    @rule(prompt=st.integers(1, 20), tokens=st.one_of(st.none(), st.integers(1, 12)), want_logits=st.booleans())
    def add(self, prompt: int, tokens: int | None, want_logits: bool) -> None:
        name = f"{self.count:04}"
        try:
            seq = self.scheduler.add(request(name, prompt, tokens, want_logits=want_logits), 0.0)
        except RequestError:
            return
        self.count += 1
        self.alive[name] = seq
        self.wanted[name] = prompt if want_logits else seq.max_len - prompt

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        output = self.scheduler.abort(self.alive.pop(name), 0.0)
        assert (output.request_id, output.finish_reason) == (name, "abort")

    @precondition(lambda self: self.alive)
    @rule()
    def drop_a_step(self) -> None:
        self.note_admissions(self.scheduler.schedule())

    @precondition(lambda self: self.alive)
    @rule()
    def fail_a_step(self) -> None:
        batch = self.scheduler.schedule()
        self.note_admissions(batch)
        for output in self.scheduler.fail(batch, "broken", 0.0):
            del self.alive[output.request_id]

    @precondition(lambda self: self.alive)
    @rule()
    def step(self) -> None:
        batch = self.scheduler.schedule()
        self.note_admissions(batch)
        self.hold_the_shape_of(batch)
        result = StepResult(
            [1] * len(batch.sampling),
            [None] * len(batch.sampling),
            [seq.num_unscored for seq in batch.scoring],
        )
        for output in self.scheduler.commit(batch, result, 0.0):
            self.note(output)

    def note(self, output: Output) -> None:
        name = output.request_id
        self.produced[name] = self.produced.get(name, 0) + len(output.new_token_ids) + (output.logits or 0)
        if output.finished:
            assert self.produced[name] == self.wanted[name]
            assert self.alive.pop(name).status is Status.FINISHED

    def note_admissions(self, batch: StepBatch) -> None:
        """Those never seen before come in the order in which they were added."""
        new = [seq.request.request_id for seq in batch.sequences if seq.request.request_id not in self.admitted]
        self.admitted += new
        assert self.admitted == sorted(self.admitted)

    def hold_the_shape_of(self, batch: StepBatch) -> None:
        limits = self.scheduler.limits
        assert 0 < batch.num_rows <= limits.max_num_batched_tokens
        assert batch.num_rows == sum(seq.num_scheduled for seq in batch.sequences)
        assert len(batch.sequences) <= limits.max_num_seqs
        rows = 0
        for seq in batch.sequences:
            assert seq.first_row == rows
            assert len(seq.pages) * limits.page_size >= seq.num_computed + seq.num_scheduled
            rows += seq.num_scheduled
        in_prompt = [
            seq for seq in self.scheduler.running if seq.num_tokens - seq.num_computed > 1 or not seq.num_computed
        ]
        decoding = [seq for seq in self.scheduler.running if seq not in in_prompt]
        assert batch.sequences[: len(decoding)] == decoding

    @invariant()
    def everything_fits_together(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            held = {id(seq) for seq in (*self.scheduler.running, *self.scheduler.waiting)}
            assert held == {id(seq) for seq in self.alive.values()}

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            for _ in range(5000):
                if not self.alive:
                    break
                self.step()
            assert not self.alive, "some requests never finish"
            self.scheduler.check()
            assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages


SchedulerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
