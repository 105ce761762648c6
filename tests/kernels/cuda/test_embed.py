"""Rows of tables of every type are dequantised exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.errors import UnsupportedError
from shoal.kernels.cuda.embed import embed
from shoal.kernels.cuda.launch import device
from shoal.kernels.cuda.pack import SUPPORTED, pack_matrix
from tests.kernels.cuda.rows import ROWS, around, view
from tests.kernels.cuda.weights import random_tensor, shortest, tensor


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_rows_of_a_table(name: str) -> None:
    columns = 3 * shortest(name)
    table = random_tensor(name, 37, columns)
    packed, numbers = pack_matrix([table]), table.dequantised()
    for rows in (1, 5):
        ids = np.random.default_rng(rows).integers(0, 37, rows).astype(np.int32)
        ids[-1] = 36
        out = view(np.zeros((rows, columns), np.float32))
        embed(packed, tensor(ids), out, rows)
        assert np.array_equal(out[:rows].cpu(), numbers[ids])
        assert torch.isnan(around(out)).all()
        assert torch.isnan(out[rows:]).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("name", "columns"), [("F32", 50), ("F16", 14), ("Q8_0", 96)])
def test_any_number_of_rows_and_columns(name: str, columns: int, rows: int) -> None:
    table = random_tensor(name, 200, columns)
    ids = np.random.default_rng(1).integers(0, 200, rows + 9).astype(np.int32)
    out = view(np.zeros((rows, columns), np.float32))
    embed(pack_matrix([table]), tensor(ids), out, rows)
    assert np.array_equal(out[:rows].cpu(), table.dequantised()[ids[:rows]])
    assert torch.isnan(out[rows:]).all()


def test_a_table_of_two_types_is_refused() -> None:
    table = pack_matrix([random_tensor("Q8_0", 3, 32), random_tensor("F16", 3, 32)])
    with pytest.raises(UnsupportedError, match="more than one"):
        embed(table, tensor(np.zeros(1, np.int32)), torch.zeros((1, 32), device=device()), 1)
