"""``shoal bench kernels --op attention,sample``: what a decode step does besides its products.

Attention of one query for each of some sequences, over KV pages that were filled before; and choosing a token from each of some rows of
logits, with the time of the logits themselves taken off.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.bench.markdown import table
from shoal.bench.timing import timings
from shoal.gguf.quants import format_named
from shoal.kernels.base import (
    LOGIT_ROWS,
    PAGE_SIZE,
    Array,
    AttentionShape,
    Backend,
    KVGroup,
    Linear,
    Ops,
    RawTensor,
    Rope,
    SampleRows,
    StepInput,
    StepLimits,
)
from shoal.kernels.load import load_backend

_KV_BYTES = 2  # f16
_LEAST_KV = 256 << 20  # of all layers together: more than caches hold, if that takes no more layers than this
_MOST_LAYERS = 32
_FILL_ROWS = 512
_LOGIT_STD = 3.0  # about that of a trained model
_HEAD_COLUMNS = 32

HOW: Mapping[str, tuple[float, int, float]] = {  # temperature, top_k, top_p
    "greedy": (0.0, 0, 1.0),
    "temperature 1": (1.0, 0, 1.0),
    "top-k 40": (1.0, 40, 1.0),
    "top-p 0.95": (1.0, 0, 0.95),
}


@dataclass(frozen=True, slots=True)
class AttentionTime:
    """Median ``seconds`` of one layer: ``sequences`` queries, each over ``context`` positions; ``num_bytes`` of K and V."""

    sequences: int
    context: int
    num_bytes: int
    seconds: float

    @property
    def byte_rate(self) -> float:
        """Bytes of K and V a second."""
        return self.num_bytes / self.seconds


@dataclass(frozen=True, slots=True)
class SampleTime:
    """Median ``seconds`` to choose a token for each of ``rows`` rows of ``vocab`` logits."""

    how: str
    rows: int
    vocab: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepOpsReport:
    """What was measured of both."""

    shape: AttentionShape
    attention: Sequence[AttentionTime]
    samples: Sequence[SampleTime]

    def as_markdown(self) -> str:
        """A table each."""
        parts = []
        if self.attention:
            heads = f"{self.shape.heads} heads of {self.shape.head_dim}, {self.shape.kv_heads} KV heads, f16"
            times = [
                (str(t.context), t.sequences, f"{1e6 * t.seconds:.0f} ({t.byte_rate / 1e9:.1f})")
                for t in self.attention
            ]
            parts += [
                f"**Attention of one layer, us (GB/s of KV), context by sequences: {heads}**",
                _grid("context", times),
            ]
        if self.samples:
            times = [(t.how, t.rows, f"{1e6 * t.seconds:.0f}") for t in self.samples]
            parts += [f"**Sampling from {self.samples[0].vocab} logits, us by rows**", _grid("choice", times)]
        return "\n\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The same, for programs."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOpsPlan:
    """What to measure: attention of so many ``sequences`` at each of ``contexts`` (none: no attention), sampling from as many rows
    (at most LOGIT_ROWS) of ``vocab`` logits (0: no sampling)."""

    sequences: tuple[int, ...]
    contexts: tuple[int, ...]
    vocab: int
    shape: AttentionShape
    rounds: int
    threads: int
    device: str


def measure_step_ops(plan: StepOpsPlan) -> StepOpsReport:
    """Measure both. Raises UnsupportedError for a head size that the backend does not have."""
    backend = load_backend(plan.device, plan.threads)
    try:
        attention = list(measure_attention(backend, plan.shape, plan.sequences, plan.contexts, plan.rounds))
        rows = [count for count in plan.sequences if count <= LOGIT_ROWS]
        samples = list(measure_sampling(backend, rows, plan.vocab, plan.rounds)) if plan.vocab else []
    finally:
        backend.close()
    return StepOpsReport(plan.shape, attention, samples)


def measure_attention(
    backend: Backend, shape: AttentionShape, sequences: Sequence[int], contexts: Sequence[int], rounds: int
) -> Iterator[AttentionTime]:
    """Each number of sequences at each context, in positions."""
    for context in contexts:
        for count in sequences:
            num_bytes = 2 * count * context * shape.kv_heads * shape.head_dim * _KV_BYTES
            layers = max(1, min(_MOST_LAYERS, _LEAST_KV // num_bytes))
            decode = _Decode(backend, shape, count, context, layers)
            seconds = statistics.median(timings(decode.run, rounds)) / layers
            yield AttentionTime(count, context, num_bytes, seconds)


class _Decode:
    """A step of attention alone: one row for each sequence, at the end of its context."""

    def __init__(self, backend: Backend, shape: AttentionShape, sequences: int, context: int, layers: int) -> None:
        pages = -(-context // PAGE_SIZE)
        self._pages = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        self._context = context
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self._table = table_ = backend.matrix([_floats((_FILL_ROWS, width), 1.0)])
        rope = Rope((10_000.0 ** -np.linspace(0, 1, shape.head_dim // 2, endpoint=False)).astype(np.float32), neox=True)
        cache = backend.kv_cache([KVGroup(tuple(range(layers)), self._pages.size)], shape, "f16")
        limits = StepLimits(max(_FILL_ROWS, sequences), sequences, pages)

        def fill(ops: Ops) -> Array:
            qkv = ops.embed(table_)
            for layer in range(layers):
                ops.rope_store(qkv, layer, shape, rope)
            return qkv

        def attend(ops: Ops) -> Array:
            qkv = ops.embed(table_)
            q = ops.rope_store(qkv, 0, shape, rope)
            for layer in range(layers):
                ops.attention(q, layer, shape)
            return qkv

        def head(ops: Ops, x: Array) -> Array:
            return ops.linear(ops.logit_rows(x), Linear(table_))

        filler = backend.bind(fill, head, cache, limits)
        for sequence in range(sequences):
            for start in range(0, context, _FILL_ROWS):
                filler.layers(self._chunk(sequence, start, min(start + _FILL_ROWS, context)))
        self._network = backend.bind(attend, head, cache, limits)

    def run(self) -> None:
        """One step."""
        count = len(self._pages)
        ids, ends = np.arange(count, dtype=np.int32) % _FILL_ROWS, np.arange(count + 1, dtype=np.int32)
        positions = np.full(count, self._context - 1, np.int32)
        self._network.layers(StepInput(ids, positions, ends, positions + 1, self._pages[None]))

    def _chunk(self, sequence: int, start: int, stop: int) -> StepInput:
        """Positions ``start`` to ``stop`` of one sequence."""
        positions = np.arange(start, stop, dtype=np.int32)
        ends = np.array([0, stop - start], np.int32)
        pages = self._pages[None, sequence : sequence + 1]
        return StepInput(positions - start, positions, ends, np.array([stop], np.int32), pages)


def measure_sampling(backend: Backend, rows: Sequence[int], vocab: int, rounds: int) -> Iterator[SampleTime]:
    """Each number of rows (at most LOGIT_ROWS) with each way to choose."""
    inputs = backend.matrix([_floats((LOGIT_ROWS, _HEAD_COLUMNS), 1.0)])
    weights = backend.matrix([_floats((vocab, _HEAD_COLUMNS), _LOGIT_STD / _HEAD_COLUMNS**0.5)])
    cache = backend.kv_cache([KVGroup((0,), LOGIT_ROWS // PAGE_SIZE)], AttentionShape(1, 1, 16, 1.0), "f16")
    limits = StepLimits(LOGIT_ROWS, 1, LOGIT_ROWS // PAGE_SIZE)
    network = backend.bind(
        lambda ops: ops.embed(inputs), lambda ops, x: ops.linear(ops.logit_rows(x), Linear(weights)), cache, limits
    )
    ids, ends = np.arange(LOGIT_ROWS, dtype=np.int32), np.array([0, LOGIT_ROWS], np.int32)
    pages = np.arange(LOGIT_ROWS // PAGE_SIZE, dtype=np.int32)[None, None]
    network.layers(StepInput(ids, ids, ends, ends[1:], pages))
    for count in rows:
        chosen = ids[:count]
        logits = statistics.median(timings(lambda chosen=chosen: network.logits(chosen), rounds))  # type: ignore[misc]
        for name, settings in HOW.items():
            how = _sample_rows(count, *settings)
            both = timings(lambda chosen=chosen, how=how: network.sample(chosen, how), rounds)  # type: ignore[misc]
            yield SampleTime(name, count, vocab, max(0.0, statistics.median(both) - logits))


def _sample_rows(count: int, temperature: float, top_k: int, top_p: float) -> SampleRows:
    return SampleRows(
        temperature=np.full(count, temperature, np.float32),
        top_k=np.full(count, top_k, np.int32),
        top_p=np.full(count, top_p, np.float32),
        min_p=np.zeros(count, np.float32),
        seed=np.arange(count, dtype=np.uint64),
        sample=np.zeros(count, np.uint32),
        position=np.zeros(count, np.uint32),
        banned=[None] * count,
    )


def _floats(shape: tuple[int, int], std: float) -> RawTensor:
    """Random float32 weights."""
    values: NDArray[np.float32] = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(std)
    return RawTensor("random", format_named("F32"), shape, values.view(np.uint8))


def _grid(name: str, cells: Sequence[tuple[str, int, str]]) -> str:
    """Of (line, column, text): a line for each first, a column for each second."""
    lines, columns = dict.fromkeys(line for line, _, _ in cells), dict.fromkeys(column for _, column, _ in cells)
    found = {(line, column): text for line, column, text in cells}
    return table([name, *map(str, columns)], ([line, *(found[line, column] for column in columns)] for line in lines))
