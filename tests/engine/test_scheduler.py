"""The scheduler alone: a step is pretended to be computed, and tokens are made up."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.engine.draft import Speculation, Wanted
from shoal.engine.draft_pace import DraftPace
from shoal.engine.kv_group import PageGroup, PageUse
from shoal.engine.pace import StepPacer
from shoal.engine.page_pool import Origin, PagePool
from shoal.engine.scheduler import DraftResult, Scheduler, SchedulerLimits, StepBatch, StepResult
from shoal.engine.sequence import Output, Request, Status, TokenLogprobs
from shoal.engine.sequence import Sequence as Running
from shoal.errors import RequestError
from shoal.params import SamplingParams


def make(
    *,
    pages: int = 100,
    page_size: int = 4,
    seqs: int = 8,
    budget: int = 16,
    longest: int = 100,
    windowed: Sequence[tuple[int, int]] = (),
    prefix_caching: bool = False,
    preempt_for_priority: bool = False,
    pacer: StepPacer | None = None,
    speculation: Speculation | None = None,
) -> Scheduler:
    """``pages`` without a window; ``windowed``: window and pages of further groups."""
    limits = SchedulerLimits(longest, seqs, budget, preempt_for_priority)
    groups = page_groups(page_size, budget, [(0, pages), *windowed])
    return Scheduler(groups, limits, prefix_caching=prefix_caching, pacer=pacer, speculation=speculation)


def page_groups(page_size: int, budget: int, windowed: Sequence[tuple[int, int]]) -> list[PageGroup]:
    return [PageGroup(PagePool(count), PageUse(page_size, budget, window)) for window, count in windowed]


def request(
    name: str, prompt: int, max_tokens: int | None = 4, *, want_logits: bool = False, prompt_logprobs: int | None = None
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    return Request(name, tuple(range(prompt)), params, want_logits=want_logits)


def pretend(batch: StepBatch, token: int = 7) -> StepResult:
    """Rows of logits of one number; instead of a prompt token the position that foretells it."""
    return StepResult(
        [token] * len(batch.sampling),
        [None] * len(batch.sampling),
        [np.zeros((len(seq.unscored), 1), np.float32) for seq in batch.scoring],
        [[TokenLogprobs(position, -1.0, 1, ()) for position in seq.unscored] for seq in batch.prompts],
        [DraftResult([token] * (1 + len(seq.draft)), [None] * (1 + len(seq.draft))) for seq in batch.drafting],
    )


def num_logits(output: Output) -> int:
    return 0 if output.logits is None else len(output.logits)


def step(scheduler: Scheduler, token: int = 7) -> tuple[StepBatch, list[Output]]:
    batch = scheduler.schedule()
    outputs = scheduler.commit(batch, pretend(batch, token), 0.0)
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


def test_a_pace_is_for_all_prompts_of_a_step_together_and_only_beside_those_that_decode() -> None:
    scheduler = make(budget=40, pacer=FixedPacer(12))
    scheduler.add(request("a", 20, 50), 0.0)
    assert shares(step(scheduler)[0]) == [("a", 20)]
    for name in "bcd":
        scheduler.add(request(name, 9, 50), 0.0)
    assert shares(step(scheduler)[0]) == [("a", 1), ("b", 9), ("c", 5)]
    assert shares(step(scheduler)[0]) == [("a", 1), ("b", 1), ("c", 4), ("d", 9)]


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


def test_halves_are_the_same_work_in_rows_of_their_own() -> None:
    scheduler = make(budget=16)
    scheduler.add(request("logits", 3, want_logits=True), 0.0)
    for name, prompt in (("a", 2), ("b", 4), ("c", 5), ("cut", 9)):
        scheduler.add(request(name, prompt), 0.0)
    batch = scheduler.schedule()
    halves = batch.halves()
    assert [shares(half) for half in halves] == [[("logits", 3), ("a", 2)], [("b", 4), ("c", 5), ("cut", 2)]]
    assert [half.num_rows for half in halves] == [5, 11]
    assert [seq.first_row for half in halves for seq in half.sequences] == [0, 3, 0, 4, 9]
    assert [seq.request.request_id for half in halves for seq in half.sampling] == ["a", "b", "c"]
    assert [seq.request.request_id for seq in halves[0].scoring] == ["logits"]
    first = scheduler.commit(halves[0], pretend(halves[0]), 0.0)
    second = scheduler.fail(halves[1], "broken", 0.0)
    assert [(o.request_id, o.error) for o in first] == [("a", None), ("logits", None)]
    assert [(o.request_id, o.error) for o in second] == [("b", "broken"), ("c", "broken"), ("cut", "broken")]
    scheduler.check()


def test_nan_ends_a_request_for_logits() -> None:
    scheduler = make(budget=4)
    scheduler.add(request("r", 10, want_logits=True), 0.0)
    assert step(scheduler)[1][0].error is None
    batch = scheduler.schedule()
    result = pretend(batch)
    result.logits[0][1] = nan
    (output,) = scheduler.commit(batch, result, 0.0)
    assert (output.finish_reason, output.logits) == ("error", None)
    assert output.error == "the logits at position 5 hold NaN"
    scheduler.check()


def test_logits_are_reported_once_although_computed_twice() -> None:
    scheduler = make(pages=4, page_size=2, budget=5)
    scheduler.add(request("a", 4, 3), 0.0)
    seq = scheduler.add(request("logits", 4, want_logits=True), 0.0)
    batch, outputs = step(scheduler)
    assert shares(batch) == [("a", 4), ("logits", 1)]
    assert [num_logits(o) for o in outputs] == [0, 1]
    seen = []
    while seq.status is not Status.FINISHED:
        seen += [num_logits(o) for o in step(scheduler)[1] if o.request_id == "logits"]
    assert seq.metrics.num_preemptions == 1
    assert seen == [3]


def test_prompt_logprobs_come_once_and_whole_although_computed_twice() -> None:
    scheduler = make(pages=4, page_size=2, budget=5)
    scheduler.add(request("a", 3, 4), 0.0)
    seq = scheduler.add(request("scored", 4, 2, prompt_logprobs=0), 0.0)
    outputs = step(scheduler)[1]
    assert (seq.num_scored, [o.request_id for o in outputs]) == (2, ["a"])
    while seq.status is not Status.FINISHED:
        outputs += [o for o in step(scheduler)[1] if o.request_id == "scored"]
    assert seq.metrics.num_preemptions == 1
    assert [[token.token_id for token in o.prompt_logprobs or ()] for o in outputs[1:]] == [[0, 1, 2], []]
    assert [o.new_token_ids for o in outputs[1:]] == [(7,), (7,)]


def test_prompt_logprobs_come_with_the_first_sample_that_goes_on() -> None:
    scheduler = make(budget=40)
    one = request("a", 10, prompt_logprobs=0)
    scheduler.add(replace(one, params=replace(one.params, n=3)), 0.0)
    batch = scheduler.schedule()
    batch.sampling[0].constraint_error = "took too long"
    failed, second, third = scheduler.commit(batch, pretend(batch), 0.0)
    scheduler.check()
    assert (failed.error, failed.prompt_logprobs) == ("took too long", None)
    assert [token.token_id for token in second.prompt_logprobs or ()] == list(range(9))
    assert third.prompt_logprobs is None


def test_nothing_to_generate_ends_with_the_prompt() -> None:
    scheduler = make(budget=4)
    scheduler.add(request("scored", 6, 0, prompt_logprobs=0), 0.0)
    scheduler.add(request("single", 1, 0, prompt_logprobs=0), 0.0)
    assert step(scheduler)[1] == []
    batch, outputs = step(scheduler)
    assert batch.sampling == []
    assert [(o.request_id, o.finish_reason, len(o.prompt_logprobs or ())) for o in outputs] == [
        ("scored", "length", 5),
        ("single", "length", 0),
    ]
    assert scheduler.counters.prompt_tokens == 7
    assert not scheduler.running


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (request("r", 0), "the prompt is empty"),
        (request("r", 20, 1), "the prompt has 20 tokens; max_model_len 20 leaves it 19"),
        (request("r", 21, want_logits=True), "the prompt has 21 tokens; max_model_len 20 leaves it 20"),
        (request("r", 21, 0, prompt_logprobs=0), "the prompt has 21 tokens; max_model_len 20 leaves it 20"),
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


# --- KV groups


@pytest.mark.parametrize(("chunk", "in_prompt", "decoding"), [(64, 36, 33), (512, 64, 33)])
def test_windowed_layers_hold_a_window_and_a_chunk(chunk: int, in_prompt: int, decoding: int) -> None:
    """Pages of 16 tokens that a sequence holds on its way to 4,000: of 512 + chunk tokens, and one where they begin inside a page."""
    scheduler = make(pages=250, page_size=16, budget=chunk, longest=4001, windowed=[(512, 250)])
    scheduler.add(request("r", 3900, 101), 0.0)
    held: dict[bool, set[int]] = {True: set(), False: set()}
    while scheduler.running or scheduler.waiting:
        batch = scheduler.schedule()
        whole, window = (group.pool.num_pages - group.pool.num_free for group in scheduler.groups)
        (seq,) = batch.sequences
        assert whole == -(-(seq.num_computed + seq.num_scheduled) // 16)
        held[seq.num_computed < seq.num_prompt].add(window)
        scheduler.commit(batch, pretend(batch), 0.0)
    assert max(held[True]) == in_prompt <= -(-(512 + chunk) // 16) + 1
    assert held[False] == {decoding - 1, decoding}


def test_a_page_goes_back_when_no_later_token_sees_it() -> None:
    scheduler = make(page_size=4, windowed=[(6, 100)])
    seq = scheduler.add(request("r", 13, 50), 0.0)
    step(scheduler)  # token 13, which comes next, sees 8 to 13
    assert [group.pool.num_free for group in scheduler.groups] == [96, 98]
    for _ in range(3):
        step(scheduler)
    assert (seq.num_computed, scheduler.groups[1].pool.num_free) == (16, 98)  # 16 sees 11 to 16
    step(scheduler)
    assert (seq.num_computed, scheduler.groups[1].pool.num_free) == (17, 98)  # 17 sees 12 to 17: of 5 pages 3 are gone


def test_a_dropped_or_failed_step_gives_back_nothing_twice() -> None:
    scheduler = make(page_size=2, budget=7, windowed=[(3, 20)])
    for name in "ab":
        scheduler.add(request(name, 20), 0.0)
    step(scheduler)
    for _ in range(2):
        scheduler.schedule()
        scheduler.check()
    step(scheduler)
    scheduler.fail(scheduler.schedule(), "broken", 0.0)
    scheduler.check()
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert [group.pool.num_free for group in scheduler.groups] == [100, 20]


def test_a_full_group_preempts_although_the_other_has_room() -> None:
    scheduler = make(page_size=2, budget=16, windowed=[(5, 6)])
    first, second, third = (scheduler.add(request(name, 4, 8), 0.0) for name in "abc")
    for _ in range(2):
        step(scheduler)
    assert (third.status, third.pages, third.num_computed) == (Status.WAITING, [], 0)
    assert [group.pool.num_free for group in scheduler.groups] == [94, 0]
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert first.num_tokens == second.num_tokens == third.num_tokens == 12
    assert [seq.metrics.num_preemptions for seq in (first, second, third)] == [0, 0, 1]
    assert [group.pool.num_free for group in scheduler.groups] == [100, 6]


def test_admission_waits_until_every_group_has_room() -> None:
    scheduler = make(page_size=4, budget=40, windowed=[(8, 8)])
    scheduler.add(request("a", 16, 16), 0.0)
    scheduler.add(request("b", 24, 1), 0.0)
    assert shares(step(scheduler)[0]) == [("a", 16)]  # b needs 6 pages with a window and 4 are free
    assert shares(step(scheduler)[0]) == [("a", 1)]  # a has given back 2 and taken one: 5 are free
    while scheduler.waiting:
        batch, _ = step(scheduler)
    assert shares(batch) == [("a", 1), ("b", 24)]


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [(15, 1, None), (16, 1, None), (17, 1, "KV memory for 17 tokens; the whole pool holds 16"), (15, None, None)],
)
def test_a_window_that_does_not_fit_limits_the_length(prompt: int, tokens: int | None, message: str | None) -> None:
    """A chunk of 16 and a window of 9 see up to 24 tokens, in 7 pages of 4; there are 4."""
    scheduler = make(page_size=4, longest=60, windowed=[(9, 4)])
    if message is None:
        seq = scheduler.add(request("r", prompt, tokens), 0.0)
        while seq.status is not Status.FINISHED:
            step(scheduler)
        assert seq.num_tokens == 17 if tokens is None else prompt + 1
    else:
        with pytest.raises(RequestError, match=message):
            scheduler.add(request("r", prompt, tokens), 0.0)


def test_a_window_that_fits_does_not_limit_the_length() -> None:
    scheduler = make(page_size=4, longest=60, windowed=[(9, 7)])
    seq = scheduler.add(request("r", 50, None), 0.0)
    while seq.status is not Status.FINISHED:
        step(scheduler)
    assert seq.num_tokens == 60


# --- the prefix cache


def finish(scheduler: Scheduler, *requests: Request) -> list[Running]:
    """Their sequences, each run to its end before the next one comes."""
    sequences = []
    for one in requests:
        sequences.append(scheduler.add(one, 0.0))
        while sequences[-1].status is not Status.FINISHED:
            step(scheduler)
    return sequences


def prompt(name: str, tokens: Sequence[int], max_tokens: int = 1, **fields: Any) -> Request:
    return replace(request(name, 1, max_tokens, **fields), prompt_token_ids=tuple(tokens))


@pytest.mark.parametrize(
    ("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (14, 12), (17, 12)]
)
def test_full_pages_that_begin_alike_are_computed_once(length: int, cached: int) -> None:
    """Of a prompt of 13 tokens three pages of 4 are full; at least one token of the next prompt is computed."""
    scheduler = make(prefix_caching=True)
    (first,) = finish(scheduler, request("first", 13, 1))
    seq = scheduler.add(request("next", length, 2), 0.0)
    assert shares(step(scheduler)[0]) == [("next", length - cached)]
    assert (first.metrics.num_cached, seq.metrics.num_cached) == (0, cached)
    assert scheduler.counters.cached_tokens == cached
    assert seq.pages[0][: cached // 4] == [0, 1, 2][: cached // 4]


@pytest.mark.parametrize(("place", "cached"), [(0, 0), (3, 0), (4, 4), (11, 8), (12, 12)])
def test_one_other_token_makes_its_page_and_all_after_it_different(place: int, cached: int) -> None:
    scheduler = make(prefix_caching=True)
    tokens = list(range(20))
    tokens[place] = 99
    assert finish(scheduler, request("a", 20, 1), prompt("b", tokens))[1].metrics.num_cached == cached


def test_the_same_tokens_elsewhere_are_not_the_same_page() -> None:
    scheduler = make(prefix_caching=True)
    finish(scheduler, prompt("a", [1, 2, 3, 4] * 3))
    assert finish(scheduler, prompt("b", [5, 6, 7, 8, 1, 2, 3, 4, 9]))[0].metrics.num_cached == 0


def test_what_was_generated_is_found_too() -> None:
    scheduler = make(prefix_caching=True)
    finish(scheduler, request("a", 6, 4))  # 6 prompt tokens and 3 times token 7 in the cache
    assert finish(scheduler, prompt("b", [*range(6), 7, 7, 7, 7, 1]))[0].metrics.num_cached == 8


def test_pages_are_shared_by_those_that_run_together() -> None:
    scheduler = make(prefix_caching=True, pages=7, budget=40)
    finish(scheduler, request("before", 17, 1))
    running = [scheduler.add(request(name, 17, 3), 0.0) for name in "abc"]
    batch, _ = step(scheduler)
    assert shares(batch) == [("a", 1), ("b", 1), ("c", 1)]
    assert {tuple(seq.pages[0][:4]) for seq in running} == {(0, 1, 2, 3)}
    assert len({seq.pages[0][4] for seq in running}) == 3
    assert scheduler.groups[0].pool.num_free == 0
    scheduler.abort(running[0], 0.0)
    scheduler.check()
    while scheduler.running:
        step(scheduler)
    assert scheduler.groups[0].pool.num_free == 7


def test_switched_off_nothing_is_kept() -> None:
    scheduler = make(prefix_caching=False)
    assert [seq.metrics.num_cached for seq in finish(scheduler, request("a", 13, 2), request("b", 13, 2))] == [0, 0]
    assert scheduler.groups[0].pool.allocate(5) == [0, 1, 2, 3, 4]


def test_pages_of_a_prompt_are_found_once_it_is_complete() -> None:
    scheduler = make(prefix_caching=True, budget=16)
    scheduler.add(request("long", 40, 9), 0.0)
    step(scheduler)
    step(scheduler)
    early = scheduler.add(request("early", 40, 9), 0.0)
    assert shares(step(scheduler)[0]) == [("long", 8), ("early", 8)]
    late = scheduler.add(request("late", 40, 9), 0.0)
    while not late.num_computed:
        step(scheduler)
    assert (early.metrics.num_cached, late.metrics.num_cached) == (0, 36)


def test_prompts_that_are_scored_are_computed_whole_but_others_find_their_pages() -> None:
    scheduler = make(prefix_caching=True, budget=40)
    finish(scheduler, request("a", 20, 1, prompt_logprobs=0))
    kinds = [{"want_logits": True}, {"prompt_logprobs": 0}, {"prompt_logprobs": 0, "max_tokens": 0}, {}]
    cached = [finish(scheduler, request("b", 21, **kind))[0].metrics.num_cached for kind in kinds]  # type: ignore[arg-type]
    assert cached == [0, 0, 0, 20]


@pytest.mark.parametrize("kind", [{"want_logits": True}, {"prompt_logprobs": 0, "max_tokens": 0}])
def test_prompts_that_nothing_is_sampled_from_leave_no_pages(kind: dict[str, Any]) -> None:
    scheduler = make(prefix_caching=True, budget=40)
    assert finish(scheduler, request("a", 20, **kind), request("b", 20))[1].metrics.num_cached == 0


def test_a_failed_step_leaves_no_pages() -> None:
    scheduler = make(prefix_caching=True)
    scheduler.add(request("a", 13), 0.0)
    scheduler.fail(scheduler.schedule(), "broken", 0.0)
    assert finish(scheduler, request("b", 13))[0].metrics.num_cached == 0


def test_nan_takes_back_the_pages_of_its_sequence_alone() -> None:
    scheduler = make(prefix_caching=True)
    finish(scheduler, request("good", 9, 1))
    bad = scheduler.add(request("bad", 20, 5), 0.0)
    step(scheduler)
    assert (bad.metrics.num_cached, bad.num_computed) == (8, 20)
    user = scheduler.add(request("user", 17, 9), 0.0)
    step(scheduler)
    assert user.metrics.num_cached == 16  # of bad, which has had a good token by then
    batch = scheduler.schedule()
    result = pretend(batch)
    result.tokens[batch.sampling.index(bad)] = -1
    failed = next(output for output in scheduler.commit(batch, result, 0.0) if output.finished)
    assert (failed.request_id, failed.finish_reason) == ("bad", "error")
    scheduler.check()
    assert finish(scheduler, request("late", 9, 1), request("late", 21, 1))[1].metrics.num_cached == 8
    while user.status is not Status.FINISHED:
        step(scheduler)
    assert user.token_ids == [*range(17), *[7] * 9]


def test_nan_inside_a_long_prompt_reaches_nobody_else() -> None:
    """Its first chunks are not sampled from, so nobody has looked at them when the other request comes."""
    scheduler = make(prefix_caching=True, budget=8, windowed=[(6, 50)])
    bad = scheduler.add(request("bad", 20), 0.0)
    step(scheduler)
    step(scheduler)
    other = scheduler.add(request("other", 20), 0.0)
    step(scheduler, token=-1)
    assert (bad.status, other.num_computed) == (Status.FINISHED, 4)
    while other.status is not Status.FINISHED:
        step(scheduler)
    assert other.metrics.num_cached == 0
    late = finish(scheduler, request("late", 20), request("later", 20))
    assert [seq.metrics.num_cached for seq in late] == [
        0,
        16,
    ]  # the first page was still bad's when the other one had it


def test_a_prompt_that_was_never_completed_stands_in_nobodys_way() -> None:
    scheduler = make(prefix_caching=True, budget=8)
    aborted = scheduler.add(request("aborted", 20), 0.0)
    step(scheduler)
    step(scheduler)
    scheduler.abort(aborted, 0.0)
    assert [seq.metrics.num_cached for seq in finish(scheduler, request("a", 20), request("b", 20))] == [0, 16]


def test_recomputed_pages_are_doubtful_again() -> None:
    """The sequence had a good token before it lost its pages; what it computes again has been seen by none."""
    scheduler = make(prefix_caching=True, pages=6, page_size=2, budget=4)
    scheduler.add(prompt("a", [90, 91], 9), 0.0)
    victim = scheduler.add(request("b", 6, 3), 0.0)
    while not victim.metrics.num_preemptions or victim.status is Status.WAITING:
        batch, _ = step(scheduler)
    assert shares(batch) == [("b", 4)]  # "a" has taken all its pages but the first
    other = scheduler.add(request("c", 6), 0.0)
    assert shares(step(scheduler)[0]) == [("b", 1), ("c", 3)]
    assert other.metrics.num_cached == 2


@pytest.mark.parametrize(("pages", "waits"), [(6, False), (5, True)])
def test_free_pages_that_are_shared_are_not_room_for_others_too(pages: int, waits: bool) -> None:
    """Of 17 tokens 16 are known, in 4 free pages, and need a fifth; "a" holds one."""
    scheduler = make(prefix_caching=True, pages=pages)
    finish(scheduler, request("before", 16, 1))
    scheduler.add(prompt("a", [99], 3), 0.0)
    step(scheduler)
    scheduler.add(request("b", 17, 1), 0.0)
    assert shares(step(scheduler)[0]) == ([("a", 1)] if waits else [("a", 1), ("b", 1)])
    while scheduler.running or scheduler.waiting:
        step(scheduler)


def test_pages_that_others_hold_need_no_room() -> None:
    scheduler = make(prefix_caching=True, pages=7)
    scheduler.add(request("a", 17, 4), 0.0)
    step(scheduler)
    step(scheduler)
    scheduler.add(request("b", 19, 2), 0.0)
    assert shares(step(scheduler)[0]) == [("a", 1), ("b", 3)]
    assert scheduler.groups[0].pool.num_free == 1


@pytest.mark.parametrize(("token", "cached"), [(10, 12), (20, 8)])
def test_the_prefix_used_last_is_kept_longest(token: int, cached: int) -> None:
    scheduler = make(prefix_caching=True, pages=9, budget=40)
    finish(scheduler, prompt("a", [10] * 12), prompt("b", [20] * 12), prompt("a again", [10] * 13))
    finish(scheduler, prompt("large", range(30, 46)))  # takes the 3 pages that hold nothing, and the last one of b
    assert finish(scheduler, prompt("again", [token] * 13))[0].metrics.num_cached == cached


def test_a_preempted_sequence_finds_its_own_pages() -> None:
    scheduler = make(prefix_caching=True, pages=8, page_size=2, budget=20)
    first = scheduler.add(prompt("a", range(50, 56), 5), 0.0)
    victim = scheduler.add(request("b", 8, 6), 0.0)
    while not victim.metrics.num_preemptions:
        step(scheduler)
    lost, known = victim.num_tokens, (victim.num_tokens - 1) // 2
    assert (victim.pages, victim.num_computed) == ([], 0)
    while victim.status is Status.WAITING:
        batch, _ = step(scheduler)
    assert first.status is Status.FINISHED
    ((name, count),) = shares(batch)
    assert name == "b"
    assert lost - 2 * known <= count < lost  # but for the page that "a" took
    assert victim.metrics.num_cached == 0
    while scheduler.running:
        step(scheduler)
    assert victim.token_ids == [*range(8), *[7] * 6]
    assert scheduler.counters.cached_tokens == 0


@pytest.mark.parametrize(("lost", "cached"), [([], 20), ([0], 20), ([2], 20), ([3], 12), ([4], 16), ([0, 4], 16)])
def test_a_group_with_a_window_needs_only_the_pages_in_it(lost: list[int], cached: int) -> None:
    """After 20 tokens a window of 6 sees 15 to 20, in pages 3 and 4 of 4 tokens; after 12 those from 7 on."""
    scheduler = make(prefix_caching=True, budget=40, windowed=[(6, 20)])
    seq = scheduler.add(request("a", 22, 1), 0.0)
    batch = scheduler.schedule()
    windowed = scheduler.groups[1].pool
    pages = list(seq.pages[1])
    scheduler.commit(batch, pretend(batch), 0.0)
    kept = [windowed.share([key]) for page, key in enumerate(seq.page_keys(4, 5)) if page not in lost]
    windowed.release(windowed.allocate(windowed.num_free))  # forget all others
    for page in kept:
        windowed.release(page)
    again = scheduler.add(request("b", 22, 2), 0.0)
    assert shares(step(scheduler)[0]) == [("b", 22 - cached)]
    passed = (cached - 6 + 1) // 4
    assert again.pages[1][:passed] == [0] * passed
    assert again.pages[1][passed : cached // 4] == pages[passed : cached // 4]


def test_pages_that_a_window_has_passed_are_kept_as_well() -> None:
    """The rest of the prompt is longer than the window: what the other one needs was given back before its first token."""
    scheduler = make(prefix_caching=True, budget=8, windowed=[(6, 30)])
    finish(scheduler, prompt("a", [*range(20), *range(100, 130)]))
    assert finish(scheduler, prompt("b", [*range(20), *range(200, 230)]))[0].metrics.num_cached == 20


class FixedPacer(StepPacer):
    """Always as many rows."""

    def __init__(self, rows: int) -> None:
        super().__init__(1.0)
        self._rows = rows

    @property
    def further_rows(self) -> int:
        return self._rows


class Sevens:
    """A drafter of ``pretend``'s token, or now and then another."""

    longest = 5

    def __init__(self, seed: int | None) -> None:
        self._rng = random.Random(seed)
        self._wrong = 0.0 if seed is None else 0.3

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [[8 if self._rng.random() < self._wrong else 7 for _ in range(one.most)] for one in wanted]

    def ended(self, key: object, output: list[int]) -> None:
        return None


