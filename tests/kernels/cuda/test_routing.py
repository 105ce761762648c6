"""Experts are chosen as by the reference: the same ones in the same order, ties and all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shoal.kernels import reference
from shoal.kernels.base import Routing
from shoal.kernels.cuda import rows as row_tiles
from shoal.kernels.cuda.launch import device
from shoal.kernels.cuda.routing import choose
from tests.kernels.cuda.rows import F32, NAN, ROWS, nmse, random, selections, view

ROUTINGS = {
    "mixtral": (Routing(used=2), 8, False),
    "one of one": (Routing(used=1), 1, False),
    "all, of an odd number": (Routing(used=5, renormalise=False, scale=2.5), 5, False),
    "qwen3": (Routing(used=8), 128, False),
    "olmoe": (Routing(used=8, renormalise=False), 64, False),
    "deepseek 3": (Routing(8, "sigmoid", scale=2.5, groups=8, groups_used=4), 256, True),
    "odd groups": (Routing(4, "softmax", scale=0.7, groups=3, groups_used=2), 21, True),
    "groups of one": (Routing(3, "sigmoid", renormalise=False, groups=6, groups_used=4), 6, False),
    "many": (Routing(16, "sigmoid"), 500, True),
}


def chosen_of(logits: F32, routing: Routing, bias: F32 | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights, and nothing is written behind them."""
    rows = len(logits)
    chosen = torch.full((rows + 2, routing.used), -7, dtype=torch.int32, device=device())
    weights = torch.full((rows + 2, routing.used), NAN, device=device())
    on_device = None if bias is None else torch.from_numpy(bias).to(device())
    choose(view(logits), routing, on_device, chosen, weights, rows)
    assert (chosen[rows:] == -7).all()
    assert torch.isnan(weights[rows:]).all()
    return chosen[:rows].cpu(), weights[:rows].cpu()


def check(logits: F32, routing: Routing, bias: F32 | None) -> None:
    ids, weights = chosen_of(logits, routing, bias)
    want_ids, want_weights = reference.choose_experts(logits, routing, bias)
    assert np.array_equal(ids, want_ids)
    assert nmse(weights, want_weights) < 1e-12


@pytest.mark.parametrize("name", ROUTINGS)
def test_choices(name: str) -> None:
    routing, experts, biased = ROUTINGS[name]
    bias = random(experts, seed=3, spread=0.2) if biased else None
    for rows in ROWS if name == "mixtral" else (1, 5):
        check(random(rows, experts, spread=2), routing, bias)


@pytest.mark.parametrize("name", ROUTINGS)
def test_among_equals_the_lowest_id_is_first(name: str) -> None:
    routing, experts, _ = ROUTINGS[name]
    logits = np.random.default_rng(1).integers(-1, 2, (4, experts)).astype(np.float32)
    logits[0] = 0
    check(logits, routing, None)


@pytest.mark.parametrize("name", ["mixtral", "deepseek 3"])
def test_large_logits(name: str) -> None:
    routing, experts, _ = ROUTINGS[name]
    check(random(5, experts, spread=50), replace(routing, groups=1, gating="softmax"), None)


@pytest.mark.parametrize("name", ["qwen3", "deepseek 3"])
def test_a_row_has_the_same_bits_among_any_others(name: str) -> None:
    routing, experts, _ = ROUTINGS[name]
    logits = random(17, experts)
    whole = chosen_of(logits, routing, None)
    for some in selections(17):
        assert all(torch.equal(a, b[some]) for a, b in zip(chosen_of(logits[some], routing, None), whole, strict=True))


@pytest.mark.parametrize("name", ["qwen3", "deepseek 3", "odd groups"])
def test_rows_of_a_program_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    routing, experts, _ = ROUTINGS[name]
    logits = random(7, experts)
    results = []
    for most in (64, 4, 1):
        monkeypatch.setattr(row_tiles, "MOST_ROWS", most)
        results.append(chosen_of(logits, routing, None))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinities in the interpreter
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["mixtral", "deepseek 3", "odd groups"])
def test_a_row_that_is_not_finite_has_experts_too_and_harms_no_other(name: str, bad: float) -> None:
    routing, experts, _ = ROUTINGS[name]
    logits = random(5, experts)
    clean = chosen_of(logits, routing, None)
    logits[2] = bad
    logits[3, 1] = NAN
    broken = chosen_of(logits, routing, None)
    for a, b in zip(clean, broken, strict=True):
        assert torch.equal(a[[0, 1, 4]], b[[0, 1, 4]])
    for row in (2, 3):
        ids = broken[0][row].tolist()
        assert len(set(ids)) == routing.used
        assert all(0 <= i < experts for i in ids)
