"""Mixtures of experts against their NumPy twin, and that nobody else in the step makes a difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from shoal.kernels import reference
from shoal.kernels.base import Activation, Routing
from shoal.kernels.cpu.backend import CPUBackend
from tests.kernels.mixtures import F32, Mixture, add_experts, floats, random_activations, random_mixture
from tests.kernels.runner import OneStep

ROWS = (1, 3, 5, 17, 123)


@pytest.fixture(scope="module")
def backends() -> Iterator[tuple[CPUBackend, CPUBackend]]:
    """One thread, and two."""
    both = CPUBackend(threads=1), CPUBackend(threads=2)
    yield both
    for backend in both:
        backend.close()


@pytest.fixture
def backend(backends: tuple[CPUBackend, CPUBackend]) -> CPUBackend:
    return backends[1]


def _nmse(a: F32, r: F32) -> float:
    return float(np.sum((a.astype(np.float64) - r) ** 2) / np.sum(r.astype(np.float64) ** 2))


def _agrees(backend: CPUBackend, mixture: Mixture, rows: int) -> bool:
    """What is added to a residual, against the twin's. A residual would hide errors: it is taken off again."""
    x = random_activations(rows, mixture.router.shape[1])
    nothing = np.zeros_like(x)
    added, wanted = add_experts(backend, mixture.packed(backend), nothing, x), mixture.twin(nothing, x)
    return _nmse(added, wanted) < 1e-10


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("types", "widths"),
    [
        (("F32", "F32", "F32"), (50, 23)),
        (("Q4_0", "Q4_0", "Q4_0"), (64, 96)),
        (("Q4_K", "Q4_K", "Q6_K"), (256, 512)),
        (("Q6_K", "Q4_K", "Q2_K"), (256, 256)),
        (("F16", "Q5_1", "F32"), (96, 40)),
        (("I2_S", "I2_S", "I2_S"), (128, 128)),
    ],
    ids=str,
)
def test_equals_its_twin(backend: CPUBackend, types: tuple[str, str, str], widths: tuple[int, int], rows: int) -> None:
    assert _agrees(backend, random_mixture(types, widths=widths), rows)


ROUTINGS = {
    "softmax": Routing(used=3),
    "as they are": Routing(used=3, renormalise=False),
    "scaled": Routing(used=2, scale=2.5),
    "sigmoid": Routing(used=3, gating="sigmoid"),
    "one": Routing(used=1, renormalise=False),
    "all": Routing(used=24),
    "groups": Routing(used=4, groups=6, groups_used=2),
    "groups of one": Routing(used=2, groups=24, groups_used=3),
    "all groups": Routing(used=3, groups=4, groups_used=4),
    "sigmoid in groups": Routing(used=5, gating="sigmoid", scale=1.5, groups=4, groups_used=2),
}


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=list(ROUTINGS))
def test_every_way_of_choosing(backend: CPUBackend, routing: Routing, biased: bool) -> None:
    mixture = random_mixture(("F32", "F32", "F32"), 24, (32, 16), routing)
    if biased:
        mixture = replace(mixture, bias=random_activations(1, 24, 8)[0] / 8)
    for rows in (1, 17):
        assert _agrees(backend, mixture, rows)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
def test_activations(backend: CPUBackend, activation: Activation) -> None:
    assert _agrees(backend, replace(random_mixture(), activation=activation), 5)


@pytest.mark.parametrize(("count", "used"), [(128, 8), (256, 8), (300, 1)])
def test_hundreds_of_experts(backend: CPUBackend, count: int, used: int) -> None:
    mixture = random_mixture(("Q8_0", "Q4_0", "Q4_0"), count, (32, 32), Routing(used=used))
    for rows in (1, 40):
        assert _agrees(backend, mixture, rows)


def test_adds_to_the_residual(backend: CPUBackend) -> None:
    mixture = random_mixture()
    x, residual = random_activations(5, 64), random_activations(5, 64, 2)
    got = add_experts(backend, mixture.packed(backend), residual, x)
    assert np.allclose(got, mixture.twin(residual, x), rtol=1e-5, atol=1e-6)
    assert not np.allclose(got, residual, atol=1e-2)


def test_ties_go_to_the_lowest_id(backend: CPUBackend) -> None:
    """Every expert adds its own number: the sum says who was chosen."""
    mixture = _numbered(7, Routing(used=2, renormalise=False))
    got = add_experts(backend, mixture.packed(backend), np.zeros((3, 16), np.float32), np.ones((3, 16), np.float32))
    assert np.allclose(got, (1 + 2) / 7)


