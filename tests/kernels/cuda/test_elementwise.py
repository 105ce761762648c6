"""Row-wise kernels against their NumPy twins, and the half form that they write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shoal.kernels import reference
from shoal.kernels.base import Activation, Heads, Norm
from shoal.kernels.cuda import elementwise
from shoal.kernels.cuda import rows as row_tiles
from shoal.kernels.cuda.launch import Tensor, device
from tests.kernels.cuda.rows import F32, NAN, ROWS, around, blank, halves, nmse, random, selections, view

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "relu2")
SHAPES = [*((rows, 100) for rows in ROWS[:-1]), (3, 1), (5, 576), (3, 1000)]
WIDE = 16384 + 37  # more than a program holds at once


def on_device(x: F32) -> Tensor:
    return torch.from_numpy(x).to(device())


def norms(width: int, *, centred: bool, biased: bool) -> tuple[Norm, Norm]:
    """On the device, and in NumPy."""
    weight, bias = random(2, width, seed=7)
    norm = Norm(weight, 1e-5, centred, bias if biased else None)
    return replace(norm, weight=on_device(weight), bias=on_device(bias) if biased else None), norm


# --- what makes rows: each is (x, out, rows, half) ------------------------------------------------------------------


def norm_maker(width: int, *, centred: bool) -> tuple[Callable[..., None], Callable[[F32], F32]]:
    norm, twin = norms(width, centred=centred, biased=centred)
    return (
        lambda x, out, rows, half: elementwise.norm(x, out, rows, norm, half),
        lambda x: reference.normalise(x, twin),
    )


def activation_maker(activation: Activation) -> tuple[Callable[..., None], Callable[[F32], F32]]:
    return (
        lambda x, out, rows, half: elementwise.activate(x, out, activation, rows, half),
        lambda x: reference.activate(x, activation),
    )


def gated_maker(activation: Activation) -> tuple[Callable[..., None], Callable[[F32], F32]]:
    return (
        lambda x, out, rows, half: elementwise.gated(x, out, activation, rows, half),
        lambda x: reference.gated(x, activation),
    )


def maker(name: str, width: int) -> tuple[Callable[..., None], Callable[[F32], F32], int]:
    """The kernel, its twin, and the width of its input for an output of ``width``."""
    if name in ("rms norm", "layer norm"):
        return *norm_maker(width, centred=name == "layer norm"), width
    kind, activation = name.split()
    if kind == "gated":
        return *gated_maker(activation), 2 * width  # type: ignore[arg-type]
    return *activation_maker(activation), width  # type: ignore[arg-type]


MAKERS = ("rms norm", "layer norm", *(f"{kind} {a}" for kind in ("gated", "activated") for a in ACTIVATIONS))


@pytest.mark.parametrize(
    ("name", "rows", "width"),
    [*((name, *shape) for name in MAKERS for shape in SHAPES), *((name, ROWS[-1], 20) for name in MAKERS[::3])],
)
def test_rows_and_their_half_form(name: str, rows: int, width: int) -> None:
    run, twin, columns = maker(name, width)
    x = random(rows, columns, spread=4) + np.float32(0.5)
    if width == 1 and name == "layer norm":
        x[:] = 1  # nothing is left of one centred number but the bias
    out, half, alone = view(np.zeros((rows, width), np.float32)), halves(rows, width), halves(rows, width)
    run(view(x), out, rows, half)
    assert nmse(out[:rows], twin(x)) < 1e-10
    assert torch.isnan(around(out)).all()
    assert torch.isnan(out[rows:]).all()
    rounded = half[0][:rows].float() * half[1][:rows, None]
    assert np.array_equal(rounded.cpu(), reference.round_half(out[:rows].cpu().numpy(), each_row=True))
    assert half[0][:rows].abs().max() <= 1
    assert torch.isnan(half[0][rows:]).all()
    assert torch.isnan(half[1][rows:]).all()
    run(view(x), None, rows, alone)
    without = blank(rows, width)
    run(view(x), without, rows, None)
    assert all(torch.equal(a[:rows], b[:rows]) for a, b in zip(alone, half, strict=True))
    assert torch.equal(without[:rows], out[:rows])
    assert torch.isnan(without[rows:]).all()


@pytest.mark.parametrize("name", ["rms norm", "layer norm", "gated silu"])
def test_rows_wider_than_a_block(name: str) -> None:
    run, twin, columns = maker(name, WIDE)
    x, out, half = random(2, columns), blank(2, WIDE), halves(2, WIDE)
    run(view(x), out, 2, half)
    assert nmse(out[:2], twin(x)) < 1e-10
    rounded = half[0][:2].float() * half[1][:2, None]
    assert np.array_equal(rounded.cpu(), reference.round_half(out[:2].cpu().numpy(), each_row=True))


@pytest.mark.parametrize("name", MAKERS)
def test_a_row_has_the_same_bits_among_any_others(name: str) -> None:
    run, _, columns = maker(name, 100)
    x = random(17, columns, spread=3)
    whole, half = blank(17, 100), halves(17, 100)
    run(view(x), whole, 17, half)
    for some in selections(17):
        out, parts = blank(len(some), 100), halves(len(some), 100)
        run(view(x[some]), out, len(some), parts)
        assert torch.equal(out[: len(some)], whole[some])
        assert all(torch.equal(a[: len(some)], b[some]) for a, b in zip(parts, half, strict=True))


@pytest.mark.parametrize("width", [1, 100, 1000])
@pytest.mark.parametrize("name", MAKERS)
def test_rows_of_a_program_change_no_bit_of_rows_made(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, columns = maker(name, width)
    x = random(7, columns, spread=3)
    results = []
    for most in (64, 4, 1):
        monkeypatch.setattr(row_tiles, "MOST_ROWS", most)
        out, half = blank(7, width), halves(7, width)
        run(view(x), out, 7, half)
        assert torch.isnan(out[7:]).all()
        results.append((out[:7], half[0][:7], half[1][:7]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinities in the interpreter
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", MAKERS)
def test_a_row_that_is_not_finite_harms_no_other(name: str, bad: float) -> None:
    run, _, columns = maker(name, 40)
    x = random(5, columns)
    clean: list[Tensor] = []
    broken: list[Tensor] = []
    for into in (clean, broken):
        out, half = blank(5, 40), halves(5, 40)
        run(view(x), out, 5, half)
        into += [out[:5], half[0][:5], half[1][:5]]
        x[2, 7] = bad
    others = torch.tensor([0, 1, 3, 4])
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, broken, strict=True))
    if bad != -float("inf") or "relu2" not in name:  # of -inf it is 0
        assert not any(torch.isfinite(values[2]).all() for values in broken[:2])
    assert torch.isfinite(broken[2][others]).all()


def test_layer_norm_of_rows_far_from_zero() -> None:
    norm, twin = norms(1000, centred=True, biased=False)
    x, out = random(3, 1000) + np.float32(300), blank(3, 1000)
    elementwise.norm(view(x), out, 3, norm)
    assert nmse(out[:3], reference.normalise(x, twin)) < 1e-10


@pytest.mark.parametrize("centred", [False, True])
def test_add_norm_has_the_bits_of_both(centred: bool) -> None:
    norm, _ = norms(100, centred=centred, biased=True)
    for rows in (1, 3, 17):
        residual, x = view(random(rows, 100)), view(random(rows, 100, seed=1, spread=5))
        want, want_half = blank(rows, 100), halves(rows, 100)
        got, half, sums = blank(rows, 100), halves(rows, 100), view(residual[:rows].cpu().numpy())
        elementwise.add(residual, x, rows)
        elementwise.norm(residual, want, rows, norm, want_half)
        elementwise.add_norm(sums, x, got, rows, norm, half)
        for a, b in ((sums, residual), (got, want), (half[0], want_half[0]), (half[1], want_half[1])):
            assert torch.equal(a[:rows], b[:rows])
        assert torch.isnan(around(sums)).all()
        assert torch.isnan(sums[rows:]).all()
        assert torch.isnan(got[rows:]).all()


# --- the half form ---------------------------------------------------------------------------------------------------


def test_half_form_of_all_magnitudes() -> None:
    scales = 2.0 ** np.array([-110, -60, -14, -1, 0, 0.5, 1, 10, 66, 110])
    x = random(len(scales), 50) * scales[:, None].astype(np.float32)
    x[4] = 0
    x[5, :] = 1
    half = halves(len(x), 50)
    elementwise.to_half(view(x), half, len(x))
    values, powers = half[0][: len(x)].float().cpu().numpy(), half[1][: len(x)].cpu().numpy()
    assert np.array_equal(values * powers[:, None], reference.round_half(x, each_row=True))
    assert np.array_equal(np.frexp(powers)[0], np.full(len(x), 0.5, np.float32))  # powers of two
    assert powers[4] == 1
    assert powers[5] == 2


@pytest.mark.parametrize("largest", [3.4e38, 1.7e38, 1e-38, 1e-44])
def test_half_form_at_the_ends_of_float32(largest: float) -> None:
    x, half = np.linspace(0, largest, 9, dtype=np.float32)[None], halves(1, 9)
    elementwise.to_half(on_device(x), half, 1)
    got = half[0][:1].double() * half[1][0].double()
    assert torch.isfinite(half[0][:1]).all()
    assert np.allclose(got.cpu(), x, rtol=6e-4, atol=2e-45)


# --- in place --------------------------------------------------------------------------------------------------------


def changed(run: Callable[[Tensor], None], x: F32) -> F32:
    """x after ``run``, which left alone what is around it."""
    inner = view(x)
    run(inner)
    assert torch.isnan(around(inner)).all()
    assert torch.isnan(inner[len(x) :]).all()
    left: F32 = inner[: len(x)].cpu().numpy()
    return left


@pytest.mark.parametrize(("rows", "width"), [*SHAPES, (2, WIDE)])
def test_changes_in_place(rows: int, width: int) -> None:
    x, y, vector = random(rows, width), random(rows, width, seed=1), random(width, seed=2)
    other, columns = view(y), on_device(vector)
    cases: list[tuple[Callable[[Tensor], None], F32]] = [
        (lambda t: elementwise.add(t, other, rows), x + y),
        (lambda t: elementwise.add_vector(t, columns, rows), x + vector),
        (lambda t: elementwise.multiply(t, 0.3, rows), x * np.float32(0.3)),
        (lambda t: elementwise.multiply_columns(t, columns, rows), x * vector),
        (lambda t: elementwise.clamp(t, 0.7, rows), np.clip(x, np.float32(-0.7), np.float32(0.7))),
    ]
    for run, want in cases:
        assert np.array_equal(changed(run, x), want)


@pytest.mark.parametrize("rows", ROWS)
def test_gate_rows(rows: int) -> None:
    x, gate = random(rows, 100), random(rows, 1, seed=1, spread=20)
    got = changed(lambda t: elementwise.gate_rows(t, view(gate), rows), x)
    assert nmse(got, x * reference.sigmoid(gate)) < 1e-12


@pytest.mark.parametrize("spread", [1e-3, 1, 30, 1e4])
def test_soft_cap(spread: float) -> None:
    x = random(5, 300, spread=spread)
    got = changed(lambda t: elementwise.soft_cap(t, 30.0, 5), x)
    assert np.allclose(got, reference.soft_cap(x, 30.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("first", "count", "width"),
    [(0, 3, 14), (14, 2, 64), (5, 4, 24), (0, 1, 40), (1, 5, 80), (0, 40, 256), (3, 2, 128)],
)
def test_norm_of_heads_leaves_the_rest_alone(first: int, count: int, width: int, centred: bool) -> None:
    whole, columns = first + count * width + 9, slice(first, first + count * width)
    norm, twin = norms(count * width, centred=centred, biased=centred)
    twin = replace(twin, weight=twin.weight.reshape(count, width))
    twin = replace(twin, bias=None if twin.bias is None else twin.bias.reshape(count, width))
    for rows in (1, 5):
        x = random(rows, whole) + np.float32(1)
        got = changed(lambda t, n=rows: elementwise.norm_heads(t, Heads(first, count, width), norm, n), x)  # type: ignore[misc]
        want = reference.normalise(x[:, columns].reshape(rows, count, width), twin).reshape(rows, -1)
        assert nmse(got[:, columns], want) < 1e-10
        assert np.array_equal(got[:, :first], x[:, :first])
        assert np.array_equal(got[:, columns.stop :], x[:, columns.stop :])


def test_norm_of_heads_has_the_same_bits_among_any_others() -> None:
    norm, _ = norms(3 * 80, centred=False, biased=False)
    x = random(17, 250)

    def run(x: F32) -> F32:
        return changed(lambda t: elementwise.norm_heads(t, Heads(5, 3, 80), norm, len(x)), x)

    whole = run(x)
    for some in selections(17):
        assert np.array_equal(run(x[some]), whole[some])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_changes_of_rows_that_are_not_finite(bad: float) -> None:
    x = random(5, 40)
    x[2] = bad
    others = [0, 1, 3, 4]
    norm, _ = norms(40, centred=False, biased=False)
    cases: list[tuple[Any, bool]] = [
        (lambda t: elementwise.add(t, view(x), 5), False),
        (lambda t: elementwise.multiply(t, 0.5, 5), False),
        (lambda t: elementwise.soft_cap(t, 30.0, 5), bad == np.inf),
        (lambda t: elementwise.clamp(t, 3.0, 5), bad == np.inf),
        (lambda t: elementwise.norm_heads(t, Heads(0, 2, 20), norm, 5), False),
    ]
    for run, finite in cases:
        got = changed(run, x)
        assert np.isfinite(got[others]).all()
        assert np.isfinite(got[2]).all() == finite


@pytest.mark.parametrize("width", [100, 1])
def test_rows_of_a_program_change_no_bit_of_rows_in_place(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, other, gate = random(7, width), view(random(7, width, seed=1)), view(random(7, 1, seed=2))
    one, _ = norms(width, centred=True, biased=True)
    cases: list[Callable[[Tensor], None]] = [
        lambda t: elementwise.add(t, other, 7),
        lambda t: elementwise.add_norm(t, other, None, 7, one, halves(7, width)),
        lambda t: elementwise.soft_cap(t, 2.0, 7),
        lambda t: elementwise.gate_rows(t, gate, 7),
        lambda t: elementwise.norm_heads(t, Heads(0, 1, width), one, 7),
    ]
    for run in cases:
        results = []
        for most in (64, 4, 1):
            monkeypatch.setattr(row_tiles, "MOST_ROWS", most)
            results.append(changed(run, x))
        assert all(np.array_equal(result, results[0]) for result in results[1:])


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
def test_copy_and_concat(rows: int) -> None:
    parts = [random(rows, width, seed=width) for width in (7, 64, 1, 130)]
    want = np.concatenate(parts, axis=1)
    arrays = [view(part) for part in parts]
    one_by_one, at_once, first = view(np.zeros_like(want)), view(np.zeros_like(want)), 0
    for array in arrays:
        elementwise.copy_columns(array, one_by_one[:, first : first + array.shape[1]], rows)
        first += array.shape[1]
    elementwise.concat(elementwise.side_by_side(arrays), at_once, rows)
    for out in (one_by_one, at_once):
        assert np.array_equal(out[:rows].cpu(), want)
        assert torch.isnan(around(out)).all()
        assert torch.isnan(out[rows:]).all()
