"""Packed weights come back with the bits of the `gguf` package, and rounded once to float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from shoal.kernels.cpu.pack import LAYOUTS as CPU_LAYOUTS
from shoal.kernels.cuda.launch import Tensor, device, launch
from shoal.kernels.cuda.pack import BLOCK, LAYOUTS, SUPPORTED, PackedPart, pack_matrix
from shoal.kernels.cuda.unpack import decode
from tests.kernels.cuda.weights import random_tensor, shortest

FORMATS = sorted(LAYOUTS)


@triton.jit
def _unpack(weights, R, out, stride, factor,  # type: ignore[no-untyped-def]
            M: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    block = tl.program_id(1)
    for group in tl.static_range(8):
        tile = decode(weights, R, block, row, factor, group, FORMAT, BITS, ROW_BYTES)
        column = block * 256 + group * 32 + tl.arange(0, 32)
        tl.store(out + row[:, None] * stride + column[None, :], tile.to(out.dtype.element_ty))


def unpacked(part: PackedPart, factor: float, kind: torch.dtype) -> Tensor:
    """All of a part times ``factor``, padding included: [R, blocks * 256]."""
    out = torch.empty((part.padded_rows, part.blocks * BLOCK), dtype=kind, device=device())
    grid = (part.padded_rows // 128, part.blocks)
    launch(_unpack, grid, part.data, part.padded_rows, out, out.stride(0), factor, M=128, **part.layout.constants)
    return out


def test_every_type_that_the_cpu_packs() -> None:
    assert set(CPU_LAYOUTS) == SUPPORTED


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(16, 1), (131, 2), (5, 3)], ids=str)
def test_weights_have_the_bits_of_the_file(name: str, shape: tuple[int, int]) -> None:
    raw = random_tensor(name, shape[0], shape[1] * shortest(name))
    (part,) = pack_matrix([raw]).parts
    rows, columns = raw.shape
    want = torch.from_numpy(raw.dequantised())
    got = unpacked(part, 1.0, torch.float32)
    assert torch.equal(got[:rows, :columns].cpu(), want)
    assert torch.isfinite(got).all()
    half = unpacked(part, 1 / part.scale, torch.float16)
    assert torch.equal(half[:rows, :columns].cpu(), (want / part.scale).to(torch.float16))
    assert half.isfinite().all()
    assert half.abs().max() > 16  # far above what float16 rounds coarsely


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("columns", [1, 48, 100, 257])
def test_floats_of_any_width(name: str, columns: int) -> None:
    raw = random_tensor(name, 7, columns)
    (part,) = pack_matrix([raw]).parts
    assert torch.equal(unpacked(part, 1.0, torch.float32)[:7, :columns].cpu(), torch.from_numpy(raw.dequantised()))


def test_exponents_from_end_to_end() -> None:
    raw = random_tensor("MXFP4", 256, 32)
    raw.data[:, 0] = np.arange(256)
    (part,) = pack_matrix([raw]).parts
    with np.errstate(over="ignore"):
        got = unpacked(part, 1.0, torch.float32)[:, :32].cpu()
    assert torch.equal(got[:255], torch.from_numpy(raw.dequantised())[:255])