def test_of_equals_the_lowest_id_is_added_first(backend: CPUBackend) -> None:
    """2^23 + 0.5 rounds to 2^23 and then + 1 is exact; the other way round 2^23 + 1.5 rounds up."""
    mixture, residual = _numbered(7, Routing(used=2)), np.full((3, 16), 2.0**23, np.float32)
    got = add_experts(backend, mixture.packed(backend), residual, np.ones((3, 16), np.float32))
    assert (got == 2.0**23 + 1).all()


def test_a_bias_decides_who_is_chosen_but_not_the_weight(backend: CPUBackend) -> None:
    bias = np.array([0, 0, 0, 0.5, 0, 0.25, 0], np.float32)
    mixture = replace(_numbered(7, Routing(used=2, renormalise=False)), bias=bias)
    got = add_experts(backend, mixture.packed(backend), np.zeros((3, 16), np.float32), np.ones((3, 16), np.float32))
    assert np.allclose(got, (4 + 6) / 7)


def _numbered(count: int, routing: Routing) -> Mixture:
    """Expert e makes e + 1 of ones, and the router likes all of them the same."""
    ones = np.full((16, 16), 1 / 16, np.float32)
    return Mixture(
        router=np.zeros((count, 16), np.float32),
        routing=routing,
        gate_up=[(floats(ones), floats(ones)) for _ in range(count)],
        down=[floats(ones * (e + 1)) for e in range(count)],
        activation="relu2",
    )


def test_all_rows_may_choose_the_same(backend: CPUBackend) -> None:
    """150 rows: more than one pass of the kernels over an expert's weights, and experts without rows."""
    mixture = random_mixture(count=40)
    router = mixture.router.copy()
    x = np.abs(random_activations(150, 64))
    router[17], router[33] = 0.3, 0.31
    mixture = replace(mixture, router=router)
    chosen, _ = reference.choose_experts(x @ router.T, mixture.routing, None)
    assert (chosen == [33, 17]).all()
    nothing = np.zeros_like(x)
    assert _nmse(add_experts(backend, mixture.packed(backend), nothing, x), mixture.twin(nothing, x)) < 1e-10


@pytest.mark.parametrize("types", [("F32", "F32", "F32"), ("Q4_K", "Q6_K", "Q4_0")], ids=str)
def test_a_row_is_the_same_in_any_batch_and_with_any_threads(
    backends: tuple[CPUBackend, CPUBackend], types: tuple[str, str, str]
) -> None:
    one, two = backends
    mixture = random_mixture(types, 9, (256, 64), Routing(used=3, groups=3, groups_used=2))
    experts, x, residual = mixture.packed(one), random_activations(123, 256), random_activations(123, 256, 2)
    whole = add_experts(two, experts, residual, x)
    assert np.array_equal(add_experts(one, experts, residual, x), whole)
    for first, last in ((0, 1), (7, 8), (122, 123), (3, 6), (20, 37), (60, 123)):
        assert np.array_equal(add_experts(two, experts, residual[first:last], x[first:last]), whole[first:last])
    order = np.random.default_rng(3).permutation(123)
    assert np.array_equal(add_experts(two, experts, residual[order], x[order]), whole[order])


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_harms_no_other(backend: CPUBackend, bad: float, gating: str) -> None:
    routing = Routing(used=2, gating="sigmoid" if gating == "sigmoid" else "softmax", groups=3, groups_used=2)
    experts = random_mixture(routing=routing).packed(backend)
    x, residual = random_activations(9, 64), random_activations(9, 64, 2)
    clean = add_experts(backend, experts, residual, x)
    x[4, 17] = bad
    got = add_experts(backend, experts, residual, x)
    assert not np.isfinite(got[4]).any()
    assert np.array_equal(np.delete(got, 4, axis=0), np.delete(clean, 4, axis=0))


def test_layers_and_steps_of_different_rows_share_a_workspace(backend: CPUBackend) -> None:
    """Two layers one after the other, the program run again with fewer rows: nothing is left over from before."""
    mixtures = [random_mixture(seed=seed) for seed in (0, 1)]
    packed = [mixture.packed(backend) for mixture in mixtures]
    step = OneStep(backend, 30)
    out, x = step.input(np.zeros((30, 64), np.float32)), step.input(random_activations(30, 64))
    for experts in packed:
        step.recorder.experts(out, x, experts)
    step.run()
    many = step.view(out).copy()
    step.view(out)[:] = 0
    step.header[:3] = 4, 2, 2
    step.run()
    assert np.array_equal(step.view(out)[:4], many[:4])
    assert not step.view(out)[4:].any()
    one_by_one = np.zeros((30, 64), np.float32)
    for experts in packed:
        one_by_one = add_experts(backend, experts, one_by_one, random_activations(30, 64))
    assert np.array_equal(one_by_one, many)
    assert len(step.recorder._choices) == 1
