"""The engine on the toy backend: every token depends on all tokens before it, as they lie in the pages."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.engine import Request, TokenLogprobs
from shoal.engine.sampler import token_logprobs
from shoal.errors import EngineError, RequestError
from shoal.kernels.base import LOGIT_ROWS, StepInput
from shoal.params import SamplingParams
from tests.engine.toy import (
    NAN_TOKEN,
    VOCAB,
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


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, **fields})  # type: ignore[arg-type]


# --- batch equals solo


@pytest.mark.parametrize("budget", [1, 16, 64, 512])
@pytest.mark.parametrize("pages", [8, 1000])
def test_batch_equals_solo(budget: int, pages: int, drafting: bool) -> None:
    rng = np.random.default_rng(budget)
    requests = mixed_requests(40, rng)
    requests += [greedy(f"len{n}", range(n)) for n in (7, 17, 33)]
    alone = solo(requests)
    rng.shuffle(requests)
    engine = toy_engine(pages=pages, budget=budget)
    assert tokens(run(engine, requests)) == alone
    assert (engine.stats().preemptions > 0) == (pages == 8 and budget > 1)
    assert (engine.stats().spec_decode_num_accepted_tokens > 0) == (drafting and budget > 1)


@pytest.mark.usefixtures("drafting")
@pytest.mark.parametrize("windows", [(0, 20), (20, 20), (7, 40, 0)])
@pytest.mark.parametrize("budget", [5, 64])
@pytest.mark.parametrize("pages", [8, 300])
def test_batch_equals_solo_with_windows(windows: tuple[int, ...], budget: int, pages: int) -> None:
    requests = mixed_requests(40, np.random.default_rng(budget), longest_prompt=104)
    engine = toy_engine(pages=pages * len(windows), budget=budget, windows=windows)
    assert tokens(run(engine, requests)) == solo(requests, windows)
    assert tokens(run(engine, requests[::-1])) == solo(requests, windows)
    if pages == 8 and 0 in windows:
        assert engine.stats().preemptions > 0


@pytest.mark.usefixtures("drafting")
@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    budget=st.integers(1, 40),
    pages=st.integers(8, 20),
    seqs=st.integers(1, 8),
    windows=st.sampled_from([(0,), (30, 0), (10,)]),
)
def test_requests_that_join_and_leave_at_any_time_do_not_change_each_other(
    data: st.DataObject, budget: int, pages: int, seqs: int, windows: tuple[int, ...]
) -> None:
    requests = mixed_requests(12, np.random.default_rng(data.draw(st.integers(0, 5))))
    aborted = data.draw(st.sets(st.sampled_from(requests), max_size=3))
    engine = toy_engine(budget=budget, pages=pages * len(windows), seqs=seqs, windows=windows)
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
        for _ in range(data.draw(st.integers(0, 3))):
            collect(engine.step(), results)
    for request in aborted:
        engine.abort(request.request_id)
    drain(engine, results)
    alone = solo(requests, windows)
    for request in requests:
        result, expected = results[request.request_id], alone[request.request_id]
        if result.end[0] == "abort":
            assert request in aborted
            assert result.token_ids == expected[: len(result.token_ids)]
        else:
            assert result.token_ids == expected


def test_a_thousand_requests_on_eight_pages() -> None:
    requests = mixed_requests(1000, np.random.default_rng(1), longest_prompt=60)
    engine = toy_engine(pages=8)
    assert tokens(run(engine, requests)) == solo(requests)
    assert engine.stats().preemptions > 0
    assert engine.stats().prompt_tokens == sum(len(r.prompt_token_ids) for r in requests)


def test_one_sequence_and_many_take_the_same_path() -> None:
    alone, together = ToyBackend(), ToyBackend()
    run(toy_engine(backend=alone), [greedy("a", [1, 2, 3])])
    run(toy_engine(backend=together), [greedy("a", [1, 2, 3]), greedy("b", [4])])
    assert alone.calls == together.calls == ["layers", "sample"] * 8
    for one, two in zip(alone.steps, together.steps, strict=True):
        for name in ("token_ids", "positions"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name)[: two.row_start[1]])
        assert one.kv_len[0] == two.kv_len[0]


def test_the_last_prompt_token_enters_the_cache_once() -> None:
    backend = ToyBackend()
    results = run(toy_engine(backend=backend, budget=4), [greedy("a", [5, 6, 7, 8, 9], 3)])
    computed = [(p, t) for step in backend.steps for p, t in zip(step.positions, step.token_ids, strict=True)]
    known = [5, 6, 7, 8, 9, *results["a"].token_ids]
    assert computed == list(enumerate(known[:-1]))


def test_more_rows_than_the_head_takes_at_once() -> None:
    requests = [greedy(f"r{i}", [i % 50, i // 50], 3) for i in range(LOGIT_ROWS * 2 + 5)]
    backend = ToyBackend()
    engine = toy_engine(backend=backend, seqs=200)
    assert tokens(run(engine, requests)) == solo(requests)
    assert backend.calls == ["layers", "sample", "sample", "sample"] * 3


# --- how a sequence ends


def test_a_stop_token_ends_the_sequence_and_is_not_emitted() -> None:
    free = solo([greedy("r", [1, 2, 3], 20)])["r"]
    stop = free[5]
    request = Request("r", (1, 2, 3), params(max_tokens=20, stop_token_ids=[stop]))
    result = run(toy_engine(), [request])["r"]
    assert result.token_ids == free[: free.index(stop)]
    assert result.end == ("stop", stop)


def test_an_end_of_generation_token_has_no_stop_reason() -> None:
    free = solo([greedy("r", [1, 2, 3], 20)])["r"]
    request = Request("r", (1, 2, 3), params(max_tokens=20), eos_ids=frozenset({free[4]}))
    result = run(toy_engine(), [request])["r"]
    assert result.token_ids == free[: free.index(free[4])]
    assert result.end == ("stop", None)


def test_ignore_eos_goes_on() -> None:
    free = solo([greedy("r", [1, 2, 3], 20)])["r"]
    request = Request("r", (1, 2, 3), params(max_tokens=20, ignore_eos=True), eos_ids=frozenset({free[4]}))
    result = run(toy_engine(), [request])["r"]
    assert (result.token_ids, result.end) == (free, ("length", None))


def test_min_tokens_bans_what_would_stop() -> None:
    free = solo([greedy("r", [1, 2, 3], 20)])["r"]
    request = Request(
        "r",
        (1, 2, 3),
        params(max_tokens=20, min_tokens=6, stop_token_ids=[free[2], 10**6]),
        eos_ids=frozenset({free[0]}),
    )
    result = run(toy_engine(), [request])["r"]
    assert len(result.token_ids) >= 6
    assert not {free[0], free[2]} & set(result.token_ids)
    assert solo([replace(request, params=params(max_tokens=20))])["r"] == []


def test_rows_that_stop_leave_the_batch_at_once() -> None:
    backend = ToyBackend()
    engine = toy_engine(backend=backend)
    results = run(engine, [greedy(f"r{n}", [n], n) for n in range(1, 6)])
    assert [len(step.kv_len) for step in backend.steps] == [5, 4, 3, 2, 1]
    assert {len(result.token_ids) for result in results.values()} == {1, 2, 3, 4, 5}


def test_max_model_len_ends_the_output() -> None:
    result = run(toy_engine(longest=20), [greedy("r", range(15), 100)])["r"]
    assert (len(result.token_ids), result.end) == (5, ("length", None))


# --- what goes wrong


def test_nan_logits_fail_their_own_request() -> None:
    others = [greedy("a", [1, 2]), greedy("b", [3])]
    bad = greedy("bad", [4, NAN_TOKEN])
    results = run(toy_engine(), [others[0], bad, others[1]])
    assert results["bad"].end == ("error", None)
    assert "position 1 hold NaN" in results["bad"].error
    del results["bad"]
    assert tokens(results) == solo(others)


def test_nothing_left_to_choose_fails_the_request() -> None:
    request = Request("r", (1,), params(min_tokens=1), eos_ids=frozenset(range(VOCAB)))
    assert run(toy_engine(), [request])["r"].end == ("error", None)


def test_an_interrupted_step_is_computed_again() -> None:
    countdown = itertools.count(5, -1)

    def interrupt(step: StepInput) -> None:
        if next(countdown) == 0:
            raise KeyboardInterrupt

    requests = mixed_requests(6, np.random.default_rng(3))
    engine = toy_engine(backend=ToyBackend(before_step=interrupt), budget=30)
    for request in requests:
        engine.add(request)
    results: dict[str, Result] = {}
    with pytest.raises(KeyboardInterrupt):
        drain(engine, results)
    drain(engine, results)
    assert tokens(results) == solo(requests)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (greedy("bad", []), "the prompt is empty"),
        (greedy("bad", [1, VOCAB]), "the prompt holds token id 61; the vocabulary ends at 60"),
        (greedy("bad", [-1]), "the prompt holds token id -1"),
        (greedy("bad", [1.0]), "the prompt holds token id 1.0"),  # type: ignore[list-item]
        (greedy("bad", [1] * 512), "the prompt has 512 tokens; max_model_len 512 leaves it 511"),
        (greedy("bad", [1] * 100, 50), "needs KV memory for 149 tokens; the whole pool holds 128"),
        (greedy("good", [1]), "request_id 'good' is in use"),
    ],
)
def test_a_refused_request_harms_no_one(request_: Request, message: str) -> None:
    engine = toy_engine(pages=8)
    good = greedy("good", [1, 2, 3])
    engine.add(good)
    with pytest.raises(RequestError, match=message):
        engine.add(request_)
    assert tokens(run(engine)) == solo([good])


# --- abort


def test_two_thousand_aborts() -> None:
    rng = np.random.default_rng(2)
    requests = mixed_requests(2000, rng, longest_prompt=40)
    engine = toy_engine(pages=20, seqs=16, budget=64)
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
        if rng.random() < 0.3:
            collect(engine.step(), results)
        victim = requests[int(rng.integers(0, len(requests)))].request_id
        if engine.abort(victim):
            assert not engine.abort(victim)
    for request in requests[::3]:
        engine.abort(request.request_id)
    drain(engine, results)
    assert engine.stats().free_pages == engine.num_pages
    assert len(results) == 2000
    assert sum(result.end[0] == "abort" for result in results.values()) > 600


def test_abort_frees_pages_at_once_and_is_reported_by_the_next_step() -> None:
    engine = toy_engine()
    engine.add(greedy("running", range(40)))
    engine.step()
    engine.add(greedy("waiting", range(40)))
    assert engine.abort("waiting")
    assert engine.abort("running")
    assert engine.stats().free_pages == engine.num_pages
    assert engine.has_work
    with pytest.raises(RequestError, match="in use"):
        engine.add(greedy("running", [1]))
    assert [(o.request_id, o.finish_reason) for o in engine.step()] == [("waiting", "abort"), ("running", "abort")]
    assert not engine.has_work
    assert engine.step() == []
    assert len(run(engine, [greedy("running", [1])])["running"].token_ids) == 8


def test_abort_of_what_is_not_there_is_no_error() -> None:
    engine = toy_engine()
    assert not engine.abort("unknown")
    run(engine, [greedy("done", [1])])
    assert not engine.abort("done")


# --- logits and log-probabilities


def wants_logits(name: str, prompt: list[int]) -> Request:
    return Request(name, tuple(prompt), params(), want_logits=True)


def logits_of(result: Result) -> np.ndarray:
    return np.concatenate([output.logits for output in result.outputs if output.logits is not None])


@pytest.mark.parametrize(("pages", "budget"), [(1000, 512), (1000, 50), (9, 20)])
def test_logits_of_every_position_in_order_and_once(pages: int, budget: int) -> None:
    rng = np.random.default_rng(4)
    prompts = {f"p{n}": rng.integers(0, 50, n).tolist() for n in (1, 17, 70, 130)}
    engine = toy_engine(pages=pages, budget=budget)
    requests = [wants_logits(name, prompt) for name, prompt in prompts.items()]
    results = run(engine, [*mixed_requests(10, rng, 30), *requests, *[greedy(f"g{i}", [i], 60) for i in range(5)]])
    for name, prompt in prompts.items():
        got = logits_of(results[name])
        assert got.shape == (len(prompt), VOCAB)
        assert got.dtype == np.float32
        assert results[name].end == ("stop", None)
        assert results[name].token_ids == []
        np.testing.assert_array_equal(got, logits_of(run(toy_engine(), [wants_logits(name, prompt)])[name]))
    assert (engine.stats().preemptions > 0) == (pages == 9)


def test_logits_go_on_where_a_preemption_broke_off() -> None:
    prompt = [n % 50 for n in range(32)]
    engine = toy_engine(pages=4, budget=8)
    result = run(engine, [greedy("first", [5] * 31, 6), wants_logits("logits", prompt)])["logits"]
    assert result.outputs[-1].metrics.num_preemptions == 1
    assert [len(output.logits) for output in result.outputs if output.logits is not None] == [1, 7, 7, 1, 8, 8]
    np.testing.assert_array_equal(
        logits_of(result), logits_of(run(toy_engine(), [wants_logits("logits", prompt)])["logits"])
    )


def test_logits_are_those_that_tokens_are_chosen_from() -> None:
    chosen = solo([greedy("r", [1, 2, 3], 10)])["r"]
    logits = logits_of(run(toy_engine(), [wants_logits("r", [1, 2, 3, *chosen])])["r"])
    assert logits[2:-1].argmax(axis=1).tolist() == chosen


def test_logprobs_come_with_each_token() -> None:
    prompt = [1, 2, 3]
    engine = toy_engine()
    requests = [
        Request("with", tuple(prompt), params(logprobs=3)),
        Request("without", tuple(prompt), params()),
        Request("none_best", tuple(prompt), params(logprobs=0, temperature=1.5), seed=5),
    ]
    results = run(engine, requests)
    logits = logits_of(run(toy_engine(), [wants_logits("r", prompt + results["with"].token_ids)])["r"]).astype(
        np.float64
    )
    logprobs = [lp for output in results["with"].outputs for lp in output.logprobs or ()]
    for row, token, reported in zip(logits[2:], results["with"].token_ids, logprobs, strict=False):
        expected = row - np.log(np.exp(row).sum())
        assert (reported.token_id, reported.rank, len(reported.top)) == (token, 1, 3)
        assert reported.logprob == pytest.approx(expected[token], abs=1e-9)
        assert [i for i, _ in reported.top] == np.argsort(-expected, kind="stable")[:3].tolist()
        assert reported.top[0] == (token, reported.logprob)
    assert len(logprobs) == 8
    assert all(output.logprobs is None for output in results["without"].outputs)
    ranks = [lp.rank for output in results["none_best"].outputs for lp in output.logprobs or ()]
    assert len(ranks) == 8
    assert max(ranks) > 1


def test_logprobs_stay_parallel_to_tokens_at_a_stop() -> None:
    free = solo([greedy("r", [1, 2, 3], 20)])["r"]
    result = run(toy_engine(), [Request("r", (1, 2, 3), params(logprobs=1, stop_token_ids=[free[0]]))])["r"]
    assert result.last is not None
    assert (result.last.new_token_ids, result.last.logprobs) == ((), ())


def test_logprobs_do_not_depend_on_the_batch() -> None:
    requests = [replace(r, params=replace(r.params, logprobs=5)) for r in mixed_requests(20, np.random.default_rng(8))]
    together = run(toy_engine(pages=12, budget=40), requests)
    engine = toy_engine()
    for request in requests:
        alone = run(engine, [request])[request.request_id]
        assert [o.logprobs for o in alone.outputs] == [o.logprobs for o in together[request.request_id].outputs]


# --- log-probabilities of the prompt


def prompt_logprobs_of(result: Result) -> tuple[TokenLogprobs, ...]:
    """They come with the first output of a request, and with no other."""
    first, *later = result.outputs
    assert first.prompt_logprobs is not None
    assert all(output.prompt_logprobs is None for output in later)
    return first.prompt_logprobs


def scored(requests: list[Request]) -> list[Request]:
    """Every other one with log-probabilities of its prompt, of 0 to 3 best tokens; every eighth generates nothing."""
    changed = [
        replace(r.params, prompt_logprobs=i // 2 % 4, max_tokens=r.params.max_tokens if i % 8 else 0)
        if i % 2 == 0
        else r.params
        for i, r in enumerate(requests)
    ]
    return [replace(r, params=new) for r, new in zip(requests, changed, strict=True)]


def test_prompt_logprobs_are_the_log_softmax_of_the_logits() -> None:
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, NAN_TOKEN, 100).tolist()
    logits = logits_of(run(toy_engine(), [wants_logits("r", prompt)])["r"])
    for temperature in (0, 0.3):
        request = Request("r", tuple(prompt), params(prompt_logprobs=3, temperature=temperature), seed=1)
        found = prompt_logprobs_of(run(toy_engine(), [request])["r"])
        assert [entry.token_id for entry in found] == prompt[1:]
        assert list(found) == [token_logprobs(row, token, 3) for row, token in zip(logits, prompt[1:], strict=False)]


@pytest.mark.parametrize("budget", [1, 7, 64, 512])
@pytest.mark.parametrize("pages", [8, 1000])
def test_prompt_logprobs_depend_neither_on_chunks_nor_on_company_nor_on_preemption(budget: int, pages: int) -> None:
    requests = scored(mixed_requests(40, np.random.default_rng(budget)))
    engine = toy_engine(pages=pages, budget=budget)
    results = run(engine, requests)
    assert (engine.stats().preemptions > 0) == (pages == 8 and budget > 1)
    alone = toy_engine()
    for request in requests:
        expected = run(alone, [request])[request.request_id]
        result = results[request.request_id]
        assert (result.token_ids, result.end) == (expected.token_ids, expected.end)
        if request.params.prompt_logprobs is None:
            assert result.outputs[0].prompt_logprobs is None
        else:
            assert prompt_logprobs_of(result) == prompt_logprobs_of(expected)
            assert len(prompt_logprobs_of(result)) == len(request.prompt_token_ids) - 1


def test_asking_for_prompt_logprobs_does_not_change_the_tokens() -> None:
    requests = mixed_requests(20, np.random.default_rng(9))
    asking = [replace(r, params=replace(r.params, prompt_logprobs=2)) for r in requests]
    assert tokens(run(toy_engine(budget=50), asking)) == solo(requests)


def test_only_rows_that_are_asked_for_go_through_the_head() -> None:
    backend = ToyBackend()
    engine = toy_engine(backend=backend)
    asking = Request("asking", (5,) * (LOGIT_ROWS + 2), params(prompt_logprobs=0, max_tokens=0))
    run(engine, [asking, Request("single", (5,), params(prompt_logprobs=0, max_tokens=0))])
    assert backend.calls == ["layers", "logits", "logits"]  # 64 rows, then 1
    assert engine.stats().generation_tokens == 0
    backend.calls.clear()
    halves = [replace(asking, request_id=name, prompt_token_ids=(5,) * (LOGIT_ROWS // 2 + 1)) for name in "ab"]
    run(engine, halves)
    assert backend.calls == ["layers", "logits"]  # both in one pass
    backend.calls.clear()
    run(engine, [greedy("plain", [5] * 100, 1)])
    assert backend.calls == ["layers", "sample"]


def test_nan_among_the_logits_of_a_prompt_fails_its_request_alone() -> None:
    prompt = [4, NAN_TOKEN, 6, 7]
    others = [greedy("a", [1, 2]), Request("deaf", tuple(prompt), params())]
    bad = [Request(f"bad{n}", tuple(prompt), params(prompt_logprobs=0, max_tokens=n)) for n in (0, 5)]
    for budget in (1, 3, 512):
        results = run(toy_engine(budget=budget), [others[0], *bad, others[1]])
        for request in bad:
            result = results.pop(request.request_id)
            assert result.end == ("error", None)
            assert "the logits at position 1 hold NaN" in result.error
            assert len(result.outputs) == 1
        assert tokens(results) == solo(others)


def test_nan_among_wanted_logits_fails_their_request_alone() -> None:
    prompt = [4, 5, NAN_TOKEN, 6, 7]
    others = [greedy("a", [1, 2]), greedy("b", [3])]
    alone = logits_of(run(toy_engine(), [wants_logits("r", [1, 2, 3])])["r"])
    for budget in (2, 512):
        bad, good = wants_logits("bad", prompt), wants_logits("good", [1, 2, 3])
        results = run(toy_engine(budget=budget), [others[0], bad, good, others[1]])
        failed = results.pop("bad")
        assert failed.end == ("error", None)
        assert failed.error == "the logits at position 2 hold NaN"
        np.testing.assert_array_equal(logits_of(results.pop("good")), alone)
        assert tokens(results) == solo(others)


def test_an_abort_inside_the_prompt_reports_no_logprobs_of_it() -> None:
    engine = toy_engine(budget=8)
    engine.add(Request("r", tuple(range(30)), params(prompt_logprobs=1)))
    assert engine.step() == []
    assert engine.abort("r")
    assert [(o.finish_reason, o.prompt_logprobs) for o in engine.step()] == [("abort", None)]
    assert engine.stats().free_pages == engine.num_pages


# --- the prefix cache

WINDOWS = [(0,), (20, 0), (7,), (40, 7, 0)]


def cached(results: dict[str, Result]) -> dict[str, int]:
    """Request id -> tokens of its prompt that were not computed."""
    return {name: result.outputs[-1].metrics.num_cached for name, result in results.items()}


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_prefix_of_any_length_changes_no_token(windows: tuple[int, ...]) -> None:
    """One after the other: what a request has in common with the first one is at least there, in full pages."""
    first = np.random.default_rng(1).integers(0, 30, 70).tolist()
    requests = [greedy("first", first, 20)]
    requests += [
        greedy(f"{n}+{m}", first[:n] + [40] * m, 3) for n in (*range(1, 19), 31, 32, 33, 48, 64) for m in (0, 1, 17)
    ]
    engine = toy_engine(windows=windows)
    results = {r.request_id: run(engine, [r])[r.request_id] for r in requests}
    assert tokens(results) == solo(requests, windows)
    found = cached(results)
    for request in requests[1:]:
        shared, more = map(int, request.request_id.split("+"))
        assert found[request.request_id] >= min(shared, shared + more - 1) // 16 * 16
        assert found[request.request_id] % 16 == 0
    assert engine.stats().cached_tokens == sum(found.values())


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("budget", [5, 64])
@pytest.mark.parametrize("pages", [9, 24, 1000])
def test_shared_prefixes_change_no_token_under_any_pressure(windows: tuple[int, ...], budget: int, pages: int) -> None:
    requests = family(30, np.random.default_rng(budget))
    engine = toy_engine(pages=pages * len(windows), budget=budget, windows=windows)
    assert tokens(run(engine, requests)) == (alone := solo(requests, windows))
    assert tokens(run(engine, requests[::-1])) == alone
    stats = engine.stats()
    if pages > 9:  # fewer are soon allocated anew
        assert stats.cached_tokens > 0
    elif 0 in windows and budget > 5:
        assert stats.preemptions > 0


def family(count: int, rng: np.random.Generator) -> list[Request]:
    """Requests with beginnings of 0 to 90 tokens from three texts."""
    texts = rng.integers(0, NAN_TOKEN, (3, 90)).tolist()
    return [
        replace(r, prompt_token_ids=(*texts[i % 3][: rng.integers(0, 91)], *r.prompt_token_ids))
        for i, r in enumerate(mixed_requests(count, rng, longest_prompt=20))
    ]


@pytest.mark.usefixtures("drafting")
@settings(max_examples=20, deadline=None)
@given(
    data=st.data(),
    budget=st.integers(1, 80),
    pages=st.integers(10, 24),
    seqs=st.integers(1, 8),
    windows=st.sampled_from(WINDOWS),
)
def test_those_that_share_come_and_go_at_any_time(
    data: st.DataObject, budget: int, pages: int, seqs: int, windows: tuple[int, ...]
) -> None:
    requests = family(16, np.random.default_rng(data.draw(st.integers(0, 5))))
    engine = toy_engine(budget=budget, pages=pages * len(windows), seqs=seqs, windows=windows)
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
        for _ in range(data.draw(st.integers(0, 4))):
            collect(engine.step(), results)
        if data.draw(st.booleans()):
            engine.abort(data.draw(st.sampled_from(requests)).request_id)
    drain(engine, results)
    alone = solo(requests, windows)
    for name, result in results.items():
        whole = result.end[0] != "abort"
        assert result.token_ids == (alone[name] if whole else alone[name][: len(result.token_ids)])
    assert engine.stats().free_pages == engine.num_pages


def test_switched_off_it_makes_no_difference_whether_prompts_are_alike() -> None:
    """The same steps on the same pages."""
    backends = [ToyBackend(), ToyBackend()]
    requests = [replace(r, params=replace(r.params, max_tokens=1)) for r in family(40, np.random.default_rng(4))]
    strangers = [replace(r, prompt_token_ids=(i + 1,) * len(r.prompt_token_ids)) for i, r in enumerate(requests)]
    for backend, second in zip(backends, (requests, strangers), strict=True):
        engine = toy_engine(backend=backend, pages=30, budget=50, prefix_caching=False)
        run(engine, requests)
        run(engine, second)
        assert engine.stats().cached_tokens == 0
    for one, two in zip(backends[0].steps, backends[1].steps, strict=True):
        np.testing.assert_array_equal(one.positions, two.positions)
        np.testing.assert_array_equal(one.page_table, two.page_table)


def test_prefixes_are_shared_by_those_of_one_salt_alone() -> None:
    engine, prompt = toy_engine(prefix_caching=True), list(range(1, 40))
    cached = []
    for name, salt in (("a", "x"), ("b", "y"), ("c", ""), ("d", "x")):
        results = run(engine, [replace(greedy(name, prompt, 2), cache_salt=salt)])
        last = results[name].last
        assert last is not None
        cached.append(last.metrics.num_cached)
    assert cached[:3] == [0, 0, 0]
    assert cached[3] > 0


def test_a_request_with_nan_leaves_nothing_behind() -> None:
    bad = greedy("bad", [4] * 40 + [NAN_TOKEN])
    good = greedy("good", [4] * 40 + [5])
    engine = toy_engine()
    assert run(engine, [bad])["bad"].end == ("error", None)
    first = run(engine, [good])
    assert (cached(first), tokens(first)) == ({"good": 0}, solo([good]))
    assert cached(run(engine, [bad])) == {"bad": 32}
    assert cached(run(engine, [good])) == {"good": 32}


def test_what_was_scored_helps_others_but_is_itself_computed_whole() -> None:
    rng = np.random.default_rng(6)
    prompt = rng.integers(0, NAN_TOKEN, 100).tolist()
    asking = Request("asking", tuple(prompt), params(prompt_logprobs=2))
    engine = toy_engine()
    expected = run(engine, [asking])["asking"]
    for request in (asking, wants_logits("logits", prompt), greedy("plain", prompt)):
        result = run(engine, [request])[request.request_id]
        assert result.outputs[-1].metrics.num_cached == (96 if request.request_id == "plain" else 0)
        if request is asking:
            assert (result.token_ids, prompt_logprobs_of(result)) == (expected.token_ids, prompt_logprobs_of(expected))
    assert engine.stats().cached_tokens == 96


def test_one_sequence_runs_where_the_cache_fills_the_pool() -> None:
    """Every page holds something that is known: those are free all the same."""
    engine = toy_engine(pages=8)
    for start in range(20):
        request = greedy(f"r{start}", [start, *range(60)], 60)
        assert tokens(run(engine, [request])) == solo([request])
    assert engine.stats().preemptions == 0


# --- the rest


def test_seeds_and_samples_draw_their_own_numbers() -> None:
    base = Request("r", (1, 2, 3), params(temperature=1.0, max_tokens=12), seed=1)
    variants = [base, replace(base, seed=2), replace(base, sample=1), replace(base, seed=-1)]
    drawn = [solo([request])["r"] for request in variants]
    assert len({tuple(ids) for ids in drawn}) == 4
    assert solo([base])["r"] == drawn[0]
    assert solo([replace(base, seed=2**64 - 1)])["r"] == drawn[3]


def test_metrics_and_stats() -> None:
    now = itertools.count(10.0)
    engine = toy_engine(budget=4, clock=lambda: float(next(now)))
    engine.add(greedy("r", [1, 2, 3, 4, 5, 6], 2))  # 10: arrival; two steps for the prompt, then one more
    assert engine.stats().waiting == 1
    results: dict[str, Result] = {}
    collect(engine.step(), results)
    assert results == {}
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)
    results = run(engine)
    assert results["r"].last is not None
    metrics = results["r"].last.metrics
    assert (metrics.arrival_time, metrics.begun_time) == (10.0, 11.0)
    assert (metrics.first_token_time, metrics.finished_time) == (13.0, 14.0)
    assert metrics.num_preemptions == 0
    stats = engine.stats()
    assert (stats.steps, stats.prompt_tokens, stats.generation_tokens, stats.preemptions) == (3, 6, 2, 0)


def test_close_drops_everything() -> None:
    engine = toy_engine()
    engine.add(greedy("a", [1]))
    engine.step()
    engine.add(greedy("b", [1]))
    engine.close()
    engine.close()
    assert not engine.has_work
    assert engine.step() == []
    assert engine.stats().free_pages == engine.num_pages
    with pytest.raises(EngineError, match="closed"):
        engine.add(greedy("c", [1]))
