"""Faults put between the engine and any backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.base import (
    Backend,
    BoundNetwork,
    Head,
    IntArray,
    KVCache,
    Layers,
    SampleRows,
    StepInput,
    StepLimits,
)

Fault = Callable[[str, StepInput], None]


def faulty(backend: Backend, fault: Fault) -> Backend:
    """``backend``, but ``fault(name, step)`` is called after each "layers", "logits", "states" and "sample", and may raise.

    After: so the step has left its traces in the KV pages and buffers.
    """
    return cast(Backend, _FaultyBackend(backend, fault))


class _FaultyBackend:
    def __init__(self, inner: Backend, fault: Fault) -> None:
        self._inner, self._fault = inner, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def bind(
        self, layers: Layers, head: Head, cache: KVCache, limits: StepLimits, states: Head | None = None
    ) -> _FaultyNetwork:
        return _FaultyNetwork(self._inner.bind(layers, head, cache, limits, states), self._fault)


class _FaultyNetwork:
    def __init__(self, inner: BoundNetwork, fault: Fault) -> None:
        self._inner, self._fault = inner, fault
        self._step: StepInput

    def layers(self, step: StepInput) -> None:
        self._step = step
        self._inner.layers(step)
        self._fault("layers", step)

    def logits(self, rows: IntArray) -> NDArray[np.float32]:
        logits = self._inner.logits(rows)
        self._fault("logits", self._step)
        return logits

    def states(self, rows: IntArray) -> NDArray[np.float32]:
        states = self._inner.states(rows)
        self._fault("states", self._step)
        return states

    def sample(self, rows: IntArray, how: SampleRows) -> IntArray:
        tokens = self._inner.sample(rows, how)
        self._fault("sample", self._step)
        return tokens

    @property
    def last_logits(self) -> NDArray[np.float32]:
        return self._inner.last_logits
