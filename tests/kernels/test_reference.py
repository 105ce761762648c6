"""The reference keeps the promise that others are held to: a row has the same bits whatever else is computed, on any BLAS."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.kernels.reference import fixed_point, matmul
from tests.kernels import same_rows
from tests.kernels.same_rows import numbers

F32 = NDArray[np.float32]

# Kernels of OpenBLAS, and what a CPU must have for them. (Another BLAS does not know the variable.)
CORE_TYPES = {
    "Nehalem": {"sse4_2"},
    "Haswell": {"avx2", "fma"},
    "Zen": {"avx2", "fma"},
    "SkylakeX": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"},
}


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", same_rows.CHECKS)
def test_a_row_is_the_same_alone_and_among_others(name: str) -> None:
    same_rows.check(name)


@pytest.mark.parametrize("core_type", CORE_TYPES)
def test_with_other_kernels_and_threads_too(core_type: str) -> None:
    missing = CORE_TYPES[core_type] - cpu_flags()
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))} for OpenBLAS's {core_type} kernels")
    here = {name: same_rows.check(name) for name in same_rows.CHECKS}
    for digests in computed_with(
        {"OPENBLAS_CORETYPE": core_type, "OPENBLAS_NUM_THREADS": "1"},
        {"OPENBLAS_CORETYPE": core_type, "OPENBLAS_NUM_THREADS": str(max(2, os.cpu_count() or 1))},
    ):
        assert digests == here


def test_without_the_vector_instructions_of_numpy_too() -> None:
    """Its functions are others then; products are not."""
    found: list[str] = np.show_config("dicts")["SIMD Extensions"].get("found", [])
    if not found:
        pytest.skip("NumPy has found no vector instructions that it could do without")
    (digests,) = computed_with({"NPY_DISABLE_CPU_FEATURES": " ".join(found)})
    for name in same_rows.CHECKS:
        assert digests[name] == same_rows.check(name) or not name.startswith("product")


def cpu_flags() -> set[str]:
    """Instruction sets of this CPU, as Linux names them on x86; elsewhere none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def computed_with(*settings: dict[str, str]) -> list[dict[str, str]]:
    """Digests of all checks, made in processes of their own, side by side."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OPENBLAS", "OMP", "NPY"))}
    environment = {**inherited, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.same_rows"],
            env=environment | changed,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for changed in settings
    ]
    ended = [(*process.communicate(), process.returncode) for process in processes]
    assert [code for *_, code in ended] == [0] * len(ended), b"\n".join(stderr for _, stderr, _ in ended).decode()
    return [json.loads(stdout) for stdout, *_ in ended]


# --- exact sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 64, 1000, 4096, 4097, 20_000])
def test_sums_are_exact_where_they_are_largest(k: int) -> None:
    """All of a sign and just below a power of two: no other numbers come nearer to what float64 holds."""
    rng = np.random.default_rng(k)
    x, weight = ((2 - rng.random(shape) * 2.0**-20).astype(np.float32) for shape in ((2, k), (3, k)))
    product, order = matmul(x, fixed_point(weight)), rng.permutation(k)
    assert np.array_equal(matmul(x[:, order], fixed_point(weight[:, order])), product)
    for row, column in np.ndindex(product.shape):
        exact = math.fsum(float(a) * float(b) for a, b in zip(x[row], weight[column], strict=True))
        assert abs(product[row, column] - exact) <= 2.0**-24 * exact


@pytest.mark.parametrize("k", [16, 576, 5000])
def test_products_are_nearer_to_exact_ones_than_float32_sums(k: int) -> None:
    """Also of numbers of very different sizes."""
    x, weight = numbers(40, k), numbers(30, k, seed=1)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    error, of_float32 = (np.abs(p - exact).max() for p in (matmul(x, fixed_point(weight)), x @ weight.T))
    assert error <= of_float32


def test_weights_of_few_bits_stay_as_they_are() -> None:
    weight = (np.random.default_rng(0).integers(-127, 128, (20, 64)) * 2.0**-12).astype(np.float32)
    assert np.array_equal(fixed_point(weight), weight)


def test_a_weight_is_rounded_to_26_bits_of_its_rows_largest() -> None:
    weight = numbers(20, 64)
    assert (np.abs(fixed_point(weight) - weight) <= np.abs(weight).max(axis=1, keepdims=True) * 2.0**-26).all()


# --- numbers that are not ordinary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_harms_no_other(bad: float) -> None:
    x, weight = numbers(9, 64), fixed_point(numbers(30, 64, seed=1))
    clean = matmul(x, weight)
    x[4, 17] = bad
    product = matmul(x, weight)
    assert not np.isfinite(product[4]).any()
    assert np.array_equal(np.delete(product, 4, axis=0), np.delete(clean, 4, axis=0))


def test_weights_that_are_not_finite_harm_no_other_column() -> None:
    x, weight = numbers(9, 64), numbers(30, 64, seed=1)
    clean = matmul(x, fixed_point(weight))
    weight[3, 5], weight[8, 9] = np.nan, np.inf
    product = matmul(x, fixed_point(weight))
    assert not np.isfinite(product[:, [3, 8]]).any()
    assert np.array_equal(np.delete(product, [3, 8], axis=1), np.delete(clean, [3, 8], axis=1))


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1.0, 1e25])
def test_numbers_of_any_size(size: float) -> None:
    """Zeros, denormals, and what makes infinities (1e25 squared is past float32)."""
    x, weight = (np.ones((2, 64), np.float32) * np.float32(size) for _ in range(2))
    x[1] = 0
    product = matmul(x, fixed_point(weight))
    with np.errstate(over="ignore"):
        assert np.array_equal(product[0], np.full(2, 64 * np.float64(np.float32(size)) ** 2).astype(np.float32))
    assert not product[1].any()
    assert not matmul(np.ones((1, 64), np.float32), fixed_point(np.zeros((2, 64), np.float32))).any()
