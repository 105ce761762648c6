"""Single operations of the CPU backend on plain arrays: one recorded operation, run once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.base import PAGE_SIZE, AttentionShape, Linear, Rope, StepInput
from shoal.kernels.cpu import attention
from shoal.kernels.cpu.backend import CPUBackend, _Recorder, _Rows
from shoal.kernels.cpu.pack import PackedMatrix

F32 = NDArray[np.float32]


class OneStep:
    """A recorder whose input is set by hand."""

    def __init__(self, backend: CPUBackend, rows: int) -> None:
        self.backend, self.count = backend, rows
        self.header = np.zeros(attention.STEP_FIELDS, np.int64)
        self.header[:3] = rows, 2, -(-rows // 2)
        cache = backend.kv_cache(1, 1, AttentionShape(1, 1, 16, 1.0), "f16")
        self.recorder = _Recorder(backend, cache, self.header, self.header.ctypes.data, rows)

    def input(self, x: F32) -> _Rows:
        """An array as workspace rows."""
        rows = self.recorder._rows(x.shape[1])
        self.view(rows)[: len(x)] = x
        return rows

    def view(self, rows: _Rows) -> F32:
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
        out = step.recorder._rows(base.shape[1])
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


def rowwise(backend: CPUBackend, x: F32, record: Callable[[_Recorder, _Rows], _Rows]) -> F32:
    """What one operation makes of some rows."""
    step = OneStep(backend, len(x))
    out = record(step.recorder, step.input(x))
    step.run()
    return step.view(out).copy()


def rounded(backend: CPUBackend, x: F32) -> tuple[NDArray[np.int8], F32, F32, F32]:
    """int8 rows, scales, sums and half sums of x."""
    step = OneStep(backend, len(x))
    place = step.recorder._rounded(step.input(x))
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


class PagedAttention:
    """rope_store and attention of one layer, over a cache that stays from step to step."""

    def __init__(
        self, backend: CPUBackend, shape: AttentionShape, rope: Rope, pages: int, dtype: str, max_rows: int
    ) -> None:
        self.backend = backend
        self.cache = backend.kv_cache(1, pages, shape, dtype)
        self.header = np.zeros(attention.STEP_FIELDS, np.int64)
        recorder = _Recorder(backend, self.cache, self.header, self.header.ctypes.data, max_rows)
        recorder.max_positions, recorder.max_tasks = pages * PAGE_SIZE, max_rows
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self._input = _Workspace(recorder, recorder._rows(width))
        out = recorder.attention(recorder.rope_store(self._input.rows, 0, shape, rope), 0, shape)
        self._out = _Workspace(recorder, out)
        self._recorder, self._program = recorder, recorder.program()

    def run(self, step: StepInput, qkv: F32) -> F32:
        """Attention of every row."""
        rows = len(qkv)
        self._input.array[:rows] = qkv
        self.header[:] = (
            *(rows, 1, rows, len(step.kv_len), step.token_ids.ctypes.data, step.positions.ctypes.data),
            *(step.row_start.ctypes.data, step.kv_len.ctypes.data, step.page_table.ctypes.data),
            step.page_table.strides[0],
        )
        self.backend.pool.run(self._program)
        return self._out.array[:rows].copy()


class _Workspace:
    """Workspace rows and the array they are."""

    def __init__(self, recorder: _Recorder, rows: _Rows) -> None:
        self.rows = rows
        memory = next(a for a in recorder.keep if a.ctypes.data == rows.address)
        flat: F32 = memory[: recorder.max_rows * rows.stride].view(np.float32)
        self.array = flat.reshape(recorder.max_rows, -1)[:, : rows.width]
