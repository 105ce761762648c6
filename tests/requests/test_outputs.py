"""Stop strings and growing outputs, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.engine import Metrics, Output, TokenLogprobs
from shoal.params import SamplingParams
from shoal.requests.outputs import Generation, StopFinder

few_letters = st.text("ab\u00e9", max_size=30)
stop_strings = st.lists(st.text("ab\u00e9", min_size=1, max_size=5), max_size=4).map(tuple)


def pushed(finder: StopFinder, pieces: list[str]) -> list[str]:
    return [finder.push(piece) for piece in pieces]


def naive(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character: the first moment at which the text ends with a stop string, the longest of them."""
    for end in range(1, len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            return text[: end - len(found)], found
    return text, None


@given(st.lists(few_letters, max_size=6), stop_strings)
def test_any_cut_of_the_text_gives_what_a_naive_search_gives(pieces: list[str], stops: tuple[str, ...]) -> None:
    finder = StopFinder(stops)
    shown = "".join(pushed(finder, pieces))
    assert (shown + finder.flush(), finder.found) == naive("".join(pieces), stops)


@given(few_letters, stop_strings)
def test_nothing_is_shown_that_a_stop_string_may_still_take_back(text: str, stops: tuple[str, ...]) -> None:
    """And nothing is held back for longer than it has to be."""
    finder, shown = StopFinder(stops), ""
    for end, char in enumerate(text, start=1):
        shown += finder.push(char)
        if finder.found is not None:
            break
        begun = [n for stop in stops for n in range(1, len(stop)) if text[:end].endswith(stop[:n])]
        assert shown == text[: end - max(begun, default=0)]


def test_a_stop_string_across_pieces_never_leaks() -> None:
    finder = StopFinder(("END",))
    assert pushed(finder, ["some E", "N", "D and more", "later"]) == ["some ", "", "", ""]
    assert (finder.found, finder.flush()) == ("END", "")


def test_a_false_start_is_shown_after_all() -> None:
    finder = StopFinder(("aab",))
    assert pushed(finder, ["a", "a", "a", "c"]) == ["", "", "a", "aac"]


def test_what_is_held_back_comes_at_the_end() -> None:
    finder = StopFinder(("\n\n",))
    assert pushed(finder, ["text\n"]) == ["text"]
    assert (finder.flush(), finder.flush()) == ("\n", "")


def test_the_stop_string_can_be_kept() -> None:
    finder = StopFinder((".", "!"), include=True)
    assert pushed(finder, ["One. Two"]) == ["One."]


def generation(**params: object) -> Generation:
    return Generation("r", None, [1], SamplingParams(**params), None, [])  # type: ignore[arg-type]


def step(*ids: int, **fields: object) -> Output:
    return Output("r", Metrics(0.0), new_token_ids=ids, **fields)  # type: ignore[arg-type]


def test_a_snapshot_does_not_grow() -> None:
    growing = generation()
    growing.take(step(5))
    early = growing.snapshot()
    growing.take(step(6, finished=True, finish_reason="length"))
    late = growing.snapshot()
    assert (early.outputs[0].token_ids, early.finished, early.outputs[0].finish_reason) == ([5], False, None)
    assert (late.outputs[0].token_ids, late.finished, late.outputs[0].finish_reason) == ([5, 6], True, "length")
    assert growing.sink == [growing, growing]


def test_logprobs_hold_the_chosen_token_first_and_sum_up() -> None:
    growing = generation(logprobs=2)
    growing.take(step(7, logprobs=(TokenLogprobs(7, -3.0, 4, ((5, -0.5), (6, -1.0))),)))
    growing.take(step(5, logprobs=(TokenLogprobs(5, -0.25, 1, ((5, -0.25), (6, -2.0))),)))
    answer = growing.snapshot().outputs[0]
    assert answer.logprobs is not None
    assert [[(token, entry.logprob, entry.rank) for token, entry in place.items()] for place in answer.logprobs] == [
        [(7, -3.0, 4), (5, -0.5, 1), (6, -1.0, 2)],
        [(5, -0.25, 1), (6, -2.0, 2)],
    ]
    assert answer.cumulative_logprob == pytest.approx(-3.25)


def test_prompt_logprobs_stay_and_have_none_for_the_first_token() -> None:
    growing = generation(prompt_logprobs=1)
    assert growing.snapshot().prompt_logprobs is None
    growing.take(
        step(5, prompt_logprobs=(TokenLogprobs(7, -3.0, 4, ((5, -0.5),)), TokenLogprobs(5, -0.25, 1, ((5, -0.25),))))
    )
    growing.take(step(6))
    found = growing.snapshot().prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert [[(token, entry.logprob, entry.rank) for token, entry in (place or {}).items()] for place in found[1:]] == [
        [(7, -3.0, 4), (5, -0.5, 1)],
        [(5, -0.25, 1)],
    ]


def test_without_logprobs_there_are_none() -> None:
    assert generation().snapshot().prompt_logprobs is None
    answer = generation().snapshot().outputs[0]
    assert answer.logprobs is None
    assert answer.cumulative_logprob is None


def test_samples_end_each_by_itself_and_the_request_with_the_last() -> None:
    growing = generation(n=3)
    assert not growing.take(step(5, sample=2, finished=True, finish_reason="length"))
    assert not growing.take(step(6))
    assert not growing.take(step(7, sample=1, finished=True, finish_reason="stop"))
    early = growing.snapshot()
    assert not growing.take(step(8, finished=True, finish_reason="length"))
    late = growing.snapshot()
    assert [answer.index for answer in late.outputs] == [0, 1, 2]
    assert [answer.token_ids for answer in early.outputs] == [[6], [7], [5]]
    assert [answer.token_ids for answer in late.outputs] == [[6, 8], [7], [5]]
    assert (early.finished, late.finished) == (False, True)
    assert [answer.finish_reason for answer in late.outputs] == ["length", "stop", "length"]


def test_what_comes_after_the_end_of_a_sample_is_nothing() -> None:
    growing = generation(n=2)
    growing.take(step(5, sample=1, finished=True, finish_reason="length"))
    del growing.sink[:]
    assert not growing.take(step(6, sample=1, finished=True, finish_reason="abort"))
    assert growing.sink == []
    assert growing.snapshot().outputs[1].token_ids == [5]


def test_an_abort_ends_the_samples_that_have_not_ended() -> None:
    growing = generation(n=2)
    growing.take(step(5, sample=1, finished=True, finish_reason="stop"))
    assert not growing.aborted
    growing.abort()
    assert growing.aborted
    assert [answer.finish_reason for answer in growing.snapshot().outputs] == ["abort", "stop"]


def test_the_error_of_any_sample_is_that_of_the_request() -> None:
    growing = generation(n=2)
    growing.take(step(5, finished=True, finish_reason="stop"))
    growing.take(step(sample=1, finished=True, finish_reason="error", error="NaN"))
    assert growing.snapshot().error == "NaN"
