"""Every operation of a backend beside the reference's, and a row alone beside the same row among others.

Operations are reached as the network reaches them: each case binds a network of one operation on both backends and compares rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.bench.gpu.network import Network, pack, random_file
from shoal.bench.models.networks import Shape
from shoal.bench.models.random_weights import random_rows, tail
from shoal.errors import EngineError
from shoal.gguf.quants import format_named
from shoal.kernels.base import (
    LOGIT_ROWS,
    PAGE_SIZE,
    Activation,
    Array,
    AttentionShape,
    Backend,
    Experts,
    Heads,
    KVGroup,
    Linear,
    Norm,
    Ops,
    RawTensor,
    Rope,
    Routing,
    StepInput,
    StepLimits,
)

F32 = NDArray[np.float32]
FLOAT_LIMIT = 1e-5  # NMSE of what has gone through products in float16; a few times what is found
_WIDTH = 256
_ROWS = 128  # of the table that inputs come from
_MOST_ROWS = LOGIT_ROWS + 59

TINY = Shape(
    n_embd=256,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    n_ff=512,
    vocab_size=320,
    context_length=1024,
    rope_base=10000.0,
)

Layers = Callable[[Ops, Array], Array]  # the input -> what is compared
Make = Callable[[Backend], Layers]  # packs weights
Check = Callable[[], float]  # the error that was found; raises EngineError where it is too large


@dataclass(frozen=True, slots=True)
class Case:
    """One operation: ``make`` packs its weights, ``width`` is that of what comes out, ``rows`` how many it is tried with."""

    name: str
    make: Make
    width: int = _WIDTH
    rows: tuple[int, ...] = (1, 17, _MOST_ROWS)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention over pages: some contexts, and then a step with one more token for some and a chunk for others."""

    name: str
    shape: AttentionShape
    rope: Rope | None = None
    kv_dtype: str = "f16"


def nmse(found: F32, right: F32) -> float:
    """Mean squared error over the mean square of what is right; infinite where it is not a number."""
    error = float(np.mean(np.square(found.astype(np.float64) - right)) / np.mean(np.square(right.astype(np.float64))))
    return error if np.isfinite(error) else float("inf")


def check_case(case: Case, backend: Backend, reference: Backend, limit: float = FLOAT_LIMIT) -> float:
    """The largest error. Raises EngineError where it is too large, or where a row's bits depend on the others."""
    ours, right = _Bound(case, backend), _Bound(case, reference)
    whole = ours.run(max(case.rows))
    for rows in case.rows:
        if not np.array_equal(ours.run(rows), whole[:rows], equal_nan=True):
            raise EngineError(f"{case.name}: rows among {rows} have other bits than among {max(case.rows)}")
    return _within(case.name, nmse(whole, right.run(max(case.rows))), limit)


def _within(name: str, error: float, limit: float) -> float:
    if error > limit:
        raise EngineError(f"{name}: NMSE {error:.2g}, at most {limit:g}")
    return error


