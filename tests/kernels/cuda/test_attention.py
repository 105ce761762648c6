"""Attention over the pages against the twins, over ragged steps; the bits of a row do not depend on what shares its step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shoal.kernels.base import PAGE_SIZE, StepLimits
from shoal.kernels.cuda import attention as kernels
from shoal.kernels.cuda.attention import attention, record_count
from shoal.kernels.cuda.launch import launches_go_to
from shoal.kernels.cuda.linear import CHIPS, as_on
from shoal.kernels.reference import PIECE
from tests.kernels.cuda.paged import PagedRun, nmse, split_heads, twin
from tests.kernels.ragged import Case, make_case

TO_TWIN, TO_FLOAT = 1e-8, 5e-5
DTYPES = ("f16", "f32", "q8_0")
# heads, KV heads, head size: 1, 2, 3, 8 and 20 queries share a KV head.
SHAPES = [(2, 2, 32), (4, 2, 64), (3, 1, 80), (6, 2, 96), (8, 1, 128), (2, 1, 256), (2, 1, 576), (20, 1, 14)]


def slopes(heads: int) -> tuple[float, ...]:
    return tuple(2.0 ** (-0.5 * h) for h in range(heads))


BENT: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 40},
    {"soft_cap": 1.5},
    {"slopes": slopes},
    {"window": 24, "soft_cap": 0.7, "slopes": slopes},
    {"causal": False},
    {"causal": False, "slopes": slopes},
]


def named(changes: dict[str, Any]) -> str:
    return " ".join(name if callable(value) else f"{name} {value}" for name, value in changes.items()) or "plain"


def bend(case: Case, changes: dict[str, Any]) -> Case:
    return case.bent(**{name: f(case.shape.heads) if callable(f) else f for name, f in changes.items()})


def check(case: Case, dtype: str) -> None:
    out = PagedRun(case, dtype, sum(case.lengths)).run(*case.whole()).numpy()
    expected = np.concatenate([twin(case, s, dtype) for s in range(len(case.lengths))])
    assert nmse(out, expected) < TO_TWIN
    assert nmse(expected, case.all_expected(dtype)) < TO_FLOAT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_equal_the_twin(shape: tuple[int, int, int], dtype: str) -> None:
    small = shape[2] <= 128 and shape[0] < 20
    check(make_case(*shape, [1, 3, 5, 17, 70] if small else [1, 19]), dtype)


@pytest.mark.parametrize("changes", BENT, ids=named)
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_windows_caps_slopes_and_encoders_equal_the_twin(dtype: str, changes: dict[str, Any]) -> None:
    check(bend(make_case(3, 1, 32, [1, 17, 123]), changes), dtype)


def test_queries_of_any_size() -> None:
    """What float16 does not hold is divided first."""
    case = replace(make_case(2, 1, 32, [40]), rope=None)
    case.qkv[0][:, :64] *= np.geomspace(1e-12, 1e9, 40, dtype=np.float32)[:, None]
    case = case.bent(soft_cap=3.0)
    out = PagedRun(case, "f16").run(*case.whole()).numpy()
    assert nmse(out, twin(case, 0, "f16")) < TO_TWIN


def test_q8_0_keeps_what_float16_has_no_room_for() -> None:
    """Values as large as scales go, and others so small that they would be float16's last."""
    case = replace(make_case(2, 1, 64, [40]), rope=None)
    size = np.geomspace(1e-5, 8e6, 40, dtype=np.float32)[:, None]
    case.qkv[0][:, 192:] *= size / np.abs(case.qkv[0][:, 192:]).max(axis=1, keepdims=True)
    out = PagedRun(case, "q8_0").run(*case.whole()).numpy()
    expected = twin(case, 0, "q8_0")
    for row in range(0, 40, 7):  # each by itself: later rows are millions of times larger
        assert nmse(out[row], expected[row]) < TO_TWIN


