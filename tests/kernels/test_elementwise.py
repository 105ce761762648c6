"""Row-wise operations against their NumPy twins."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.gguf.quants import format_named
from shoal.kernels import reference
from shoal.kernels.base import RawTensor
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.runner import rounded, rowwise

ROWS = (1, 3, 5, 17, 123)
WIDTHS = (14, 16, 56, 64, 576, 1000)


@pytest.fixture(scope="module")
def backend() -> Iterator[CPUBackend]:
    backend = CPUBackend(threads=2)
    yield backend
    backend.close()


def _random(rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def _close(a: NDArray[np.float32], r: NDArray[np.float32]) -> bool:
    return bool(np.allclose(a, r, rtol=3e-6, atol=1e-7))


@pytest.mark.parametrize("width", WIDTHS)
def test_norm(backend: CPUBackend, width: int) -> None:
    weight = _random(1, width, 7)[0]
    vector = backend.vector(RawTensor("w", format_named("F32"), weight.shape, weight.view(np.uint8)))
    for rows in ROWS:
        x = _random(rows, width)
        got = rowwise(backend, x, lambda ops, r: ops.norm(r, vector, 1e-3))
        assert _close(got, reference.rms_norm(x, weight, 1e-3))


@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(backend: CPUBackend, width: int) -> None:
    for rows in ROWS:
        x = _random(rows, 2 * width) * 6
        assert _close(rowwise(backend, x, lambda ops, r: ops.swiglu(r)), reference.swiglu(x))


def test_swiglu_of_extreme_values(backend: CPUBackend) -> None:
    gate = np.array([[-1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e30]], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)], axis=1)
    got = rowwise(backend, x, lambda ops, r: ops.swiglu(r))
    want = reference.swiglu(x)
    # Below -87 the kernel's exp stops growing: silu there is 1e-36 of x, not 0.
    assert np.allclose(got[:, 2:], want[:, 2:], rtol=3e-6, atol=1e-30)
    assert np.isfinite(got).all()


def test_rounding_equals_its_twin_bit_for_bit(backend: CPUBackend) -> None:
    x = _random(17, 192) * np.exp(3 * _random(17, 192, 2))
    x[3, 32:64] = 0
    x[5] *= 1e-33
    q, scale = reference.quantise_q8(x)
    got_q, got_scale, sums, halves = rounded(backend, x)
    assert np.array_equal(got_q, q)
    assert np.array_equal(got_scale, scale)
    exact = scale * q.reshape(17, -1, 16).sum(2, dtype=np.int64).astype(np.float32)
    assert np.array_equal(halves, exact)
    assert np.array_equal(sums, exact[:, ::2] + exact[:, 1::2])
