"""Drafts from earlier answers, held against a search of all of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.draft import Wanted
from shoal.engine.draft_suffix import GRAM, Answers, SuffixDrafter
from shoal.engine.engine import Engine, Request
from shoal.params import EngineConfig, SamplingParams
from tests.engine.toy import ToyBackend, run, solo, tokens, toy_model

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=25), max_size=5)


def matches(answers: list[list[int]], text: list[int], depth: int) -> dict[int, list[list[int]]]:
    """By length of the match, what followed the end of ``text`` in the answers, the latest first."""
    found: dict[int, list[list[int]]] = {}
    for answer in answers[::-1]:
        for place in range(len(answer) - 1, GRAM - 1, -1):
            before, match = answer[:place], 0
            while match < min(depth, len(text), place) and before[-1 - match] == text[-1 - match]:
                match += 1
            if match >= GRAM:
                found.setdefault(match, []).append(answer[place:])
    return found


@given(answers=TEXTS, text=st.lists(st.integers(0, 2), min_size=1, max_size=30), depth=st.integers(GRAM, 8))
def test_the_longest_match_of_all_answers_is_found(answers: list[list[int]], text: list[int], depth: int) -> None:
    memory = Answers(100, 512)
    for answer in answers:
        memory.add(answer)
    found = matches(answers, text, depth)
    if sum(map(len, found.values())) > 16:  # the latest places alone are looked at
        return
    length, places = memory.longest(text, depth)
    assert length == max(found, default=0)
    assert [memory.following([place], 99, 0.0) for place in places] == found.get(length, [])


def test_what_most_places_go_on_with_is_drafted() -> None:
    memory = Answers(100, 512)
    for end in ([7, 8, 9], [7, 8, 1], [7, 8, 9], [5, 5, 5]):
        memory.add([1, 2, 3, *end])
    _, places = memory.longest([1, 2, 3], 24)
    assert len(places) == 4
    assert memory.following(places, 10, 0.0) == [7, 8, 9]
    assert memory.following(places, 10, 0.7) == [7, 8]
    assert memory.following(places, 10, 0.8) == []
    assert memory.following(places, 1, 0.0) == [7]


@given(
    answers=st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=30),
    text=st.lists(st.integers(0, 3), max_size=9),
)
def test_what_was_written_over_is_not_found(answers: list[list[int]], text: list[int]) -> None:
    """A ring of 64: what is found follows the tokens that it should."""
    memory, whole = Answers(100, 64), list[int]()
    for answer in answers:
        memory.add(answer)
        if len(answer) > GRAM:
            whole += [*answer[-32:], -1]
    length, places = memory.longest(text, 9)
    for place in places:
        assert place > len(whole) - 64
        assert whole[place - length : place] == text[-length:]


def test_so_many_answers_are_remembered() -> None:
    memory = Answers(2, 512)
    for first in (1, 11, 21):
        memory.add(list(range(first, first + 6)))
    assert [memory.longest([first, first + 1, first + 2], 24)[0] for first in (1, 11, 21)] == [0, 3, 3]
    nothing = Answers(0, 512)
    nothing.add([1, 2, 3, 4])
    assert nothing.longest([1, 2, 3], 24) == (0, [])


def test_places_that_would_outgrow_their_numbers_begin_anew() -> None:
    memory = Answers(10, 512)
    memory.add([1, 2, 3, 4])
    memory._end = (1 << 30) + 1
    memory.add([5, 6, 7, 8])
    assert memory.longest([5, 6, 7], 24)[0] == 3
    assert memory.longest([1, 2, 3], 24)[0] == 0


def test_a_draft_is_as_long_as_its_match_allows() -> None:
    drafter = SuffixDrafter(20)
    drafter.ended("before", list(range(1, 30)))
    assert drafter.draft([Wanted("a", [90, 1, 2, 3], 20)]) == [[4, 5, 6]]
    assert drafter.draft([Wanted("a", [90, *range(1, 9)], 20)]) == [list(range(9, 17))]
    assert drafter.draft([Wanted("b", [90, 2, 3], 20)]) == [[]]


def test_the_text_itself_counts_too_and_the_longer_match_wins() -> None:
    drafter = SuffixDrafter(20)
    drafter.ended("before", [1, 2, 3, 4, 5])
    assert drafter.draft([Wanted("a", [9, 1, 2, 3, 8, 9, 1, 2, 3], 2)]) == [[8, 9]]
    drafter.ended("before", [9, 9, 1, 2, 3, 7, 7])
    assert drafter.draft([Wanted("b", [5, 1, 2, 3, 8, 9, 9, 1, 2, 3], 2)]) == [[7, 7]]
    assert set(drafter._own) == {"a", "b"}
    drafter.ended("a", [])
    assert set(drafter._own) == {"b"}


def test_the_same_request_again_takes_fewer_steps() -> None:
    params = SamplingParams(temperature=0.8, max_tokens=40)
    first, again = (Request(name, (1, 2, 3), params, seed=4) for name in ("first", "again"))
    config = EngineConfig(speculative_config={"method": "suffix"})
    engine = Engine(toy_model(), ToyBackend(), config, clock=lambda: 0.0, check_every_step=True)
    steps = []
    for request in (first, again):
        before = engine.stats().steps
        assert tokens(run(engine, [request])) == solo([request])
        steps.append(engine.stats().steps - before)
    assert steps[0] >= 18
    assert steps[1] <= steps[0] / 2
