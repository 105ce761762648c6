"""Single operations of the CPU backend on plain arrays: one recorded operation, run once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from shoal.kernels.base import AttentionShape, KVGroup, Linear, Rope, StepInput, StepLimits
from shoal.kernels.cpu import attention, isa
from shoal.kernels.cpu.backend import CPUBackend
from shoal.kernels.cpu.ops import CPUOps
from shoal.kernels.cpu.pack import PackedMatrix
from shoal.kernels.cpu.recording import Rows

F32 = NDArray[np.float32]


class OneStep:
    """A recorder whose input is set by hand."""

    def __init__(self, backend: CPUBackend, rows: int) -> None:
        self.backend, self.count = backend, rows
        self.header = np.zeros(attention.STEP_FIELDS, np.int64)
        self.header[:3] = rows, 2, -(-rows // 2)
        cache = backend.kv_cache([KVGroup((0,), 1)], AttentionShape(1, 1, 16, 1.0), "f16")
        self.recorder = CPUOps(backend.threads, cache, self.header, self.header.ctypes.data, StepLimits(rows, 1, 1))

    def input(self, x: F32) -> Rows:
        """An array as workspace rows."""
        rows = self.recorder.new_rows(x.shape[1])
        self.view(rows)[: len(x)] = x
        return rows

    def view(self, rows: Rows) -> F32:
        """The workspace rows as an array."""
        memory = next(a for a in self.recorder.keep if a.ctypes.data == rows.address)
        flat: F32 = memory[: self.count * rows.stride].view(np.float32)
        return flat.reshape(self.count, -1)[:, : rows.width]

    def run(self) -> None:
        """Run what was recorded."""
        self.backend.pool.run(self.recorder.program())


def multiply(backend: CPUBackend, matrix: PackedMatrix, x: F32, base: F32 | None = None) -> F32:
    """x @ matrix.T, or base + that."""
    step = OneStep(backend, len(x))
    rows = step.input(x)
    if base is None:
        out = step.recorder.linear(rows, Linear(matrix))
    else:
        out = step.recorder.new_rows(base.shape[1])
        step.view(out)[:] = base
        step.recorder.linear_add(out, rows, Linear(matrix))
    step.run()
    return step.view(out).copy()


def embed(backend: CPUBackend, matrix: PackedMatrix, tokens: NDArray[np.int32]) -> F32:
    """Rows of a matrix by number."""
    step = OneStep(backend, len(tokens))
    step.header[attention.TOKENS // 8] = tokens.ctypes.data
    out = step.recorder.embed(matrix)
    step.run()
    return step.view(out).copy()


def rowwise(backend: CPUBackend, x: F32, record: Callable[[CPUOps, Rows], Rows]) -> F32:
    """What one operation makes of some rows."""
    step = OneStep(backend, len(x))
    out = record(step.recorder, step.input(x))
    step.run()
    return step.view(out).copy()


def rounded(backend: CPUBackend, x: F32) -> tuple[NDArray[np.int8], F32, F32, F32]:
    """int8 rows, scales, sums and half sums of x."""
    step = OneStep(backend, len(x))
    place = step.recorder.rounded_form(step.input(x))
    step.run()
    groups = x.shape[1] // 32

    def read(address: int, count: int, kind: type[np.generic]) -> NDArray[np.generic]:
        memory = next(a for a in step.recorder.keep if a.ctypes.data == address)
        return memory.view(kind)[: len(x) * count].reshape(len(x), count).copy()

    return (  # type: ignore[return-value]
        read(place.q8.address, x.shape[1], np.int8),
        read(place.scales.address, 2 * groups, np.float32),
        read(place.sums.address, groups, np.float32),
        read(place.half_sums.address, 2 * groups, np.float32),
    )


LayerKind = tuple[AttentionShape, Rope | None]


class PagedLayers:
    """rope_store and attention of some layers, each with an input of its own, over a cache that stays from step to step."""

    def __init__(self, backend: CPUBackend, layers: Sequence[LayerKind], pages: int, dtype: str, max_rows: int) -> None:
        self.backend = backend
        self.cache = backend.kv_cache([KVGroup(tuple(range(len(layers))), pages)], layers[0][0], dtype)
        self.header = np.zeros(attention.STEP_FIELDS, np.int64)
        limits = StepLimits(max_rows, max_rows, pages)
        self._recorder = CPUOps(backend.threads, self.cache, self.header, self.header.ctypes.data, limits)
        self._places = [self._record(layer, *kind) for layer, kind in enumerate(layers)]
        self._program = self._recorder.program()

    def _record(self, layer: int, shape: AttentionShape, rope: Rope | None) -> tuple[_Workspace, _Workspace]:
        """Where the layer's input and its attention stand."""
        ops = self._recorder
        qkv = ops.new_rows((shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        out = ops.attention(ops.rope_store(qkv, layer, shape, rope), layer, shape)
        return _Workspace(ops, qkv), _Workspace(ops, out)

    def run_all(self, step: StepInput, *qkv: F32) -> list[F32]:
        """Attention of every row in each layer."""
        rows = len(qkv[0])
        for (place, _), values in zip(self._places, qkv, strict=True):
            place.array[:rows] = values
        self.header[:] = (
            *(rows, 1, rows, len(step.kv_len), step.token_ids.ctypes.data, step.positions.ctypes.data),
            *(step.row_start.ctypes.data, step.kv_len.ctypes.data, step.page_table.ctypes.data),
            *step.page_table.strides[:2],
        )
        self.backend.pool.run(self._program)
        return [out.array[:rows].copy() for _, out in self._places]


class PagedAttention(PagedLayers):
    """A single layer."""

    def __init__(
        self, backend: CPUBackend, shape: AttentionShape, rope: Rope | None, pages: int, dtype: str, max_rows: int
    ) -> None:
        super().__init__(backend, [(shape, rope)], pages, dtype, max_rows)

    def run(self, step: StepInput, qkv: F32) -> F32:
        """Attention of every row."""
        return self.run_all(step, qkv)[0]


class _Workspace:
    """Workspace rows and the array they are."""

    def __init__(self, recorder: CPUOps, rows: Rows) -> None:
        self.rows = rows
        memory = next(a for a in recorder.keep if a.ctypes.data == rows.address)
        flat: F32 = memory[: recorder.max_rows * rows.stride].view(np.float32)
        self.array = flat.reshape(recorder.max_rows, -1)[:, : rows.width]


# The least that an x86-64 CPU can be, which has neither fma nor conversion of halves, nor what the tests may have been told to use.
OLD_CPU = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "", "SHOAL_ISA": ""}
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")


def said_by_each_isa(program: str) -> list[str]:
    """What a Python program prints with each instruction set."""
    return said_with(program, [{"SHOAL_ISA": name} for name in isa.possible()])


def said_with(program: str, settings: Sequence[dict[str, str]]) -> list[str]:
    """What a Python program prints in some environments: processes side by side, as compiling takes most of their time. How much that
    is on a busy machine nobody knows, so they have no limit but the test's own."""
    processes = [_start(program, chosen) for chosen in settings]
    try:
        ended = [(*process.communicate(), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for _, stderr, code in ended:
        assert code == 0, stderr
    assert all(stdout for stdout, *_ in ended)
    return [stdout for stdout, *_ in ended]


def _start(program: str, settings: dict[str, str]) -> subprocess.Popen[str]:
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=pipe, stderr=pipe, text=True)
