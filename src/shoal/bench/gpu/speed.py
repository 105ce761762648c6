"""How fast models are: steps of one token for each of some sequences, and a long prompt; beside what the device can do at most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from shoal.bench.gpu.network import Network, matrices_of, pack, random_file
from shoal.bench.gpu.parts import Part, Row
from shoal.bench.models.networks import Shape
from shoal.errors import EngineError
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import Backend
from shoal.models.weights import Model

if TYPE_CHECKING:
    from shoal.kernels.load import Probe

_WARM = 3  # steps that are not measured


@dataclass(frozen=True, slots=True)
class Plan:
    """Sequences that decode at once, how many tokens they have by then, steps that are measured, tokens of the long prompt, seconds for
    choosing tiles: each is a kernel to compile, and all of them take longer than the rest."""

    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    context: int = 128
    steps: int = 32
    prompt: int = 2048
    tuning: float = 60.0


class ModelSpeed:
    """One random model and the parts that measure it. The first of them makes it, the last lets it go."""

    def __init__(self, name: str, shape: Shape, type_name: str, plan: Plan) -> None:
        self._name, self._shape, self._type, self._plan = f"{name} {type_name}", shape, type_name, plan
        self._model: Model | None = None
        self._network: Network | None = None
        self._matmuls = _matmul_shapes(shape)

    def parts(self, backend: Backend, probe: Probe, bandwidth: float) -> Iterator[Part]:
        """In the order in which they must run. ``bandwidth``: bytes a second that the device copies; 0: not known."""
        group = self._name
        yield Part(group, "load", lambda: self._load(backend, probe))
        yield Part(group, "tune", lambda: self._tune(probe))
        yield Part(group, "bind", lambda: self._bind(backend, probe))
        for batch in self._plan.batches:
            yield Part(group, f"decode {batch}", partial(self._decode, batch, probe, bandwidth))
        yield Part(group, f"prefill {self._plan.prompt}", lambda: self._prefill(probe))
        yield Part(group, "same bits", self._same_bits)
        yield Part(group, "unload", lambda: self._unload(probe))

    def _load(self, backend: Backend, probe: Probe) -> Row:
        before, file = probe.memory_used(), random_file(self._shape, self._type)
        self._model = pack(backend, file, self._context)
        self._bytes = _bytes_read(file)
        return {"bytes_of_weights": self._bytes, "memory": probe.memory_used() - before}

    def _tune(self, probe: Probe) -> Row:
        """Before programs are bound, which hold the tiles that they were captured with."""
        return probe.tune(matrices_of(self._packed), [*self._plan.batches, self._plan.prompt], self._plan.tuning)

    def _bind(self, backend: Backend, probe: Probe) -> Row:
        plan, before = self._plan, probe.memory_used()
        most = max(plan.prompt, *plan.batches)
        self._network = Network(backend, self._packed, max(plan.batches), self._context, most)
        return {"memory": probe.memory_used() - before}

    @property
    def _context(self) -> int:
        return self._plan.context + _WARM + self._plan.steps + 2

    @property
    def _packed(self) -> Model:
        if self._model is None:
            raise EngineError(f"{self._name} is not loaded")
        return self._model

    def _unload(self, probe: Probe) -> Row:
        self._network = self._model = None
        probe.release()
        return {"memory": probe.memory_used()}

    @property
    def _bound(self) -> Network:
        if self._network is None:
            raise EngineError(f"{self._name} is not bound")
        return self._network

    def _fill(self, batch: int) -> None:
        """Every sequence has a context, the same for all."""
        tokens = np.arange(self._plan.context, dtype=np.int32) % np.int32(self._shape.vocab_size)
        self._bound.run([0], [0], [tokens])
        self._bound.share_context(self._plan.context)

    def _decode(self, batch: int, probe: Probe, bandwidth: float) -> Row:
        network, plan = self._bound, self._plan
        self._fill(batch)
        steps = _Decoding(network, batch, plan.context)
        for _ in range(_WARM):
            steps.run()
        seconds = probe.wall_seconds(steps.run, plan.steps)
        read = self._bytes + batch * plan.context * self._kv_bytes
        matmul = probe.matmul_seconds(self._matmuls, batch) * self._shape.n_layers
        row = {
            "tokens_per_second": batch / seconds,
            "ms": 1e3 * seconds,
            "torch_f16_matmul_ms": 1e3 * matmul,
        }
        if bandwidth:
            row["bandwidth_share"] = read / seconds / bandwidth
        return row | _busy(probe, steps, seconds)

    @property
    def _kv_bytes(self) -> int:
        """Of a position in all layers, in float16."""
        return 2 * 2 * self._shape.n_kv_heads * self._shape.head_dim * self._shape.n_layers

    def _prefill(self, probe: Probe) -> Row:
        network, count = self._bound, self._plan.prompt
        tokens = np.arange(count, dtype=np.int32) % np.int32(self._shape.vocab_size)
        last = np.array([count - 1], np.int32)

        def run() -> None:
            network.run_prompt(tokens)
            network.sample(last)

        run()
        seconds = probe.wall_seconds(run, 3)
        work = 2.0 * count * sum(n * k for n, k in self._matmuls) * self._shape.n_layers
        matmul = probe.matmul_seconds(self._matmuls, count) * self._shape.n_layers
        return {
            "tokens_per_second": count / seconds,
            "ms": 1e3 * seconds,
            "tflops": work / seconds / 1e12,
            "torch_f16_matmul_ms": 1e3 * matmul,
            "torch_f16_tflops": work / matmul / 1e12,
        }

    def _same_bits(self) -> Row:
        """Logits of a token alone and among any number of others, and of a prompt in one piece and in pieces."""
        network, plan, one = self._bound, self._plan, np.array([7], np.int32)
        self._fill(max(plan.batches))
        network.run([0], [plan.context], [one])
        alone = network.logits(np.zeros(1, np.int32))
        for batch in plan.batches:
            network.run(range(batch), [plan.context] * batch, [one] * batch)
            rows = np.array(sorted({0, batch // 2, batch - 1}), np.int32)
            for row, logits in zip(rows, network.logits(rows), strict=True):
                if not np.array_equal(logits, alone[0]):
                    raise EngineError(f"row {row} of {batch} has other bits than alone")
        prompt = np.arange(plan.context, dtype=np.int32) % np.int32(self._shape.vocab_size)
        cut = plan.context // 3
        network.run([0], [0], [prompt[:cut]])
        network.run([0], [cut], [np.append(prompt[cut:], one)])
        if not np.array_equal(network.logits(np.array([plan.context - cut], np.int32))[0], alone[0]):
            raise EngineError("a prompt in pieces has other bits than in one")
        return {"batches": str(plan.batches), "equal": True}


class _Decoding:
    """Steps of one token for each of the first ``batch`` sequences, each sampled from the one before."""

    def __init__(self, network: Network, batch: int, context: int) -> None:
        self._network, self._batch, self._position = network, batch, context
        self._rows = np.arange(batch, dtype=np.int32)
        self._tokens = np.full(batch, 7, np.int32)

    def run(self) -> None:
        """The next step."""
        batch = self._batch
        self._network.run(range(batch), [self._position] * batch, [self._tokens[i : i + 1] for i in range(batch)])
        self._tokens = self._network.sample(self._rows)
        self._position += 1
        if (self._tokens < 0).any():
            raise EngineError(f"no token at position {self._position}: logits that are not numbers")


def _busy(probe: Probe, steps: _Decoding, seconds: float) -> Row:
    """The share of a step in which the device computes, where that can be seen."""
    try:
        return {"gpu_busy": probe.kernel_seconds(steps.run) / seconds}
    except RuntimeError as problem:
        return {"gpu_busy": f"not seen: {problem}"}


def _matmul_shapes(shape: Shape) -> Sequence[tuple[int, int]]:
    """Products of a layer, as they are fused."""
    queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    width, inner = shape.n_embd, shape.n_ff
    return (queries + 2 * keys, width), (width, queries), (2 * inner, width), (width, inner)


def _bytes_read(file: GGUFFile) -> int:
    """Of the weights that a step reads: an embedding that is no head gives it a few rows."""
    left_out = "token_embd.weight" if "output.weight" in file.tensors else ""
    return sum(info.nbytes for name, info in file.tensors.items() if name != left_out)
