"""Steps on their way to the device: rows, page tables, padding, and the lists of attention's work."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.kernels.base import StepInput, StepLimits
from shoal.kernels.cuda.step import CHUNK_ROWS, SHORT_ROWS, StagedStep, StepArrays, plan
from shoal.kernels.reference import PIECE

LIMITS = StepLimits(max_rows=400, max_seqs=6, max_pages_per_seq=80)
SCRATCH = [500, 700]


def make_step(spans: list[tuple[int, int]]) -> StepInput:
    """One sequence for each (first position, one past the last); page p of sequence s in group g is 100 g + 10 s + p."""
    counts = [stop - first for first, stop in spans]
    starts = np.cumsum([0, *counts]).astype(np.int32)
    positions = np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])
    table = np.add.outer(
        np.add.outer(100 * np.arange(2), 10 * np.arange(len(spans))), np.arange(LIMITS.max_pages_per_seq)
    )
    kv_len = np.array([stop for _, stop in spans], np.int32)
    return StepInput(positions + 7, positions, starts, kv_len, table.astype(np.int32))


def pages_of(arrays: StepArrays, group: int, sequence: int) -> list[int]:
    stride = int(arrays.table_stride[0])
    start = (sequence * arrays.groups + group) * stride
    return [int(page) for page in arrays.page_table[start : start + stride]]


@pytest.mark.parametrize("bucket", [None, 7, 32])
def test_what_the_device_gets(bucket: int | None) -> None:
    staged = StagedStep(LIMITS, SCRATCH, 100)
    staged.set(make_step([(0, 300), (5, 9)]))  # what was there before does not matter
    step = make_step([(0, 3), (40, 41), (16, 19)])
    arrays = staged.set(step, bucket)
    rows = bucket or 7
    pad = rows - 7
    assert arrays.rows == rows
    assert arrays.token_ids[:rows].tolist() == [*step.token_ids, *[0] * pad]
    assert arrays.positions[:rows].tolist() == [*step.positions, *[0] * pad]
    assert arrays.row_seq[:rows].tolist() == [0, 0, 0, 1, 2, 2, 2, *[3] * pad]
    assert arrays.kv_len[:4].tolist() == [3, 41, 19, 0]
    assert [pages_of(arrays, 1, s) for s in (0, 1, 3)] == [[100, 101, 102], [110, 111, 112], [700] * 3]
    assert pages_of(arrays, 0, 3) == [500] * 3
    assert arrays.num_singles == 1 + pad
    assert arrays.singles[: 1 + pad].tolist() == [[1, 3, 1, -1], *([3, row, 1, -1] for row in range(7, rows))]
    assert arrays.shorts[: arrays.num_shorts].tolist() == [[0, 0, 3, -1], [2, 4, 3, -1]]
    assert arrays.num_chunks == 0
    assert not arrays.only_singles
    assert staged.set(make_step([(5, 6), (300, 301)]), bucket).only_singles


def test_its_addresses_stay() -> None:
    staged = StagedStep(LIMITS, SCRATCH, 100)
    first = staged.set(make_step([(0, 5)]))
    addresses = first.token_ids.data_ptr(), first.page_table.data_ptr(), first.chunks.data_ptr()
    for stop in (3, 9, 12):
        again = staged.set(make_step([(2, stop), (0, 1)]))
        assert again.rows == stop - 1
        assert (again.token_ids.data_ptr(), again.page_table.data_ptr(), again.chunks.data_ptr()) == addresses


def test_many_rows_are_chunks_and_every_row_is_in_one() -> None:
    step = make_step([(0, 2 * CHUNK_ROWS), (3, 4 + CHUNK_ROWS), (9, 10), (0, SHORT_ROWS + 1), (1, SHORT_ROWS + 1)])
    singles, shorts, chunks = plan(step, len(step.token_ids), 100)
    starts = step.row_start.tolist()
    assert singles.tolist() == [[2, starts[2], 1, -1]]
    assert shorts.tolist() == [[4, starts[4], SHORT_ROWS, -1]]
    assert chunks.tolist() == [
        [0, 0, CHUNK_ROWS, -1],
        [0, CHUNK_ROWS, CHUNK_ROWS, -1],
        [1, starts[1], CHUNK_ROWS, -1],
        [1, starts[1] + CHUNK_ROWS, 1, -1],
        [3, starts[3], SHORT_ROWS + 1, -1],
    ]


def test_singles_of_several_pieces_have_records_and_are_chunks_without_room() -> None:
    stops = [PIECE, PIECE + 1, 3 * PIECE, 4 * PIECE]
    step = make_step([(stop - 1, stop) for stop in stops])
    singles, shorts, chunks = plan(step, 4, 9)
    assert singles.tolist() == [[0, 0, 1, -1], [1, 1, 1, 0], [2, 2, 1, 2], [3, 3, 1, 5]]
    assert not len(shorts)
    assert not len(chunks)
    singles, _, chunks = plan(step, 4, 8)
    assert singles[:, 0].tolist() == [0, 1, 2]
    assert chunks.tolist() == [[3, 3, 1, -1]]
    singles, _, chunks = plan(step, 4, 0)
    assert singles[:, 0].tolist() == [0]
    assert chunks[:, 0].tolist() == [1, 2, 3]


def test_each_row_of_a_short_has_records() -> None:
    step = make_step([(PIECE, PIECE + 3), (PIECE, PIECE + 1), (0, 2), (2 * PIECE, 2 * PIECE + 4)])
    singles, shorts, chunks = plan(step, 10, 2 * 3 + 2 + 3 * 4)
    assert singles.tolist() == [[1, 3, 1, 6]]
    assert shorts.tolist() == [[0, 0, 3, 0], [2, 4, 2, -1], [3, 6, 4, 8]]
    assert not len(chunks)
    singles, shorts, chunks = plan(step, 10, 2 * 3 + 2 + 3 * 4 - 1)
    assert singles.tolist() == [[1, 3, 1, 6]]
    assert shorts.tolist() == [[0, 0, 3, 0], [2, 4, 2, -1]]
    assert chunks.tolist() == [[3, 6, 4, -1]]