def test_larger_values_that_a_row_does_not_see_change_no_bit_of_it() -> None:
    """Weights that are float16's last have their bits whatever is behind them in the same tile."""
    case = replace(make_case(2, 1, 32, [40]), rope=None)
    case.qkv[0][:, :96] *= 2.0  # of q and k: some weights are small
    case.qkv[0][20:, 96:] *= 1e4
    run = PagedRun(case, "q8_0")
    at_once = run.run(*case.whole())
    for position in (3, 12, 19):
        assert torch.equal(run.run(*case.step([(0, position, position + 1)]))[0], at_once[position])


# --- more than one piece ---------------------------------------------------------------------------------------------

LENGTHS = [2 * PIECE + 40, PIECE + 1, 30]
EDGES = [0, 64, PIECE - 1, PIECE, 2 * PIECE, 2 * PIECE + 39]
LONG: list[dict[str, Any]] = [{}, {"window": 100}, {"window": 300, "soft_cap": 2.0, "slopes": slopes}]


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [("f16", LONG[0]), ("f16", LONG[1]), ("f16", LONG[2]), ("f32", LONG[1]), ("q8_0", LONG[2])],
    ids=lambda value: value if isinstance(value, str) else named(value),
)
def test_singles_chunks_and_neighbours_have_the_same_bits(dtype: str, changes: dict[str, Any]) -> None:
    """A row alone, with records and without room for them, in chunks of any size, by itself and among others; and the twin's values."""
    case = bend(make_case(3, 1, 32, LENGTHS), changes)
    run = PagedRun(case, dtype, sum(LENGTHS))
    at_once = run.run(*case.whole())
    rows = [*range(0, LENGTHS[0], 97), *EDGES]
    assert nmse(at_once[rows].numpy(), twin(case, 0, dtype, rows)) < TO_TWIN

    for position in EDGES:
        assert torch.equal(run.run(*case.step([(0, position, position + 1)]))[0], at_once[position])
    ends = np.cumsum(LENGTHS)
    last = case.step([(s, n - 1, n) for s, n in enumerate(LENGTHS)])
    assert torch.equal(run.run(*last, bucket=7)[:3], at_once[ends - 1])
    roomless = PagedRun(case, dtype, sum(LENGTHS), records=0)
    roomless.cache = run.cache
    assert torch.equal(roomless.run(*last), at_once[ends - 1])
    for count in (2, 17):
        step = case.step([(2, 29, 30), (0, LENGTHS[0] - count, LENGTHS[0]), (1, PIECE + 1 - count, PIECE + 1)])
        want = [at_once[-1:], at_once[ends[0] - count : ends[0]], at_once[ends[1] - count : ends[1]]]
        assert torch.equal(run.run(*step), torch.cat(want))


@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize(
    ("dtype", "heads", "changes"), [("f16", 3, LONG[0]), ("f16", 1, LONG[1]), ("q8_0", 5, LONG[2])]
)
def test_a_few_rows_over_a_long_context_have_the_same_bits(
    dtype: str, heads: int, changes: dict[str, Any], rows: int
) -> None:
    """With records, and without: one tile of queries or more; some rows see a piece that others do not; beside singles and chunks."""
    case = bend(make_case(heads, 1, 32, [2 * PIECE + 3, PIECE + 40, 7, PIECE + 40]), changes)
    run = PagedRun(case, dtype, sum(case.lengths))
    roomless = PagedRun(case, dtype, sum(case.lengths), records=0)
    for whole, qkv in [case.step([(s, 0, n)]) for s, n in enumerate(case.lengths)]:
        run.fill(whole, *split_heads(qkv, case.shape, whole.positions, case.rope)[1:])
    roomless.cache = run.cache
    spans = [
        (0, 2 * PIECE + 3 - rows, 2 * PIECE + 3),
        (1, PIECE + 20, PIECE + 30),
        (2, 5, 7),
        (3, PIECE + 39, PIECE + 40),
    ]
    step = case.step(spans)
    arrays = run.staged.set(run.both_groups(step[0]))
    assert (arrays.num_singles, arrays.num_shorts, arrays.num_chunks) == (1, 2, 1)
    assert torch.equal(run.run(*step), roomless.run(*step))
    at_once = run.run(*case.step([(0, 2 * PIECE - 20, 2 * PIECE + 3)]))
    assert torch.equal(run.run(*case.step(spans[:1])), at_once[-rows:])


