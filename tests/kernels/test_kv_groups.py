"""KV groups: layers with page tables of their own, and pages that went to another sequence once the window had passed them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.gguf.quants import format_named
from shoal.kernels.base import (
    PAGE_SIZE,
    Array,
    AttentionShape,
    Backend,
    IntArray,
    KVGroup,
    Linear,
    Ops,
    RawTensor,
    Rope,
    StepInput,
    StepLimits,
)
from shoal.kernels.load import load_backend

F32 = NDArray[np.float32]
WINDOW, LENGTH = 20, 160
PAGES = LENGTH // PAGE_SIZE
NAN_TOKEN = 50
WHOLE = AttentionShape(heads=4, kv_heads=2, head_dim=16, scale=0.25)
WINDOWED = AttentionShape(heads=4, kv_heads=2, head_dim=16, scale=0.25, window=WINDOW)
WIDTH = (WHOLE.heads + 2 * WHOLE.kv_heads) * WHOLE.head_dim
OUT = 2 * WHOLE.heads * WHOLE.head_dim


@pytest.fixture(scope="module", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    backend = load_backend(request.param, 2)
    yield backend
    backend.close()


class TwoLayers:
    """A layer that sees everything beside one with a window, both over rows of a table; ``run`` gives what both attend to."""

    def __init__(self, backend: Backend, dtype: str, window_pages: int) -> None:
        table = np.random.default_rng(0).standard_normal((NAN_TOKEN + 1, WIDTH)).astype(np.float32)
        table[NAN_TOKEN] = np.nan
        self._table, self._same = backend.matrix([_tensor(table)]), backend.matrix([_tensor(np.eye(OUT))])
        self._rope = Rope((100.0 ** -np.linspace(0, 1, 8)).astype(np.float32), neox=True)
        groups = [KVGroup((0,), PAGES + 1), KVGroup((1,), window_pages)]
        cache = backend.kv_cache(groups, WHOLE, dtype)
        limits = StepLimits(max_rows=2 * PAGE_SIZE, max_seqs=2, max_pages_per_seq=PAGES)
        self._network = backend.bind(self._layers, self._head, cache, limits)

    def _layers(self, ops: Ops) -> Array:
        parts = []
        for layer, shape in enumerate((WHOLE, WINDOWED)):
            q = ops.rope_store(ops.embed(self._table), layer, shape, self._rope)
            parts.append(ops.attention(q, layer, shape))
        return ops.concat(parts)

    def _head(self, ops: Ops, x: Array) -> Array:
        return ops.linear(ops.logit_rows(x), Linear(self._same))

    def run(self, tokens: IntArray, first: int, pages: IntArray) -> F32:
        """Positions from ``first`` on of one sequence; ``pages`` [2, PAGES]."""
        positions = np.arange(first, first + len(tokens), dtype=np.int32)
        ends = np.array([0, len(tokens)], np.int32)
        self._network.layers(StepInput(tokens, positions, ends, positions[-1:] + 1, pages[:, None]))
        return self._network.logits(positions - first).copy()


def _tensor(values: NDArray[np.floating]) -> RawTensor:
    return RawTensor("values", format_named("F32"), values.shape, values.astype(np.float32).view(np.uint8))


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_what_lies_before_the_window_is_not_read(backend: Backend, dtype: str, chunk: int) -> None:
    """Four pages in turn are enough for a window of 20 and a chunk of 16; the one not in use is filled with NaN before each step."""
    tokens = np.random.default_rng(1).integers(0, NAN_TOKEN, LENGTH).astype(np.int32)
    own = np.stack([np.arange(PAGES), np.arange(PAGES)]).astype(np.int32)
    in_turn = np.stack([np.arange(PAGES)[::-1], np.arange(PAGES) % 4]).astype(np.int32)
    alone, shared = TwoLayers(backend, dtype, PAGES), TwoLayers(backend, dtype, 4)
    poison = np.full(PAGE_SIZE, NAN_TOKEN, np.int32)
    for first in range(0, LENGTH, chunk):
        part = tokens[first : first + chunk]
        last_page = (first + len(part) - 1) // PAGE_SIZE
        shared.run(poison, 0, np.array([[PAGES] * PAGES, [(last_page + 1) % 4] * PAGES], np.int32))
        expected = alone.run(part, first, own)
        assert np.isfinite(expected).all()
        assert np.array_equal(shared.run(part, first, in_turn), expected)


def test_a_window_makes_a_difference(backend: Backend) -> None:
    tokens = np.random.default_rng(1).integers(0, NAN_TOKEN, 2 * PAGE_SIZE).astype(np.int32)
    pages = np.stack([np.arange(PAGES), np.arange(PAGES)]).astype(np.int32)
    whole, windowed = np.split(TwoLayers(backend, "f32", PAGES).run(tokens, 0, pages), 2, axis=1)
    assert np.array_equal(whole[:WINDOW], windowed[:WINDOW])
    assert (np.abs(whole[WINDOW:] - windowed[WINDOW:]).max(axis=1) > 1e-3).all()
