"""Matrix products on their own: a network that does nothing but multiply."""

from __future__ import annotations

import numpy as np

from shoal.bench.models.random_weights import random_rows
from shoal.gguf.quants import QuantFormat, format_named
from shoal.kernels.base import (
    PAGE_SIZE,
    Array,
    AttentionShape,
    Backend,
    KVGroup,
    Linear,
    Ops,
    RawTensor,
    StepInput,
    StepLimits,
)

_NO_ATTENTION = AttentionShape(heads=1, kv_heads=1, head_dim=16, scale=1.0)


class Products:
    """``copies`` random matrices of one format and ``shape`` (rows, columns), each multiplied ``repeats`` times with the same
    tokens in one pass; ``num_bytes`` is the size of all of them, as in a file.

    Copies that no cache holds together come from memory; a small one that is multiplied again and again stays in the cache.
    """

    def __init__(
        self,
        backend: Backend,
        format: QuantFormat,
        shape: tuple[int, int],
        max_tokens: int,
        *,
        copies: int,
        repeats: int,
    ) -> None:
        tensor = random_tensor(format, shape)
        matrices = [backend.matrix([tensor]) for _ in range(copies)]
        table = backend.matrix([random_tensor(format_named("F32"), (max_tokens, shape[1]))])

        def layers(ops: Ops) -> Array:
            x = ops.embed(table)
            for matrix in matrices * repeats:
                ops.linear(x, Linear(matrix))
            return x

        self.num_bytes = copies * tensor.data.size
        self.products = copies * repeats
        self._weights = (*matrices, table)  # a bound network does not keep them
        self._pages = np.arange(-(-max_tokens // PAGE_SIZE), dtype=np.int32)[None, None]
        cache = backend.kv_cache([KVGroup((0,), self._pages.size)], _NO_ATTENTION, "f16")
        limits = StepLimits(max_tokens, 1, self._pages.size)
        self._network = backend.bind(layers, lambda ops, x: ops.linear(ops.logit_rows(x), Linear(table)), cache, limits)

    def run(self, tokens: int) -> None:
        """One pass over all matrices with this many tokens."""
        ids, ends = np.arange(tokens, dtype=np.int32), np.array([0, tokens], np.int32)
        self._network.layers(StepInput(ids, ids, ends, ends[1:], self._pages))


def random_tensor(format: QuantFormat, shape: tuple[int, int]) -> RawTensor:
    """Random weights (random_weights.py), always the same."""
    return RawTensor("random", format, shape, random_rows(format, shape, np.random.default_rng(0)))
