"""What kernels do to single numbers: activations, and the power of two that a row is divided by before it is rounded to float16."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu, gelu (tanh form: 1 + tanh(u) is 2 * sigmoid(2u)) or squared relu of float32 x."""
    if ACTIVATION == "relu2":
        positive = tl.where(x < 0, 0.0, x)  # NaN stays NaN
        y = positive * positive
    elif ACTIVATION == "gelu":
        y = x * sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
    else:
        tl.static_assert(ACTIVATION == "silu")
        y = x * sigmoid(x)
    return y


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)); nothing overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1 + small)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """By exp, and where that loses digits by its series: good to a few units in the last place."""
    small = tl.exp(-2.0 * tl.abs(x))
    by_exp = (1.0 - small) / (1.0 + small)
    near = tl.where(tl.abs(x) < 0.125, x, 0.0)
    square = near * near
    by_series = near + near * square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315)))
    return tl.where(tl.abs(x) < 0.125, by_series, tl.where(x < 0, -by_exp, by_exp))


@triton.jit
def half_scale(largest):  # type: ignore[no-untyped-def]
    """Of the largest magnitude of a row (float32): the smallest power of two above it, and 1 / that, both exact. 1 for a row of zeros
    and for one with inf or NaN. Next to the ends of float32 the power stays within 2^-125 ... 2^126: its inverse is a normal number."""
    field = largest.to(tl.int32, bitcast=True) >> 23
    field = tl.where((largest > 0) & (field < 255), tl.minimum(tl.maximum(field, 1), 252), 126)
    return ((field + 1) << 23).to(tl.float32, bitcast=True), ((253 - field) << 23).to(tl.float32, bitcast=True)
