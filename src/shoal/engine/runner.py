"""ModelRunner: step arrays + weights + KV pages -> hidden states and logits."""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np
from numpy.typing import NDArray

from shoal.engine.scheduler import PageCopy, StepBatch
from shoal.engine.sequence import Sequence
from shoal.engine.step import StepArrays
from shoal.kernels.base import LOGIT_ROWS, Backend, BoundNetwork, KVGroup, StepLimits
from shoal.models.transformer import run_head, run_layers
from shoal.models.weights import Model


class ModelRunner:
    """One network, bound to KV memory of its own for ``groups`` and to buffers for the largest step."""

    def __init__(self, model: Model, backend: Backend, groups: Row[KVGroup], kv_dtype: str, limits: StepLimits) -> None:
        self._cache = cache = backend.kv_cache(groups, model.shape, kv_dtype)
        self.network: BoundNetwork = backend.bind(
            lambda ops: run_layers(ops, model),
            lambda ops, x: run_head(ops, model, x),
            cache,
            limits,
        )
        self._arrays = StepArrays(limits, len(groups))
        self._vocab_size = model.config.vocab_size
        self._backend = backend
        self._model = model  # a bound network may hold bare addresses of its weights: they must live as long

    def forward(self, batch: StepBatch) -> None:
        """Run all layers over the batch. Its hidden states stay for ``logits`` and the sampler."""
        self.network.layers(self._arrays.fill(batch))

    def copy_pages(self, copies: Row[PageCopy]) -> None:
        """Copy pages. No page may be both read and written."""
        for index in {copy.group for copy in copies}:
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == index]
            self._backend.copy_pages(self._cache, index, pairs)

    def logits(self, seq: Sequence) -> NDArray[np.float32]:
        """Logits [rows, vocab] of those positions of this step that were not reported before; the caller's to keep."""
        rows = np.array([seq.row_of(position) for position in seq.unscored], np.int32)
        out = np.empty((len(rows), self._vocab_size), np.float32)
        for start in range(0, len(rows), LOGIT_ROWS):
            out[start : start + LOGIT_ROWS] = self.network.logits(rows[start : start + LOGIT_ROWS])
        return out
