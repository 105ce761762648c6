"""Samplers through the engine: what a sequence remembers, and that nobody else's rows matter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.engine import Request, TokenWords
from shoal.engine.sampler import Sampler
from shoal.engine.sampling_state import SamplingState, bits_of, no_breakers
from shoal.engine.sequence import Sequence, TokenLogprobs
from shoal.errors import ParameterError, RequestError
from shoal.kernels.samplers import (
    XTC,
    Bias,
    Breakers,
    Dry,
    MinP,
    Mirostat,
    Penalties,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    Typical,
)
from shoal.params import SamplingParams
from tests.engine.toy import NAN_TOKEN, VOCAB, run, solo, tokens, toy_engine

IDS = st.integers(0, VOCAB - 2)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """Any few of all parameters."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "n": st.integers(1, 3),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.integers(0, 20),
        "top_p": st.floats(0.1, 1),
        "min_p": st.floats(0, 0.5),
        "min_tokens": st.integers(0, 5),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "repeat_last_n": st.sampled_from([-1, 0, 3, 64]),
        "logit_bias": st.dictionaries(IDS, st.floats(-9, 9), max_size=4),
        "allowed_token_ids": st.lists(IDS, min_size=5, max_size=30),
        "typical_p": st.floats(0.1, 1),
        "top_n_sigma": st.floats(0.5, 3),
        "dynatemp_range": st.floats(0, 1),
        "xtc_probability": st.floats(0, 1),
        "dry_multiplier": st.floats(0, 3),
        "dry_allowed_length": st.integers(0, 2),
        "dry_penalty_last_n": st.sampled_from([-1, 10, 64]),
        "mirostat": st.sampled_from([0, 1, 2]),
        "min_keep": st.integers(0, 3),
        "samplers": st.lists(st.sampled_from("edskypmxt"), max_size=6),
    }
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=6, unique=True))
    return SamplingParams(**{name: draw(fields[name]) for name in names}, max_tokens=draw(st.integers(5, 20)))


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    found = []
    for number in range(draw(st.integers(2, 7))):
        words = TokenWords(tuple(map(tuple, draw(st.lists(st.lists(IDS, min_size=1, max_size=2), max_size=3)))))
        prompt = tuple(draw(st.lists(IDS, min_size=1, max_size=40)))
        found.append(
            Request(f"r{number}", prompt, draw(sampling_params()), frozenset({7}), draw(IDS), number % 3, words=words)
        )
    return found


@pytest.mark.usefixtures("drafting")
@settings(max_examples=25, deadline=None)
@given(found=requests(), budget=st.integers(8, 64))
def test_tokens_are_those_of_a_run_alone(found: list[Request], budget: int) -> None:
    """Beside others, in chunks, preempted again and again on a pool that is too small."""
    expected = solo(found)
    assert tokens(run(toy_engine(budget=budget), found)) == expected
    assert tokens(run(toy_engine(pages=6, budget=budget, longest=96), found)) == expected


@pytest.mark.usefixtures("drafting")
def test_preemption_happens_and_changes_nothing() -> None:
    params = SamplingParams(
        max_tokens=40,
        frequency_penalty=1.5,
        dry_multiplier=2,
        mirostat=2,
        repeat_last_n=16,
        temperature=2,
        allowed_token_ids=list(range(NAN_TOKEN)),
    )
    found = [Request(f"r{i}", tuple(range(i, i + 20)), params, seed=i) for i in range(6)]
    engine = toy_engine(pages=8, longest=96)
    assert tokens(run(engine, found)) == solo(found)
    assert engine.stats().preemptions > 0


def test_a_step_that_is_computed_again_is_remembered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirostat's mu moves when a token is committed, not when it is drawn."""
    request = Request("a", (1, 2, 3), SamplingParams(max_tokens=20, mirostat=2, frequency_penalty=0.5), seed=5)
    expected = solo([request])
    calls, score = [], Sampler.score

    def fail_sometimes(self: Sampler, sequences: list[Sequence]) -> list[list[TokenLogprobs]]:
        calls.append(sequences)
        if len(calls) % 3 == 1:  # its tokens are drawn by now
            raise MemoryError
        return score(self, sequences)

    monkeypatch.setattr(Sampler, "score", fail_sometimes)
    assert tokens(run(toy_engine(), [request])) == expected
    assert len(calls) > len(expected["a"]) > 1


# --- what is remembered ----------------------------------------------------------------------------------------------


def state(prompt: list[int], words: TokenWords | None = None, **fields: Any) -> SamplingState:
    return SamplingState(Request("a", tuple(prompt), SamplingParams(**fields), words=words), 300, VOCAB)


