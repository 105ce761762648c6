from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.text.marking import Marker, all_words, strings_in


def nothing(text: str) -> list[tuple[int, int]]:
    return []


def test_all_strings_are_found() -> None:
    assert list(strings_in({"a": ["b", ("c", 1, None)], "d": {"e": "f"}})) == ["a", "b", "c", "d", "e", "f"]


def test_marked_words_are_found_again_wherever_they_go() -> None:
    marker = Marker(["ab c"])
    marked = marker.marked({"x": ["ab c", 1]}, all_words, nothing)
    text = marked["x"][0]
    assert "a" not in text
    assert marker.unmarked(f"-{text[1:]}-") == ("-b c-", [(1, 2), (3, 4)])


def test_trusted_roles_stay_and_others_are_marked() -> None:
    marker = Marker(["user", "evil"])
    marked = marker.marked([{"role": "user"}, {"role": "evil"}], all_words, nothing)
    assert marked[0] == {"role": "user"}
    assert marker.unmarked(marked[1]["role"]) == ("evil", [(0, 4)])


def test_private_use_characters_of_the_user_s_own_survive() -> None:
    own = "\U000f0000\U000f0001a"
    marker = Marker([own])
    assert marker.unmarked(marker.marked(own, all_words, nothing)) == (own, [(0, 3)])


@given(st.text(max_size=20), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20))))
def test_any_spans_overlapping_or_empty(text: str, pairs: list[tuple[int, int]]) -> None:
    spans = [(min(pair), min(max(pair), len(text))) for pair in pairs]
    marker = Marker([text])
    unmarked, found = marker.unmarked(marker.marked(text, lambda _: spans, nothing))
    assert unmarked == text
    marked = {i for start, end in spans for i in range(start, end)}
    assert marked == {i for start, end in found for i in range(start, end)}
