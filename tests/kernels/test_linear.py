"""Packed layouts and matrix products against their NumPy twins."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.gguf.quants import dequantise, format_named
from shoal.kernels import reference
from shoal.kernels.base import RawTensor
from shoal.kernels.cpu.backend import CPUBackend
from shoal.kernels.cpu.pack import LAYOUTS
from tests.kernels.runner import embed, multiply
from tests.support.gguf_builder import random_rows

FORMATS = sorted(LAYOUTS)
ROWS = (1, 2, 3, 4, 5, 7, 8, 12, 17, 33, 123)


@pytest.fixture(scope="module")
def backend() -> Iterator[CPUBackend]:
    backend = CPUBackend(threads=2)
    yield backend
    backend.close()


def _weights(name: str, rows: int, columns: int, seed: int = 0) -> RawTensor:
    fmt = format_named(name)
    data = random_rows(fmt, (rows, columns), np.random.default_rng(seed), 0.05)
    return RawTensor("w", fmt, (rows, columns), data)


def _activations(rows: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def _nmse(a: NDArray[np.float32], r: NDArray[np.float32]) -> float:
    return float(np.sum((a.astype(np.float64) - r) ** 2) / np.sum(r.astype(np.float64) ** 2))


def _columns(name: str) -> int:
    """One block: the shortest row."""
    return max(32, format_named(name).block_size)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(16, 1), (23, 2), (100, 3)], ids=str)
def test_unpacks_to_the_same_bits(backend: CPUBackend, name: str, shape: tuple[int, int]) -> None:
    raw = _weights(name, shape[0], shape[1] * _columns(name))
    got = embed(backend, backend.matrix([raw]), np.arange(shape[0], dtype=np.int32))
    want = dequantise(raw.format, raw.data)
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("columns", [1, 14, 16, 48, 50])
def test_floats_of_any_width(backend: CPUBackend, name: str, columns: int) -> None:
    raw = _weights(name, 23, columns)
    weight, matrix = dequantise(raw.format, raw.data), backend.matrix([raw])
    assert np.array_equal(embed(backend, matrix, np.arange(23, dtype=np.int32)), weight)
    x = _activations(5, columns)
    assert _nmse(multiply(backend, matrix, x), reference.matmul(x, reference.fixed_point(weight))) < 1e-10


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(16, 1), (23, 2), (8, 3), (1, 1), (112, 6)], ids=str)
def test_product_equals_its_twin(backend: CPUBackend, name: str, shape: tuple[int, int]) -> None:
    raw = _weights(name, shape[0], shape[1] * _columns(name))
    weight = reference.fixed_point(dequantise(raw.format, raw.data))
    matrix = backend.matrix([raw])
    twin = reference.matmul if LAYOUTS[name].is_float else reference.linear_q8
    for rows in ROWS:
        x = _activations(rows, weight.shape[1])
        assert _nmse(multiply(backend, matrix, x), twin(x, weight)) < 1e-10


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_the_same_in_any_batch(backend: CPUBackend, name: str) -> None:
    matrix = backend.matrix([_weights(name, 40, 2 * _columns(name))])
    x = _activations(123, matrix.columns)
    whole = multiply(backend, matrix, x)
    for rows in ROWS:
        for start in (0, 123 - rows):
            assert np.array_equal(multiply(backend, matrix, x[start : start + rows]), whole[start : start + rows])


def test_parts_of_different_types_stand_below_each_other(backend: CPUBackend) -> None:
    parts = [_weights("Q4_1", 24, 256), _weights("Q4_1", 8, 256, 1), _weights("Q8_0", 21, 256), _weights("F16", 5, 256)]
    x = _activations(5, 256)
    got = multiply(backend, backend.matrix(parts), x)
    separate = [multiply(backend, backend.matrix([part]), x) for part in parts]
    assert np.array_equal(got, np.concatenate(separate, axis=1))


def test_adds_to_what_is_there(backend: CPUBackend) -> None:
    matrix = backend.matrix([_weights("Q4_1", 40, 64)])
    x, base = _activations(6, 64), _activations(6, 40, seed=9)
    assert np.array_equal(multiply(backend, matrix, x, base), base + multiply(backend, matrix, x))


@pytest.mark.parametrize("name", [n for n in FORMATS if not LAYOUTS[n].is_float])
def test_rounding_costs_little(name: str) -> None:
    raw = _weights(name, 64, 512)
    weight, x = reference.fixed_point(dequantise(raw.format, raw.data)), _activations(32, 512)
    assert _nmse(reference.linear_q8(x, weight), reference.matmul(x, weight)) < 5e-5
    wild = x * np.exp(2 * _activations(32, 512, seed=5))
    assert _nmse(reference.linear_q8(wild, weight), reference.matmul(wild, weight)) < 5e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_harms_no_other(backend: CPUBackend, bad: float) -> None:
    matrix = backend.matrix([_weights("Q4_1", 32, 64)])
    x = _activations(9, 64)
    clean = multiply(backend, matrix, x)
    x[4, 17] = bad
    got = multiply(backend, matrix, x)
    assert not np.isfinite(got[4]).any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert np.array_equal(got[others], clean[others])
