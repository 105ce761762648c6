"""Rotary positions and stored K and V are the twins' to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shoal.kernels import reference
from shoal.kernels.base import PAGE_SIZE, AttentionShape, KVGroup
from shoal.kernels.cuda import rows as row_tiles
from shoal.kernels.cuda.cache import PagedCache, copy_pages, kv_cache, token_bytes
from tests.kernels.cuda.paged import PagedRun, nmse, split_heads, twin
from tests.kernels.ragged import Case, make_case

F32 = NDArray[np.float32]
DTYPES = ("f16", "f32", "q8_0")


def stored(cache: PagedCache, layer: int, case: Case, s: int) -> list[F32]:
    """K and V of a sequence's positions as the cache gives them back, [n, kv_heads, head_dim]."""
    pages = cache.layers[layer]
    positions = np.arange(case.lengths[s])
    page, offset = case.tables[s, positions // PAGE_SIZE], positions % PAGE_SIZE
    out = []
    for values, scales in ((pages.k, pages.k_scales), (pages.v, pages.v_scales)):
        x = values.numpy()[page, :, offset].astype(np.float32)
        if cache.dtype == "q8_0":
            x *= scales.numpy()[page, :, offset].astype(np.float32).repeat(32, axis=-1)[..., : x.shape[-1]]
        out.append(x)
    return out


def check(case: Case, dtype: str, bucket: int | None = None) -> None:
    run = PagedRun(case, dtype)
    rows = run.store(*case.whole(), bucket).numpy()
    start = 0
    for s, n in enumerate(case.lengths):
        positions = np.arange(n, dtype=np.int32)
        q, k, v = split_heads(case.qkv[s], case.shape, positions, case.rope)
        assert np.array_equal(rows[start : start + n, : q[0].size], q.reshape(n, -1))
        want = [reference.store_as(x, dtype) for x in (k, v)]
        for ours, theirs in zip(stored(run.cache, run.layer, case, s), want, strict=True):
            assert np.array_equal(ours, theirs)
        start += n
    written = {run.layer}
    for layer, pages in run.cache.layers.items():
        assert all(x.any() == (layer in written) for x in pages.tensors)


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4, 14), (9, 3, 64), (4, 2, 80), (12, 12, 32), (2, 1, 576), (6, 2, 256)], ids=str)
def test_equal_the_twin(shape: tuple[int, int, int], dtype: str, neox: bool) -> None:
    check(make_case(*shape, [1, 17, 3], neox=neox), dtype)


@pytest.mark.parametrize("neox", [False, True])
def test_part_of_a_head_turns(neox: bool) -> None:
    check(make_case(4, 2, 64, [20, 5], neox=neox, rope_dim=24), "f32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_rope_nothing_turns(dtype: str) -> None:
    check(replace(make_case(4, 2, 20, [19, 3]), rope=None), dtype)


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows_of_a_program(dtype: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tiles, "MOST_ROWS", most)
    check(make_case(9, 3, 80, [1, 17, 3]), dtype)


def test_rows_that_pad_store_in_the_scratch_page_alone() -> None:
    case = make_case(4, 2, 32, [3, 1])
    check(case, "f16", bucket=8)
    run = PagedRun(case, "f16")
    run.store(*case.whole(), 8)
    pages = run.cache.layers[run.layer]
    assert (pages.k[case.pages, :, 0] != 0).all()
    used = {int(case.tables[0, 0]), int(case.tables[1, 0]), case.pages}
    assert {page for page in range(case.pages + 1) if pages.k[page].any()} == used


def test_q8_0_keeps_zeros_tiny_and_mixed_groups() -> None:
    case = replace(make_case(2, 1, 80, [40]), rope=None)
    case.qkv[0][:, 160:] *= np.float32(10) ** np.arange(-37, 3, dtype=np.float32)[:, None]
    case.qkv[0][7, 160:] = 0
    check(case, "q8_0")


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # the interpreter is NumPy
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_values_out_of_range_are_not_numbers_when_they_come_back(bad: float) -> None:
    case = replace(make_case(2, 1, 64, [3]), rope=None)
    case.qkv[0][1, 130] = bad
    run = PagedRun(case, "q8_0")
    run.store(*case.whole())
    with np.errstate(invalid="ignore"):
        k, v = stored(run.cache, run.layer, case, 0)
    assert not np.isfinite(k[1, 0, :32]).any()
    assert np.isfinite(k[[0, 2]]).all()
    assert np.isfinite(k[1, 0, 32:]).all()
    assert np.isfinite(v).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_copied_pages(dtype: str) -> None:
    case = make_case(4, 2, 40, [16, 16, 16, 16])
    run = PagedRun(case, dtype)
    run.store(*case.whole())
    before = [x.clone() for x in run.cache.groups[1].tensors]
    copy_pages(run.cache, 1, [(0, 2), (3, 1)])
    for now, then in zip(run.cache.groups[1].tensors, before, strict=True):
        assert torch.equal(now[:, :4], then[:, [0, 3, 0, 3]])
        assert not now[:, 4:].any()
    copy_pages(run.cache, 1, [])


def test_memory_of_a_position_is_what_the_cache_takes() -> None:
    shape = AttentionShape(4, 2, 80, 1.0)
    for dtype in DTYPES:
        cache = kv_cache([KVGroup((0, 2), 5), KVGroup((1,), 3)], shape, dtype)
        size = sum(x.nbytes for pages in cache.groups for x in pages.tensors)
        assert size == (2 * 6 + 4) * PAGE_SIZE * token_bytes(2, 80, dtype)
    assert token_bytes(3, 64, "f16") == 2 * 3 * 64 * 2
    assert token_bytes(2, 80, "q8_0") == 2 * 2 * (80 + 3 * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_finds_what_was_stored(dtype: str) -> None:
    case = make_case(4, 2, 48, [1, 19, 4])
    run = PagedRun(case, dtype)
    out = run.attend(run.store(*case.whole(), bucket=32))
    expected = np.concatenate([twin(case, s, dtype) for s in range(3)])
    assert nmse(out[:24].numpy(), expected) < 1e-8
    assert not out[24:].any()
