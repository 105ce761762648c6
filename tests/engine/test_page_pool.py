from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.engine.page_pool import PagePool


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
def test_check_finds_a_page_with_two_owners(owned: list[list[int]]) -> None:
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="has two owners"):
        pool.check(owned)


class PoolMachine(RuleBasedStateMachine):
    """Any run of allocations and releases keeps each page in exactly one place."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12)
        self.owned: list[list[int]] = []

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            pages = self.pool.allocate(count)
            assert len(pages) == count
            self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check(self.owned)
        assert self.pool.num_free == 12 - sum(map(len, self.owned))


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase
