"""Kernels to be compiled ahead, and a program that does so and prints what came out, one JSON line each.

Its own process: Triton must not be in interpreter mode when it is imported.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from shoal.kernels.cuda.compile_ahead import compile_all, mixed_instructions, recorded
from shoal.kernels.cuda.dependent import wait_for_earlier
from shoal.kernels.cuda.launch import device, launch


@triton.jit
def double(x):  # type: ignore[no-untyped-def]
    return x + x


@triton.jit(do_not_specialize=["rows"])
def change(out, rows, size, by, SIZE: tl.constexpr, HOW: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, HOW(tl.load(out + at)) * by, mask=at < rows * size)


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + inner[None, :])
    right = tl.load(b + columns[None, :] * K + inner[:, None])
    tl.store(out + rows[:, None] * N + columns[None, :], tl.dot(left, right))


@triton.jit
def unknown_name(out):  # type: ignore[no-untyped-def]
    tl.store(out, not_there)  # type: ignore[name-defined]  # noqa: F821


@triton.jit
def patient(out, PDL: tl.constexpr = False):  # type: ignore[no-untyped-def]
    wait_for_earlier(PDL)
    tl.store(out, tl.load(out) + 1.0)


@triton.jit
def hasty(out, PDL: tl.constexpr = False):  # type: ignore[no-untyped-def]
    value = tl.load(out)
    wait_for_earlier(PDL)
    tl.store(out, value + 1.0)


@triton.jit
def never_waiting(out, PDL: tl.constexpr = False):  # type: ignore[no-untyped-def]
    tl.store(out, 1.0)


def main(target: str) -> None:
    half, out = torch.zeros(4096, dtype=torch.float16), torch.ones(4096, device=device_of_recording())
    with recorded() as recorder:
        for rows in (1, 16, 17):  # not specialised: one kernel
            launch(change, (1,), out, rows, 32, 0.25, SIZE=64, HOW=double)
        for size in (1, 48, 33):  # specialised: two more
            launch(change, (1,), out, 5, size, 2.0, SIZE=64, HOW=double)
        launch(change, (1,), out[1:], 5, 33, 2.0, SIZE=64, HOW=double)  # begins anywhere: one more
        recorder.subject_of = lambda named: "a matrix"
        launch(product, (1,), half, half, out, M=64, N=16, K=64)
        launch(product, (1,), half, half, out, M=16, N=16, K=64, warps=1)
        recorder.subject_of = lambda named: "a matrix in steady hands"
        launch(product, (1,), half, half, out, M=64, N=16, K=64)
        launch(product, (1,), half, half, out, M=64, N=32, K=64)
        recorder.subject_of = lambda named: ""
        launch(product, (1,), half, half, out, M=256, N=256, K=64, warps=1)  # too much for the registers of a warp
        launch(product, (1,), half, half, out, M=128, N=512, K=512, warps=8)  # too much for shared memory
        launch(unknown_name, (1,), out)
        for kernel in (patient, hasty, never_waiting):
            launch(kernel, (1,), out)
    assert out.eq(1).all(), "nothing ran"
    results = list(compile_all(target, recorder.launches, processes=2))
    for result in results:
        fields = asdict(result) | {"launch": str(result.launch), "faults": result.faults}
        print(json.dumps(fields))
    print(json.dumps(list(mixed_instructions(results, recorder.launches))))


def device_of_recording() -> torch.device:
    with recorded():
        return device()


if __name__ == "__main__":
    from tests.kernels.cuda import ahead_kernels  # by its name, so that other processes find the kernels

    ahead_kernels.main(sys.argv[1])
