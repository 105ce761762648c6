"""The specification: every operation in obvious NumPy, and a whole backend made of them.

Other backends are tested against the functions here. ``matmul`` is float arithmetic on dequantised weights; ``linear_q8`` is the
twin of the integer kernels: activations rounded to int8 with one scale per 16 values.

A row has the same bits alone and among others, on any CPU and with any number of threads. A BLAS adds in an order of its own for
each number of rows, so products are exact sums (``matmul``), whose order cannot matter; all else is done for each row by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.quants import DEQUANTISABLE, QuantFormat
from shoal.kernels.base import (
    PAGE_SIZE,
    Activation,
    AttentionShape,
    Backend,
    BoundLayers,
    BoundNetwork,
    Experts,
    Head,
    Heads,
    IntArray,
    KVGroup,
    Layers,
    Linear,
    Norm,
    Ops,
    RawTensor,
    Rope,
    Routing,
    SampleRows,
    StepInput,
    StepLimits,
)
from shoal.kernels.reference_sampling import sample_row

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
GROUP = 16  # values that share an activation scale
KV_GROUP = 32  # dims of a head that share a scale in a q8_0 cache
PIECE, TILE = 256, 64  # positions that attention on a GPU makes a record of, and that it takes together
TINY = np.float32(1e-30)  # a group whose largest value is no more than this is all zeros
WEIGHT_BITS = 26  # of a fixed-point weight, beside its sign
_DOUBLE_BITS = 53  # integers up to 2^53 are exact in float64


# --- operations ------------------------------------------------------------------------------------------------------


def rms_norm(x: F32, weight: F32, eps: float, bias: F32 | None = None) -> F32:
    """x [..., n] / sqrt(mean(x^2) + eps) * weight + bias (Zhang and Sennrich 2019)."""
    scale = 1.0 / np.sqrt(np.mean(np.square(_doubles(x)), axis=-1, keepdims=True) + eps)
    out: F32 = (x * scale * weight + (0 if bias is None else bias)).astype(np.float32)
    return out


def layer_norm(x: F32, weight: F32, bias: F32 | None, eps: float) -> F32:
    """(x - mean) / sqrt(variance + eps) * weight + bias of [..., n] (Ba et al. 2016)."""
    doubles = _doubles(x)
    centred = doubles - np.mean(doubles, axis=-1, keepdims=True)
    scale = 1.0 / np.sqrt(np.mean(np.square(centred), axis=-1, keepdims=True) + eps)
    out: F32 = (centred * scale * weight + (0 if bias is None else bias)).astype(np.float32)
    return out


def normalise(x: F32, norm: Norm) -> F32:
    """Either of them."""
    if norm.centred:
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return rms_norm(x, norm.weight, norm.eps, norm.bias)


def _doubles(x: F32) -> F64:
    """x in float64, one row after the other: NumPy adds up each by itself then, not in pieces of a buffer that holds several."""
    return np.ascontiguousarray(x, dtype=np.float64)


def fixed_point(*weights: F32) -> F64:
    """Weights, all of them [n, k] one below the other, as ``matmul`` takes them: whole multiples of 2^(e - 26) in float64, where 2^e
    is above the row's largest."""
    fixed = np.concatenate(weights, dtype=np.float64)
    _round(fixed, _exponents(fixed) - WEIGHT_BITS)
    return fixed


def matmul(x: F32 | F64, weight: F64) -> F32:
    """x [rows, k] @ weight [n, k].T, weight being ``fixed_point``: [rows, n]. A row of x that is not finite gives NaN.

    The sums are exact, so that no BLAS, number of rows or of threads makes a difference. With b = 27 - ceil(log2(k)), x is taken as
    x1 + x2, whole multiples of 2^(e - b) and of 2^(e - 2b - 1) where 2^e is above the row's largest; what is left of x, at most
    2^(e - 2b - 2), is dropped. Counted in such multiples, weights are at most 2^26, x1 and x2 at most 2^b: every partial sum
    of their products is a whole number up to k * 2^26 * 2^b <= 2^53, which float64 holds exactly, fused multiply-add or not.
    """
    rows, k = x.shape
    bits = _DOUBLE_BITS - WEIGHT_BITS - (k - 1).bit_length()
    exponents = _exponents(x)
    slices = np.empty((2 * rows, k))
    high, low = slices[:rows], slices[rows:]
    with np.errstate(invalid="ignore", over="ignore"):
        high[:] = x
        _round(high, exponents - bits)
        np.subtract(x, high, out=low)
        _round(low, exponents - 2 * bits - 1)
        sums = slices @ weight.T
        out: F32 = (sums[:rows] + sums[rows:]).astype(np.float32)
    return out


