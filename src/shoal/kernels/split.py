"""A Backend made of two: the first layers of a model lie on one, the others and the head on the other. Any two backends will do.

The network is bound to both as a whole, each time through ``_Half``, which does the operations of its own side alone: weights know
whose they are, by the names that tensors have in the file, and what is made without weights is made where its input is. The
hidden state crosses once a step, as rows of float32:

    first    embed  layers 0 ... cut - 1                          hidden
                                                                     |
    second                                received  layers cut ... n - 1  head, sampling
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.quants import QuantFormat
from shoal.kernels.base import (
    Activation,
    Array,
    AttentionShape,
    Backend,
    BoundLayers,
    BoundNetwork,
    Experts,
    Head,
    Heads,
    IntArray,
    KVCache,
    KVGroup,
    Layers,
    Linear,
    Norm,
    Ops,
    RawTensor,
    Rope,
    SampleRows,
    StepInput,
    StepLimits,
)

_LAYER = re.compile(r"blk\.(\d{1,9})\.")
_INPUT = re.compile(r"token_embd|position_embd|token_types")


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a model is cut: layers from ``first_layer`` on and the head are the second backend's. ``width``: n_embd. ``tied``: the
    embedding is the head's matrix too, so that both have it."""

    first_layer: int
    width: int
    tied: bool

    def sides(self, tensor: str) -> tuple[int, ...]:
        """Which of the two backends (0, 1) need a tensor."""
        layer = _LAYER.match(tensor)
        if layer is not None:
            return (int(int(layer[1]) >= self.first_layer),)
        if self.tied and tensor == "token_embd.weight":
            return (0, 1)
        return (0,) if _INPUT.match(tensor) else (1,)


@dataclass(frozen=True, slots=True)
class _Owned:
    """A matrix or vector as each side has it; None where it does not."""

    on: tuple[Array | None, Array | None]


