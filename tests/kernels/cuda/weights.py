"""Random weights and activations, as the kernels of a GPU take them, and what is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.gguf.quants import format_named
from shoal.kernels.base import RawTensor
from shoal.kernels.cuda.launch import Tensor, device
from tests.support.gguf_builder import random_rows, random_scale

F32 = NDArray[np.float32]


def random_tensor(name: str, rows: int, columns: int, seed: int = 0) -> RawTensor:
    """Weights of standard deviation 0.05."""
    fmt = format_named(name)
    data = random_rows(fmt, (rows, columns), np.random.default_rng(seed), 0.05)
    return RawTensor("w", fmt, (rows, columns), data, random_scale(fmt, 0.05))


def shortest(name: str) -> int:
    """Columns of one block of a format, 32 at least."""
    return max(32, format_named(name).block_size)


def random_activations(rows: int, columns: int, seed: int = 1) -> F32:
    """Standard normal, each row times a power of ten of its own."""
    rng = np.random.default_rng(seed)
    x: F32 = (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-3, 4, (rows, 1))).astype(np.float32)
    return x


def tensor(values: Any) -> Tensor:
    """On the device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device())


def half_of(x: F32) -> tuple[Tensor, Tensor]:
    """x [rows, columns] divided by the power of two above each row, float16, and that power, float32 [rows]."""
    largest = np.abs(x).max(axis=1)
    exponents = np.where(np.isfinite(largest) & (largest > 0), np.frexp(largest)[1], 0)
    half = np.ldexp(x, -exponents[:, None]).astype(np.float16)
    return tensor(half), tensor(np.ldexp(np.float32(1), exponents))


def nmse(got: Tensor | F32, want: F32) -> float:
    """Squared error by squared size, the mean of the rows' (which differ in size)."""
    values = np.asarray(got.cpu() if isinstance(got, torch.Tensor) else got, np.float64)
    return float(np.mean(((values - want) ** 2).sum(axis=1) / (want.astype(np.float64) ** 2).sum(axis=1)))
