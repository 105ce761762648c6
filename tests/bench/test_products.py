"""A network that only multiplies: how many products a pass does, and with what."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.bench.products import Products
from shoal.gguf.quants import format_named
from shoal.kernels import reference
from shoal.kernels.load import load_backend


def test_a_pass_multiplies_every_copy_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, int, tuple[int, ...]]] = []
    multiply = reference.matmul

    def note(x: reference.F32, weight: reference.F64) -> reference.F32:
        done.append((id(weight), len(x), weight.shape))
        return multiply(x, weight)

    monkeypatch.setattr(reference, "matmul", note)
    products = Products(reference.ReferenceBackend(), format_named("Q4_0"), (48, 64), 20, copies=3, repeats=2)
    products.run(7)
    assert products.products == len(done) == 6
    assert products.num_bytes == 3 * 48 * 36
    assert {(rows, shape) for _, rows, shape in done} == {(7, (48, 64))}
    assert len({matrix for matrix, _, _ in done}) == 3


@pytest.mark.parametrize("name", ["Q4_1", "F32"])
def test_products_run_on_the_cpu_with_any_number_of_tokens(name: str) -> None:
    """The weights must outlive the binding: what a program points to is not kept by it."""
    backend = load_backend("cpu", 2)
    products = Products(backend, format_named(name), (64, 256), 33, copies=2, repeats=3)
    np.ones(1 << 20).sum()  # takes memory that is free
    for tokens in (33, 1, 16):
        products.run(tokens)
    backend.close()
