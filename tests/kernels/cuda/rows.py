"""What tests of kernels over rows have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.kernels.cuda.launch import Tensor, device

F32 = NDArray[np.float32]
ROWS = (1, 3, 5, 17, 123)
NAN = float("nan")


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> F32:
    """Normal numbers."""
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(np.float32)


def view(x: F32, *, more_rows: int = 2, before: int = 3, after: int = 5) -> Tensor:
    """x on the device as columns of something wider, with rows of NaN behind: [len(x) + more_rows, width]."""
    whole = torch.full((len(x) + more_rows, before + x.shape[1] + after), NAN, device=device())
    inner = whole[:, before : before + x.shape[1]]
    inner[: len(x)] = torch.from_numpy(x)
    return inner


def blank(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN, two rows more than asked for."""
    return torch.full((rows + 2, width), NAN, dtype=dtype, device=device())


def halves(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Room for a half form."""
    return blank(rows, width, torch.float16), blank(rows, 1)[:, 0]


def around(x: Tensor) -> Tensor:
    """What stands around a ``view`` in memory."""
    whole = x._base
    assert whole is not None
    return torch.cat((whole[:, :3].flatten(), whole[:, 3 + x.shape[1] :].flatten()))


def nmse(got: Any, want: Any) -> float:
    """Mean square of the error over that of ``want``."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.square(got - want).sum() / np.square(want).sum())


def selections(rows: int) -> Iterator[NDArray[np.int64]]:
    """Numbers of rows to compute by themselves: the last alone, some in another order."""
    yield np.array([rows - 1])
    yield np.random.default_rng(5).permutation(rows)[: max(1, rows * 2 // 3)]
