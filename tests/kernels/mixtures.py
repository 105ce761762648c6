"""Random mixtures of experts, their NumPy twin, and the operation that is tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.quants import format_named
from shoal.kernels import reference
from shoal.kernels.base import Activation, Experts, Linear, RawTensor, Routing
from shoal.kernels.cpu.backend import CPUBackend
from shoal.kernels.cpu.pack import LAYOUTS
from tests.kernels.runner import OneStep
from tests.support.gguf_builder import random_rows, random_scale

F32 = NDArray[np.float32]


def _tensor(name: str, rows: int, columns: int, rng: np.random.Generator, scale: float = 0.05) -> RawTensor:
    fmt = format_named(name)
    factor = random_scale(fmt, scale) * rng.uniform(0.5, 2) if fmt.tail_bytes else 1.0
    return RawTensor("w", fmt, (rows, columns), random_rows(fmt, (rows, columns), rng, scale), factor)


def floats(values: F32) -> RawTensor:
    """A tensor of float32."""
    return RawTensor("w", format_named("F32"), values.shape, values.view(np.uint8))


@dataclass(frozen=True)
class Mixture:
    """The tensors of a layer: of each expert its gate and up, and its down."""

    router: F32
    routing: Routing
    gate_up: Sequence[tuple[RawTensor, RawTensor]]
    down: Sequence[RawTensor]
    activation: Activation = "silu"
    bias: F32 | None = None

    def packed(self, backend: CPUBackend) -> Experts:
        """In the layout of a backend."""
        return Experts(
            router=Linear(backend.matrix([floats(self.router)])),
            routing=self.routing,
            gate_up=tuple(backend.matrix(pair) for pair in self.gate_up),
            down=tuple(backend.matrix([raw]) for raw in self.down),
            activation=self.activation,
            choice_bias=None if self.bias is None else backend.vector(floats(self.bias)),
        )

    def twin(self, residual: F32, x: F32) -> F32:
        """Row by row and expert by expert; products as the integer kernels round."""
        chosen, weights = reference.choose_experts(x @ self.router.T, self.routing, self.bias)
        out = residual.copy()
        for row, (experts, factors) in enumerate(zip(chosen, weights, strict=True)):
            for expert, factor in zip(experts, factors, strict=True):
                parts = [_product(x[row : row + 1], raw) for raw in self.gate_up[expert]]
                hidden = reference.gated(np.concatenate(parts, axis=1), self.activation)
                out[row] += factor * _product(hidden, self.down[expert])[0]
        return out


def _product(x: F32, raw: RawTensor) -> F32:
    twin = reference.matmul if LAYOUTS[raw.format.name].is_float else reference.linear_q8
    return twin(x, reference.fixed_point(raw.dequantised()))


def random_mixture(
    types: tuple[str, str, str] = ("Q4_0", "Q4_0", "Q4_0"),
    count: int = 6,
    widths: tuple[int, int] = (64, 96),
    routing: Routing | None = None,
    seed: int = 0,
) -> Mixture:
    """Random experts of types (gate, up, down) and widths (n_embd, n_ff)."""
    rng, (gate, up, down), (n_embd, n_ff) = np.random.default_rng(seed), types, widths
    return Mixture(
        router=(rng.standard_normal((count, n_embd)) / 4).astype(np.float32),
        routing=routing or Routing(used=2),
        gate_up=[(_tensor(gate, n_ff, n_embd, rng), _tensor(up, n_ff, n_embd, rng)) for _ in range(count)],
        down=[_tensor(down, n_embd, n_ff, rng) for _ in range(count)],
    )


def random_activations(rows: int, width: int, seed: int = 1) -> F32:
    """[rows, width]."""
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def add_experts(backend: CPUBackend, experts: Experts, residual: F32, x: F32) -> F32:
    """residual plus what the experts make of x."""
    step = OneStep(backend, len(x))
    out, rows = step.input(residual), step.input(x)
    step.recorder.experts(out, rows, experts)
    step.run()
    return step.view(out).copy()
