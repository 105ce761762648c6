"""Drafts: what they save, and what they must leave as it is. Tests that run with and without them are marked ``drafting``."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from shoal.engine import masks
from shoal.engine.constraint import Mask
from shoal.engine.draft import Speculation, Wanted
from shoal.engine.draft_pace import DraftPace
from shoal.engine.engine import Engine, Request
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import LOGIT_ROWS, Backend, StepInput
from shoal.kernels.load import load_backend
from shoal.models.weights import load_model
from shoal.params import EngineConfig, SamplingParams
from tests.engine.random_network import NAN_TOKEN as NETWORK_NAN
from tests.engine.random_network import VOCAB as NETWORK_VOCAB
from tests.engine.random_network import write_network
from tests.engine.steps import END, Steps
from tests.engine.toy import (
    NAN_TOKEN,
    VOCAB,
    Result,
    ToyBackend,
    collect,
    greedy,
    guessing,
    mixed_requests,
    run,
    solo,
    tokens,
    toy_engine,
)


class Always(DraftPace):
    """As many tokens as there is room for."""

    def counts(self, chances: list[float], most: list[int], room: int) -> list[int]:
        counts = []
        for count in most:
            counts.append(max(0, min(count, room)))
            room -= counts[-1]
        return counts


class Says:
    """Drafts what is written down for a request, from where the request is."""

    def __init__(self, texts: dict[str, list[int]], longest: int = 6) -> None:
        self.texts, self.longest = texts, longest
        self.asked: list[tuple[str, int]] = []
        self.outputs: dict[str, list[int]] = {}

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        drafts = []
        for one in wanted:
            seq: Any = one.key
            self.asked.append((seq.request.request_id, one.most))
            place = len(one.token_ids) - seq.num_prompt
            drafts.append(self.texts.get(seq.request.request_id, [])[place : place + one.most])
        return drafts

    def ended(self, key: Any, output: list[int]) -> None:
        self.outputs[key.request.request_id] = output


def saying(texts: dict[str, list[int]], longest: int = 6) -> Speculation:
    return Speculation(Says(texts, longest), Always())


def rows_of(backend: ToyBackend) -> list[int]:
    return [len(step.token_ids) for step in backend.steps]


def whole(result: Result) -> tuple[Any, ...]:
    """All that is reported of a request, put together."""
    places = [place for output in result.outputs for place in output.logprobs or ()]
    prompts = [output.prompt_logprobs for output in result.outputs if output.prompt_logprobs is not None]
    return result.end, result.token_ids, places, prompts, [output.error for output in result.outputs][-1]


# --- what they save


def test_right_guesses_are_kept_and_the_token_behind_them_comes_too() -> None:
    request = greedy("r", [1, 2, 3], 15)
    backend = ToyBackend()
    engine = toy_engine(backend=backend, speculation=saying(solo([request])))
    results = run(engine, [request])
    assert tokens(results) == solo([request])
    assert rows_of(backend) == [3, 7, 7]  # 1 token, then twice 6 guesses and one behind them
    assert [len(output.new_token_ids) for output in results["r"].outputs] == [1] * 15
    stats = engine.stats()
    assert (stats.spec_decode_num_draft_tokens, stats.spec_decode_num_accepted_tokens) == (12, 12)
    assert stats.generation_tokens == 15


def test_the_first_wrong_guess_ends_it() -> None:
    request = greedy("r", [1, 2, 3], 12)
    right = solo([request])["r"]
    wrong = [(token + (index == 3)) % VOCAB for index, token in enumerate(right)]
    backend = ToyBackend()
    engine = toy_engine(backend=backend, speculation=saying({"r": wrong}))
    assert tokens(run(engine, [request])) == {"r": right}
    # The fourth token is not the one that was guessed; it comes for nothing, from the row before it.
    assert rows_of(backend) == [3, 7, 7, 1]
    stats = engine.stats()
    assert (stats.spec_decode_num_draft_tokens, stats.spec_decode_num_accepted_tokens) == (12, 2 + 6)


def test_a_draft_never_goes_past_the_last_token() -> None:
    request = greedy("r", [1, 2, 3], 5)
    backend = ToyBackend()
    engine = toy_engine(
        backend=backend, speculation=saying(solo([replace(request, params=greedy("r", [1], 50).params)]))
    )
    assert tokens(run(engine, [request])) == solo([request])
    assert rows_of(backend) == [3, 4]


def test_those_that_decode_have_their_row_first() -> None:
    requests = [greedy(f"r{i}", [i, i + 1], 8) for i in range(3)]
    backend = ToyBackend()
    engine = toy_engine(backend=backend, budget=8, speculation=saying(solo(requests)))
    assert tokens(run(engine, requests)) == solo(requests)
    assert rows_of(backend)[1] == 8
    assert [len(step.kv_len) for step in backend.steps][:2] == [3, 3]


def test_nothing_is_drafted_beside_a_prompt() -> None:
    one, long = greedy("one", [1, 2], 30), greedy("long", range(40), 2)
    backend = ToyBackend()
    engine = toy_engine(backend=backend, budget=16, speculation=saying(solo([one, long])))
    engine.add(one)
    results: dict[str, Result] = {}
    collect(engine.step(), results)
    collect(engine.step(), results)
    engine.add(long)
    while engine.has_work:
        collect(engine.step(), results)
    assert tokens(results) == solo([one, long])
    prefilling = [step for step in backend.steps if len(step.kv_len) == 2 and step.row_start[1] > 1]
    assert not any(step.kv_len[1] < 40 and step.row_start[2] - step.row_start[1] > 1 for step in prefilling[1:])


@pytest.mark.parametrize(("budget", "pages"), [(7, 1000), (64, 4)])
def test_who_can_begin_does_not_wait_for_the_end_of_guesses(budget: int, pages: int) -> None:
    """Guesses would take all rows of each step, or all pages."""
    one, late = greedy("one", range(4, 18), 50), greedy("late", range(20, 36), 3)
    engine = toy_engine(budget=budget, pages=pages, longest=64, speculation=saying(solo([one, late]), longest=40))
    engine.add(one)
    results: dict[str, Result] = {}
    while "one" not in results:
        collect(engine.step(), results)
    engine.add(late)
    for _ in range(3):
        collect(engine.step(), results)
    assert "late" in results
    run_on = run(engine)
    for name, result in run_on.items():
        results[name].token_ids += result.token_ids
    assert tokens(results) == solo([one, late])


def test_more_rows_than_the_head_takes_at_once() -> None:
    requests = [one for i in range(60) if NAN_TOKEN not in solo([one := greedy(f"r{i}", [i], 20)])[f"r{i}"]][:30]
    backend = ToyBackend()
    engine = toy_engine(backend=backend, speculation=saying(solo(requests)))
    assert tokens(run(engine, requests)) == solo(requests)
    assert rows_of(backend) == [30, 30 * 7, 30 * 7, 30 * 5]
    assert backend.calls.count("sample") == 1 + 2 * -(-210 // LOGIT_ROWS) + -(-150 // LOGIT_ROWS)


# --- what stays as it is


@pytest.mark.parametrize("seed", range(3))
def test_log_probabilities_are_the_same_to_the_last_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = [
        replace(r, params=replace(r.params, logprobs=2, logprob_token_ids=[3, 9], prompt_logprobs=1 if i % 3 else None))
        for i, r in enumerate(mixed_requests(20, rng))
    ]
    plain = run(toy_engine(budget=64), requests)
    drafted = run(toy_engine(budget=64, speculation=guessing(seed=seed)), requests)
    assert {name: whole(result) for name, result in drafted.items()} == {
        name: whole(result) for name, result in plain.items()
    }


@pytest.mark.parametrize("place", range(1, 9))
@pytest.mark.parametrize("kind", ["stop_token_ids", "eos"])
def test_a_stop_token_ends_it_wherever_it_is_in_a_draft(place: int, kind: str) -> None:
    free = greedy("r", [1, 2, 3], 20)
    text = solo([free])["r"]
    stop = text[place]
    if kind == "eos":
        request = replace(free, eos_ids=frozenset({stop}))
    else:
        request = replace(free, params=replace(free.params, stop_token_ids=[stop]))
    engine = toy_engine(speculation=saying({"r": text}))
    plain = run(toy_engine(), [request])["r"]
    assert whole(run(engine, [request])["r"]) == whole(plain)
    assert len(plain.token_ids) == text.index(stop)


@pytest.mark.parametrize("least", range(1, 10))
def test_no_stop_token_comes_too_early(least: int) -> None:
    """Which tokens are banned is another thing at each row of a draft."""
    params = SamplingParams(temperature=0, max_tokens=20, min_tokens=least, stop_token_ids=list(range(0, VOCAB, 2)))
    request = Request("r", (1, 2, 3), params)
    plain = run(toy_engine(), [request])["r"]
    drafted = run(toy_engine(speculation=saying({"r": plain.token_ids})), [request])["r"]
    assert whole(drafted) == whole(plain)
    assert len(plain.token_ids) >= least


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.3},
        {"repetition_penalty": 1.5, "repeat_last_n": 3},
        {"dry_multiplier": 2.0, "dry_allowed_length": 1},
        {"xtc_probability": 0.5, "top_k": 30},
        {"logit_bias": {5: 3.0}, "typical_p": 0.7},
    ],
)
def test_what_a_sampler_remembers_is_what_came_before_its_row(fields: dict[str, Any]) -> None:
    """Tokens 1 to 5 alone: what was drafted just before decides what comes."""
    params = SamplingParams(temperature=1.5, max_tokens=40, allowed_token_ids=[1, 2, 3, 4, 5], **fields)
    requests = [Request(f"r{i}", (1, 2, 3), params, seed=i) for i in range(4)]
    plain = solo(requests)
    for seed in range(3):
        engine = toy_engine(speculation=guessing(seed=seed))
        assert tokens(run(engine, requests)) == plain
        assert engine.stats().spec_decode_num_accepted_tokens > 20


def test_mirostat_has_no_drafts() -> None:
    """Each token depends on the surprise of the one before."""
    drafter = Says({})
    request = Request("r", (1, 2, 3), SamplingParams(max_tokens=10, mirostat=2), seed=1)
    drafter.texts = solo([request])
    assert tokens(run(toy_engine(speculation=Speculation(drafter, Always())), [request])) == drafter.texts
    assert drafter.asked == []


def test_a_wrong_guess_with_nan_behind_it_harms_nobody() -> None:
    request = greedy("r", [1, 2, 3], 12)
    right = solo([request])["r"]
    engine = toy_engine(speculation=saying({"r": [NAN_TOKEN] * 12}))
    result = run(engine, [request])["r"]
    assert (result.token_ids, result.end) == (right, ("length", None))


def test_pages_of_wrong_guesses_are_not_found_by_others() -> None:
    """Two pages of guesses: the tokens of both, or what was sampled in their place, are in the cache, and nothing else."""
    request = greedy("r", range(2, 18), 40)
    right = solo([request])["r"]
    engine = toy_engine(speculation=saying({"r": [right[0], *[NAN_TOKEN] * 40]}, longest=40))
    assert NAN_TOKEN not in right
    assert tokens(run(engine, [request])) == {"r": right}
    prompt = request.prompt_token_ids
    again = replace(request, request_id="again", prompt_token_ids=(*prompt, *right[:33]))
    guessed = replace(request, request_id="guessed", prompt_token_ids=(*prompt, right[0], *[NAN_TOKEN] * 32))
    results = run(engine, [again, guessed])
    cached = {name: result.outputs[-1].metrics.num_cached for name, result in results.items()}
    assert cached == {"again": 48, "guessed": 16}
    assert results["again"].token_ids[:7] == right[33:40]


def test_guesses_take_no_pages_from_others() -> None:
    """With one page to spare each: both would like two more."""
    requests = [greedy("a", range(15), 17), greedy("b", range(20, 35), 17)]
    engine = toy_engine(pages=4, longest=32, speculation=saying(solo(requests), longest=16))
    assert tokens(run(engine, requests)) == solo(requests)
    assert engine.stats().preemptions == 0
    assert engine.stats().spec_decode_num_accepted_tokens > 0


def test_a_step_that_fails_is_computed_again_without_its_drafts() -> None:
    request = greedy("r", [1, 2, 3], 12)
    right = solo([request])["r"]

    def refuse(step: StepInput) -> None:
        if 50 in step.token_ids:
            raise FloatingPointError("that guess")

    guesses = [right[0], right[1], 50, *right[3:]]
    assert 50 not in right
    backend = ToyBackend(before_step=refuse)
    engine = toy_engine(backend=backend, speculation=saying({"r": guesses}))
    assert tokens(run(engine, [request])) == {"r": right}


def test_what_a_step_takes_that_is_computed_twice_tells_nothing() -> None:
    now, calls = 0.0, itertools.count()
    recorded: list[float] = []

    def tick(step: StepInput) -> None:
        nonlocal now
        now += 1.0
        if next(calls) in (2, 5) or NAN_TOKEN in step.token_ids[:-1]:
            raise FloatingPointError

    class Records(Always):
        def record(self, sequences: int, rows: int, seconds: float) -> None:
            recorded.append(seconds)

    request = greedy("r", range(14), 18)
    engine = toy_engine(
        backend=ToyBackend(before_step=tick),
        clock=lambda: now,
        speculation=Speculation(Says(solo([request]), longest=2), Records()),
    )
    assert tokens(run(engine, [request])) == solo([request])
    assert recorded
    assert set(recorded) == {1.0}


@pytest.mark.parametrize("failing", range(8))
def test_a_step_that_fails_once_does_so_behind_nan_too(failing: int) -> None:
    """The token that brings NaN is guessed right, and whatever is computed once more may fail once."""
    request = greedy("r", range(14), 50)
    calls = itertools.count()

    def fail(step: StepInput) -> None:
        if next(calls) == failing:
            raise FloatingPointError

    plain = run(toy_engine(), [request])["r"]
    assert plain.end[0] == "error"
    engine = toy_engine(backend=ToyBackend(before_step=fail), speculation=saying({"r": plain.token_ids}))
    assert whole(run(engine, [request])["r"]) == whole(plain)


class Broken(Says):
    """Raises from some call on, or returns what nobody asked for."""

    def __init__(self, texts: dict[str, list[int]], how: str) -> None:
        super().__init__(texts)
        self._how = how

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        if self._how == "draft" and len(self.asked) > 2:
            raise OSError("gone")
        drafts = super().draft(wanted)
        if self._how == "fewer":
            return drafts[1:]
        return [[*draft[:2], {"beyond": VOCAB, "below": -1}.get(self._how, 0), *draft[3:]] for draft in drafts]

    def ended(self, key: Any, output: list[int]) -> None:
        if self._how == "ended":
            raise OSError("gone")


@pytest.mark.parametrize("how", ["draft", "ended", "fewer", "beyond", "below"])
def test_a_broken_drafter_harms_nobody(how: str) -> None:
    requests = [greedy(f"r{i}", [i, i + 1], 5 + 5 * i) for i in range(3)]
    backend = ToyBackend()
    engine = toy_engine(
        backend=backend, speculation=Speculation(Broken(solo(requests), how), Always(), vocab_size=VOCAB)
    )
    assert tokens(run(engine, requests)) == solo(requests)
    assert all(0 <= token < VOCAB for step in backend.steps for token in step.token_ids)


def test_a_guess_that_fails_its_step_was_wrong() -> None:
    """Else it would be tried again at each step."""
    request = greedy("r", [1, 2, 3], 8)

    def refuse(step: StepInput) -> None:
        if 50 in step.token_ids:
            raise FloatingPointError("that guess")

    class Learns(Always):
        learnt: ClassVar[list[tuple[int, int]]] = []

        def learned(self, chance: float, drafted: int, kept: int) -> float:
            self.learnt.append((drafted, kept))
            return super().learned(chance, drafted, kept)

    backend = ToyBackend(before_step=refuse)
    engine = toy_engine(backend=backend, speculation=Speculation(Says({"r": [50] * 8}), Learns()))
    assert tokens(run(engine, [request])) == solo([request])
    assert Learns.learnt == [(6, 0), (5, 0), (4, 0), (3, 0), (2, 0), (1, 0)]


def test_a_dropped_step_is_scheduled_again() -> None:
    request = greedy("r", range(14), 12)
    right = solo([request])["r"]
    interrupted = itertools.chain((False, True, False, True), itertools.repeat(False))

    def interrupt(step: StepInput) -> None:
        if next(interrupted):
            raise KeyboardInterrupt

    backend = ToyBackend(before_step=interrupt)
    engine = toy_engine(backend=backend, speculation=saying({"r": right[:5] + [0] * 7}))
    results: dict[str, Result] = {}
    engine.add(request)
    while engine.has_work:
        try:
            collect(engine.step(), results)
        except KeyboardInterrupt:
            engine._check()
    assert tokens(results) == {"r": right}


def test_a_deadline_between_two_steps_leaves_whole_tokens() -> None:
    now = 0.0

    def tick(step: StepInput) -> None:
        nonlocal now
        now += 1.0

    request = replace(greedy("r", [1, 2, 3], 40), timeout=2.5)
    right = solo([replace(request, timeout=None)])["r"]
    engine = toy_engine(backend=ToyBackend(before_step=tick), clock=lambda: now, speculation=saying({"r": right}))
    result = run(engine, [request])["r"]
    assert (result.end[0], result.token_ids) == ("timeout", right[:15])


def test_the_drafter_hears_of_every_end() -> None:
    requests = [greedy(f"r{i}", [i], 5) for i in range(3)]
    drafter = Says(solo(requests))
    engine = toy_engine(speculation=Speculation(drafter, Always()))
    for request in requests:
        engine.add(request)
    engine.abort("r1")
    run(engine)
    assert drafter.outputs == {**drafter.texts, "r1": []}


def test_nobody_learns_from_the_time_of_steps_what_was_answered_under_a_salt() -> None:
    requests = [greedy("open", [1], 5), replace(greedy("own", [2], 5), cache_salt="mine")]
    drafter = Says(solo(requests))
    assert tokens(run(toy_engine(speculation=Speculation(drafter, Always())), requests)) == drafter.texts
    assert drafter.outputs == {"open": drafter.texts["open"], "own": []}


# --- constraints


def constrained(name: str, constraint: Steps, **fields: Any) -> Request:
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": 12, **fields})
    return Request(name, (5, 6, 7), params, frozenset((END,)), seed=len(name), constraint=constraint)


def ten_steps(**fields: Any) -> Steps:
    return Steps(tuple((10 + i, 20 + i, 30 + i) for i in range(10)), **fields)


def test_masks_advance_along_a_draft() -> None:
    backend = ToyBackend()
    text = solo([constrained("r", ten_steps())])["r"]
    engine = toy_engine(backend=backend, speculation=saying({"r": text}))
    result = run(engine, [constrained("r", ten_steps())])["r"]
    assert (result.token_ids, result.end) == (text, ("stop", None))
    assert rows_of(backend) == [3, 7, 3]


def test_a_guess_that_a_constraint_does_not_allow_is_no_error() -> None:
    text = solo([constrained("r", ten_steps())])["r"]
    for wrong in range(1, 10):
        guesses = [3 if index == wrong else token for index, token in enumerate(text)]
        result = run(toy_engine(speculation=saying({"r": guesses})), [constrained("r", ten_steps())])["r"]
        assert (result.token_ids, result.end) == (text, ("stop", None))


@pytest.mark.parametrize("place", range(10))
def test_a_limit_breaks_at_its_token_and_no_guess_before(place: int) -> None:
    text = solo([constrained("r", ten_steps())])["r"]
    engine = toy_engine(speculation=saying({"r": text}))
    result = run(engine, [constrained("r", ten_steps(broken_at=place))])["r"]
    assert (result.token_ids, result.end) == (text[:place], ("error", None))
    assert result.error == "too many items"


@pytest.mark.parametrize("least", range(1, 9))
def test_where_an_output_may_end_is_counted_along_a_draft(least: int) -> None:
    """Nothing is left but its own tokens or the end, at each place; the end is the likelier half of the time."""
    free = ten_steps(accepting=frozenset(range(1, 10)))
    for seed in range(4):
        request = replace(constrained("r", free, min_tokens=least), seed=seed)
        text = solo([constrained("r", ten_steps())])["r"]
        plain = run(toy_engine(), [request])["r"]
        drafted = run(toy_engine(speculation=saying({"r": [*plain.token_ids, *text]})), [request])["r"]
        assert whole(drafted) == whole(plain)
        assert len(plain.token_ids) >= least


def test_an_interrupted_wait_for_masks_leaves_the_next_draft_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constraint allows nothing of the first draft; the second is another one."""
    text = solo([constrained("r", ten_steps())])["r"]
    engine = toy_engine(speculation=saying({"r": [text[0], 3, *text[2:]]}))
    finish = masks.MaskFiller._finish
    results: dict[str, Result] = {}
    engine.add(constrained("r", ten_steps()))
    collect(engine.step(), results)

    def interrupt(filler: masks.MaskFiller) -> dict[Any, masks.Masks]:
        if filler._shares:
            monkeypatch.setattr(masks.MaskFiller, "_finish", finish)
            raise KeyboardInterrupt
        return finish(filler)

    monkeypatch.setattr(masks.MaskFiller, "_finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine._speculation._drafter.texts = {"r": text}  # type: ignore[union-attr]
    failed: list[Any] = []
    monkeypatch.setattr(logging.getLogger("shoal.engine.engine"), "error", lambda *args, **_: failed.append(args))
    while engine.has_work:
        collect(engine.step(), results)
    assert tokens(results) == {"r": text}
    assert not failed


def test_pages_of_a_draft_that_was_cut_to_nothing_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step that is dropped just then."""
    request = replace(constrained("r", ten_steps()), prompt_token_ids=tuple(range(3, 16)))
    text = solo([request])["r"]
    engine = toy_engine(speculation=saying({"r": [text[0], *[3] * 9]}))
    engine.add(request)
    results: dict[str, Result] = {}
    collect(engine.step(), results)
    free = engine.stats().free_pages
    sampler = engine._compute[1]  # type: ignore[index]
    with monkeypatch.context() as patch:

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(sampler, "sample", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine._speculation._drafter.texts = {}  # type: ignore[union-attr]
    collect(engine.step(), results)
    assert engine.stats().free_pages == free
    results["r"].token_ids += run(engine)["r"].token_ids
    assert tokens(results) == {"r": text}


class SlowAhead(Steps):
    """Masks from the third on are ready once nothing waits for them as a guess."""

    release = threading.Event()
    is_copy = False

    def fill_mask(self, row: Mask) -> None:
        if self.is_copy and self.place >= 3:
            self.release.wait(20)
        super().fill_mask(row)

    def copy(self) -> SlowAhead:
        twin = replace(self, filled=[])
        twin.is_copy = self.place > 0  # the request's own is copied once, before it begins
        return twin


def test_a_guess_whose_mask_is_late_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MASK_SECONDS", 0.1)
    slow = SlowAhead(ten_steps().sets)
    others = [constrained(f"other{i}", ten_steps()) for i in range(3)]
    text = solo([constrained("r", ten_steps()), *others])
    engine = toy_engine(speculation=saying(text))
    try:
        results = run(engine, [constrained("r", slow), *others])
        assert tokens(results) == text
        assert {result.end for result in results.values()} == {("stop", None)}
    finally:
        SlowAhead.release.set()
        engine.close()


# --- real arithmetic


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = load_backend(request.param, 2)
    yield backend
    backend.close()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_tokens_of_a_network_and_their_log_probabilities(
    tmp_path: Path, backend: Backend, architecture: str, dtype: str
) -> None:
    """With pages for a window and a chunk alone, where there is one; guesses that are right up to some place."""
    rng = np.random.default_rng(3)
    requests = [
        Request(
            f"r{i}",
            tuple(rng.integers(0, NETWORK_VOCAB, length).tolist()),
            SamplingParams(temperature=i % 2 * 0.9, max_tokens=40, logprobs=2),
            seed=i,
        )
        for i, length in enumerate([1, 17, 40, 90, 300])
    ]
    with GGUFFile.open(write_network(tmp_path / "net.gguf", architecture)) as file:
        model = load_model(file, backend)

    def engine(speculation: Speculation | None = None) -> Engine:
        config = EngineConfig(max_num_batched_tokens=48, kv_cache_dtype=dtype, max_model_len=512)
        return Engine(model, backend, config, check_every_step=True, speculation=speculation)

    one = engine()
    plain = {request.request_id: run(one, [request])[request.request_id] for request in requests}
    guesses = {
        name: [token if index % 7 else (token + 1) % NETWORK_VOCAB for index, token in enumerate(result.token_ids)]
        for name, result in plain.items()
    }
    many = engine(saying(guesses))
    results = run(many, requests)
    assert {name: whole(result) for name, result in results.items()} == {
        name: whole(result) for name, result in plain.items()
    }
    stats = many.stats()
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("right", range(4))
def test_nan_that_a_guess_brings_is_not_its_sequence_s(
    tmp_path: Path, backend: Backend, architecture: str, right: int
) -> None:
    """What a row does not see has the weight 0, and NaN of it is NaN; the guesses come again and again, behind right ones."""
    rng = np.random.default_rng(1)
    requests = [
        Request(
            f"r{i}",
            tuple(rng.integers(0, NETWORK_NAN, length).tolist()),
            SamplingParams(temperature=0, max_tokens=20, logprobs=1, logit_bias={NETWORK_NAN: -100}),
        )
        for i, length in enumerate([3, 20, 60])
    ]
    with GGUFFile.open(write_network(tmp_path / "net.gguf", architecture, with_nan=True)) as file:
        model = load_model(file, backend)

    def results(speculation: Speculation | None = None) -> dict[str, Result]:
        config = EngineConfig(max_num_batched_tokens=64, max_model_len=512)
        return run(Engine(model, backend, config, check_every_step=True, speculation=speculation), requests)

    plain = results()
    guesses = {
        name: [token if index % (right + 1) < right else NETWORK_NAN for index, token in enumerate(result.token_ids)]
        for name, result in plain.items()
    }
    assert {result.end for result in plain.values()} == {("length", None)}
    assert {name: whole(result) for name, result in results(saying(guesses)).items()} == {
        name: whole(result) for name, result in plain.items()
    }
