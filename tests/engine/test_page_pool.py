from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.engine.page_pool import Origin, PagePool

SOUND = Origin(sound=True)
SOUND_OR_NOT = st.sampled_from([None, True, False])


def keys(names: str) -> list[bytes]:
    return [name.encode() for name in names]


def registered(pool: PagePool, names: str) -> list[int]:
    """A page for each letter, in use and registered under it."""
    pages = pool.allocate(len(names))
    pool.register(keys(names), pages, SOUND)
    return pages


def test_low_ids_go_first_and_released_ones_are_reused_first() -> None:
    pool = PagePool(5)
    first, second = pool.allocate(2), pool.allocate(1)
    assert (first, second) == ([0, 1], [2])
    pool.release(first)
    assert pool.allocate(3) == [0, 1, 3]


def test_release_twice_is_caught() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="page 0 released twice"):
        pool.release(pages)


def test_more_than_there_is_is_caught() -> None:
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        PagePool(2).allocate(3)


def test_check_finds_a_leak() -> None:
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="page 0 has leaked"):
        pool.check([])


@pytest.mark.parametrize("owned", [[[0], [0]], [[0, 0]], [[0], [2]]])
def test_check_finds_a_page_with_more_owners_than_it_knows_of(owned: list[list[int]]) -> None:
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(AssertionError, match=r"page [02] has [12] owners and [01] references"):
        pool.check(owned)


# --- registered pages


def test_a_registered_page_is_found_while_it_is_used_and_afterwards() -> None:
    pool = PagePool(4)
    pages = registered(pool, "ab")
    assert pool.share(keys("ab")) == pages == [0, 1]
    pool.check([pages, pages])
    pool.release(pages)
    assert (pool.num_free, pool.num_idle(keys("ab"))) == (2, 0)
    pool.release(pages)
    assert (pool.num_free, pool.num_idle(keys("ab"))) == (4, 2)
    assert pool.share(keys("b")) == [1]
    assert (pool.num_free, pool.num_idle(keys("ab"))) == (3, 1)
    pool.check([[1]])


def test_pages_that_hold_nothing_go_before_those_that_hold_something() -> None:
    pool = PagePool(5)
    pool.release(registered(pool, "ab"))
    rest = pool.allocate(3)
    assert rest == [2, 3, 4]
    pool.release(rest[1:])
    assert pool.allocate(2) == [3, 4]
    assert all(key in pool for key in keys("ab"))


def test_the_least_recently_used_goes_first_and_of_those_given_back_together_the_last() -> None:
    pool = PagePool(6)
    old, new = registered(pool, "abc"), registered(pool, "xyz")
    pool.release(old)
    pool.release(new)
    pool.release(pool.share(keys("ab")))  # used again: now xyz are older
    assert pool.allocate(1) == [2]
    assert b"c" not in pool
    assert pool.allocate(3) == [5, 4, 3]
    assert pool.allocate(1) == [1]
    assert [key in pool for key in keys("abcxyz")] == [True] + [False] * 5


def test_the_first_page_of_a_key_stays() -> None:
    pool = PagePool(4)
    first, second = registered(pool, "a"), registered(pool, "a")
    pool.release(second)
    assert pool.share(keys("a")) == first == [0]
    assert pool.allocate(1) == second == [1]
    pool.check([first, first, second])


def test_only_pages_of_a_sound_origin_are_found() -> None:
    pool, origin = PagePool(2), Origin()
    pool.register([b"a"], pool.allocate(1), origin)
    for sound in (None, True, False):
        origin.sound = sound
        assert (b"a" in pool) == (sound is True)


def test_pages_that_may_yet_be_sound_keep_their_place() -> None:
    pool, origin = PagePool(3), Origin()
    first = pool.allocate(1)
    pool.register([b"a"], first, origin)
    registered(pool, "a")
    assert b"a" not in pool
    origin.sound = True
    assert pool.share([b"a"]) == first


@pytest.mark.parametrize("released", [True, False])
def test_pages_that_are_never_found_make_way(released: bool) -> None:
    pool = PagePool(3)
    bad = pool.allocate(1)
    pool.register([b"a"], bad, Origin(sound=False))
    if released:
        pool.release(bad)
    pages = registered(pool, "a")
    assert pool.share([b"a"]) == pages
    if not released:
        pool.release(bad)
    pool.check([pages, pages])
    assert pool.allocate(2)[0] == bad[0]  # holds nothing any more


def test_a_page_is_registered_only_while_it_is_in_use() -> None:
    with pytest.raises(AssertionError, match="page 1 is registered and not in use"):
        PagePool(2).register([b"a"], [1], SOUND)


class PoolMachine(RuleBasedStateMachine):
    """Any run of calls, beside a model that knows the content of each page and in which order they should go.

    ``free``: those that hold nothing, next one last. ``idle``: keys of those that hold something, next one first.
    """

    num_pages = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.num_pages)
        self.owned: list[list[int]] = []
        self.free = list(range(self.num_pages - 1, -1, -1))
        self.idle: list[bytes] = []
        self.content: dict[bytes, tuple[int, Origin]] = {}

    @property
    def key_of(self) -> dict[int, bytes]:
        return {page: key for key, (page, _) in self.content.items()}

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        assert self.pool.num_free == len(self.free) + len(self.idle)
        if count > self.pool.num_free:
            return
        expected = []
        for _ in range(count):
            if not self.free:
                self.free.append(self.content.pop(self.idle.pop(0))[0])
            expected.append(self.free.pop())
        self.owned.append(self.pool.allocate(count))
        assert self.owned[-1] == expected

    @precondition(lambda self: any(self.owned))
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from([pages for pages in self.owned if pages]))
        page = data.draw(st.sampled_from(pages))
        key, origin = data.draw(st.sampled_from(keys("abcdef"))), Origin(data.draw(SOUND_OR_NOT))
        if page in self.key_of:
            return
        self.pool.register([key], [page], origin)
        if key in self.content:
            held, earlier = self.content[key]
            if earlier.sound is not False:
                return
            if key in self.idle:
                self.idle.remove(key)
                self.free.append(held)
        self.content[key] = page, origin

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def judge(self, data: st.DataObject) -> None:
        _, origin = self.content[data.draw(st.sampled_from(sorted(self.content)))]
        origin.sound = data.draw(SOUND_OR_NOT)

    @rule(wanted=st.lists(st.sampled_from(keys("abcdef")), unique=True, max_size=4))
    def share(self, wanted: list[bytes]) -> None:
        found = [key for key in wanted if key in self.pool]
        assert found == [key for key in wanted if key in self.content and self.content[key][1].sound]
        assert self.pool.num_idle(found) == sum(key in self.idle for key in found)
        self.owned.append(self.pool.share(found))
        assert self.owned[-1] == [self.content[key][0] for key in found]
        self.idle = [key for key in self.idle if key not in found]

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.release(pages)
        still = {page for others in self.owned for page in others}
        for page in reversed(pages):
            if page in still:
                continue
            if page in self.key_of:
                self.idle.append(self.key_of[page])
            else:
                self.free.append(page)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check(self.owned)
        used = Counter(page for pages in self.owned for page in pages)
        assert self.pool.num_free == self.num_pages - len(used)


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
