"""Rotary positions, paged storage and attention against the NumPy twins, over ragged batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.kernels import reference
from shoal.kernels.base import PAGE_SIZE, AttentionShape, Rope, StepInput
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.runner import PagedAttention

F32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def backend() -> Iterator[CPUBackend]:
    backend = CPUBackend(threads=2)
    yield backend
    backend.close()


@dataclass
class Case:
    """Sequences with random q, k, v for each position, and pages dealt out of order."""

    shape: AttentionShape
    rope: Rope
    lengths: list[int]
    qkv: list[F32]
    tables: NDArray[np.int32]
    pages: int

    def step(self, spans: list[tuple[int, int, int]]) -> tuple[StepInput, F32]:
        """The step that computes positions first ... last - 1 of some sequences: (sequence, first, last)."""
        counts = [last - first for _, first, last in spans]
        step = StepInput(
            token_ids=np.zeros(sum(counts), np.int32),
            positions=np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in spans]),
            row_start=np.cumsum([0, *counts]).astype(np.int32),
            kv_len=np.array([last for _, _, last in spans], np.int32),
            page_table=np.ascontiguousarray(self.tables[[s for s, _, _ in spans]]),
        )
        return step, np.concatenate([self.qkv[s][a:b] for s, a, b in spans])

    def expected(self, s: int, dtype: type[np.float16] | type[np.float32]) -> F32:
        """Attention of sequence s from the twins."""
        shape, n = self.shape, self.lengths[s]
        heads = self.qkv[s].reshape(n, -1, shape.head_dim)
        q, k, v = np.split(heads, [shape.heads, shape.heads + shape.kv_heads], axis=1)
        positions = np.arange(n, dtype=np.int32)
        k = reference.rotate(k, positions, self.rope).astype(dtype).astype(np.float32)
        q = reference.rotate(q, positions, self.rope)
        out = reference.attend(q, k, v.astype(dtype).astype(np.float32), positions, shape.scale)
        return out.reshape(n, -1)


def _case(shape: AttentionShape, lengths: list[int], *, neox: bool = False, rope_dim: int | None = None) -> Case:
    rng = np.random.default_rng(shape.head_dim + len(lengths))
    pairs = (rope_dim or shape.head_dim) // 2
    rope = Rope((10000.0 ** (-np.arange(pairs) / pairs)).astype(np.float32), neox)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    per_sequence = -(-max(lengths) // PAGE_SIZE)
    order = rng.permutation(len(lengths) * per_sequence).astype(np.int32)
    qkv = [rng.standard_normal((n, width)).astype(np.float32) for n in lengths]
    return Case(shape, rope, lengths, qkv, order.reshape(len(lengths), -1), len(order))


def _nmse(a: F32, r: F32) -> float:
    return float(np.sum((a.astype(np.float64) - r) ** 2) / np.sum(r.astype(np.float64) ** 2))


def _shape(heads: int, kv_heads: int, head_dim: int) -> AttentionShape:
    return AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5)


SHAPES = [(4, 4, 14), (9, 3, 64), (4, 2, 80), (6, 2, 96), (8, 1, 128), (7, 1, 32), (2, 1, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_prompts_equal_the_twin(backend: CPUBackend, shape: tuple[int, int, int], dtype: str) -> None:
    case = _case(_shape(*shape), [1, 3, 17, 40, 123], neox=shape[2] == 80)
    paged = PagedAttention(backend, case.shape, case.rope, case.pages, dtype, max_rows=256)
    out = paged.run(*case.step([(s, 0, n) for s, n in enumerate(case.lengths)]))
    kind = np.float16 if dtype == "f16" else np.float32
    expected = np.concatenate([case.expected(s, kind) for s in range(len(case.lengths))])
    assert _nmse(out, expected) < {"f32": 1e-10, "f16": 1e-6}[dtype]


def test_part_of_a_head_turns(backend: CPUBackend) -> None:
    for neox in (False, True):
        case = _case(_shape(4, 2, 64), [20, 5], neox=neox, rope_dim=24)
        paged = PagedAttention(backend, case.shape, case.rope, case.pages, "f32", max_rows=64)
        out = paged.run(*case.step([(0, 0, 20), (1, 0, 5)]))
        expected = np.concatenate([case.expected(s, np.float32) for s in (0, 1)])
        assert _nmse(out, expected) < 1e-10


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 64, 200])
def test_chunks_and_neighbours_change_no_bit(backend: CPUBackend, chunk: int) -> None:
    case = _case(_shape(9, 3, 64), [180, 33, 17])
    whole = PagedAttention(backend, case.shape, case.rope, case.pages, "f16", max_rows=256)
    at_once = whole.run(*case.step([(s, 0, n) for s, n in enumerate(case.lengths)]))
    starts = np.cumsum([0, *case.lengths])
    paged = PagedAttention(backend, case.shape, case.rope, case.pages, "f16", max_rows=256)
    done = 0
    while done < max(case.lengths):
        spans = [(s, done, min(done + chunk, n)) for s, n in enumerate(case.lengths) if done < n]
        out, row = paged.run(*case.step(spans)), 0
        for s, first, last in spans:
            want = at_once[starts[s] + first : starts[s] + last]
            assert np.array_equal(out[row : row + last - first], want)
            row += last - first
        done += chunk


def test_beyond_one_piece(backend: CPUBackend) -> None:
    case = _case(_shape(3, 1, 64), [1100])
    paged = PagedAttention(backend, case.shape, case.rope, case.pages, "f16", max_rows=1100)
    at_once = paged.run(*case.step([(0, 0, 1100)]))
    assert _nmse(at_once, case.expected(0, np.float16)) < 1e-6
    one = paged.run(*case.step([(0, 1099, 1100)]))
    assert np.array_equal(one[0], at_once[1099])


def test_what_was_in_a_page_before_does_not_matter(backend: CPUBackend) -> None:
    case = _case(_shape(4, 2, 32), [21])
    paged = PagedAttention(backend, case.shape, case.rope, case.pages, "f16", max_rows=64)
    clean = paged.run(*case.step([(0, 0, 21)]))
    paged.cache.k.view(np.float16)[:] = np.nan
    paged.cache.v.view(np.float16)[:] = np.nan
    assert np.array_equal(paged.run(*case.step([(0, 0, 21)])), clean)
