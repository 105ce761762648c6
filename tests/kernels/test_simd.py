"""Functions written from SIMD operations against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from shoal.kernels.cpu.jit import Lazy, kernel
from shoal.kernels.cpu.simd import Address, emit, load_f32, load_f32x16, load_i64, store_f32x16, tanh
from shoal.kernels.cpu.simd.floats import _fma_by_hand
from shoal.kernels.cpu.simd.halves import narrow_by_hand, widen_by_hand
from shoal.kernels.cpu.simd.vectors import I16, f32x16, vector


@kernel
def all_tanh(values: Address, count: int) -> None:
    """tanh of each of ``count`` float32, in place."""
    for i in range(0, 4 * count, 64):
        store_f32x16(values + i, tanh(load_f32x16(values + i)))


def test_tanh_is_right_to_a_few_units_in_the_last_place() -> None:
    sizes = np.concatenate([np.geomspace(1e-30, 100, 40_000), np.linspace(0.6, 0.65, 8_000)])
    x = np.concatenate([sizes, -sizes, np.zeros(16)]).astype(np.float32)
    exact, got = np.tanh(x.astype(np.float64)), x.copy()
    all_tanh(got.ctypes.data, len(got))
    assert np.max(np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32))) <= 4


def test_tanh_of_what_is_no_number_or_infinite() -> None:
    x = np.resize(np.array([np.nan, np.inf, -np.inf, 3e38], np.float32), 16)
    all_tanh(x.ctypes.data, len(x))
    assert np.array_equal(x[:4], np.array([np.nan, 1, -1, 1], np.float32), equal_nan=True)


# --- what some CPUs have no instruction for: the same bits by hand ---------------------------------------------------


@emit.operation(f32x16)
def load_f16x16_by_hand(b: Any, _: Any, address: ir.Value) -> ir.Value:
    """As load_f16x16 where there is no instruction for it."""
    return widen_by_hand(b, emit.load(b, address, vector(I16, 16)))


@emit.operation(types.void)
def store_f16x16_by_hand(b: Any, _: Any, address: ir.Value, value: ir.Value) -> None:
    """As store_f16x16."""
    emit.store(b, narrow_by_hand(b, value), address)


@emit.operation(types.void)
def store_f16_by_hand(b: Any, _: Any, address: ir.Value, value: ir.Value) -> None:
    """As store_f16."""
    emit.store(b, narrow_by_hand(b, value), address)


@emit.operation(f32x16)
def fma_by_hand(b: Any, _: Any, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """As fma."""
    return _fma_by_hand(b, x, y, z)


@emit.operation(f32x16)
def fma_of_llvm(b: Any, _: Any, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """What LLVM makes of it: an instruction, or the C library's function."""
    return emit.call(b, "llvm.fma.v16f32", f32x16.llvm, x, y, z)


@kernel
def widen_all(args: Address, count: int) -> None:
    """``count`` float16 to float32: args = (from, to)."""
    source, target = load_i64(args), load_i64(args + 8)
    for i in range(0, count, 16):
        store_f32x16(target + 4 * i, load_f16x16_by_hand(source + 2 * i))


@kernel
def narrow_all(args: Address, count: int) -> None:
    """``count`` float32 to float16, by vectors and one by one: args = (from, to, to)."""
    source = load_i64(args)
    for i in range(0, count, 16):
        store_f16x16_by_hand(load_i64(args + 8) + 2 * i, load_f32x16(source + 4 * i))
        for j in range(i, i + 16):
            store_f16_by_hand(load_i64(args + 16) + 2 * j, load_f32(source + 4 * j))


@kernel
def multiply_add_all(args: Address, count: int) -> None:
    """x * y + z both ways: args = (x, y, z, to, to)."""
    for i in range(0, 4 * count, 64):
        x, y = load_f32x16(load_i64(args) + i), load_f32x16(load_i64(args + 8) + i)
        z = load_f32x16(load_i64(args + 16) + i)
        store_f32x16(load_i64(args + 24) + i, fma_by_hand(x, y, z))
        store_f32x16(load_i64(args + 32) + i, fma_of_llvm(x, y, z))


def _run(kernel: Lazy, count: int, *arrays: NDArray[Any]) -> None:
    addresses = np.array([array.ctypes.data for array in arrays], np.int64)
    kernel(addresses.ctypes.data, count)


def test_every_half_is_widened_as_numpy_does_it() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    got = np.empty(1 << 16, np.uint32)
    _run(widen_all, 1 << 16, halves, got)
    assert np.array_equal(got, halves.view(np.float16).astype(np.float32).view(np.uint32) | _quiet(halves))


def _quiet(halves: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """The bit that a conversion sets in NaN."""
    return np.where((halves & 0x7FFF) > 0x7C00, 0x00400000, 0).astype(np.uint32)


def test_floats_are_rounded_to_halves_as_numpy_does_it() -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    rng = np.random.default_rng(1)
    around = [np.nextafter(x, np.float32(side)) for x in (halves, ties) for side in (-1, 1)]
    ends = np.array([65519.996, 65520, 65536, 3e38, np.inf, 1e-8, 2**-25, 1e-45, 0], np.float32)
    anything = rng.integers(0, 0x7F800000, 100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([halves, ties, *around, ends, anything])
    x = np.resize(np.concatenate([x, -x]), -(-2 * len(x) // 16) * 16)
    with np.errstate(over="ignore", under="ignore"):
        right = x.astype(np.float16).view(np.uint16)
    vectors, singles = np.empty_like(right), np.empty_like(right)
    _run(narrow_all, len(x), x, vectors, singles)
    assert np.array_equal(vectors, right)
    assert np.array_equal(singles, right)


def test_nan_stays_nan_as_a_half() -> None:
    nans = np.array(
        [0x7F800001, 0x7F801FFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFC02000] + [0x7FC00000] * 10, np.uint32
    )
    vectors, singles = np.empty(16, np.uint16), np.empty(16, np.uint16)
    _run(narrow_all, 16, nans, vectors, singles)
    assert vectors[:6].tolist() == [0x7E00, 0x7E00, 0x7E00, 0x7FFF, 0xFE00, 0xFE01]
    assert np.array_equal(vectors, singles)


def test_multiplying_and_adding_rounds_once() -> None:
    rng, n = np.random.default_rng(2), 1 << 16
    anything = [rng.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32) for _ in range(3)]
    x, y = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    near = -(x * y) * (1 + rng.integers(-3, 4, n) * 2.0**-23)  # what is left is what rounding took away
    tiny = [np.ldexp(rng.integers(1, 1 << 24, n), e) for e in (-100, -72, -149)]  # sums of denormals
    halfway = [
        rng.integers(1 << 23, 1 << 24, n),
        1 + rng.integers(0, 2, n) * 2.0**-23,
        rng.integers(-1, 2, n) * 2.0**-40,
    ]
    for case in (anything, [x, y, near], tiny, halfway):
        values = [array.astype(np.float32) for array in case]
        by_hand, right = np.empty(n, np.float32), np.empty(n, np.float32)
        _run(multiply_add_all, n, *values, by_hand, right)
        assert np.array_equal(np.isnan(by_hand), np.isnan(right))
        numbers = ~np.isnan(right)
        assert np.array_equal(by_hand.view(np.uint32)[numbers], right.view(np.uint32)[numbers])
