"""Rotary positions, paged storage and attention against the NumPy twins, over ragged batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import gguf
from shoal.kernels import reference
from shoal.kernels.cpu import attention
from shoal.kernels.cpu import backend as backend_module
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.ragged import Case, make_case
from tests.kernels.runner import PagedAttention

F32 = NDArray[np.float32]
# How far from the twins: sums in another order may round a value the other way.
LIMITS = {"f32": 1e-10, "f16": 1e-6, "q8_0": 2e-6}
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
@pytest.mark.parametrize("dtype", LIMITS)
def test_prompts_equal_the_twin(backend: CPUBackend, shape: tuple[int, int, int], dtype: str) -> None:
    case = make_case(*shape, [1, 3, 5, 17, 40, 123], neox=shape[2] == 80)
    out = paged(backend, case, dtype).run(*case.whole())
    assert nmse(out, case.all_expected(dtype)) < LIMITS[dtype]


def test_part_of_a_head_turns(backend: CPUBackend) -> None:
    for neox in (False, True):
        case = make_case(4, 2, 64, [20, 5], neox=neox, rope_dim=24)
        out = paged(backend, case, "f32").run(*case.whole())
        assert nmse(out, case.all_expected("f32")) < LIMITS["f32"]


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 64, 200])
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_chunks_and_neighbours_change_no_bit(backend: CPUBackend, chunk: int, dtype: str) -> None:
    case = make_case(9, 3, 64, [180, 33, 17])
    at_once = paged(backend, case, dtype).run(*case.whole())
    starts = np.cumsum([0, *case.lengths])
    in_chunks, done = paged(backend, case, dtype), 0
    while done < max(case.lengths):
        spans = [(s, done, min(done + chunk, n)) for s, n in enumerate(case.lengths) if done < n]
        out, row = in_chunks.run(*case.step(spans)), 0
        for s, first, last in spans:
            want = at_once[starts[s] + first : starts[s] + last]
            assert np.array_equal(out[row : row + last - first], want)
            row += last - first
        done += chunk


def test_tasks_of_several_heads_change_no_bit(backend: CPUBackend) -> None:
    """With so many single rows a task takes two of the three KV heads."""
    case = make_case(6, 3, 32, [40] * 12)
    run = paged(backend, case, "f16", 480)
    at_once = run.run(*case.whole())
    assert np.array_equal(run.run(*case.step([(s, 39, 40) for s in range(12)])), at_once[39::40])


# --- more than one piece ---------------------------------------------------------------------------------------------

PIECE = attention.PIECE
LENGTHS = [4 * PIECE + 76, 2 * PIECE + 1, PIECE, PIECE + 1, 30]
# Positions about the ends of pieces and pages, and the last.
EDGES = [0, 15, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE - 1, 2 * PIECE, 3 * PIECE + 7, 4 * PIECE + 75]


@pytest.fixture(scope="module")
def long_case() -> Case:
    return make_case(6, 2, 64, LENGTHS)


@pytest.fixture(scope="module", params=LIMITS)
def long_run(request: pytest.FixtureRequest, backend: CPUBackend, long_case: Case) -> tuple[str, PagedAttention, F32]:
    """Storage type, a cache that holds all of the case, and its attention from one step."""
    run = paged(backend, long_case, request.param, sum(LENGTHS))
    return request.param, run, run.run(*long_case.whole())


LongRun = tuple[str, PagedAttention, F32]


def test_pieces_equal_the_twin(long_case: Case, long_run: LongRun) -> None:
    dtype, _, out = long_run
    assert nmse(out, long_case.all_expected(dtype)) < LIMITS[dtype]


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


@pytest.mark.parametrize("dtype", LIMITS)
def test_what_was_in_a_page_before_does_not_matter(backend: CPUBackend, dtype: str) -> None:
    case = make_case(4, 2, 32, [21])
    run = paged(backend, case, dtype)
    clean = run.run(*case.whole())
    run.cache.k[:] = run.cache.v[:] = 0xFF  # NaN as float16 and float32
    assert np.array_equal(run.run(*case.whole()), clean)


# --- int8 ------------------------------------------------------------------------------------------------------------


def test_q8_0_is_what_the_gguf_package_makes_of_the_values() -> None:
    x = np.random.default_rng(1).standard_normal((50, 3, 64)).astype(np.float32) * 20
    packed = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    ours = reference.store_as(x, "q8_0")
    # They multiply by 1 / (largest / 127), we by 127 / largest: a value on the edge may round the other way.
    step = np.abs(x).reshape(50, 3, 2, 32).max(axis=-1, keepdims=True).repeat(32, axis=-1).reshape(x.shape) / 126
    assert (ours == theirs).mean() > 0.999
    assert (np.abs(ours - theirs) <= step).all()


@pytest.mark.parametrize("head_dim", [14, 64, 80])
def test_q8_0_keeps_zeros_tiny_and_mixed_groups(backend: CPUBackend, head_dim: int) -> None:
    case = make_case(2, 1, head_dim, [40])
    case.qkv[0][:, 2 * head_dim :] *= (
        np.float32(10) ** np.arange(-37, 3, dtype=np.float32)[:, None]
    )  # k and v by position
    case.qkv[0][7, 2 * head_dim :] = 0
    out = paged(backend, case, "q8_0").run(*case.whole())
    assert nmse(out, case.all_expected("q8_0")) < LIMITS["q8_0"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_values_out_of_range_are_seen_in_their_own_sequence_alone(backend: CPUBackend, dtype: str, bad: float) -> None:
    case = make_case(2, 1, 32, [20, 20])
    clean = paged(backend, case, dtype).run(*case.whole())
    case.qkv[0][5, -1] = bad  # the last dim of v
    out = paged(backend, case, dtype).run(*case.whole())
    assert not np.isfinite(out[5:20]).all(axis=1).any()
    assert np.array_equal(out[20:], clean[20:])


def test_memory_of_a_position_counts_padding_and_scales(backend: CPUBackend) -> None:
    assert backend.kv_token_bytes(3, 64, "f16") == 2 * 3 * 64 * 2
    assert backend.kv_token_bytes(1, 14, "f32") == 2 * 16 * 4
    assert backend.kv_token_bytes(2, 80, "q8_0") == 2 * 2 * (80 + 3 * 2)
    for dtype in LIMITS:
        case = make_case(4, 2, 20, [40])
        cache = backend.kv_cache(3, 5, case.shape, dtype)
        assert cache.k.nbytes + cache.v.nbytes - 2 * 64 == 3 * 5 * 16 * backend.kv_token_bytes(2, 20, dtype)