def test_prompts_in_chunks_have_the_same_bits() -> None:
    case = make_case(2, 1, 32, [PIECE + 44, 33])
    at_once = PagedRun(case, "f16", 400).run(*case.whole())
    for chunk in (100, 64):
        run, done = PagedRun(case, "f16", 400), 0
        while done < case.lengths[0]:
            spans = [(s, done, min(done + chunk, n)) for s, n in enumerate(case.lengths) if done < n]
            want = [at_once[s * case.lengths[0] + first : s * case.lengths[0] + last] for s, first, last in spans]
            assert torch.equal(run.run(*case.step(spans)), torch.cat(want))
            done += chunk


@pytest.mark.parametrize("programs", [1, 6, 1000])
def test_the_number_of_programs_that_share_a_single_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, programs: int
) -> None:
    case = make_case(4, 2, 32, LENGTHS)
    run = PagedRun(case, "f16", sum(LENGTHS))
    at_once = run.run(*case.whole())
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    ends = np.cumsum(LENGTHS)
    last = run.run(*case.step([(s, n - 1, n) for s, n in enumerate(LENGTHS)]))
    assert torch.equal(last, at_once[ends - 1])
    few = run.run(*case.step([(s, n - 3, n) for s, n in enumerate(LENGTHS)]))
    assert torch.equal(few, torch.cat([at_once[end - 3 : end] for end in ends]))