class _Bound:
    """One case on one backend."""

    def __init__(self, case: Case, backend: Backend) -> None:
        layers, table = case.make(backend), backend.matrix([floats("input", (_ROWS, _WIDTH), 1.0)])
        norm = _no_norm(backend, case.width)
        self._pages = -(-_MOST_ROWS // PAGE_SIZE)
        cache = backend.kv_cache([KVGroup((0,), self._pages)], AttentionShape(1, 1, 64, 1.0), "f16")
        self._network = backend.bind(
            lambda ops: layers(ops, ops.embed(table)),
            lambda ops, x: ops.norm(ops.logit_rows(x), norm),
            cache,
            StepLimits(_MOST_ROWS, 1, self._pages),
        )
        self._kept = (layers, table, norm, cache)

    def run(self, rows: int) -> F32:
        """What comes out of the first rows of the table."""
        ids, end = np.arange(rows, dtype=np.int32), np.array([0, rows], np.int32)
        pages = np.arange(self._pages, dtype=np.int32)[None, None]
        self._network.layers(StepInput(ids, ids, end, end[1:], pages))
        return _in_blocks(self._network, ids)


def _no_norm(backend: Backend, width: int) -> Norm:
    """Divides by a number that is almost the same for any row: a head begins with a norm, and errors of scale must stay visible."""
    return Norm(backend.vector(_raw("ones", np.ones(width, np.float32))), eps=1e4)


def _in_blocks(network: Any, rows: NDArray[np.int32]) -> F32:
    blocks = [network.logits(rows[i : i + LOGIT_ROWS]).copy() for i in range(0, len(rows), LOGIT_ROWS)]
    return np.concatenate(blocks)


# --- the cases -------------------------------------------------------------------------------------------------------


def cases(backend: Backend, types: Sequence[str]) -> Iterator[Case]:
    """Everything but attention; products with each of ``types`` that the backend packs."""
    yield from products(backend, types)
    yield Case("linear with bias and scale", _biased)
    yield Case("linear_add", _added)
    yield Case("linear of two types", _two_types, 192)
    activations: tuple[Activation, ...] = ("silu", "gelu", "relu2")
    for activation in activations:
        yield Case(f"gated {activation}", _gated(activation), 2 * _WIDTH)
        yield Case(f"activate {activation}", _activated(activation))
    yield Case("rms norm", _normed(centred=False))
    yield Case("layer norm", _normed(centred=True))
    yield Case("norm of heads", _head_norms)
    yield Case("row by row", _row_by_row)
    yield Case("columns and concat", _columns, 96)
    yield Case("gate_rows", _gate_rows)
    yield Case("experts", _experts)


def products(backend: Backend, types: Sequence[str]) -> Iterator[Case]:
    """Of each of ``types`` that the backend packs."""
    for name in types:
        if backend.supports(format_named(name)):
            yield Case(f"linear {name}", _product(name, 96), 96, (1, 3, 5, 17, 64, _MOST_ROWS))
            yield Case(f"embed {name}", _embedding(name))


def attentions() -> Iterator[Attention]:
    """Head sizes, KV types, and what scores can go through."""
    turn = Rope((10000.0 ** -np.linspace(0, 1, 32, endpoint=False)).astype(np.float32), neox=True)
    for size in (64, 80, 128):
        for kv_dtype in ("f16", "q8_0"):
            yield Attention(f"attention {size} {kv_dtype}", AttentionShape(4, 2, size, size**-0.5), turn, kv_dtype)
    yield Attention("attention 96 f32", AttentionShape(3, 1, 96, 0.1), turn, "f32")
    yield Attention("attention window", AttentionShape(4, 2, 64, 0.125, window=50), turn)
    yield Attention("attention cap", AttentionShape(4, 4, 64, 0.125, soft_cap=5.0))
    yield Attention("attention slopes", AttentionShape(2, 1, 64, 0.125, slopes=(0.25, 0.0625)))


def floats(name: str, shape: tuple[int, ...], std: float) -> RawTensor:
    """Random float32 numbers, the same for the same name and shape."""
    rng = np.random.default_rng([*name.encode(), *shape])
    return _raw(name, rng.standard_normal(shape, np.float32) * np.float32(std))


def _raw(name: str, values: F32) -> RawTensor:
    return RawTensor(name, format_named("F32"), values.shape, np.ascontiguousarray(values).view(np.uint8))


def _weights(type_name: str, rows: int, columns: int = _WIDTH, seed: int = 0) -> RawTensor:
    fmt = format_named(type_name)
    data = random_rows(fmt, (rows, columns), np.random.default_rng(seed))
    scale = float(tail(fmt)[:4].view("<f4")[0]) if fmt.tail_bytes else 1.0
    return RawTensor(type_name, fmt, (rows, columns), data, scale)


def _activated(activation: Activation) -> Make:
    return lambda backend: lambda ops, x: ops.activate(x, activation)


def _product(type_name: str, rows: int) -> Make:
    def make(backend: Backend) -> Layers:
        matrix = backend.matrix([_weights(type_name, rows)])
        return lambda ops, x: ops.linear(x, Linear(matrix))

    return make


def _embedding(type_name: str) -> Make:
    def make(backend: Backend) -> Layers:
        table = backend.matrix([_weights(type_name, _ROWS)])
        return lambda ops, x: ops.embed(table)

    return make


def _biased(backend: Backend) -> Layers:
    bias, scale = (backend.vector(floats(name, (_WIDTH,), 1.0)) for name in ("bias", "scale"))
    linear = Linear(backend.matrix([_weights("Q8_0", _WIDTH)]), bias, scale)
    return lambda ops, x: ops.linear(x, linear)


def _added(backend: Backend) -> Layers:
    linear = Linear(backend.matrix([_weights("Q4_K", _WIDTH)]))

    def layers(ops: Ops, x: Array) -> Array:
        y = ops.activate(x, "relu2")
        ops.linear_add(y, x, linear)
        return y

    return layers


def _two_types(backend: Backend) -> Layers:
    matrix = backend.matrix([_weights("Q4_K", 128), _weights("Q6_K", 64)])
    return lambda ops, x: ops.linear(x, Linear(matrix))


def _gated(activation: Activation) -> Make:
    def make(backend: Backend) -> Layers:
        matrix = backend.matrix([_weights("Q4_K", 4 * _WIDTH)])
        return lambda ops, x: ops.gated(ops.linear(x, Linear(matrix)), activation)

    return make


def _normed(*, centred: bool) -> Make:
    def make(backend: Backend) -> Layers:
        matrix = backend.matrix([_weights("Q6_K", _WIDTH)])
        norm = Norm(backend.vector(floats("norm", (_WIDTH,), 1.0)), 1e-5, centred)
        return lambda ops, x: ops.linear(ops.norm(x, norm), Linear(matrix))

    return make


def _head_norms(backend: Backend) -> Layers:
    norm = Norm(backend.vector(floats("norm", (2 * 64,), 1.0)), 1e-6)

    def layers(ops: Ops, x: Array) -> Array:
        ops.norm_heads(x, Heads(64, 2, 64), norm)
        return x

    return layers


def _row_by_row(backend: Backend) -> Layers:
    vector = backend.vector(floats("vector", (_WIDTH,), 1.0))

    def layers(ops: Ops, x: Array) -> Array:
        y = ops.activate(x, "gelu")
        ops.multiply(y, 3.0)
        ops.add_vector(y, vector)
        ops.add(y, x)
        ops.soft_cap(y, 4.0)
        ops.clamp(y, 2.5)
        return y

    return layers


def _columns(backend: Backend) -> Layers:
    return lambda ops, x: ops.concat([ops.columns(x, 160, 32), ops.columns(x, 3, 64)])


def _gate_rows(backend: Backend) -> Layers:
    gate = Linear(backend.matrix([floats("gate", (1, _WIDTH), 0.1)]))

    def layers(ops: Ops, x: Array) -> Array:
        y = ops.activate(x, "silu")
        ops.gate_rows(y, x, gate)
        return y

    return layers


def _experts(backend: Backend) -> Layers:
    count, inner = 6, 256
    experts = Experts(
        router=Linear(backend.matrix([floats("router", (count, _WIDTH), 0.3)])),
        routing=Routing(used=2),
        gate_up=tuple(backend.matrix([_weights("Q4_K", 2 * inner, seed=i)]) for i in range(count)),
        down=tuple(backend.matrix([_weights("Q6_K", _WIDTH, inner, seed=i)]) for i in range(count)),
        activation="silu",
    )

    def layers(ops: Ops, x: Array) -> Array:
        y = ops.activate(x, "relu2")
        ops.multiply(y, 0.01)  # about as large as what is added
        ops.experts(y, x, experts)
        return y

    return layers


# --- attention and whole models --------------------------------------------------------------------------------------

_CONTEXTS = (0, 1, 45, 300)
_TAKES = (33, 1, 1, 5)  # rows of each sequence in the step that is compared


def check_attention(case: Attention, backend: Backend, reference: Backend, limit: float = FLOAT_LIMIT) -> float:
    """As ``check_case``, for sequences alone and together."""
    right = _Paged(case, reference).run(range(len(_CONTEXTS)))
    ours = _Paged(case, backend)
    together = ours.run(range(len(_CONTEXTS)))
    ends = np.cumsum([0, *_TAKES])
    for sequence in range(len(_CONTEXTS)):
        alone = ours.run([sequence])
        if not np.array_equal(alone, together[ends[sequence] : ends[sequence + 1]]):
            raise EngineError(f"{case.name}: context {_CONTEXTS[sequence]} has other bits alone than among others")
    return _within(case.name, nmse(together, right), limit)


class _Paged:
    """One layer of attention on one backend. The contexts are filled once; the step that is compared stores what it stores again."""

    def __init__(self, case: Attention, backend: Backend) -> None:
        shape = case.shape
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        table = backend.matrix([floats("qkv", (_ROWS, width), 1.0)])
        norm = _no_norm(backend, shape.heads * shape.head_dim)
        self._pages = -(-(max(_CONTEXTS) + max(_TAKES)) // PAGE_SIZE)
        cache = backend.kv_cache([KVGroup((0,), len(_CONTEXTS) * self._pages)], shape, case.kv_dtype)
        self._network = backend.bind(
            lambda ops: ops.attention(ops.rope_store(ops.embed(table), 0, shape, case.rope), 0, shape),
            lambda ops, x: ops.norm(ops.logit_rows(x), norm),
            cache,
            StepLimits(max(_CONTEXTS), len(_CONTEXTS), self._pages),
        )
        self._kept = (table, norm, cache)
        for sequence, context in enumerate(_CONTEXTS):
            if context:
                self._network.layers(self._step([sequence], [0], [context]))

    def run(self, sequences: Sequence[int]) -> F32:
        """The rows of the step that is compared."""
        takes = [_TAKES[s] for s in sequences]
        self._network.layers(self._step(sequences, [_CONTEXTS[s] for s in sequences], takes))
        return _in_blocks(self._network, np.arange(sum(takes), dtype=np.int32))

    def _step(self, sequences: Sequence[int], first: Sequence[int], counts: Sequence[int]) -> StepInput:
        positions = np.concatenate([np.arange(f, f + n, dtype=np.int32) for f, n in zip(first, counts, strict=True)])
        owner = np.repeat(np.array(sequences, np.int32), counts)
        pages = np.arange(len(_CONTEXTS) * self._pages, dtype=np.int32).reshape(len(_CONTEXTS), self._pages)
        return StepInput(
            token_ids=(positions + 31 * owner).astype(np.int32) % np.int32(_ROWS),
            positions=positions,
            row_start=np.cumsum([0, *counts]).astype(np.int32),
            kv_len=np.add(first, counts).astype(np.int32),
            page_table=np.ascontiguousarray(pages[None, list(sequences)]),
        )


def check_model(type_name: str, backend: Backend, reference: Backend, limit: float = FLOAT_LIMIT) -> float:
    """A whole model: a prompt in one piece, then in pieces with another sequence beside it, then a token each."""
    file = random_file(TINY, type_name)
    ours, right = (Network(b, pack(b, file, 128), 2, 128, 64) for b in (backend, reference))
    prompt = np.arange(3, 40, dtype=np.int32)
    last = np.array([len(prompt) - 1], np.int32)
    for network in (ours, right):
        network.run([0], [0], [prompt])
    whole = ours.logits(last)
    error = _within(f"model {type_name}", nmse(whole, right.logits(last)), limit)
    ours.run([1, 0], [0, 0], [prompt[:21], prompt[:5]])
    ours.run([0, 1], [5, 21], [prompt[5:], prompt[21:22]])
    if not np.array_equal(ours.logits(last - 5), whole):
        raise EngineError(f"model {type_name}: a prompt in pieces has other bits than in one")
    ours.run([0], [len(prompt)], [prompt[:1]])
    alone = ours.logits(np.array([0], np.int32))
    ours.run([1, 0], [22, len(prompt)], [prompt[22:23], prompt[:1]])
    if not np.array_equal(ours.logits(np.array([1], np.int32)), alone):
        raise EngineError(f"model {type_name}: a token has other bits alone than beside another")
    return error
