from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.kv_group import PageUse


def seen(window: int, first: int, stop: int) -> range:
    """The positions that a step over positions ``first`` to ``stop`` - 1 reads."""
    return range(max(0, first - window + 1) if window else 0, stop)


@given(
    page_size=st.integers(1, 8),
    window=st.integers(0, 40),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    longest=st.integers(0, 100),
)
def test_pages_of_a_sequence(page_size: int, window: int, chunks: list[int], longest: int) -> None:
    """Against all positions, one by one, while chunks of any size are computed."""
    use = PageUse(page_size, max(chunks), window)
    tokens, most, first = sum(chunks), 0, 0
    for chunk in chunks:
        needed = {p // page_size for p in seen(window, first, first + chunk)}
        assert use.num_passed(first) == min(needed)
        most, first = max(most, len(needed)), first + chunk
    assert most <= use.most_pages(tokens) <= -(-tokens // page_size)
    if window:
        assert use.most_pages(tokens) <= -(-(window + max(chunks)) // page_size) + 1
    assert use.settled_pages(tokens) == PageUse(page_size, 1, window).most_pages(tokens)


@given(page_size=st.integers(1, 8), window=st.integers(1, 40), chunk=st.integers(1, 20))
def test_the_most_pages_are_reached(page_size: int, window: int, chunk: int) -> None:
    use, long = PageUse(page_size, chunk, window), 1000
    counts = (len({p // page_size for p in seen(window, first, first + chunk)}) for first in range(200, 240))
    assert max(counts) == use.most_pages(long)


@given(
    page_size=st.integers(1, 8),
    window=st.integers(0, 40),
    chunk=st.integers(1, 20),
    pages=st.integers(1, 40),
    longest=st.integers(1, 200),
)
def test_most_tokens_is_the_inverse_of_most_pages(
    page_size: int, window: int, chunk: int, pages: int, longest: int
) -> None:
    use = PageUse(page_size, chunk, window)
    fit = [tokens for tokens in range(1, longest + 1) if use.most_pages(tokens) <= pages]
    assert use.most_tokens(pages, longest) == max(fit)
