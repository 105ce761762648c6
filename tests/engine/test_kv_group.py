from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.kv_group import PageGroup, PageUse, longest_prefix
from shoal.engine.page_pool import Origin, PagePool


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


# --- pages that a sequence can begin with

KEYS = [bytes([index]) for index in range(30)]


def group_with(use: PageUse, indices: set[int], pages: int = len(KEYS)) -> PageGroup:
    """A group whose pool has registered some of KEYS; nobody uses them."""
    pool = PagePool(pages)
    kept = pool.allocate(len(indices))
    pool.register([KEYS[index] for index in sorted(indices)], kept, Origin(sound=True))
    pool.release(kept)
    return PageGroup(pool, use)


def before(use: PageUse, computed: int) -> set[int]:
    """Pages of the positions among the first ``computed`` that the token after them sees."""
    first = seen(use.window, computed, computed + 1).start
    return {position // use.page_size for position in range(first, computed)}


@given(
    page_size=st.integers(1, 5),
    known=st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(0, 29), max_size=5)), min_size=1, max_size=3),
    count=st.integers(0, 30),
)
def test_the_longest_prefix_is_the_most_pages_after_which_nothing_is_missing(
    page_size: int, known: list[tuple[int, set[int]]], count: int
) -> None:
    """Against all counts, one by one; ``known``: window of each group and the pages that it lacks."""
    groups = [group_with(PageUse(page_size, 8, window), set(range(30)) - lacks) for window, lacks in known]
    fits = [
        n
        for n in range(count + 1)
        if all(
            before(group.use, n * page_size).isdisjoint(lacks) for group, (_, lacks) in zip(groups, known, strict=True)
        )
    ]
    assert longest_prefix(groups, KEYS[:count]) == max(fits)


@given(
    page_size=st.integers(1, 5),
    window=st.integers(0, 20),
    chunk=st.integers(1, 12),
    shared=st.integers(0, 12),
    more=st.integers(1, 40),
    pages=st.integers(12, 30),
    in_use=st.integers(0, 12),
    taken=st.integers(0, 30),
)
def test_a_sequence_that_has_room_never_runs_out_of_it(
    page_size: int, window: int, chunk: int, shared: int, more: int, pages: int, in_use: int, taken: int
) -> None:
    """Chunk by chunk, where others use some of the shared pages and ``taken`` further ones."""
    use = PageUse(page_size, chunk, window)
    group = group_with(use, set(range(shared)), pages)
    group.pool.share(KEYS[: min(in_use, shared)])
    group.pool.allocate(min(taken, group.pool.num_free - (shared - min(in_use, shared))))
    tokens, keys = shared * page_size + more, KEYS[:shared]
    room = group.has_room(tokens, keys)
    held = group.share(keys)
    assert held[: use.num_passed(shared * page_size)] == [0] * use.num_passed(shared * page_size)
    computed, fits = shared * page_size, True
    while computed < tokens and fits:
        stop = min(tokens, computed + chunk)
        short = -(-stop // page_size) - len(held)
        fits = short <= group.pool.num_free
        if fits:
            held += group.pool.allocate(short)
            group.pool.release(held[use.num_passed(computed) : use.num_passed(stop)])
            computed = stop
    assert fits or not room
    if not window:
        assert fits == room