def counted(found: SamplingState, token_ids: list[int]) -> dict[int, int]:
    (penalties,) = found.needs(token_ids).samplers or ()
    assert isinstance(penalties, Penalties)
    ids = penalties.ids.tolist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, penalties.counts.tolist(), strict=True))


TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=30)


@given(prompt=TOKENS, output=TOKENS, skip=st.integers(1, 5))
def test_counts_of_the_output(prompt: list[int], output: list[int], skip: int) -> None:
    found = state(prompt, repetition_penalty=1.5, presence_penalty=1)
    for end in range(0, len(output), skip):
        expected = Counter(output[:end])
        assert counted(found, prompt + output[:end]) == {t: expected[t] for t in {*prompt, *output[:end]}}
    assert counted(state(prompt, presence_penalty=1), prompt + output) == Counter(output)


@given(prompt=TOKENS, output=TOKENS, window=st.integers(-1, 12).filter(bool))
def test_counts_of_a_window(prompt: list[int], output: list[int], window: int) -> None:
    found = state(prompt, frequency_penalty=1, repeat_last_n=window)
    for end in range(len(output)):
        seen = prompt + output[:end]
        assert counted(found, seen) == Counter(seen if window < 0 else seen[-window:])


def test_many_different_tokens_are_counted() -> None:
    found = SamplingState(Request("a", (1,), SamplingParams(frequency_penalty=1)), 1000, 900)
    seen = [1, *range(800)]
    assert counted(found, seen) == dict.fromkeys(range(800), 1)


@pytest.mark.parametrize(("window", "expected"), [(-1, [1, 2, 3, 4]), (3, [2, 3, 4]), (64, [1, 2, 3, 4])])
def test_dry_looks_at_a_window(window: int, expected: list[int]) -> None:
    found = state([1, 2], dry_multiplier=1, dry_penalty_last_n=window)
    (dry,) = found.needs([1, 2, 3, 4]).samplers or ()
    assert isinstance(dry, Dry)
    assert dry.history.tolist() == expected


def test_mu_follows_the_committed_tokens() -> None:
    found = state([1], mirostat=2, mirostat_tau=3, mirostat_eta=0.5)

    def mu(token_ids: list[int]) -> float:
        (sampler,) = found.needs(token_ids).samplers or ()
        assert isinstance(sampler, Mirostat)
        return sampler.mu

    assert mu([1]) == 6
    found.surprised(1, 5.0)
    assert mu([1]) == 6  # the step was lost
    found.surprised(1, 4.0)
    assert mu([1, 9]) == 5.5
    assert mu([1, 9]) == 5.5


def test_bad_words() -> None:
    found = state([4, 8], TokenWords(((5,), (8, 9), (1, 2, 3), (1, 2, 4), (2, 6))))
    assert found.needs([4, 8]).mask is not None
    np.testing.assert_array_equal(found.needs([4, 8]).mask, bits_of(set(range(VOCAB)) - {5}, VOCAB))
    assert found.needs([4, 8]).banned is None  # of the output, not of the prompt
    for output, expected in (([8], [9]), ([1, 2], [3, 4, 6]), ([3, 2], [6]), ([1, 2, 7], None)):
        banned = found.needs([4, 8, *output]).banned
        assert (None if banned is None else banned.tolist()) == expected


def test_bad_words_and_min_tokens_ban_together() -> None:
    params = SamplingParams(max_tokens=12, min_tokens=12, logit_bias={7: 60, 9: 50, 5: 55}, temperature=0)
    request = Request("a", (1, 2), params, frozenset({7}), words=TokenWords(((5,), (9, 9))))
    (found,) = tokens(run(toy_engine(), [request])).values()
    assert len(found) == 12
    assert not {5, 7} & set(found)
    assert found[0] == 9
    assert found[1] != 9


# --- order -----------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "logit_bias": {1: 1.0},
    "frequency_penalty": 1.0,
    "dry_multiplier": 1.0,
    "top_n_sigma": 2.0,
    "temperature": 0.5,
    "dynatemp_range": 0.25,
    "typical_p": 0.9,
    "min_p": 0.1,
    "top_k": 5,
    "top_p": 0.8,
    "xtc_probability": 0.5,
}


def kinds(**fields: Any) -> list[type]:
    return [type(sampler) for sampler in state([1, 2], **fields).needs([1, 2]).samplers or ()]


def test_the_order_without_samplers() -> None:
    assert kinds(**EVERYTHING) == [
        Bias, Penalties, Dry, TopNSigma, Temperature, Typical, MinP, TopK, TopP, XTC,
    ]  # fmt: skip


