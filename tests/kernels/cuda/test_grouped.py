"""Products of a group against each of them in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.kernels import reference
from shoal.kernels.cuda import grouped
from shoal.kernels.cuda.grouped import Group, products
from shoal.kernels.cuda.launch import Tensor
from shoal.kernels.cuda.pack import PackedMatrix, pack_matrix
from tests.kernels.cuda.rows import F32, NAN, ROWS, around, blank, view
from tests.kernels.cuda.weights import nmse, random_activations, random_tensor

HEADS, GAP = 3, 8  # columns of x between those of two heads


def heads_of(x: Tensor, k: int) -> list[Tensor]:
    return [x[:, h * (k + GAP) : h * (k + GAP) + k] for h in range(HEADS)]


def inputs(rows: int, k: int) -> F32:
    return random_activations(rows, HEADS * (k + GAP))


def run(x: F32, matrices: list[PackedMatrix], n: int, k: int) -> list[Tensor]:
    """What each head makes of its columns of x; nothing else is written."""
    group, source = Group(), view(x)
    outs = [view(np.zeros((len(x), n), np.float32)) for _ in matrices]
    for head, matrix, out in zip(heads_of(source, k), matrices, outs, strict=True):
        assert group.add(head, matrix, out)
    products(group, len(x))
    for out in outs:
        assert torch.isnan(around(out)).all()
        assert torch.isnan(out[len(x) :]).all()
    return [out[: len(x)] for out in outs]


@pytest.mark.parametrize(
    ("name", "n", "k"), [("Q8_0", 70, 128), ("F16", 20, 48), ("Q4_K", 64, 512), ("BF16", 5, 300), ("Q4_0", 130, 32)]
)
def test_products_of_heads(name: str, n: int, k: int) -> None:
    tensors = [random_tensor(name, n, k, seed) for seed in range(HEADS)]
    matrices = [pack_matrix([tensor]) for tensor in tensors]
    for rows in ROWS if name == "F16" else (1, 5):
        x = inputs(rows, k)
        for head, tensor, got in zip(range(HEADS), tensors, run(x, matrices, n, k), strict=True):
            part = np.ascontiguousarray(x[:, head * (k + GAP) :][:, :k])
            assert nmse(got, reference.linear_half(part, tensor.dequantised())) < 1e-8


def test_a_row_has_the_same_bits_among_any_others_and_in_any_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [pack_matrix([random_tensor("Q8_0", 20, 96, seed)]) for seed in range(HEADS)]
    x = inputs(40, 96)
    whole = run(x, matrices, 20, 96)
    some = np.random.default_rng(2).permutation(40)[:7]
    for tokens in (16, 32, 64):
        monkeypatch.setattr(grouped, "_tokens", lambda rows, tokens=tokens: tokens)
        for got, want in zip(run(x[some], matrices, 20, 96), whole, strict=True):
            assert torch.equal(got, want[some])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinities in the interpreter
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_row_that_is_not_finite_harms_no_other(bad: float) -> None:
    matrices = [pack_matrix([random_tensor("Q8_0", 20, 32, seed)]) for seed in range(HEADS)]
    x = inputs(5, 32)
    clean = run(x, matrices, 20, 32)
    x[2] = bad
    x[3] = 0
    for got, want in zip(run(x, matrices, 20, 32), clean, strict=True):
        assert torch.equal(got[[0, 1, 4]], want[[0, 1, 4]])
        assert not torch.isfinite(got[2]).any()
        assert not got[3].any()


def test_what_does_not_belong_to_a_group() -> None:
    matrix, other = (pack_matrix([random_tensor(name, 20, 32)]) for name in ("Q8_0", "F16"))
    wide, mixed = (
        pack_matrix([random_tensor("Q8_0", 20, 64)]),
        pack_matrix([random_tensor(n, 9, 32) for n in ("Q8_0", "F16")]),
    )
    x, y, out = blank(3, 32), blank(3, 32), blank(3, 20)
    assert not Group().add(x, mixed, out)
    group = Group()
    assert group.add(x, matrix, out)
    assert not group.add(x, other, blank(3, 20))
    assert not group.add(blank(3, 64), wide, blank(3, 20))
    assert not group.add(out, matrix, blank(3, 20))  # reads what the first writes
    assert not group.add(y, matrix, x)  # writes what the first reads
    assert not group.add(y, matrix, out)
    both = blank(3, 40)
    assert group.add(y, matrix, both[:, :20])
    assert group.add(y, matrix, both[:, 20:])
    assert len(group) == 3