class SplitBackend:
    """``first`` and ``second``, joined at ``cut``."""

    def __init__(self, first: Backend, second: Backend, cut: Cut) -> None:
        self.both, self.cut = (first, second), cut
        self.name = f"{first.name}+{second.name}"

    def describe(self) -> str:
        """Each in its words, and where the cut is."""
        first, second = (backend.describe() for backend in self.both)
        return f"the first {self.cut.first_layer} layers on {first}; the others and the head on {second}"

    def supports(self, format: QuantFormat) -> bool:
        """Whether both do."""
        return all(backend.supports(format) for backend in self.both)

    def matrix(self, parts: Sequence[RawTensor]) -> _Owned:
        """Packed where it is needed."""
        return self._owned(parts[0].name, lambda backend: backend.matrix(parts))

    def vector(self, tensor: RawTensor) -> _Owned:
        """The same."""
        return self._owned(tensor.name, lambda backend: backend.vector(tensor))

    def _owned(self, name: str, make: Callable[[Backend], Array]) -> _Owned:
        sides = self.cut.sides(name)
        first, second = (make(backend) if side in sides else None for side, backend in enumerate(self.both))
        return _Owned((first, second))

    def kv_token_bytes(self, kv_heads: int, head_dim: int, dtype: str) -> int:
        """Where that is more; ``owners`` have figures of their own."""
        return max(backend.kv_token_bytes(kv_heads, head_dim, dtype) for backend in self.both)

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> tuple[KVCache, KVCache]:
        """Pages of each layer where its weights are; page ids and groups are the same on both sides."""
        first, second = (
            backend.kv_cache([self._of_side(group, side) for group in groups], shape, dtype)
            for side, backend in enumerate(self.both)
        )
        return first, second

    def _of_side(self, group: KVGroup, side: int) -> KVGroup:
        return replace(group, layers=tuple(i for i in group.layers if self.cut.sides(f"blk.{i}.") == (side,)))

    def copy_pages(self, cache: tuple[KVCache, KVCache], group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """On both sides."""
        for backend, own in zip(self.both, cache, strict=True):
            backend.copy_pages(own, group, pairs)

    def bind(
        self,
        layers: Layers,
        head: Head,
        cache: tuple[KVCache, KVCache],
        limits: StepLimits,
        states: Head | None = None,
    ) -> BoundNetwork:
        """Bind the halves. What is read from the hidden state is the second's."""
        first, second = self._halves(layers)
        return _SplitNetwork(
            self.both[0].bind_layers(first, cache[0], limits),
            self.both[1].bind(
                second, self._tail(head), cache[1], limits, None if states is None else self._tail(states)
            ),
        )

    def bind_layers(self, layers: Layers, cache: tuple[KVCache, KVCache], limits: StepLimits) -> BoundLayers:
        """The same without a head."""
        first, second = (
            backend.bind_layers(half, own, limits)
            for backend, half, own in zip(self.both, self._halves(layers), cache, strict=True)
        )
        return _SplitLayers(first, second)

    def _halves(self, layers: Layers) -> tuple[Layers, Layers]:
        def first(ops: Ops) -> Array:
            return layers(_Half(ops, 0, self.cut.width))

        def second(ops: Ops) -> Array:
            half = _Half(ops, 1, self.cut.width)
            return half.brought(layers(half))

        return first, second

    def _tail(self, head: Head) -> Head:
        return lambda ops, hidden: head(_Half(ops, 1, self.cut.width), hidden)

    def owners(self, tensor: str) -> tuple[Backend, ...]:
        """One of the two, or both."""
        return tuple(self.both[side] for side in self.cut.sides(tensor))

    def memory_room(self) -> None:
        """None of its own: its owners have some."""

    def close(self) -> None:
        """Both."""
        for backend in self.both:
            backend.close()


class _SplitLayers:
    """Two bound halves, one after the other."""

    def __init__(self, first: BoundLayers, second: BoundLayers) -> None:
        self._first, self._last = first, second

    def receive(self, rows: NDArray[np.float32]) -> None:
        self._first.receive(rows)

    def layers(self, step: StepInput) -> None:
        self._first.layers(step)
        self._last.receive(self._first.hidden)
        self._last.layers(step)

    @property
    def hidden(self) -> NDArray[np.float32]:
        return self._last.hidden


class _SplitNetwork(_SplitLayers):
    """Two bound halves, of which the second has the head."""

    def __init__(self, first: BoundLayers, second: BoundNetwork) -> None:
        super().__init__(first, second)
        self._second = second

    def logits(self, rows: IntArray) -> NDArray[np.float32]:
        return self._second.logits(rows)

    def sample(self, rows: IntArray, how: SampleRows) -> IntArray:
        return self._second.sample(rows, how)

    def states(self, rows: IntArray) -> NDArray[np.float32]:
        return self._second.states(rows)

    @property
    def last_logits(self) -> NDArray[np.float32]:
        return self._second.last_logits


class _Elsewhere:
    """An array of the other side."""


_Weights = TypeVar("_Weights", _Owned, Linear, Norm, Experts)


class _Half:
    """``shoal.kernels.base.Ops`` (whose docstrings say what each does) of one side: 0 or 1. Operations of the other do nothing and give
    an ``_Elsewhere``. One array crosses, from side 0 to side 1: the first that an operation of side 1 reads."""

    def __init__(self, ops: Ops, side: int, width: int) -> None:
        self._ops, self._side, self._width = ops, side, width
        self._crossed: tuple[Array, Array] | None = None  # what it is over there, and what was received
        self._over = False  # on side 0: the other's layers have begun

    def brought(self, x: Array) -> Array:
        """``x`` on this side, received if it is not here yet."""
        x = self._known(x)
        if not isinstance(x, _Elsewhere):
            return x
        assert self._side == 1, "nothing comes back to the first side"
        assert self._crossed is None, "one array crosses"
        received = self._ops.received(self._width)
        self._crossed = x, received
        return received

    def _known(self, x: Array) -> Array:
        return self._crossed[1] if self._crossed is not None and x is self._crossed[0] else x

    def _weighed(self, op: Callable[..., Array], arrays: Sequence[Array], weights: _Weights) -> Array:
        """An operation with weights: of the side that has them."""
        mine = _on_side(weights, self._side)
        if mine is None:
            self._over = self._side == 0
            return _Elsewhere()
        assert not self._over, "layers of the first side come first"
        return op(*(self.brought(x) for x in arrays), mine)

    def _plain(self, op: Callable[..., Array], *arrays: Array) -> Array:
        """An operation without: where its input is. What the second side adds to a row of the first is no matter of the first's."""
        here = [self._known(x) for x in arrays]
        away = [x for x in here if isinstance(x, _Elsewhere)]
        if len(away) == len(here) or (away and self._side == 0):
            return _Elsewhere()
        return op(*(self.brought(x) for x in here))

    def embed(self, table: _Owned) -> Array:
        return self._ops.embed(table.on[0]) if self._side == 0 else _Elsewhere()

    def positions(self, table: _Owned) -> Array:
        return self._ops.positions(table.on[0]) if self._side == 0 else _Elsewhere()

    def received(self, width: int) -> Array:
        return self._ops.received(width) if self._side == 0 else _Elsewhere()

    def norm(self, x: Array, norm: Norm) -> Array:
        return self._weighed(self._ops.norm, [x], norm)

    def norm_heads(self, x: Array, heads: Heads, norm: Norm) -> None:
        self._weighed(lambda x, norm: self._ops.norm_heads(x, heads, norm), [x], norm)

    def linear(self, x: Array, linear: Linear) -> Array:
        return self._weighed(self._ops.linear, [x], linear)

    def linear_add(self, residual: Array, x: Array, linear: Linear) -> None:
        self._weighed(self._ops.linear_add, [residual, x], linear)

    def add(self, residual: Array, x: Array) -> None:
        self._plain(self._ops.add, residual, x)

    def add_vector(self, x: Array, vector: _Owned) -> None:
        self._weighed(self._ops.add_vector, [x], vector)

    def multiply(self, x: Array, factor: float) -> None:
        self._plain(lambda x: self._ops.multiply(x, factor), x)

    def soft_cap(self, x: Array, cap: float) -> None:
        self._plain(lambda x: self._ops.soft_cap(x, cap), x)

    def clamp(self, x: Array, limit: float) -> None:
        self._plain(lambda x: self._ops.clamp(x, limit), x)

    def rope_store(self, qkv: Array, layer: int, shape: AttentionShape, rope: Rope | None) -> Array:
        return self._plain(lambda qkv: self._ops.rope_store(qkv, layer, shape, rope), qkv)

    def attention(self, q: Array, layer: int, shape: AttentionShape) -> Array:
        return self._plain(lambda q: self._ops.attention(q, layer, shape), q)

    def gated(self, gate_up: Array, activation: Activation) -> Array:
        return self._plain(lambda x: self._ops.gated(x, activation), gate_up)

    def activate(self, x: Array, activation: Activation) -> Array:
        return self._plain(lambda x: self._ops.activate(x, activation), x)

    def gate_rows(self, x: Array, h: Array, gate: Linear) -> None:
        self._weighed(self._ops.gate_rows, [x, h], gate)

    def experts(self, residual: Array, x: Array, experts: Experts) -> None:
        self._weighed(self._ops.experts, [residual, x], experts)

    def columns(self, x: Array, first: int, width: int) -> Array:
        return self._plain(lambda x: self._ops.columns(x, first, width), x)

    def concat(self, parts: Sequence[Array]) -> Array:
        return self._plain(lambda *parts: self._ops.concat(parts), *parts)

    def logit_rows(self, x: Array) -> Array:
        return self._plain(self._ops.logit_rows, x)


def _on_side(weights: _Owned | Linear | Norm | Experts, side: int) -> Array | None:
    """The same as one side has it; None if that does not have it."""
    if isinstance(weights, _Owned):
        return weights.on[side]
    if isinstance(weights, Experts):
        router = _on_side(weights.router, side)
        gate_up, down = (tuple(m.on[side] for m in matrices) for matrices in (weights.gate_up, weights.down))
        bias = _optional(weights.choice_bias, side)
        return router and replace(weights, router=router, gate_up=gate_up, down=down, choice_bias=bias)
    if isinstance(weights, Norm):
        weight = weights.weight.on[side]
        return None if weight is None else replace(weights, weight=weight, bias=_optional(weights.bias, side))
    matrix, bias, scale = weights.matrix.on[side], _optional(weights.bias, side), _optional(weights.scale, side)
    return None if matrix is None else replace(weights, matrix=matrix, bias=bias, scale=scale)


def _optional(vector: _Owned | None, side: int) -> Array | None:
    return None if vector is None else vector.on[side]
