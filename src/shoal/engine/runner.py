"""ModelRunner: step arrays + weights + KV pages -> hidden states and logits."""

from __future__ import annotations

from collections.abc import Sequence as Row

import numpy as np
from numpy.typing import NDArray

from shoal.engine.memory_plan import MemoryPlan, kv_dtype
from shoal.engine.scheduler import PageCopy, StepBatch
from shoal.engine.sequence import Sequence
from shoal.engine.step import StepArrays
from shoal.kernels.base import LOGIT_ROWS, Backend, BoundNetwork, Head, KVGroup, Layers, StepLimits
from shoal.models.encoder import run_classifier, run_encoder, run_encoder_states
from shoal.models.transformer import run_head, run_layers, run_states
from shoal.models.weights import Encoder, Model
from shoal.params import EngineConfig


class ModelRunner:
    """One network, bound to KV memory of its own for ``groups`` and to buffers for the largest step."""

    def __init__(
        self, model: Model | Encoder, backend: Backend, groups: Row[KVGroup], kv_dtype: str, limits: StepLimits
    ) -> None:
        self._cache = cache = backend.kv_cache(groups, model.shape, kv_dtype)
        self.network: BoundNetwork = backend.bind(*_network(model), cache, limits, _states(model))
        self._arrays = StepArrays(limits, len(groups))
        self._backend = backend
        self._model = model  # a bound network may hold bare addresses of its weights: they must live as long

    @classmethod
    def planned(cls, model: Model | Encoder, backend: Backend, plan: MemoryPlan, config: EngineConfig) -> ModelRunner:
        """With the memory that was planned for the model."""
        groups = [KVGroup(group.layers, group.num_pages) for group in plan.groups]
        return cls(model, backend, groups, kv_dtype(model.config, config), plan.step_limits(config))

    def forward(self, batch: StepBatch) -> None:
        """Run all layers over the batch. Its hidden states stay for ``rows`` and the sampler."""
        self.network.layers(self._arrays.fill(batch))

    def copy_pages(self, copies: Row[PageCopy]) -> None:
        """Copy pages. No page may be both read and written."""
        for index in {copy.group for copy in copies}:
            pairs = [(copy.source, copy.target) for copy in copies if copy.group == index]
            self._backend.copy_pages(self._cache, index, pairs)

    def rows(self, seq: Sequence) -> NDArray[np.float32]:
        """What a sequence wants of those positions of this step that were not reported before: logits [rows, vocab], states [rows,
        n_embd] or, for pooling rank, scores [rows, classes]; the caller's to keep."""
        read = self.network.logits if seq.request.pooling in (None, "rank") else self.network.states
        rows = np.array([seq.row_of(position) for position in seq.unscored], np.int32)
        first = read(rows[:LOGIT_ROWS])
        out = np.empty((len(rows), first.shape[1]), np.float32)
        out[:LOGIT_ROWS] = first
        for start in range(LOGIT_ROWS, len(rows), LOGIT_ROWS):
            out[start : start + LOGIT_ROWS] = read(rows[start : start + LOGIT_ROWS])
        return out


def _network(model: Model | Encoder) -> tuple[Layers, Head]:
    if isinstance(model, Encoder):
        return (lambda ops: run_encoder(ops, model)), (lambda ops, x: run_classifier(ops, model, x))
    return (lambda ops: run_layers(ops, model)), (lambda ops, x: run_head(ops, model, x))


def _states(model: Model | Encoder) -> Head:
    if isinstance(model, Encoder):
        return lambda ops, x: run_encoder_states(ops, model, x)
    return lambda ops, x: run_states(ops, model, x)
