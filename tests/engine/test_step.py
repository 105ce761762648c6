from __future__ import annotations

import numpy as np

from shoal.engine.scheduler import StepBatch
from shoal.engine.sequence import Metrics, Request, Sequence
from shoal.engine.step import SampleArrays, StepArrays
from shoal.kernels.base import StepLimits
from shoal.params import SamplingParams


def sequence(name: str, tokens: list[int], pages: list[list[int]], computed: int = 0, **fields: object) -> Sequence:
    request = Request(name, tuple(tokens), SamplingParams(**fields), seed=-1)  # type: ignore[arg-type]
    seq = Sequence(request, 100, Metrics(0.0))
    seq.pages, seq.num_computed = pages, computed
    return seq


def test_sequences_lie_end_to_end() -> None:
    arrays = StepArrays(StepLimits(max_rows=8, max_seqs=3, max_pages_per_seq=4), num_groups=2)
    batch = StepBatch()
    batch.add(sequence("decode", [1, 2, 3], [[7], [0]], computed=2), 1)
    batch.add(sequence("chunk", list(range(20, 40)), [[2, 5], [6, 1]], computed=16), 3)
    step = arrays.fill(batch)
    assert step.token_ids.tolist() == [3, 36, 37, 38]
    assert step.positions.tolist() == [2, 16, 17, 18]
    assert step.row_start.tolist() == [0, 1, 4]
    assert step.kv_len.tolist() == [3, 19]
    assert step.page_table[:, :, :2].tolist() == [[[7, 0], [2, 5]], [[0, 0], [6, 1]]]
    assert {getattr(step, name).dtype for name in step.__slots__} == {np.dtype(np.int32)}


def test_the_page_table_follows_growth_loss_and_moves() -> None:
    arrays = StepArrays(StepLimits(max_rows=8, max_seqs=2, max_pages_per_seq=4), num_groups=2)
    a, b = sequence("a", [1] * 60, [[1], [2]]), sequence("b", [1] * 60, [[9, 8], [6, 7]])

    def table(*sequences: Sequence) -> list[list[list[int]]]:
        batch = StepBatch()
        for seq in sequences:
            batch.add(seq, 1)
        rows = arrays.fill(batch).page_table
        return [rows[:, i, : len(seq.pages[0])].tolist() for i, seq in enumerate(sequences)]

    assert table(a, b) == [a.pages, b.pages] == [[[1], [2]], [[9, 8], [6, 7]]]
    for pages, page in zip(a.pages, (4, 5), strict=True):
        pages.append(page)
    assert table(a, b) == [a.pages, b.pages] == [[[1, 4], [2, 5]], [[9, 8], [6, 7]]]
    assert table(b) == [b.pages]
    assert table(a, b) == [a.pages, b.pages]
    a.pages = [[3, 2], [1, 0]]  # preempted and admitted again
    assert table(a, b) == [a.pages, b.pages] == [[[3, 2], [1, 0]], [[9, 8], [6, 7]]]


def test_sampling_parameters_are_rows_of_arrays() -> None:
    arrays = SampleArrays(max_seqs=4, vocab_size=50)
    first = sequence("a", [1, 2, 3], [[0]], temperature=0.5, top_k=-1, top_p=0.25, min_p=0.125)
    second = sequence("b", [4], [[1]], temperature=0, top_k=7, min_tokens=1, stop_token_ids=[9, 3, 50])
    batch = StepBatch()
    batch.add(first, 3)
    batch.add(second, 1)
    arrays.fill(batch.sampling)
    rows, how = arrays.block(0, 2)
    assert rows.tolist() == [2, 3]
    assert how.temperature.tolist() == [0.5, 0.0]
    assert (how.top_k.tolist(), how.top_p.tolist(), how.min_p.tolist()) == ([0, 7], [0.25, 1.0], [0.125, 0.0])
    assert how.seed.tolist() == [2**64 - 1] * 2
    assert how.position.tolist() == [3, 1]
    assert how.banned[0] is None
    assert how.banned[1] is not None
    assert how.banned[1].tolist() == [3, 9]
    rows, how = arrays.block(1, 2)
    assert (rows.tolist(), how.top_k.tolist(), len(how.banned)) == ([3], [7], 1)