def _exponents(x: F32 | F64) -> NDArray[np.int32]:
    """For each row of x [rows, k] the smallest e with 2^e above all its magnitudes: [rows, 1]."""
    largest = np.maximum(
        x.max(axis=1, keepdims=True), -x.min(axis=1, keepdims=True)
    )  # abs(x) would take as much memory as x
    exponents: NDArray[np.int32] = np.frexp(largest)[1]
    return exponents


def _round(x: F64, exponents: NDArray[np.int32]) -> None:
    """Rows of x to the nearest whole multiples of 2^exponent, in place: next to 1.5 * 2^52 times that, float64 has no others."""
    anchor = np.ldexp(1.5, exponents + (_DOUBLE_BITS - 1))
    x += anchor
    x -= anchor


def quantise_q8(x: F32) -> tuple[NDArray[np.int8], F32]:
    """Activations [rows, k] as int8 [rows, k] in +-127 and one scale per 16 values [rows, k / 16]: x ~ int8 * scale."""
    groups = x.reshape(len(x), -1, GROUP)
    largest = np.abs(groups).max(axis=2)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > TINY, np.float32(127) / largest, np.float32(0)).astype(np.float32)
    q: NDArray[np.int8] = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    return q.reshape(x.shape), (largest * np.float32(1 / 127)).astype(np.float32)


def linear_q8(x: F32, weight: F64) -> F32:
    """What the integer kernels compute: x rounded by ``quantise_q8``, then ``matmul``."""
    q, scale = quantise_q8(x)
    rounded = q.reshape(len(x), -1, GROUP).astype(np.float64) * scale[:, :, None]
    return matmul(rounded.reshape(x.shape), weight)


def round_half(x: F32, *, each_row: bool) -> F32:
    """x [rows, n] rounded once to float16 as kernels of a GPU take it: after division by 2^e, which is above the largest magnitude (of
    each row, or of all), so that none is infinite; multiplied by it again."""
    exponents = _exponents(x) if each_row else _exponents(x).max()
    out: F32 = np.ldexp(np.ldexp(x, -exponents).astype(np.float16).astype(np.float32), exponents)
    return out


def linear_half(x: F32, weight: F32) -> F32:
    """What the kernels of a GPU compute: x [rows, k] and weight [n, k] rounded by ``round_half``, then ``matmul``."""
    return matmul(round_half(x, each_row=True), fixed_point(round_half(weight, each_row=False)))


