"""Row-wise operations against their NumPy twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gguf
from shoal.gguf.quants import format_named
from shoal.kernels import reference
from shoal.kernels.base import Activation, Heads, Linear, Norm, RawTensor
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


def _vector(backend: CPUBackend, values: NDArray[np.float32]) -> Any:
    return backend.vector(RawTensor("w", format_named("F32"), values.shape, values.view(np.uint8)))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm(backend: CPUBackend, width: int, centred: bool) -> None:
    weight, bias = _random(2, width, 7)
    for b in (None, bias) if centred else (None,):
        norm = Norm(_vector(backend, weight), 1e-3, centred, None if b is None else _vector(backend, b))
        for rows in ROWS:
            x = _random(rows, width) + 1
            got = rowwise(backend, x, lambda ops, r, norm=norm: ops.norm(r, norm))  # type: ignore[misc]
            assert np.allclose(got, reference.normalise(x, Norm(weight, 1e-3, centred, b)), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("first", "count", "width"), [(0, 3, 14), (14, 2, 16), (5, 4, 24), (0, 1, 40)])
def test_norm_of_heads_leaves_the_rest_alone(
    backend: CPUBackend, first: int, count: int, width: int, centred: bool
) -> None:
    weight = _random(1, count * width, 7)[0]

    def change(ops: Any, rows: Any) -> Any:
        ops.norm_heads(rows, Heads(first, count, width), Norm(_vector(backend, weight), 1e-3, centred))
        return rows

    for rows in ROWS:
        x = _random(rows, 130)
        want = x.copy()
        part = x[:, first : first + count * width].reshape(rows, count, width)
        normed = reference.normalise(part, Norm(weight.reshape(count, width), 1e-3, centred))
        want[:, first : first + count * width] = normed.reshape(rows, -1)
        got = rowwise(backend, x, change)
        assert np.allclose(got, want, rtol=3e-6, atol=3e-6)
        outside = np.r_[0:first, first + count * width : 130]
        assert np.array_equal(got[:, outside], x[:, outside])


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("width", WIDTHS)
def test_activations(backend: CPUBackend, width: int, activation: Activation) -> None:
    for rows in ROWS:
        x = _random(rows, 2 * width) * 6
        got = rowwise(backend, x, lambda ops, r: ops.gated(r, activation))
        # Where gelu is nearly 0 its twin has lost digits: 1 + tanh.
        assert np.allclose(got, reference.gated(x, activation), rtol=3e-6, atol=4e-6)
        got = rowwise(backend, x, lambda ops, r: ops.activate(r, activation))
        assert np.allclose(got, reference.activate(x, activation), rtol=3e-6, atol=4e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_of_extreme_values(backend: CPUBackend, activation: Activation) -> None:
    gate = np.array([[-1e12, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e12]], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)], axis=1)
    got = rowwise(backend, x, lambda ops, r: ops.gated(r, activation))
    want = reference.gated(x, activation)
    # Below -87 the kernel's exp stops growing: silu there is 1e-36 of x, not 0.
    assert np.allclose(got[:, 2:], want[:, 2:], rtol=3e-6, atol=1e-30)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_changes_in_place(backend: CPUBackend, width: int) -> None:
    x, y = _random(17, width), _random(17, width, 5)
    column = _vector(backend, y[0])
    cases: list[tuple[Callable[[Any, Any], None], NDArray[np.float32]]] = [
        (lambda ops, r: ops.multiply(r, 0.3), x * np.float32(0.3)),
        (lambda ops, r: ops.clamp(r, 0.5), np.clip(x, -0.5, 0.5)),
        (lambda ops, r: ops.soft_cap(r, 0.7), reference.soft_cap(x, 0.7)),
        (lambda ops, r: ops.add(r, ops.norm(r, Norm(column, 1e-3))), x + reference.rms_norm(x, y[0], 1e-3)),
    ]
    for change, want in cases:

        def apply(ops: Any, rows: Any, change: Callable[[Any, Any], None] = change) -> Any:
            change(ops, rows)
            return rows

        assert np.allclose(rowwise(backend, x, apply), want, rtol=3e-6, atol=4e-7)


def test_scale_bias_and_row_gate(backend: CPUBackend) -> None:
    x, weight, column = _random(17, 96), _random(40, 96, 1), _random(2, 40, 2)
    raw = RawTensor("w", format_named("F32"), weight.shape, weight.view(np.uint8))
    gate = RawTensor("g", format_named("F32"), (1, 96), weight[:1].view(np.uint8))
    packed, packed_gate = backend.matrix([raw]), Linear(backend.matrix([gate]))
    linear = Linear(packed, _vector(backend, column[0]), _vector(backend, column[1]))

    def gated(ops: Any, rows: Any) -> Any:
        out = ops.linear(rows, linear)
        ops.linear_add(out, rows, linear)
        ops.gate_rows(out, rows, packed_gate)
        return out

    once = reference.matmul(x, reference.fixed_point(weight)) * column[1] + column[0]
    want = 2 * once * reference.sigmoid(x @ weight[:1].T)
    assert np.allclose(rowwise(backend, x, gated), want, rtol=1e-4, atol=1e-4)


def test_columns_and_concat(backend: CPUBackend) -> None:
    x = _random(17, 75)
    parts = [(3, 20), (0, 17), (40, 35)]
    got = rowwise(backend, x, lambda ops, r: ops.concat([ops.columns(r, a, n) for a, n in parts]))
    assert np.array_equal(got, np.concatenate([x[:, a : a + n] for a, n in parts], axis=1))


def test_rows_that_changed_are_rounded_anew(backend: CPUBackend) -> None:
    x, weight = _random(5, 64), _random(64, 64, 1)
    packed = Linear(backend.matrix([RawTensor("w", format_named("Q8_0"), (64, 64), _as_q8_0(weight))]))

    def twice(ops: Any, rows: Any) -> Any:
        ops.linear(rows, packed)
        ops.multiply(rows, 3.0)
        return ops.linear(rows, packed)

    once = rowwise(backend, x, lambda ops, r: ops.linear(r, packed))
    assert np.allclose(rowwise(backend, x, twice), 3 * once, rtol=1e-3, atol=1e-3)


def test_rows_rounded_late_survive_what_ran_in_between(backend: CPUBackend) -> None:
    """Buffers are used again: what is rounded by the kernel that made it must not have been overwritten since."""
    x, weight = _random(5, 64), _random(64, 64, 1)
    packed = Linear(backend.matrix([RawTensor("w", format_named("Q8_0"), (64, 64), _as_q8_0(weight))]))
    norm = Norm(_vector(backend, np.ones(64, np.float32)), 1e-3)

    def late(ops: Any, rows: Any) -> Any:
        early = ops.norm(rows, norm)
        other = ops.activate(rows, "relu2")
        ops.linear(other, packed)
        del other
        return ops.linear(early, packed)

    want = rowwise(backend, x, lambda ops, r: ops.linear(ops.norm(r, norm), packed))
    assert np.array_equal(rowwise(backend, x, late), want)


def _as_q8_0(weight: NDArray[np.float32]) -> NDArray[np.uint8]:
    rows: NDArray[np.uint8] = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    return rows


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