class AllThereIsRoomFor(DraftPace):
    def counts(self, chances: list[float], most: list[int], room: int) -> list[int]:
        counts = []
        for count in most:
            counts.append(max(0, min(count, room)))
            room -= counts[-1]
        return counts


def sevens(seed: int | None = None) -> Speculation:
    return Speculation(Sevens(seed), AllThereIsRoomFor())


def name_of(one: Running | Output) -> str:
    request_id = one.request_id if isinstance(one, Output) else one.request.request_id
    return f"{request_id}/{one.sample}"


def slot(group: int, seq: Running, position: int) -> int:
    """Where a position lies, with pages of 2."""
    return seq.pages[group][position // 2] * 2 + position % 2


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go at random; each step keeps the promises; in the end all are done and nothing leaks.

    ``slots`` are the memory of each KV group: what was last stored where. What a step sees must still be there: rows of the sequence
    itself, or with a prefix cache of any sequence that had the same tokens up to there. A row of a sequence that is ``struck`` is
    bad, as are those after it, that see it; no other sequence ever sees a bad one. A request may have several samples: names are
    those of samples.
    """

    @initialize(
        pages=st.integers(3, 15),
        seqs=st.integers(1, 6),
        budget=st.integers(1, 12),
        windowed=st.lists(st.tuples(st.integers(1, 12), st.integers(3, 15)), max_size=2),
        prefix_caching=st.booleans(),
        preempt_for_priority=st.booleans(),
        further_rows=st.one_of(st.none(), st.integers(1, 8)),
        drafts=st.one_of(st.none(), st.integers(0, 100)),
    )
    def start(
        self,
        pages: int,
        seqs: int,
        budget: int,
        windowed: list[tuple[int, int]],
        prefix_caching: bool,
        preempt_for_priority: bool,
        further_rows: int | None,
        drafts: int | None,
    ) -> None:
        self.scheduler = make(
            pages=pages,
            page_size=2,
            seqs=seqs,
            budget=budget,
            longest=30,
            windowed=windowed,
            prefix_caching=prefix_caching,
            preempt_for_priority=preempt_for_priority,
            pacer=None if further_rows is None else FixedPacer(further_rows),
            speculation=None if drafts is None else sevens(drafts),
        )
        self.prefix_caching = prefix_caching
        self.further_rows = further_rows
        self.stepped: list[Origin] = []  # of sequences in a committed step: a new one at each admission
        self.slots: list[dict[int, Hashable]] = [{} for _ in self.scheduler.groups]
        self.struck: set[str] = set()
        self.bad_rows: set[tuple[str, int]] = set()
        self.alive: dict[str, Running] = {}
        self.wanted: dict[str, int] = {}
        self.produced: dict[str, int] = {}
        self.count = 0

    @rule(
        prompt=st.integers(1, 20),
        alike=st.integers(0, 20),
        kind=st.integers(0, 2),
        tokens=st.one_of(st.none(), st.integers(1, 12)),
        wanted=st.sampled_from(
            [{}, {"want_logits": True}, {"prompt_logprobs": 0}, {"prompt_logprobs": 0, "max_tokens": 0}]
        ),
        n=st.sampled_from([1, 1, 2, 4]),
        priority=st.sampled_from([0, 0, 1]),
    )
    def add(
        self,
        prompt: int,
        alike: int,
        kind: int,
        tokens: int | None,
        wanted: dict[str, Any],
        n: int,
        priority: int,
    ) -> None:
        """All prompts begin with tokens that are ``alike``."""
        ids = tuple(i if i < alike else 100 * kind + i for i in range(prompt))
        one = request(f"{self.count:04}", prompt, **{"max_tokens": tokens, **wanted})
        params = replace(one.params, n=1 if "want_logits" in wanted else n)
        try:
            seq = self.scheduler.add(replace(one, params=params, prompt_token_ids=ids, priority=priority), 0.0)
        except RequestError:
            return
        self.count += 1
        for sample in (seq, *seq.siblings):
            self.alive[name_of(sample)] = sample
            self.wanted[name_of(sample)] = prompt if "want_logits" in wanted else seq.max_len - prompt

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """One of those that wait for another to compute their prompt is left to that one."""
        name = data.draw(st.sampled_from([name for name, seq in self.alive.items() if seq.status is not Status.HELD]))
        outputs = self.scheduler.abort(self.alive[name], 0.0)
        assert name_of(outputs[0]) == name
        assert {output.finish_reason for output in outputs} == {"abort"}
        self.forget(outputs)

    def forget(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert self.alive.pop(name_of(output)).status is Status.FINISHED

    @rule(pages=st.integers(3, 15), seqs=st.integers(1, 6), budget=st.integers(1, 12), data=st.data())
    def resize(self, pages: int, seqs: int, budget: int, data: st.DataObject) -> None:
        limits = replace(self.scheduler.limits, max_num_seqs=seqs, max_num_batched_tokens=budget)
        windows = [group.use.window for group in self.scheduler.groups[1:]]
        windowed = [(window, data.draw(st.integers(3, 15))) for window in windows]
        self.scheduler.preempt_all()
        self.slots = [{} for _ in self.scheduler.groups]
        outputs = self.scheduler.resize(page_groups(2, budget, [(0, pages), *windowed]), limits, 0.0)
        assert {output.finish_reason for output in outputs} <= {"error", "length"}
        self.forget(outputs)
        for name, seq in self.alive.items():
            assert all(sibling.max_len == seq.max_len for sibling in seq.siblings)
            if not seq.request.want_logits:
                self.wanted[name] = seq.max_len - seq.num_prompt

    @precondition(lambda self: self.alive)
    @rule()
    def drop_a_step(self) -> None:
        self.schedule()

    @precondition(lambda self: self.alive)
    @rule()
    def fail_a_step(self) -> None:
        self.forget(self.scheduler.fail(self.schedule(), "broken", 0.0))

    @precondition(lambda self: self.alive)
    @rule()
    def step(self) -> None:
        self.run(self.schedule())

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def strike(self, data: st.DataObject) -> None:
        """A step in which the rows of one sequence go wrong, and those of no other."""
        batch = self.schedule()
        victim = data.draw(st.sampled_from(batch.sequences))
        self.struck.add(victim.request.request_id)
        self.run(batch, victim)

    @precondition(lambda self: self.alive)
    @rule()
    def compute_half_of_a_step(self) -> None:
        """A step that fails as a whole, and so does its second half."""
        batch = self.schedule()
        self.store(batch, None)
        first, second = self.scheduler.without_drafts(batch).halves()
        for output in self.scheduler.commit(first, self.result(first), 0.0):
            self.note(output)
        self.forget(self.scheduler.fail(second, "broken", 0.0))

    def schedule(self) -> StepBatch:
        """The next step; whoever it begins with comes before all who wait."""
        before = set(self.scheduler.running)
        batch = self.scheduler.schedule()
        begun = [seq.order for seq in self.scheduler.running if seq not in before]
        waiting = [seq.order for seq in self.scheduler.waiting]
        assert not begun or not waiting or max(begun) < min(waiting)
        return batch

    def run(self, batch: StepBatch, victim: Running | None = None) -> None:
        self.hold_the_shape_of(batch)
        self.store(batch, victim)
        self.hold_what_is_seen(batch)
        self.stepped += [seq.origin for seq in batch.sequences]
        for output in self.scheduler.commit(batch, self.result(batch), 0.0):
            self.note(output)
        self.stepped += [seq.origin for seq in batch.choosing]  # of new samples too

    def result(self, batch: StepBatch) -> StepResult:
        """As pretended, but for NaN wherever a row is bad."""
        result = pretend(batch)
        for index, seq in enumerate(batch.sampling):
            if (self.computing(seq), seq.num_tokens - 1) in self.bad_rows:
                result.tokens[index] = -1
        for seq, found in zip(batch.drafting, result.drafted, strict=True):
            for ahead in range(len(found.tokens)):
                if (name_of(seq), seq.num_tokens - 1 + ahead) in self.bad_rows:
                    found.tokens[ahead] = -1
        result.prompt_logprobs = [
            [
                place._replace(logprob=nan) if (name_of(seq), place.token_id) in self.bad_rows else place
                for place in found
            ]
            for seq, found in zip(batch.prompts, result.prompt_logprobs, strict=True)
        ]
        for seq, rows in zip(batch.scoring, result.logits, strict=True):
            rows[[(name_of(seq), position) in self.bad_rows for position in seq.unscored]] = nan
        return result

    def computing(self, seq: Running) -> str:
        """Which sample's row a sequence samples from."""
        return f"{seq.request.request_id}/0" if seq.status is Status.HELD else name_of(seq)

    def note(self, output: Output) -> None:
        name = name_of(output)
        if output.finish_reason == "error":
            assert output.request_id in self.struck
            del self.alive[name]
            return
        first = name not in self.produced
        self.produced[name] = self.produced.get(name, 0) + len(output.new_token_ids) + num_logits(output)
        seq = self.alive[name]
        if first and seq.sample == 0 and seq.request.params.prompt_logprobs is not None:
            assert [token.token_id for token in output.prompt_logprobs or ()] == list(range(seq.num_prompt - 1))
        else:
            assert output.prompt_logprobs is None
        if output.finished:
            assert self.produced[name] == self.wanted[name]
            assert self.alive.pop(name).status is Status.FINISHED

    def hold_the_shape_of(self, batch: StepBatch) -> None:
        limits = self.scheduler.limits
        assert 0 < batch.num_rows <= limits.max_num_batched_tokens
        assert batch.num_rows == sum(seq.num_scheduled for seq in batch.sequences)
        assert len(batch.sequences) <= limits.max_num_seqs
        rows = 0
        for seq in batch.sequences:
            assert seq.first_row == rows
            rows += seq.num_scheduled
        lacks = [seq.num_tokens + len(seq.draft) - seq.num_computed for seq in self.scheduler.running]
        assert batch.sequences == self.scheduler.running[: len(batch.sequences)]
        assert [seq.num_scheduled for seq in batch.sequences[:-1]] == lacks[: len(batch.sequences) - 1]
        stepped = [any(seq.origin is origin for origin in self.stepped) for seq in self.scheduler.running]
        assert batch.num_drafted == 0 or all(seq.decodes for seq in batch.sequences if seq not in batch.beginning)
        decoding = [
            before and seq.num_tokens - seq.num_computed == 1
            for before, seq in zip(stepped, self.scheduler.running, strict=True)
        ]
        assert decoding == sorted(decoding, reverse=True), "a prompt comes before a sequence that decodes"
        if any(decoding) and self.further_rows is not None:
            assert batch.num_rows - len(batch.sequences) - batch.num_drafted <= self.further_rows

    def store(self, batch: StepBatch, victim: Running | None) -> None:
        """Store the rows of a step; those of the victim are bad, and those that see a bad one."""
        self.bad_rows.clear()
        for copy in self.scheduler.copies:
            for offset in range(2):
                kept = self.slots[copy.group].get(2 * copy.source + offset)
                self.slots[copy.group][2 * copy.target + offset] = kept
        self.scheduler.copies = []
        for seq in batch.sequences:
            for position in range(seq.num_computed, seq.num_computed + seq.num_scheduled):
                bad = seq is victim or self.sees_bad(seq, position)
                if bad:
                    self.bad_rows.add((name_of(seq), position))
                for index, slots in enumerate(self.slots):
                    slots[slot(index, seq, position)] = self.bad(seq, position) if bad else self.good(seq, position)

    def sees_bad(self, seq: Running, position: int) -> bool:
        return any(
            self.slots[index][slot(index, seq, before)] == self.bad(seq, before)
            for index in range(len(self.slots))
            for before in self.seen(index, position)
        )

    def hold_what_is_seen(self, batch: StepBatch) -> None:
        """After all rows of the step have been stored."""
        for index, slots in enumerate(self.slots):
            for seq in batch.sequences:
                first, last = seq.num_computed, seq.num_computed + seq.num_scheduled - 1
                for position in range(min(self.seen(index, first), default=first), last + 1):
                    assert slots[slot(index, seq, position)] in (self.good(seq, position), self.bad(seq, position))

    def seen(self, index: int, position: int) -> range:
        """The positions before a row's own that it sees."""
        window = self.scheduler.groups[index].use.window
        return range(max(0, position - window + 1) if window else 0, position)

    def good(self, seq: Running, position: int) -> Hashable:
        """What belongs into a slot: with a prefix cache anything computed from the same tokens."""
        tokens = tuple((seq.token_ids + seq.draft)[: position + 1])
        return tokens if self.prefix_caching else (self.writer(seq, position), tokens)

    def bad(self, seq: Running, position: int) -> Hashable:
        return "bad", self.writer(seq, position), position

    def writer(self, seq: Running, position: int) -> str:
        """The prompt is the same for all samples, whichever has computed it."""
        return seq.request.request_id if position < seq.num_prompt else name_of(seq)

    @invariant()
    def everything_fits_together(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            held = {id(seq) for seq in (*self.scheduler.running, *self.scheduler.waiting)}
            assert held == {id(seq) for seq in self.alive.values() if seq.status is not Status.HELD}

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            for _ in range(5000):
                if not self.alive:
                    break
                self.step()
            assert not self.alive, "some requests never finish"
            self.scheduler.check()
            for group in self.scheduler.groups:
                assert group.pool.num_free == group.pool.num_pages


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
