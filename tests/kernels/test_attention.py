"""Rotary positions, paged storage and attention against the NumPy twins, over ragged batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.kernels.cpu import attention
from shoal.kernels.cpu import backend as backend_module
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.ragged import Case, make_case
from tests.kernels.runner import PagedAttention

F32 = NDArray[np.float32]
KINDS: dict[str, type[np.float16] | type[np.float32]] = {"f16": np.float16, "f32": np.float32}
# heads, KV heads, head size: 1, 2, 3, 4, 7, 8, 9 and 16 queries share a KV head.
SHAPES = [(4, 4, 14), (9, 3, 64), (4, 2, 80), (6, 2, 96), (8, 1, 128), (7, 1, 32), (2, 1, 256), (8, 2, 48), (9, 1, 32)]
SHAPES.append((32, 2, 32))


@pytest.fixture(scope="module")
def backend() -> Iterator[CPUBackend]:
    backend = CPUBackend(threads=2)
    yield backend
    backend.close()


def paged(backend: CPUBackend, case: Case, dtype: str, max_rows: int = 256) -> PagedAttention:
    return PagedAttention(backend, case.shape, case.rope, case.pages, dtype, max_rows)


def nmse(a: F32, r: F32) -> float:
    return float(np.sum((a.astype(np.float64) - r) ** 2) / np.sum(r.astype(np.float64) ** 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_prompts_equal_the_twin(backend: CPUBackend, shape: tuple[int, int, int], dtype: str) -> None:
    case = make_case(*shape, [1, 3, 5, 17, 40, 123], neox=shape[2] == 80)
    out = paged(backend, case, dtype).run(*case.whole())
    expected = np.concatenate([case.expected(s, KINDS[dtype]) for s in range(len(case.lengths))])
    assert nmse(out, expected) < {"f32": 1e-10, "f16": 1e-6}[dtype]


def test_part_of_a_head_turns(backend: CPUBackend) -> None:
    for neox in (False, True):
        case = make_case(4, 2, 64, [20, 5], neox=neox, rope_dim=24)
        out = paged(backend, case, "f32").run(*case.whole())
        expected = np.concatenate([case.expected(s, np.float32) for s in (0, 1)])
        assert nmse(out, expected) < 1e-10


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 64, 200])
def test_chunks_and_neighbours_change_no_bit(backend: CPUBackend, chunk: int) -> None:
    case = make_case(9, 3, 64, [180, 33, 17])
    at_once = paged(backend, case, "f16").run(*case.whole())
    starts = np.cumsum([0, *case.lengths])
    in_chunks, done = paged(backend, case, "f16"), 0
    while done < max(case.lengths):
        spans = [(s, done, min(done + chunk, n)) for s, n in enumerate(case.lengths) if done < n]
        out, row = in_chunks.run(*case.step(spans)), 0
        for s, first, last in spans:
            want = at_once[starts[s] + first : starts[s] + last]
            assert np.array_equal(out[row : row + last - first], want)
            row += last - first
        done += chunk


# --- more than one piece ---------------------------------------------------------------------------------------------

PIECE = attention.PIECE
LENGTHS = [4 * PIECE + 76, 2 * PIECE + 1, PIECE, PIECE + 1, 30]
# Positions about the ends of pieces and pages, and the last.
EDGES = [0, 15, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE - 1, 2 * PIECE, 3 * PIECE + 7, 4 * PIECE + 75]


@pytest.fixture(scope="module")
def long_case() -> Case:
    return make_case(6, 2, 64, LENGTHS)


@pytest.fixture(scope="module", params=["f16", "f32"])
def long_run(request: pytest.FixtureRequest, backend: CPUBackend, long_case: Case) -> tuple[str, PagedAttention, F32]:
    """Storage type, a cache that holds all of the case, and its attention from one step."""
    run = paged(backend, long_case, request.param, sum(LENGTHS))
    return request.param, run, run.run(*long_case.whole())


LongRun = tuple[str, PagedAttention, F32]


def test_pieces_equal_the_twin(long_case: Case, long_run: LongRun) -> None:
    dtype, _, out = long_run
    expected = np.concatenate([long_case.expected(s, KINDS[dtype]) for s in range(len(LENGTHS))])
    assert nmse(out, expected) < {"f32": 1e-10, "f16": 1e-6}[dtype]


def test_pieces_as_tasks_of_their_own_change_no_bit(long_case: Case, long_run: LongRun) -> None:
    _, run, at_once = long_run
    for position in EDGES:
        assert np.array_equal(run.run(*long_case.step([(0, position, position + 1)]))[0], at_once[position])


def test_rows_and_neighbours_change_no_bit_at_the_ends_of_pieces(long_case: Case, long_run: LongRun) -> None:
    _, run, at_once = long_run
    starts = np.cumsum([0, *LENGTHS])
    for rows in (1, 2, 9, 25):
        spans = [(s, max(0, n - rows), n) for s, n in enumerate(LENGTHS)]
        want = np.concatenate([at_once[starts[s] + first : starts[s] + last] for s, first, last in spans])
        assert np.array_equal(run.run(*long_case.step(spans)), want)


def test_one_thread_and_too_few_slots_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, long_case: Case, long_run: LongRun
) -> None:
    dtype, _, at_once = long_run
    ends = np.cumsum(LENGTHS) - 1
    # Tasks of up to 3 pieces, and 7 slots: of the first sequence's 5 pieces, twice, they take one.
    pieces = long_case.shape.kv_heads * -(-long_case.pages * 16 // PIECE)
    monkeypatch.setattr(backend_module, "_SLOTS_PER_THREAD", 7 - pieces)
    monkeypatch.setattr(backend_module, "_TASKS_PER_THREAD", 8)
    single = CPUBackend(threads=1)
    run = paged(single, long_case, dtype, sum(LENGTHS))
    run.run(*long_case.whole())
    last = run.run(*long_case.step([(s, n - 1, n) for s, n in enumerate(LENGTHS)]))
    single.close()
    assert np.array_equal(last, at_once[ends])


def test_what_was_in_a_page_before_does_not_matter(backend: CPUBackend) -> None:
    case = make_case(4, 2, 32, [21])
    run = paged(backend, case, "f16")
    clean = run.run(*case.whole())
    run.cache.k.view(np.float16)[:] = np.nan
    run.cache.v.view(np.float16)[:] = np.nan
    assert np.array_equal(run.run(*case.whole()), clean)
