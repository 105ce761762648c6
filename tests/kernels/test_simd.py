"""Functions written from SIMD operations against NumPy in float64."""

from __future__ import annotations

import numpy as np

from shoal.kernels.cpu.jit import kernel
from shoal.kernels.cpu.simd import Address, load_f32x16, store_f32x16, tanh


@kernel
def all_tanh(values: Address, count: int) -> None:
    """tanh of each of ``count`` float32, in place."""
    for i in range(0, 4 * count, 64):
        store_f32x16(values + i, tanh(load_f32x16(values + i)))


def test_tanh_is_right_to_a_few_units_in_the_last_place() -> None:
    sizes = np.concatenate([np.geomspace(1e-30, 100, 40_000), np.linspace(0.6, 0.65, 8_000)])
    x = np.concatenate([sizes, -sizes, np.zeros(16)]).astype(np.float32)
    exact, got = np.tanh(x.astype(np.float64)), x.copy()
    all_tanh.get().ctypes(got.ctypes.data, len(got))
    assert np.max(np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32))) <= 4


def test_tanh_of_what_is_no_number_or_infinite() -> None:
    x = np.resize(np.array([np.nan, np.inf, -np.inf, 3e38], np.float32), 16)
    all_tanh.get().ctypes(x.ctypes.data, len(x))
    assert np.array_equal(x[:4], np.array([np.nan, 1, -1, 1], np.float32), equal_nan=True)
