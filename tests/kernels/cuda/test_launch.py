"""Kernels are launched with numbers, tensors and constants, over a grid that may be empty."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.cuda.launch import INTERPRETED, device, launch


@triton.jit
def _fill(out, value, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, value, mask=at < n)


def test_a_kernel_runs_over_its_grid() -> None:
    assert INTERPRETED
    out = torch.zeros(20, device=device())
    launch(_fill, (2,), out, 3.0, 17, SIZE=16, warps=2)
    assert out.tolist() == [3.0] * 17 + [0.0] * 3


def test_an_empty_grid_is_no_fault() -> None:
    out = torch.zeros(20, device=device())
    launch(_fill, (0,), out, 3.0, 17, SIZE=16)
    assert not out.any()
