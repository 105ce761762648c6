"""A set of rows behaves as a set of numbers, in a bit for each."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from shoal.jobs.durable.rowset import RowSet

ROWS = st.sets(st.integers(0, 200))


def row_set(rows: set[int]) -> RowSet:
    made = RowSet()
    for row in rows:
        made.add(row)
        made.add(row)  # no difference
    return made


def members(rows: RowSet) -> set[int]:
    return {row for row in range(300) if row in rows}


@given(ROWS)
def test_holds_what_was_added(rows: set[int]) -> None:
    assert members(row_set(rows)) == rows
    assert len(row_set(rows)) == len(rows)


@given(ROWS, ROWS)
def test_removes_another_set(rows: set[int], others: set[int]) -> None:
    left = row_set(rows)
    left.remove_all(row_set(others))
    assert members(left) == rows - others
    assert len(left) == len(rows - others)
    left.add(7)
    assert members(left) == (rows - others) | {7}


def test_a_million_rows_take_a_bit_each() -> None:
    rows = RowSet()
    for row in range(1, 1_000_001):
        rows.add(row)
    assert len(rows) == 1_000_000
    assert sys.getsizeof(rows._bits) < 200_000