def store_as(x: F32, dtype: str) -> F32:
    """What a KV cache of this type gives back for heads [..., head_dim]. q8_0 is llama.cpp's: 32 values are int8 in +-127 with a
    float16 scale, which is rounded only after the values were divided by it."""
    if dtype != "q8_0":
        with np.errstate(over="ignore"):
            return x.astype({"f16": np.float16, "f32": np.float32}[dtype]).astype(np.float32)
    width = x.shape[-1]
    groups = np.zeros((*x.shape[:-1], -(-width // KV_GROUP), KV_GROUP), np.float32)
    groups.reshape(*x.shape[:-1], -1)[..., :width] = x
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > TINY, np.float32(127) / largest, np.float32(0)).astype(np.float32)
        scale = (largest * np.float32(1 / 127)).astype(np.float16).astype(np.float32)
    rounded: F32 = (np.rint(groups * inverse) * scale).reshape(*x.shape[:-1], -1)[..., :width]
    return rounded


def rotate(heads: F32, positions: IntArray, rope: Rope) -> F32:
    """Turn [rows, heads, head_dim] by position (Su et al. 2021)."""
    pairs = len(rope.inv_freq)
    angle = positions[:, None].astype(np.float64) * rope.inv_freq.astype(np.float64)
    cos = (np.cos(angle) * rope.scale).astype(np.float32)[:, None, :]
    sin = (np.sin(angle) * rope.scale).astype(np.float32)[:, None, :]
    first = slice(0, pairs) if rope.neox else slice(0, 2 * pairs, 2)
    second = slice(pairs, 2 * pairs) if rope.neox else slice(1, 2 * pairs, 2)
    out = heads.copy()
    a, b = heads[..., first], heads[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def attend(q: F32, k: F32, v: F32, positions: IntArray, shape: AttentionShape, first: int = 0) -> F32:
    """Attention of one sequence: q [rows, heads, d] at ``positions`` over k, v [n, kv_heads, d] of the positions from ``first``
    on -> [rows, heads, d]."""
    out = np.empty_like(q)
    for row, position in enumerate(positions.tolist()):
        start = max(0, position - shape.window + 1 if shape.window else 0)
        seen = slice(start - first, position + 1 - first if shape.causal else None)
        out[row] = _attend_row(q[row], k[seen], v[seen], shape, position - start)
    return out


def _attend_row(q: F32, k: F32, v: F32, shape: AttentionShape, own: int) -> F32:
    """q [heads, d] over the keys and values [n, kv_heads, d] that it sees, its own at ``own`` among them: [heads, d].

    Nothing else has a part in it, so its sums have the same order whatever else the step computes.
    """
    scores = _scores(q, k, shape, np.arange(len(k), dtype=np.float32) - np.float32(own))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return _weighted(weights, v)


def _scores(q: F32, k: F32, shape: AttentionShape, distance: F32) -> F32:
    """Scores [heads, n] of q [heads, d] and keys [n, kv_heads, d], which are ``distance`` [n] away."""
    grouped = q.reshape(k.shape[1], -1, q.shape[1])
    scores: F32 = np.einsum("kgd,pkd->kgp", grouped, k).reshape(len(q), -1) * np.float32(shape.scale)
    if shape.soft_cap:
        scores = soft_cap(scores, shape.soft_cap)
    if shape.slopes is not None:
        scores = scores - np.array(shape.slopes, np.float32)[:, None] * np.abs(distance)
    return scores


def _weighted(weights: F32, v: F32) -> F32:
    """The sum of values [n, kv_heads, d] by weights [heads, n]: [heads, d]."""
    grouped = weights.reshape(v.shape[1], -1, len(v))
    out: F32 = np.einsum("kgp,pkd->kgd", grouped, v).reshape(len(weights), -1)
    return out


def attend_half(q: F32, k: F32, v: F32, positions: IntArray, shape: AttentionShape, first: int = 0) -> F32:
    """What the kernels of a GPU compute for ``attend``: q and every k and v rounded by ``round_half``; PIECE positions give a record,
    made tile by tile with weights rounded to float16; records are folded in order."""
    q, k, v = (round_half(x.reshape(-1, x.shape[-1]), each_row=True).reshape(x.shape) for x in (q, k, v))
    out = np.empty_like(q)
    for row, position in enumerate(positions.tolist()):
        begin = max(0, position - shape.window + 1 if shape.window else 0)
        end = position + 1 if shape.causal else first + len(k)
        folded = _Record.empty(q.shape[1:])
        for start in range(begin // PIECE * PIECE, end, PIECE):
            record = _Record.empty(q.shape[1:])
            for tile in range(start, start + PIECE, TILE):
                at = np.arange(max(begin, tile), min(end, tile + TILE))
                if len(at):
                    scores = _scores(q[row], k[at - first], shape, (at - position).astype(np.float32))
                    record = record.with_tile(scores, v[at - first])
            folded = folded.fold(record)
        out[row] = folded.sums / folded.total
    return out


@dataclass(frozen=True)
class _Record:
    """What some positions give each query head: the largest score and the sum of exp(score - largest), [heads, 1], and the values
    weighted so, [heads, d]."""

    top: F32
    total: F32
    sums: F32

    @staticmethod
    def empty(shape: tuple[int, ...]) -> _Record:
        top = np.full((shape[0], 1), -1e30, np.float32)
        return _Record(top, np.zeros_like(top), np.zeros(shape, np.float32))

    def with_tile(self, scores: F32, v: F32) -> _Record:
        """This and some more positions."""
        top = np.maximum(self.top, scores.max(axis=1, keepdims=True))
        weights, shrink = np.exp(scores - top), np.exp(self.top - top)
        total = self.total * shrink + weights.sum(axis=1, keepdims=True)
        halves = weights.astype(np.float16).astype(np.float32)
        return _Record(top, total, self.sums * shrink + _weighted(halves, v))

    def fold(self, later: _Record) -> _Record:
        """This and the record of a later piece."""
        top = np.maximum(self.top, later.top)
        a, b = np.exp(self.top - top), np.exp(later.top - top)
        return _Record(top, self.total * a + later.total * b, self.sums * a + later.sums * b)


def soft_cap(x: F32, cap: float) -> F32:
    """cap * tanh(x / cap)."""
    out: F32 = (np.tanh(x / np.float32(cap)) * np.float32(cap)).astype(np.float32)
    return out


def sigmoid(x: F32) -> F32:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):
        out: F32 = (1.0 / (1.0 + np.exp(-x))).astype(np.float32)
    return out


def activate(x: F32, activation: Activation) -> F32:
    """silu, gelu (tanh form) or squared relu."""
    if activation == "silu":
        return x * sigmoid(x)
    if activation == "relu2":
        return np.square(np.maximum(x, np.float32(0)))
    inner = np.float32(np.sqrt(2 / np.pi)) * x * (1 + np.float32(0.044715) * x * x)
    out: F32 = (0.5 * x * (1 + np.tanh(inner))).astype(np.float32)
    return out


def gated(gate_up: F32, activation: Activation) -> F32:
    """activation(gate) * up of [rows, 2n] (Shazeer 2020): [rows, n]."""
    gate, up = np.split(gate_up, 2, axis=1)
    return activate(gate, activation) * up


def choose_experts(logits: F32, routing: Routing, bias: F32 | None) -> tuple[NDArray[np.int64], F32]:
    """Of router logits [rows, experts]: the chosen experts, best first, and their weights, both [rows, used]."""
    if routing.gating == "sigmoid":
        probabilities = sigmoid(logits)
    else:
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    scores = probabilities if bias is None else probabilities + bias
    if routing.groups > 1:
        grouped = scores.reshape(len(scores), routing.groups, -1)
        best = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argsort(-best, axis=1, kind="stable")[:, : routing.groups_used]
        allowed = np.zeros(best.shape, bool)
        np.put_along_axis(allowed, kept, True, axis=1)
        scores = np.where(allowed[:, :, None], grouped, -np.inf).reshape(scores.shape)
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, : routing.used]
    weights = np.take_along_axis(probabilities, chosen, axis=1)
    if routing.renormalise:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return chosen, (weights * np.float32(routing.scale)).astype(np.float32)


# --- the backend -----------------------------------------------------------------------------------------------------


@dataclass
class _Cache:
    """K and V pages of each layer, [pages * PAGE_SIZE, kv_heads, head_dim], float16 for f16, otherwise float32; ``group`` of each."""

    k: dict[int, NDArray[Any]]
    v: dict[int, NDArray[Any]]
    group: dict[int, int]
    dtype: str


class ReferenceBackend:
    """The whole model in NumPy, float arithmetic throughout. Slow, and right."""

    name = "reference"

    def describe(self) -> str:
        """One line for people."""
        return "reference: NumPy, float32, one step after another (slow; for comparison)"

    def supports(self, format: QuantFormat) -> bool:
        """Whatever can be dequantised."""
        return format.name in DEQUANTISABLE

    def matrix(self, parts: Sequence[RawTensor]) -> F64:
        """Dequantised [rows, columns], rounded to fixed point."""
        return fixed_point(*(part.dequantised() for part in parts))

    def vector(self, tensor: RawTensor) -> F32:
        """Dequantised float32 [n]."""
        return tensor.dequantised().copy()

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> _Cache:
        """Zeroed pages."""
        kind = np.float16 if dtype == "f16" else np.float32
        cache = _Cache({}, {}, {}, dtype)
        for index, group in enumerate(groups):
            size = (group.pages * PAGE_SIZE, shape.kv_heads, shape.head_dim)
            for layer in group.layers:
                cache.group[layer] = index
                cache.k[layer], cache.v[layer] = np.zeros(size, kind), np.zeros(size, kind)
        return cache

    def copy_pages(self, cache: _Cache, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """All positions of a page at once."""
        for layer in (layer for layer, index in cache.group.items() if index == group):
            for pages in (cache.k[layer], cache.v[layer]):
                for source, target in pairs:
                    pages[target * PAGE_SIZE :][:PAGE_SIZE] = pages[source * PAGE_SIZE :][:PAGE_SIZE]

    def kv_token_bytes(self, kv_heads: int, head_dim: int, dtype: str) -> int:
        """Values that are rounded to q8_0 are kept as float32."""
        return 2 * kv_heads * head_dim * (2 if dtype == "f16" else 4)

    def bind(
        self, layers: Layers, head: Head, cache: _Cache, limits: StepLimits, states: Head | None = None
    ) -> BoundNetwork:
        """Run the network anew each step."""
        return _Bound(layers, head, states or head, cache)

    def bind_layers(self, layers: Layers, cache: _Cache, limits: StepLimits) -> BoundLayers:
        """The same; the hidden state is all there is to read."""
        return _Bound(layers, _nothing_more, _nothing_more, cache)

    def owners(self, tensor: str) -> tuple[Backend, ...]:
        """All of it."""
        return (self,)

    def memory_room(self) -> None:
        """The machine's."""

    def close(self) -> None:
        """Nothing to stop."""


def _nothing_more(ops: Ops, hidden: F32) -> F32:
    return hidden


class _Bound:
    """The Ops of one network; also what runs it."""

    def __init__(self, layers: Layers, head: Head, states: Head, cache: _Cache) -> None:
        self._layers, self._head, self._states, self._cache = layers, head, states, cache
        self.hidden: F32 = np.zeros((0, 0), np.float32)
        self._received: F32 = np.zeros((0, 0), np.float32)
        self._rows: IntArray = np.zeros(0, np.int32)
        self.last_logits: F32 = np.zeros((0, 0), np.float32)

    def layers(self, step: StepInput) -> None:
        self._step = step
        self._slots = [_slots(pages, step.kv_len) for pages in step.page_table]
        self.hidden = self._layers(self)

    def receive(self, rows: F32) -> None:
        self._received = rows.copy()  # layers add to it in place

    def logits(self, rows: IntArray) -> F32:
        self._rows = rows
        self.last_logits = self._head(self, self.hidden)
        return self.last_logits

    def states(self, rows: IntArray) -> F32:
        self._rows = rows
        states: F32 = self._states(self, self.hidden)
        return states

    def sample(self, rows: IntArray, how: SampleRows) -> IntArray:
        logits = self.logits(rows)
        return np.array([sample_row(logits[i], how, i) for i in range(len(rows))], np.int32)

    def embed(self, table: F64) -> F32:
        return table[self._step.token_ids].astype(np.float32)

    def positions(self, table: F64) -> F32:
        return table[self._step.positions].astype(np.float32)

    def received(self, width: int) -> F32:
        return self._received

    def norm(self, x: F32, norm: Norm) -> F32:
        return normalise(x, norm)

    def norm_heads(self, x: F32, heads: Heads, norm: Norm) -> None:
        part = x[:, heads.first : heads.first + heads.count * heads.width]
        split = part.reshape(len(x), heads.count, heads.width)
        weight, bias = (None if w is None else w.reshape(heads.count, heads.width) for w in (norm.weight, norm.bias))
        part[:] = normalise(split, replace(norm, weight=weight, bias=bias)).reshape(len(x), -1)

    def linear(self, x: F32, linear: Linear) -> F32:
        out = matmul(x, linear.matrix)
        if linear.scale is not None:
            out = out * linear.scale
        return out if linear.bias is None else out + linear.bias

    def linear_add(self, residual: F32, x: F32, linear: Linear) -> None:
        residual += self.linear(x, linear)

    def add(self, residual: F32, x: F32) -> None:
        residual += x

    def add_vector(self, x: F32, vector: F32) -> None:
        x += vector

    def multiply(self, x: F32, factor: float) -> None:
        x *= np.float32(factor)

    def soft_cap(self, x: F32, cap: float) -> None:
        x[:] = soft_cap(x, cap)

    def clamp(self, x: F32, limit: float) -> None:
        np.clip(x, -limit, limit, out=x)

    def rope_store(self, qkv: F32, layer: int, shape: AttentionShape, rope: Rope | None) -> F32:
        heads = qkv.reshape(len(qkv), shape.heads + 2 * shape.kv_heads, shape.head_dim)
        q, k, v = np.split(heads, [shape.heads, shape.heads + shape.kv_heads], axis=1)
        if rope is not None:
            q, k = rotate(q, self._step.positions, rope), rotate(k, self._step.positions, rope)
        places = self._slots[self._cache.group[layer]]
        slots = np.concatenate([s[-n:] for s, n in zip(places, np.diff(self._step.row_start), strict=True)])
        self._cache.k[layer][slots] = store_as(k, self._cache.dtype)
        self._cache.v[layer][slots] = store_as(v, self._cache.dtype)
        return q

    def attention(self, q: F32, layer: int, shape: AttentionShape) -> F32:
        out = np.empty_like(q)
        places = self._slots[self._cache.group[layer]]
        for slots, start, stop in zip(places, self._step.row_start, self._step.row_start[1:], strict=False):
            positions = self._step.positions[start:stop]
            first = max(0, int(positions[0]) - shape.window + 1) if shape.window else 0  # what lies before may be gone
            k = self._cache.k[layer][slots[first:]].astype(np.float32)
            v = self._cache.v[layer][slots[first:]].astype(np.float32)
            out[start:stop] = attend(q[start:stop], k, v, positions, shape, first)
        return out.reshape(len(q), -1)

    def gated(self, gate_up: F32, activation: Activation) -> F32:
        return gated(gate_up, activation)

    def activate(self, x: F32, activation: Activation) -> F32:
        return activate(x, activation)

    def gate_rows(self, x: F32, h: F32, gate: Linear) -> None:
        x *= sigmoid(self.linear(h, gate))

    def experts(self, residual: F32, x: F32, experts: Experts) -> None:
        chosen, weights = choose_experts(self.linear(x, experts.router), experts.routing, experts.choice_bias)
        out = np.zeros((*chosen.shape, residual.shape[1]), np.float32)
        for e, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down, strict=True)):
            rows, places = np.nonzero(chosen == e)
            if len(rows):
                out[rows, places] = matmul(gated(matmul(x[rows], gate_up), experts.activation), down)
        for place in range(chosen.shape[1]):
            residual += weights[:, place, None] * out[:, place]

    def columns(self, x: F32, first: int, width: int) -> F32:
        return x[:, first : first + width]

    def concat(self, parts: Sequence[F32]) -> F32:
        return np.concatenate(parts, axis=1)

    def logit_rows(self, x: F32) -> F32:
        return x[self._rows]


def _slots(page_table: IntArray, kv_len: IntArray) -> list[NDArray[np.int64]]:
    """For each sequence, where its positions 0 ... kv_len - 1 lie in the pages of one KV group."""
    slots = []
    for pages, length in zip(page_table, kv_len, strict=True):
        positions = np.arange(length)
        slots.append(pages[positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE)
    return slots
