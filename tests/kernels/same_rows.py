"""Whether a row has the same bits alone and among others: every operation of the reference backend, and a small network.

    OPENBLAS_CORETYPE=Haswell OPENBLAS_NUM_THREADS=1 python -m tests.kernels.same_rows

fails, or prints a digest of what each of ``CHECKS`` computed, as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.engine.engine import Engine, Request
from shoal.gguf.quants import format_named
from shoal.gguf.reader import GGUFFile
from shoal.kernels import reference
from shoal.kernels.base import (
    Activation,
    AttentionShape,
    Experts,
    Heads,
    IntArray,
    Linear,
    Norm,
    Ops,
    RawTensor,
    Rope,
    Routing,
    StepInput,
    StepLimits,
)
from shoal.models.weights import load_model
from shoal.params import EngineConfig, SamplingParams
from tests.engine.random_network import VOCAB, write_network
from tests.engine.toy import run, tokens

F32 = NDArray[np.float32]
Operation = Callable[[Ops, F32], F32]

ROWS, WIDTH = 123, 96
COUNTS = (1, 3, 5, 17)
SHAPE = AttentionShape(heads=6, kv_heads=2, head_dim=16, scale=0.25)
SLOPES = tuple(0.5**h for h in range(6))


def numbers(*shape: int, seed: int = 0) -> F32:
    """Random ones from 1e-3 to 1e3: their sum is another in another order."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3, shape)).astype(np.float32)


def weights(*shape: int, seed: int = 1) -> Any:
    """A random matrix of the backend."""
    raw = RawTensor("w", format_named("F32"), shape, numbers(*shape, seed=seed).view(np.uint8))
    return reference.ReferenceBackend().matrix([raw])


# --- what is checked -------------------------------------------------------------------------------------------------