def test_samplers_set_the_order_and_what_is_left_out_stays_off() -> None:
    assert kinds(**EVERYTHING, samplers=["top_k", "nucleus", "temp", "penalties"]) == [
        Bias, TopK, TopP, Temperature, Penalties,
    ]  # fmt: skip
    assert kinds(samplers="edskypmxt") == []


def test_mirostat_takes_the_place_of_what_truncates() -> None:
    assert kinds(**EVERYTHING, mirostat=1) == [Bias, Penalties, Dry, Temperature, Mirostat]
    (temperature,) = state([1], temperature=0.5, dynatemp_range=1, mirostat=2).needs([1]).samplers[:1]  # type: ignore[index]
    assert temperature == Temperature(0.5)


def test_what_comes_after_a_greedy_choice_is_left_out() -> None:
    assert kinds(**{**EVERYTHING, "temperature": 0}) == [Bias, Penalties, Dry]
    assert kinds(**{**EVERYTHING, "temperature": 0}, mirostat=2) == [Bias, Penalties, Dry]
    assert kinds(**{**EVERYTHING, "temperature": 0}, samplers=["xtc", "temperature", "top_k"]) == [Bias, XTC]


def test_plain_rows_need_nothing() -> None:
    plain = state([1], temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, repeat_last_n=64, dry_base=2, xtc_threshold=0.3)
    assert plain.is_plain
    assert plain.draws_plainly
    assert state([1], presence_penalty=1).draws_plainly
    assert not state([1], min_keep=2).draws_plainly


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("logit_bias", {VOCAB: 1}), ("allowed_token_ids", [1, VOCAB]), ("logprob_token_ids", [VOCAB])]
)
def test_ids_that_the_model_does_not_have(field: str, value: Any) -> None:
    request = Request("a", (1,), SamplingParams(**{field: value}))
    with pytest.raises(RequestError, match=f"{field}.*{VOCAB}.*ends at {VOCAB - 1}") as caught:
        toy_engine().add(request)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 2.1),
        ("repetition_penalty", 0),
        ("repeat_penalty", float("nan")),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {True: 1}),
        ("allowed_token_ids", 5),
        ("bad_words", ["x", 1]),
        ("samplers", [["top_k"]]),
        ("samplers", 5),
        ("samplers", ["top_k"] * 33),
        ("min_keep", -1),
        ("mirostat_tau", -1),
        ("dry_sequence_breakers", [""]),
    ],
)
def test_parameters_that_are_wrong(field: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


def test_repeat_penalty_is_another_name() -> None:
    params = SamplingParams(repeat_penalty=1.5)
    assert params == SamplingParams(repetition_penalty=1.5)
    assert replace(params, top_k=3).repetition_penalty == 1.5
    with pytest.raises(ParameterError, match=r"repeat_penalty.*repetition_penalty"):
        SamplingParams(repeat_penalty=1.5, repetition_penalty=1.2)


def test_a_row_that_allows_nothing_fails_alone() -> None:
    nothing = Request("a", (1,), SamplingParams(allowed_token_ids=[5]), words=TokenWords(((5,),)))
    other = Request("b", (1,), SamplingParams(max_tokens=4), seed=3)
    results = run(toy_engine(), [nothing, other])
    assert results["a"].error.endswith("leave no token to choose")
    assert results["b"].token_ids == solo([other])["b"]


def test_logprobs_are_raw_and_of_what_is_asked() -> None:
    plain = Request("a", (1, 2), SamplingParams(max_tokens=1, logprobs=5, temperature=0))
    bent = replace(
        plain, request_id="b", params=replace(plain.params, logit_bias={3: 90}, logprobs=None, logprob_token_ids=[8, 3])
    )
    results = run(toy_engine(), [plain, bent])
    assert results["b"].token_ids == [3]
    (first,), (second,) = (results[name].outputs[-1].logprobs or () for name in "ab")
    top = {token: (logprob, rank) for rank, (token, logprob) in enumerate(first.top, 1)}
    assert [token for token, _, _ in second.asked] == [8, 3]
    assert second.asked[1][1:] == (second.logprob, second.rank)
    assert second.top == ()
    for token, logprob, rank in second.asked:
        assert top.get(token, (logprob, rank)) == (logprob, rank)
    assert second.logprob <= first.logprob


def test_no_breakers() -> None:
    none = no_breakers(40)
    assert isinstance(none, Breakers)
    assert (none.single.tolist(), none.heads.tolist(), none.longer.tolist()) == ([0, 0], [0, 0], [])
