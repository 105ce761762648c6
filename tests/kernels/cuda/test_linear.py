"""Products against the float16 twin, and that a row has the same bits whatever else is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from shoal.kernels import reference
from shoal.kernels.base import Activation, RawTensor
from shoal.kernels.cuda import linear as products
from shoal.kernels.cuda.launch import INTERPRETED, Tensor, device
from shoal.kernels.cuda.linear import (
    CHIPS,
    CONFIGS,
    FEW,
    GATED_TILE,
    PLAIN,
    TUNED,
    Chip,
    Config,
    Form,
    Scratch,
    Source,
    as_on,
    can_gate,
    config,
    gated_parts,
    linear,
    linear_gated,
    pieces,
    scratch_for,
    shared_bytes,
)
from shoal.kernels.cuda.pack import LAYOUTS, PackedMatrix, pack_matrix
from tests.kernels.cuda.weights import F32, half_of, nmse, random_activations, random_tensor, shortest, tensor

FORMATS = sorted(LAYOUTS)
ROWS = (1, 3, 5, 17, 64, 65, 123)
BEHIND = 3  # rows of an output that lie behind those that are computed


@contextmanager
def scratch_of(matrix: PackedMatrix) -> Iterator[Scratch]:
    """Sums are NaN before, counters zero behind."""
    scratch = scratch_for([matrix], FEW)
    scratch.sums.fill_(torch.nan)
    yield scratch
    assert not scratch.counters.any()


def half_source(x: F32) -> Source:
    """x in its half form."""
    return Source(*half_of(x))


def float_source(x: F32, parts: int = 3) -> Source:
    """x as it is, and the largest magnitudes of some parts of each row."""
    half, scale = half_of(x)
    largest = np.stack([np.abs(part).max(axis=1, initial=0) for part in np.array_split(x, parts, axis=1)])
    room = torch.full_like(half, torch.nan), torch.full_like(scale, torch.nan)
    return Source(*room, tensor(x), tensor(largest))


SOURCES = (half_source, float_source)


def multiplied(
    matrix: PackedMatrix, x: F32, base: F32 | None = None, source: Callable[[F32], Source] = half_source, **options: Any
) -> Tensor:
    """x @ matrix.T, or that added to ``base``, in an array of more rows and columns whose rest must stay as it is."""
    out = torch.full((len(x) + BEHIND, matrix.rows + 7), torch.nan, device=device())
    view = out[:, 2 : 2 + matrix.rows]
    if base is not None:
        view[: len(x)] = tensor(base)
    with scratch_of(matrix) as scratch:
        read = source(np.concatenate([x, np.full((BEHIND, x.shape[1]), np.inf, np.float32)]))
        linear(read, matrix, view, len(x), scratch=scratch, add=base is not None, **options)
    assert out[len(x) :].isnan().all()
    assert out[:, :2].isnan().all()
    assert out[:, 2 + matrix.rows :].isnan().all()
    return view[: len(x)].cpu()


def twin(x: F32, *tensors: RawTensor) -> F32:
    """Each tensor by itself."""
    return np.concatenate([reference.linear_half(x, raw.dequantised()) for raw in tensors], axis=1)


@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_their_twin(name: str) -> None:
    raw = random_tensor(name, 40, shortest(name) * (1 if shortest(name) == 256 else 3))
    matrix = pack_matrix([raw])
    x = random_activations(max(ROWS), matrix.columns)
    whole = multiplied(matrix, x)
    assert nmse(whole, twin(x, raw)) < 1e-8
    assert nmse(whole, reference.matmul(x, reference.fixed_point(raw.dequantised()))) < 5e-5
    for rows in ROWS:
        assert torch.equal(multiplied(matrix, x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("name", FORMATS)
def test_floats_are_rounded_as_they_are_read_to_what_their_half_form_is(name: str) -> None:
    """Also where K is cut into pieces."""
    raw = random_tensor(name, 40, 4 * 256)
    matrix, x = pack_matrix([raw]), random_activations(5, 4 * 256)
    assert pieces(matrix.parts[0]) == (2, 2)
    got = multiplied(matrix, x, source=float_source)
    assert torch.equal(got, multiplied(matrix, x))
    assert nmse(got, twin(x, raw)) < 1e-8


@pytest.mark.parametrize(("name", "source"), [("Q4_K", half_source), ("Q6_K", float_source), ("F16", float_source)])
def test_a_row_is_the_same_in_any_batch(name: str, source: Callable[[F32], Source]) -> None:
    """Be it rounded by the product or before it, and be pieces added by one program or by the last of many."""
    matrix = pack_matrix([random_tensor(name, 70, 4 * 256)])
    assert pieces(matrix.parts[0])[0] > 1
    x = random_activations(max(ROWS), matrix.columns)
    whole = multiplied(matrix, x)
    order = np.random.default_rng(2).permutation(len(x))
    assert torch.equal(multiplied(matrix, x[order], source=source), whole[order])
    for rows in ROWS[:-1]:
        start = len(x) - rows
        assert torch.equal(multiplied(matrix, x[start:], source=source), whole[start:])


@pytest.mark.parametrize("parts", [1, 2, 200])
def test_any_number_of_parts_says_how_large_a_row_is(parts: int) -> None:
    matrix, x = pack_matrix([random_tensor("F16", 30, 300)]), random_activations(FEW, 300)
    assert torch.equal(multiplied(matrix, x, source=lambda x: float_source(x, parts)), multiplied(matrix, x))


@pytest.mark.parametrize("columns", [200, 1024])
def test_tiles_change_no_bit(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = pack_matrix([random_tensor("F16", 130, columns)])
    x = random_activations(FEW, columns)
    whole = multiplied(matrix, x)
    for block_m, block_n in ((64, 16), (128, 32), (128, 128)):  # narrower ones are another kernel of NumPy's BLAS
        monkeypatch.setitem(TUNED, ("F16", 130, columns, 64, PLAIN), Config(block_m, block_n, 4, 2))
        assert torch.equal(multiplied(matrix, x), whole)


def test_pieces_are_added_in_one_program_as_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = pack_matrix([random_tensor("Q4_0", 64, 10 * 256 - 32)])
    x = random_activations(5, matrix.columns)
    assert pieces(matrix.parts[0]) == (5, 2)
    many = multiplied(matrix, x)
    assert torch.equal(multiplied(matrix, x, source=float_source), many)
    monkeypatch.setattr(products, "FEW", 0)
    for source in SOURCES:
        assert torch.equal(multiplied(matrix, x, source=source), many)
    monkeypatch.undo()
    with as_on(CHIPS["gfx942"]):
        assert torch.equal(multiplied(matrix, x), many)


@pytest.mark.skipif(not INTERPRETED, reason="only there the order of programs can be chosen")
def test_whoever_is_the_last_adds_pieces_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = pack_matrix([random_tensor("Q8_0", 64, 6 * 256, seed) for seed in (0, 1)])
    x = random_activations(5, matrix.columns)
    assert pieces(matrix.parts[0])[0] == 3
    forwards = multiplied(matrix, x), gate(matrix, x, "silu")
    begin = InterpreterBuilder.set_grid_idx
    seen: list[tuple[int, int, int]] = []

    def backwards(self: Any, *place: int) -> None:
        seen.append(tuple(size - 1 - at for size, at in zip(self.grid_dim, place, strict=True)))
        begin(self, *seen[-1])

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", backwards)
    assert torch.equal(multiplied(matrix, x), forwards[0])
    assert torch.equal(gate(matrix, x, "silu"), forwards[1])
    assert seen[0] == (1, 0, 2)


@pytest.mark.parametrize("columns", [1, 14, 48, 100, 300])
def test_floats_of_any_width(columns: int) -> None:
    raw = random_tensor("F32", 23, columns)
    x = random_activations(5, columns)
    assert nmse(multiplied(pack_matrix([raw]), x), twin(x, raw)) < 1e-8


def test_parts_of_different_types_stand_below_each_other() -> None:
    tensors = [
        random_tensor(name, rows, 256, rows) for name, rows in (("Q4_1", 24), ("Q4_1", 8), ("Q8_0", 21), ("F16", 5))
    ]
    matrix, x = pack_matrix(tensors), random_activations(5, 256)
    assert [(part.first_row, part.rows) for part in matrix.parts] == [(0, 32), (32, 21), (53, 5)]
    separate = [multiplied(pack_matrix([raw]), x) for raw in tensors]
    assert torch.equal(multiplied(matrix, x), torch.cat(separate, dim=1))


@pytest.mark.parametrize("columns", [256, 4 * 256])
@pytest.mark.parametrize("rows", [5, 70])
def test_factor_bias_and_what_is_there(columns: int, rows: int) -> None:
    raws = [random_tensor("Q8_0", 30, columns), random_tensor("Q4_0", 40, columns)]
    matrix, x = pack_matrix(raws), random_activations(rows, columns)
    factor, bias = random_activations(1, 70, seed=3)[0], random_activations(1, 70, seed=4)[0]
    product = multiplied(matrix, x)
    want = product * torch.from_numpy(factor) + torch.from_numpy(bias)
    options = {"factor": tensor(factor), "bias": tensor(bias)}
    assert torch.equal(multiplied(matrix, x, **options), want)
    base = random_activations(rows, 70, seed=5)
    assert torch.equal(multiplied(matrix, x, base, **options), torch.from_numpy(base) + want)


def gate(matrix: PackedMatrix, x: F32, activation: Activation, source: Callable[[F32], Source] = half_source) -> Tensor:
    """``linear_gated``, into an array of more rows. The largest magnitudes that it leaves are those of its tiles."""
    out = torch.full((len(x) + BEHIND, matrix.rows // 2), torch.nan, device=device())
    largest = torch.full((gated_parts(matrix), len(out)), torch.nan, device=device())
    with scratch_of(matrix) as scratch:
        read = source(np.concatenate([x, np.full((BEHIND, x.shape[1]), np.inf, np.float32)]))
        linear_gated(read, matrix, out, len(x), activation, scratch=scratch, largest=largest)
    assert out[len(x) :].isnan().all()
    assert largest[:, len(x) :].isnan().all()
    tiles = out[: len(x)].view(len(x), gated_parts(matrix), GATED_TILE)
    assert torch.equal(largest[:, : len(x)], tiles.abs().amax(2).T)
    return out[: len(x)].cpu()


@pytest.mark.parametrize(("activation", "columns"), [("gelu", 96), ("relu2", 96), ("silu", 96), ("silu", 4 * 256)])
def test_gate_and_up(columns: int, activation: Activation) -> None:
    raws = [random_tensor("Q4_0", 128, columns, seed) for seed in (0, 1)]
    matrix, x = pack_matrix(raws), (random_activations(70, columns) / 10).astype(np.float32)
    assert can_gate(matrix)
    whole = gate(matrix, x, activation)
    assert nmse(whole, reference.gated(twin(x, *raws), activation)) < 1e-8
    for source in SOURCES:
        for rows in (1, 17):
            assert torch.equal(gate(matrix, x[-rows:], activation, source), whole[-rows:])


def test_gate_and_up_of_different_types_are_not_gated() -> None:
    assert not can_gate(pack_matrix([random_tensor("Q4_K", 64, 256), random_tensor("Q6_K", 64, 256)]))
    assert not can_gate(pack_matrix([random_tensor("Q4_0", 48, 256), random_tensor("Q4_0", 48, 256)]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", [96, 4 * 256])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_that_is_not_finite_harms_no_other(bad: float, columns: int, source: Callable[[F32], Source]) -> None:
    matrix = pack_matrix([random_tensor("Q4_1", 32, columns)])
    x = random_activations(9, columns)
    clean = multiplied(matrix, x)
    x[4, 17] = bad
    got = multiplied(matrix, x, source=source)
    assert not got[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("source", SOURCES)
def test_rows_of_zeros_and_huge_numbers(source: Callable[[F32], Source]) -> None:
    raw = random_tensor("Q8_0", 32, 256)
    x = random_activations(4, 256)
    x[1], x[2], x[3] = 0, x[2] * 1e30, x[3] * 1e-30
    got = multiplied(pack_matrix([raw]), x, source=source)
    assert not got[1].any()
    rows = [0, 2, 3]
    assert nmse(got[rows], twin(x[rows], raw)) < 1e-8


def test_pieces_depend_on_the_weights_alone() -> None:
    part = pack_matrix([random_tensor("Q4_0", 64, 40 * 256)]).parts[0]
    assert pieces(part) == (14, 3)
    assert set(CONFIGS) == {16, 32, 64, 128}
    scratch = scratch_for([PackedMatrix(64, 40 * 256, (part,))], 1000)
    assert scratch.sums.shape == (14 * FEW * 64,)
    assert scratch.counters.shape == (FEW // 16,)


def test_as_many_stages_as_shared_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    part = pack_matrix([random_tensor("F32", 64, 256)]).parts[0]
    assert config(part, 1000) == CONFIGS[128]
    assert shared_bytes(part.layout, CONFIGS[128]) == 270336  # what the compiler reports for sm_90
    monkeypatch.setattr(products, "chip", lambda: Chip(232448, CONFIGS))
    assert config(part, 1000) == Config(128, 128, 8, 1)
    assert config(part, 16) == CONFIGS[16]
    assert config(part, 64, Form(floats=True)) == Config(64, 64, 4, 2)
    assert [config(part, rows, Form(gated=True)).block_n for rows in (1, 32, 64, 1000)] == [16, 32, 32, 32]