def product(*shape: int) -> Operation:
    """Weights [n, k] by k columns of x side by side with itself."""
    matrix, times = Linear(weights(*shape)), -(-shape[1] // WIDTH)
    return lambda ops, x: ops.linear(np.tile(x, times)[:, : shape[1]], matrix)


def biased(ops: Ops, x: F32) -> F32:
    """A product scaled and moved, added to a residual, and that gated."""
    linear = Linear(weights(WIDTH, WIDTH), numbers(WIDTH, seed=3), numbers(WIDTH, seed=4) / 1000)
    residual = np.ones_like(x)
    ops.linear_add(residual, x, linear)
    ops.gate_rows(residual, x, Linear(weights(1, WIDTH), scale=np.full(1, 1e-4, np.float32)))
    return residual


def normalised(*, centred: bool) -> Operation:
    """A norm of whole rows, then of each of some heads."""
    norm = Norm(numbers(WIDTH), 1e-5, centred, numbers(WIDTH, seed=5))
    heads = Norm(numbers(64), 1e-5, centred)

    def operation(ops: Ops, x: F32) -> F32:
        out: F32 = ops.norm(x, norm)
        ops.norm_heads(out, Heads(16, 4, 16), heads)
        return out

    return operation


def activated(activation: Activation) -> Operation:
    """An activation, and a gated one; of numbers that do not saturate it."""
    return lambda ops, x: np.hstack([ops.activate(x / 100, activation), ops.gated(x / 100, activation)])


def capped(ops: Ops, x: F32) -> F32:
    """Soft cap, factor and clamp."""
    ops.soft_cap(x, 50.0)
    ops.multiply(x, 0.3)
    ops.clamp(x, 12.0)
    return x


def experts(routing: Routing) -> Operation:
    """What nine experts add to a residual of ones."""
    gate_up = tuple(weights(80, WIDTH, seed=10 + e) for e in range(9))
    down = tuple(weights(WIDTH, 40, seed=20 + e) for e in range(9))
    router = Linear(weights(9, WIDTH), scale=np.full(9, 1e-4, np.float32))
    chosen = Experts(router, routing, gate_up, down, "silu", numbers(9) / 1000)

    def operation(ops: Ops, x: F32) -> F32:
        residual = np.ones_like(x)
        ops.experts(residual, x, chosen)
        return residual

    return operation


def rotated(ops: Ops, x: F32) -> F32:
    """Heads turned by positions that the row itself holds."""
    rope = Rope((10.0 ** -np.arange(0, 4, 0.5)).astype(np.float32), neox=True, scale=1.1)
    positions = (np.abs(x[:, 0]) * 1000).astype(np.int32) % 100_000
    return reference.rotate(x.reshape(len(x), 6, 16), positions, rope).reshape(len(x), -1)


OPERATIONS: dict[str, Callable[[], Operation]] = {
    "product 96 x 64": lambda: product(96, 64),
    "product 37 x 50": lambda: product(37, 50),
    "product 1 x 1": lambda: product(1, 1),
    "product 300 x 700": lambda: product(300, 700),
    "int8 product": lambda: lambda ops, x: reference.linear_q8(x, weights(70, WIDTH)),
    "scale, bias and gate": lambda: biased,
    "rms norm": lambda: normalised(centred=False),
    "layer norm": lambda: normalised(centred=True),
    "silu": lambda: activated("silu"),
    "gelu": lambda: activated("gelu"),
    "relu2": lambda: activated("relu2"),
    "soft cap": lambda: capped,
    "experts": lambda: experts(Routing(used=3)),
    "experts in groups": lambda: experts(Routing(used=4, gating="sigmoid", groups=3, groups_used=2)),
    "rope": lambda: rotated,
}

ATTENTIONS = {
    "attention": SHAPE,
    "attention in a window": replace(SHAPE, window=40),
    "attention, soft cap": replace(SHAPE, soft_cap=5.0),
    "attention, slopes": replace(SHAPE, slopes=SLOPES),
}
NETWORKS = ("llama", "gemma2")


# --- the checks ------------------------------------------------------------------------------------------------------


def check_operation(name: str) -> str:
    """All rows at once, some of them, and all in another order."""
    operation, x = OPERATIONS[name](), numbers(ROWS, WIDTH)
    whole = computed(operation, x)
    for some in selections():
        assert np.array_equal(computed(operation, x[some]), whole[some]), f"{name}: of {len(some)} rows"
    return digest(whole)


def selections() -> Iterator[IntArray]:
    """Numbers of rows to compute by themselves."""
    for count in COUNTS:
        for first in (1, ROWS - count):
            yield np.arange(first, first + count, dtype=np.int32)
    order = np.random.default_rng(6).permutation(ROWS).astype(np.int32)
    yield from (order, order[:40], order[40:])


def computed(operation: Operation, x: F32) -> F32:
    """What the operation makes of rows x."""
    out: list[F32] = []

    def layers(ops: Ops) -> F32:
        out.append(operation(ops, x.copy()))
        return x

    backend = reference.ReferenceBackend()
    network = backend.bind(layers, lambda ops, h: h, backend.kv_cache([], SHAPE, "f16"), StepLimits(ROWS, 1, 1))
    ids, ends = np.arange(len(x), dtype=np.int32), np.array([0, len(x)], np.int32)
    network.layers(StepInput(ids, ids, ends, ends[1:], np.zeros((0, 1, 1), np.int32)))
    return out[0]


def check_attention(name: str) -> str:
    """A prompt at once, in chunks, and token by token, when nothing lies behind the last."""
    shape, length = ATTENTIONS[name], 150
    q, k, v = (numbers(length, heads, 16, seed=seed) * np.float32(0.03) for seed, heads in enumerate((6, 2, 2)))
    places = np.arange(length, dtype=np.int32)
    whole = reference.attend(q, k, v, places, shape)
    for chunk in (1, 7, 64):
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            first = max(0, start - shape.window + 1) if shape.window else 0
            part = reference.attend(q[start:end], k[first:end], v[first:end], places[start:end], shape, first)
            assert np.array_equal(part, whole[start:end]), f"{name}: positions {start} to {end}"
    return digest(whole)


def check_network(architecture: str) -> str:
    """Tokens and logits of some requests: alone, together, in chunks."""
    rng = np.random.default_rng(7)
    requests = [
        Request(
            f"r{i}",
            tuple(rng.integers(0, VOCAB, length).tolist()),
            SamplingParams(temperature=0.9 * (i % 2), max_tokens=4),
            seed=i,
        )
        for i, length in enumerate([1, 7, 60, 17])
    ]
    scored = replace(requests[2], request_id="scored", want_logits=True)
    with TemporaryDirectory() as folder, GGUFFile.open(write_network(Path(folder) / "n.gguf", architecture)) as file:
        model = load_model(file, reference.ReferenceBackend())

    def answers(some: list[Request], budget: int) -> tuple[dict[str, list[int]], F32 | None]:
        config = EngineConfig(max_num_batched_tokens=budget, kv_cache_memory=1 << 20, max_model_len=128)
        results = run(Engine(model, reference.ReferenceBackend(), config), some)
        logits: list[Any] = [output.logits for output in results["scored"].outputs] if scored in some else []
        results.pop("scored", None)
        return tokens(results), np.concatenate(logits) if logits else None

    alone = {name: ids for request in requests for name, ids in answers([request], 512)[0].items()}
    logits = answers([scored], 512)[1]
    assert logits is not None
    for budget in (512, 7):
        together, again = answers([scored, *requests[::-1]], budget)
        assert together == alone, f"{architecture}: tokens, {budget} a step"
        assert np.array_equal(again, logits), f"{architecture}: logits, {budget} a step"  # type: ignore[arg-type]
    return digest(logits)


def digest(x: F32) -> str:
    """Of all bits; the numbers must be finite, and more than one."""
    assert np.isfinite(x).all()
    assert len(np.unique(x)) > len(x) / 2
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


CHECKS = (*OPERATIONS, *ATTENTIONS, *NETWORKS)


@cache
def check(name: str) -> str:
    """One of ``CHECKS``: a digest of what it computed. Raises AssertionError where a row's bits depend on others."""
    if name in OPERATIONS:
        return check_operation(name)
    return check_attention(name) if name in ATTENTIONS else check_network(name)


if __name__ == "__main__":
    print(json.dumps({name: check(name) for name in CHECKS}))
