"""Activations against NumPy, and the power of two that a row is divided by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from shoal.kernels import reference
from shoal.kernels.base import Activation
from shoal.kernels.cuda.activation import activate, half_scale
from shoal.kernels.cuda.launch import device, launch


@triton.jit
def _activate(x, out, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out + at, activate(tl.load(x + at), ACTIVATION))


@triton.jit
def _half_scale(x, scale, inverse, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    power, one_over = half_scale(tl.load(x + at))
    tl.store(scale + at, power)
    tl.store(inverse + at, one_over)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
def test_activations_equal_the_reference(activation: Activation) -> None:
    x = np.concatenate([np.linspace(-20, 20, 60), [0, 1e-6, 300, 1e4]]).astype(np.float32)
    out = torch.empty(64, device=device())
    launch(_activate, (1,), torch.from_numpy(x).to(device()), out, SIZE=64, ACTIVATION=activation)
    np.testing.assert_allclose(out.cpu().numpy(), reference.activate(x, activation), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
def test_nan_stays_nan(activation: Activation) -> None:
    out = torch.zeros(16, device=device())
    launch(_activate, (1,), torch.full((16,), torch.nan, device=device()), out, SIZE=16, ACTIVATION=activation)
    assert out.isnan().all()


def test_a_row_is_divided_by_the_power_of_two_above_it() -> None:
    largest = np.array(
        [0, 1, 0.5, 0.75, 3, 1e-30, 1e30, 6e4, 2**-149, 3e38, np.inf, np.nan, 1.999, 2, 65504, 1e-38], np.float32
    )
    scale, inverse = torch.empty(16), torch.empty(16)
    launch(_half_scale, (1,), torch.from_numpy(largest).to(device()), scale, inverse, SIZE=16)
    want = np.ldexp(np.float32(1), np.clip(np.frexp(largest)[1], -125, 126)).astype(np.float32)
    want[[0, 10, 11]] = 1
    assert np.array_equal(scale.cpu().numpy(), want)
    assert np.array_equal(inverse.cpu().numpy(), 1 / want)
