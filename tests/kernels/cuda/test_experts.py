"""Mixtures of experts against the float16 twin, for choices that are spread, crowded and lonely."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shoal.kernels import reference
from shoal.kernels.base import Activation, Experts, Linear, RawTensor, Routing
from shoal.kernels.cuda import experts as mixtures
from shoal.kernels.cuda import rows as row_tiles
from shoal.kernels.cuda.experts import expert_tables, experts, experts_space
from shoal.kernels.cuda.launch import Tensor
from shoal.kernels.cuda.linear import CONFIGS, Config
from shoal.kernels.cuda.pack import pack_matrix
from tests.kernels.cuda.weights import F32, half_of, nmse, random_activations, random_tensor, tensor

ROWS = (1, 3, 17, 40)
BEHIND = 3
COUNT, USED = 5, 2


@dataclass(frozen=True)
class Mixture:
    """Gate, up and down of each expert, of these types; widths n_embd and n_ff."""

    types: tuple[str, str, str] = ("Q4_0", "Q4_0", "Q4_0")
    widths: tuple[int, int] = (96, 64)
    activation: Activation = "silu"

    def tensors(self, expert: int) -> tuple[RawTensor, RawTensor, RawTensor]:
        gate, up, down = self.types
        n_embd, n_ff = self.widths
        return (
            random_tensor(gate, n_ff, n_embd, 3 * expert),
            random_tensor(up, n_ff, n_embd, 3 * expert + 1),
            random_tensor(down, n_embd, n_ff, 3 * expert + 2),
        )

    def packed(self) -> Experts:
        raws = [self.tensors(expert) for expert in range(COUNT)]
        return Experts(
            router=Linear(None),
            routing=Routing(used=USED),
            gate_up=tuple(pack_matrix(raw[:2]) for raw in raws),
            down=tuple(pack_matrix(raw[2:]) for raw in raws),
            activation=self.activation,
        )

    def twin(self, residual: F32, x: F32, chosen: NDArray[np.int32], weights: F32) -> F32:
        """Row by row, choice by choice."""
        out = residual.copy()
        for row in range(len(x)):
            for expert, weight in zip(chosen[row], weights[row], strict=True):
                gate, up, down = (raw.dequantised() for raw in self.tensors(int(expert)))
                one = x[row : row + 1]
                both = np.concatenate([reference.linear_half(one, gate), reference.linear_half(one, up)], axis=1)
                out[row] += weight * reference.linear_half(reference.gated(both, self.activation), down)[0]
        return out


@dataclass(frozen=True)
class Step:
    """Activations and choices of some rows."""

    residual: F32
    x: F32
    chosen: NDArray[np.int32]
    weights: F32

    def some(self, rows: NDArray[np.int64]) -> Step:
        return Step(self.residual[rows], self.x[rows], self.chosen[rows], self.weights[rows])


def random_step(rows: int, width: int) -> Step:
    """Most rows choose expert 3 first; nobody chooses expert 1."""
    rng = np.random.default_rng(rows)
    others = np.array([0, 2, 4])[rng.integers(0, 3, rows)]
    crowd = rng.random(rows) < 0.7
    chosen = np.stack([np.where(crowd, 3, others), np.where(crowd, others, 3)], axis=1).astype(np.int32)
    weights = rng.random((rows, USED)).astype(np.float32)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return Step(random_activations(rows, width, 7), x, chosen, weights)


def mixed(layer: Experts, step: Step) -> Tensor:
    """residual plus what the experts make of x, in an array of more rows and columns, whose rest must stay as it is."""
    rows, width = step.x.shape
    out = torch.full((rows + BEHIND, width + 5), torch.nan)
    out[:rows, 1 : 1 + width] = torch.from_numpy(step.residual)
    out = out.to(tensor(step.x).device)
    half, scale = half_of(np.concatenate([step.x, np.full((BEHIND, width), np.inf, np.float32)]))
    chosen = tensor(np.concatenate([step.chosen, np.full((BEHIND, USED), 1, np.int32)]))
    weights = tensor(np.concatenate([step.weights, np.full((BEHIND, USED), np.nan, np.float32)]))
    space = experts_space(rows + BEHIND, layer)
    residual = out[:, 1 : 1 + width]
    experts(residual, half, scale, chosen, weights, expert_tables(layer), rows, space)
    assert out[rows:].isnan().all()
    assert out[:, 0].isnan().all()
    assert out[:, 1 + width :].isnan().all()
    return residual[:rows].cpu()


@pytest.mark.parametrize(
    "mixture",
    [
        Mixture(),
        Mixture(("Q4_K", "Q4_K", "Q6_K"), (256, 256)),
        Mixture(("Q4_K", "Q6_K", "Q8_0"), (256, 96), "gelu"),
        Mixture(("F16", "F16", "F32"), (80, 50), "relu2"),
        Mixture(("MXFP4", "MXFP4", "MXFP4"), (288, 32)),
    ],
    ids=str,
)
def test_experts_equal_their_twin(mixture: Mixture) -> None:
    layer = mixture.packed()
    for rows in (1, 11):
        step = random_step(rows, mixture.widths[0])
        want = mixture.twin(step.residual, step.x, step.chosen, step.weights)
        assert nmse(mixed(layer, step), want) < 1e-8


def test_a_row_is_the_same_in_any_batch() -> None:
    layer, step = Mixture().packed(), random_step(max(ROWS), 96)
    whole = mixed(layer, step)
    for rows in ROWS[:-1]:
        some = np.arange(len(whole) - rows, len(whole))
        assert torch.equal(mixed(layer, step.some(some)), whole[some])
    order = np.random.default_rng(1).permutation(len(whole))
    assert torch.equal(mixed(layer, step.some(order)), whole[order])


def test_tiles_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, step = Mixture(widths=(4 * 256, 32)).packed(), random_step(12, 4 * 256)
    whole = mixed(layer, step)
    for shape in (Config(128, 64, 4, 2), Config(64, 32, 4, 2)):
        monkeypatch.setitem(CONFIGS, 16, shape)
        assert torch.equal(mixed(layer, step), whole)


def test_rows_of_a_program_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, step = Mixture().packed(), random_step(5, 96)
    whole = mixed(layer, step)
    for most in (4, 1):
        monkeypatch.setattr(row_tiles, "MOST_ROWS", most)
        assert torch.equal(mixed(layer, step), whole)


def test_slots_are_sorted_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "_CHUNK", 16)
    layer, step = Mixture().packed(), random_step(40, 96)
    half, scale = half_of(step.x)
    space = experts_space(40, layer)
    arguments = (tensor(step.chosen), tensor(step.weights), expert_tables(layer), 40, space)
    experts(tensor(step.residual), half, scale, *arguments)
    flat = step.chosen.reshape(-1)
    assert space.slots.tolist() == np.argsort(flat, kind="stable").tolist()
    assert space.owners.tolist() == np.sort(flat).tolist()
    assert space.starts.tolist() == np.searchsorted(np.sort(flat), np.arange(COUNT + 1)).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_a_row_that_is_not_finite_harms_no_other(bad: float) -> None:
    layer, step = Mixture().packed(), random_step(9, 96)
    clean = mixed(layer, step)
    step.x[4, 17] = bad
    got = mixed(layer, step)
    assert not got[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(got[others], clean[others])


def test_experts_of_one_layer_have_the_same_types() -> None:
    layer, other = Mixture().packed(), Mixture(("Q4_1", "Q4_0", "Q4_0")).packed()
    with pytest.raises(AssertionError):
        expert_tables(Experts(layer.router, layer.routing, (*layer.gate_up[:2], other.gate_up[2]), layer.down, "silu"))
