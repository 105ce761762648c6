"""Rotary positions, paged storage and attention against the NumPy twins, over ragged batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gguf
from shoal.kernels import reference
from shoal.kernels.base import PAGE_SIZE, KVGroup, Rope
from shoal.kernels.cpu import attention
from shoal.kernels.cpu import paged as paged_module
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.ragged import Case, make_case
from tests.kernels.runner import PagedAttention, PagedLayers

F32 = NDArray[np.float32]
# How far from the twins: sums in another order may round a value the other way.
LIMITS = {"f32": 1e-10, "f16": 1e-6, "q8_0": 2e-6}
# heads, KV heads, head size: 1, 2, 3, 4, 7, 8, 9 and 16 queries share a KV head.
SHAPES = [(4, 4, 14), (9, 3, 64), (4, 2, 80), (6, 2, 96), (8, 1, 128), (7, 1, 32), (2, 1, 256), (8, 2, 48), (9, 1, 32)]
SHAPES += [(32, 2, 32), (16, 1, 576), (6, 6, 10), (4, 2, 12), (4, 2, 20), (4, 1, 24)]


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


def slopes(heads: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-0.5 * h) for h in range(heads))


# What may be between a product and its score.
BENT: list[dict[str, Any]] = [
    *({"window": window} for window in (1, 5, 16, 40, 100, 123, 200)),
    {"soft_cap": 1.5},
    {"slopes": slopes},
    {"window": 24, "soft_cap": 0.7, "slopes": slopes},
]


def named(changes: dict[str, Any]) -> str:
    return " ".join(name if callable(value) else f"{name} {value}" for name, value in changes.items()) or "plain"


def bend(case: Case, changes: dict[str, Any]) -> Case:
    """A case with one of BENT; slopes for as many heads as it has."""
    return case.bent(**{name: f(case.shape.heads) if callable(f) else f for name, f in changes.items()})


@pytest.mark.parametrize("changes", BENT, ids=named)
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 14), (3, 1, 96), (8, 1, 128), (16, 1, 576)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS)
def test_windows_caps_and_slopes_equal_the_twin(
    backend: CPUBackend, shape: tuple[int, int, int], dtype: str, changes: dict[str, Any]
) -> None:
    case = bend(make_case(*shape, [1, 3, 5, 17, 123]), changes)
    out = paged(backend, case, dtype).run(*case.whole())
    assert nmse(out, case.all_expected(dtype)) < LIMITS[dtype]


@pytest.mark.parametrize("changes", [{"causal": False}, {"causal": False, "slopes": slopes}], ids=named)
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 14), (12, 12, 32), (8, 1, 128)], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_encoders_see_both_ways(
    backend: CPUBackend, shape: tuple[int, int, int], dtype: str, changes: dict[str, Any]
) -> None:
    """As the twin does; and each sequence has the same bits alone."""
    case = bend(make_case(*shape, [1, 2, 25, 48, 123, attention.PIECE + 60]), changes)
    run = paged(backend, case, dtype, sum(case.lengths))
    together = run.run(*case.whole())
    assert nmse(together, case.all_expected(dtype)) < LIMITS[dtype]
    starts = np.cumsum([0, *case.lengths])
    for s, length in enumerate(case.lengths):
        assert np.array_equal(run.run(*case.step([(s, 0, length)])), together[starts[s] : starts[s + 1]])


def test_scores_of_any_size_are_capped(backend: CPUBackend) -> None:
    """From products far below the cap, where tanh is nearly straight, to some far above it."""
    case = make_case(2, 1, 32, [60])
    case.qkv[0][:, :64] *= np.geomspace(1e-6, 1e6, 60, dtype=np.float32)[:, None]
    case = case.bent(soft_cap=3.0)
    assert nmse(paged(backend, case, "f32").run(*case.whole()), case.all_expected("f32")) < LIMITS["f32"]


def test_without_rope_nothing_turns(backend: CPUBackend) -> None:
    case = replace(make_case(4, 2, 20, [40, 3]), rope=None)
    out = paged(backend, case, "f32").run(*case.whole())
    assert nmse(out, case.all_expected("f32")) < LIMITS["f32"]


@pytest.mark.parametrize("changes", [{}, BENT[3], BENT[-1]], ids=named)
@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 64, 200])
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_chunks_and_neighbours_change_no_bit(
    backend: CPUBackend, chunk: int, dtype: str, changes: dict[str, Any]
) -> None:
    case = bend(make_case(9, 3, 64, [180, 33, 17]), changes)
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


# Windows within a page, across an edge of a piece, as long as a piece, across two, longer than all.
LONG: list[dict[str, Any]] = [
    {},
    *({"window": window} for window in (7, 100, PIECE, 2 * PIECE + 30, 5000)),
    {"window": 300, "soft_cap": 2.0, "slopes": slopes},
]


@pytest.fixture(scope="module", params=LONG, ids=named)
def long_case(request: pytest.FixtureRequest) -> Case:
    return bend(make_case(6, 2, 64, LENGTHS), request.param)


@pytest.fixture(scope="module", params=LIMITS)
def long_run(request: pytest.FixtureRequest, backend: CPUBackend, long_case: Case) -> tuple[str, PagedAttention, F32]:
    """Storage type, a cache that holds all of the case, and its attention from one step."""
    run = paged(backend, long_case, request.param, sum(LENGTHS))
    return request.param, run, run.run(*long_case.whole())


LongRun = tuple[str, PagedAttention, F32]


def test_pieces_equal_the_twin(long_case: Case, long_run: LongRun) -> None:
    dtype, _, out = long_run
    for s, rows in enumerate(np.split(out, np.cumsum(LENGTHS)[:-1])):
        assert nmse(rows[::7], long_case.expected(s, dtype, every=7)) < LIMITS[dtype]


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
    monkeypatch.setattr(paged_module, "_SLOTS_PER_THREAD", 7 - pieces)
    monkeypatch.setattr(paged_module, "_TASKS_PER_THREAD", 8)
    single = CPUBackend(threads=1)
    run = paged(single, long_case, dtype, sum(LENGTHS))
    run.run(*long_case.whole())
    last = run.run(*long_case.step([(s, n - 1, n) for s, n in enumerate(LENGTHS)]))
    single.close()
    assert np.array_equal(last, at_once[ends])


def lose(run: PagedAttention, case: Case, pages: int) -> None:
    """The first pages of the first sequence hold what is no number."""
    for stored in (run.cache.k, run.cache.v):
        by_page = stored[:-64].reshape(case.pages, -1)
        by_page[case.tables[0, :pages]] = 0xFF


@pytest.mark.parametrize("rows", [1, 3, 17, 60])
def test_pages_before_the_window_are_not_read(long_case: Case, long_run: LongRun, rows: int) -> None:
    _, run, at_once = long_run
    saved = run.cache.k.copy(), run.cache.v.copy()
    for stop in (n for n in (*EDGES, LENGTHS[0]) if n >= rows):
        first = stop - rows
        before = max(0, first + 1 - (long_case.shape.window or stop)) // PAGE_SIZE
        step, qkv = long_case.step([(0, first, stop)])
        step.page_table[0, 0, :before] = 1 << 20  # far out of the cache: to read there would be the end of the process
        assert np.array_equal(run.run(step, qkv), at_once[first:stop])
    lose(run, long_case, before + 1)  # the page where the last step's window begins
    assert np.isnan(run.run(*long_case.step([(0, first, stop)]))[0]).all()
    run.cache.k[:], run.cache.v[:] = saved


def test_layers_have_windows_and_ropes_of_their_own(backend: CPUBackend) -> None:
    """Each as in a network of its own, though some share a plan or a table of angles."""
    case = make_case(6, 2, 64, [300, 20])
    assert case.rope is not None
    wide, narrow, other = case.shape, case.bent(window=33).shape, Rope(case.rope.inv_freq * np.float32(0.5), neox=True)
    kinds = [(narrow, case.rope), (wide, other), (narrow, None), (wide, case.rope), (narrow, other)]
    together = PagedLayers(backend, kinds, case.pages, "f16", 400)
    alone = [PagedAttention(backend, *kind, case.pages, "f16", 400) for kind in kinds]
    for spans in ([(0, 0, 300), (1, 0, 20)], [(0, 299, 300), (1, 18, 20)]):
        step, qkv = case.step(spans)
        inputs = [qkv * np.float32(1 + 0.1 * layer) for layer in range(len(kinds))]
        for run, x, out in zip(alone, inputs, together.run_all(step, *inputs), strict=True):
            assert np.array_equal(out, run.run(step, x))


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
        cache = backend.kv_cache([KVGroup((0, 2), 5), KVGroup((1,), 3)], case.shape, dtype)
        assert cache.k.nbytes + cache.v.nbytes - 2 * 64 == (2 * 5 + 3) * 16 * backend.kv_token_bytes(2, 20, dtype)