def test_any_number_of_singles_has_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each other constant is another kernel to compile, in the middle of serving."""
    monkeypatch.setattr(kernels, "_PROGRAMS", 64)
    case = make_case(4, 2, 32, [2 * PIECE + 9] + [PIECE + 9] * 39)
    run, seen = PagedRun(case, "f16"), []
    for singles in (1, 17, 23, 40):
        launches: list[tuple[str, dict[str, Any]]] = []
        with launches_go_to(lambda kernel, grid, args, options, to=launches: to.append((kernel.__name__, options))):
            run.run(*case.step([(s, PIECE + 8, PIECE + 9) for s in range(singles)]))
        seen.append(launches)
    assert [name for name, _ in seen[0]] == ["_split"]
    assert all(launches == seen[0] for launches in seen)


@pytest.mark.parametrize(("few", "chunks"), [(16, 16), (32, 64), (64, 32)])
def test_the_number_of_queries_of_a_program_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, few: int, chunks: int
) -> None:
    case = make_case(20, 1, 32, [90, 1])
    at_once = PagedRun(case, "f16").run(*case.whole())
    monkeypatch.setattr(kernels, "_few_tile", lambda *_: few)
    monkeypatch.setattr(kernels, "_chunk_tile", lambda *_: chunks)
    run = PagedRun(case, "f16")
    assert torch.equal(run.run(*case.whole()), at_once)
    assert torch.equal(run.run(*case.step([(0, 89, 90)]))[0], at_once[89])
    assert torch.equal(run.run(*case.step([(0, 85, 90)])), at_once[85:90])


@pytest.mark.parametrize("pieces", [4, 5, 9])
def test_any_number_of_records_is_folded_as_a_chunk_folds(pieces: int) -> None:
    """However many are read at a time; and again, with the counters as the first time left them. The head has two slices."""
    case = replace(make_case(3, 1, 80, [PIECE * pieces - 3]), rope=None)
    run, roomless = PagedRun(case, "f32"), PagedRun(case, "f32", records=0)
    step, qkv = case.whole()
    run.fill(step, *split_heads(qkv, case.shape, step.positions, None)[1:])
    roomless.cache = run.cache
    last = case.step([(0, case.lengths[0] - 1, case.lengths[0])])
    expected = roomless.run(*last)
    for _ in range(2):
        assert torch.equal(run.run(*last), expected)


def test_how_large_a_row_is_need_not_be_asked() -> None:
    case = make_case(4, 2, 32, [PIECE + 9, 20])
    run = PagedRun(case, "f16", 400)
    run.run(*case.whole())
    step, qkv = case.step([(0, PIECE + 8, PIECE + 9), (1, 3, 20)])
    at_once = run.run(step, qkv)
    q = torch.from_numpy(split_heads(qkv, case.shape, step.positions, case.rope)[0].reshape(len(qkv), -1))
    out = torch.empty_like(q)
    attention(q, out, run.cache, run.layer, run.shape, run.staged.arrays, run.space)
    assert torch.equal(out, at_once)


def test_other_pages_change_no_bit() -> None:
    case = make_case(4, 2, 32, [100, 40, 1])
    at_once = PagedRun(case, "f16").run(*case.whole())
    order = np.random.default_rng(5).permutation(case.pages).astype(np.int32)
    moved = replace(case, tables=order[case.tables])
    assert torch.equal(PagedRun(moved, "f16").run(*moved.whole()), at_once)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_before_the_window_are_not_read(dtype: str, rows: int) -> None:
    case = make_case(2, 1, 32, [PIECE + 50]).bent(window=70)
    run = PagedRun(case, dtype, 400)
    stop = case.lengths[0]
    at_once = run.run(*case.whole())[stop - rows :]
    before = (stop - rows + 1 - 70) // PAGE_SIZE
    step, qkv = case.step([(0, stop - rows, stop)])
    step.page_table[0, 0, :before] = 1 << 20  # far out of the cache
    assert torch.equal(run.run(step, qkv), at_once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # the interpreter is NumPy
def test_what_was_in_a_page_before_does_not_matter(dtype: str) -> None:
    case = make_case(4, 2, 32, [21, 1])
    clean = PagedRun(case, dtype).run(*case.whole())
    run = PagedRun(case, dtype)
    for pages in run.cache.groups[1].tensors:
        pages.view(torch.uint8).fill_(0xFF)  # NaN as float16 and float32
    assert torch.equal(run.run(*case.whole()), clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_values_out_of_range_are_seen_in_their_own_sequence_alone(dtype: str, bad: float) -> None:
    case = make_case(2, 1, 32, [20, 20])
    clean = PagedRun(case, dtype).run(*case.whole())
    case.qkv[0][5, -1] = bad  # the last dim of v
    out = PagedRun(case, dtype).run(*case.whole())
    assert not out[5:20].isfinite().all(dim=1).any()
    assert torch.equal(out[20:], clean[20:])


def test_rows_that_pad_are_zeros_and_change_no_bit() -> None:
    case = make_case(4, 2, 32, [1, 1, 40])
    alone = PagedRun(case, "f16").run(*case.whole())
    padded = PagedRun(case, "f16").run(*case.whole(), bucket=64)
    assert torch.equal(padded[:42], alone)
    assert not padded[42:].any()


def test_records_are_as_many_as_can_be_needed_or_fit() -> None:
    assert record_count(StepLimits(64, 4, 40), heads=32, head_dim=128) == 4 * 8 * 3
    assert record_count(StepLimits(20, 4, 40), heads=32, head_dim=128) == 20 * 3
    many = record_count(StepLimits(256, 256, 8192), heads=32, head_dim=128)
    assert 1000 * 512 > many > 4000
    assert record_count(StepLimits(256, 256, 8192), heads=128, head_dim=576) == 512
    with as_on(CHIPS["gfx942"]):  # no program can leave a record to another
        assert record_count(StepLimits(64, 4, 40), heads=32, head_dim=128) == 0
