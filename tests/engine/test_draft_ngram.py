"""N-grams of a text, held against a search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.draft import Wanted
from shoal.engine.draft_ngram import NgramDrafter, NgramIndex
from shoal.engine.engine import Engine, Request
from shoal.params import EngineConfig, SamplingParams
from tests.engine.toy import ToyBackend, run, solo, tokens, toy_model


def searched(text: list[int], least: int, most: int, count: int) -> list[int]:
    """What followed the longest n-gram of the end, where that came last before."""
    for size in range(most, least - 1, -1):
        for place in range(len(text) - 1, size - 1, -1):
            if len(text) > size and text[place - size : place] == text[-size:]:
                draft = text[place : place + count]
                return (draft * count)[:count]
    return []


@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=60), least=st.integers(1, 3), more=st.integers(0, 3))
def test_the_longest_and_latest_is_found(text: list[int], least: int, more: int) -> None:
    assert NgramIndex(range(least + more, least - 1, -1)).draft(text, 5) == searched(text, least, least + more, 5)


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=60), cuts=st.sets(st.integers(1, 60)), most=st.integers(1, 4)
)
def test_a_text_that_grows_has_the_drafts_of_one_that_is_new_or_goes_on_with_the_last(
    text: list[int], cuts: set[int], most: int
) -> None:
    index, before, source = NgramIndex(range(most, 0, -1)), 0, list[int]()
    for cut in sorted(cuts):
        grown = text[:cut]
        draft = index.draft(list(grown), 80)
        came = grown[before:]
        if source and came == source[: len(came)]:
            source = source[len(came) :]
            assert draft[: len(source)] == source[:80]
        else:
            assert draft == searched(grown, 1, most, 80)
        before, source = len(grown), draft


def test_a_copy_goes_on_where_it_is_although_its_last_tokens_came_elsewhere_too() -> None:
    index = NgramIndex(range(2, 0, -1))
    prompt = [1, 2, 3, 4, 5, 6, 9, 9, 3, 4, 7, 7]
    assert index.draft([*prompt, 1, 2], 2) == [3, 4]
    assert index.draft([*prompt, 1, 2, 3, 4], 2) == [5, 6]
    assert NgramIndex(range(2, 0, -1)).draft([*prompt, 1, 2, 3, 4], 2) == [7, 7]


def test_each_text_has_an_index_until_it_ends() -> None:
    drafter = NgramDrafter(4, 1, 2)
    assert drafter.draft([Wanted("a", [1, 2, 1], 2), Wanted("b", [5, 5], 3)]) == [[2, 1], [5, 5, 5]]
    assert len(drafter._texts) == 2
    for key in ("a", "b", "c"):
        drafter.ended(key, [])
    assert not drafter._texts


def test_an_engine_has_fewer_steps_where_a_text_repeats() -> None:
    """Two tokens alone: of eight, the last two have mostly come before."""
    params = SamplingParams(temperature=1.0, max_tokens=60, allowed_token_ids=[5, 6], logit_bias={5: 4.0})
    requests = [Request(f"r{i}", (1, 2, 3), params, seed=i) for i in range(3)]
    backend = ToyBackend()
    config = EngineConfig(speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2})
    engine = Engine(toy_model(), backend, config, clock=lambda: 0.0, check_every_step=True)
    assert tokens(run(engine, requests)) == solo(requests)
    stats = engine.stats()
    assert stats.spec_decode_num_accepted_tokens > 60
    assert stats.steps < 50
    assert engine._speculation is not None
