from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.text.special import SpecialToken, SpecialTokens

LETTERS = st.text("ab<>\n ", min_size=1, max_size=6)


def tokens(*texts: str, control: bool = False, lstrip: bool = False, rstrip: bool = False) -> SpecialTokens:
    return SpecialTokens(SpecialToken(text, i, control, lstrip, rstrip) for i, text in enumerate(texts))


def cut_fragments(text: str, texts: list[str]) -> list[str | int]:
    """The same by llama.cpp's own procedure: every token in turn, longest first, cuts the fragments that are left."""
    fragments: list[str | int] = [text]
    for token in sorted(texts, key=lambda token: (-len(token.encode()), texts.index(token))):
        cut: list[str | int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                cut.append(fragment)
                continue
            for i, part in enumerate(fragment.split(token)):
                cut += [texts.index(token), part] if i else [part]
        fragments = cut
    return [fragment for fragment in fragments if fragment != ""]


@given(st.lists(LETTERS, unique=True, max_size=8), st.text("ab<>\n ", max_size=40))
def test_cutting_is_longest_first(texts: list[str], text: str) -> None:
    assert list(tokens(*texts).cut(text, control=False)) == cut_fragments(text, texts)


@given(st.text("u0123<>n", max_size=200))
def test_a_large_family_of_tokens_is_found_as_a_small_one_is(text: str) -> None:
    family = [f"<u{i}>" for i in range(300)]
    found = list(tokens(*family).cut(text + "<u7><u299>", control=False))
    assert found == cut_fragments(text + "<u7><u299>", family)


def test_length_counts_in_bytes() -> None:
    assert list(tokens("aab", "b\u4f60").cut("aab\u4f60", control=False)) == ["aa", 1]


def test_white_space_goes_with_a_token_that_strips() -> None:
    assert list(tokens("<e>", rstrip=True).cut("a <e> \n b<e>  ", control=False)) == ["a ", 0, "b", 0]


def test_white_space_goes_with_a_token_that_strips_before_it() -> None:
    assert list(tokens("<e>", lstrip=True).cut("a \n<e> b <e><e>", control=False)) == ["a", 0, " b", 0, 0]


def test_control_tokens_stay_text_unless_asked_for() -> None:
    special = tokens("<e>", control=True)
    assert list(special.cut("a<e>", control=False)) == ["a<e>"]
    assert list(special.cut("a<e>", control=True)) == ["a", 0]
    assert list(special.cut("<e><e><e>", control=True, user_spans=[(4, 5)])) == [0, "<e>", 0]


def test_spellings_of_control_tokens_with_overlaps() -> None:
    special = tokens("<<", "<a>", control=True)
    assert sorted(special.control_spans("<<<a>")) == [(0, 2), (1, 3), (2, 5)]
    assert tokens("<a>").control_spans("<a>") == []
