"""The CPU backend: packs weights, records the network as a program of kernels, and runs it on the pool.

Binding calls the network once with `_Recorder`, whose operations allocate workspace and append to a program instead of computing.
A step then sets a few numbers in the step header and runs the program: one call from Python for all layers.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from shoal.errors import MemoryLimitError, UnsupportedError
from shoal.gguf.quants import QuantFormat
from shoal.kernels.base import (
    LOGIT_ROWS,
    PAGE_SIZE,
    Activation,
    Array,
    AttentionShape,
    BoundNetwork,
    Experts,
    Head,
    Heads,
    IntArray,
    KVGroup,
    Layers,
    Linear,
    Norm,
    RawTensor,
    Rope,
    SampleRows,
    StepInput,
    StepLimits,
)
from shoal.kernels.cpu import attention, elementwise, embed, groups, linear, sample
from shoal.kernels.cpu.arena import Arena
from shoal.kernels.cpu.experts import Choices, record_experts
from shoal.kernels.cpu.isa import ISA
from shoal.kernels.cpu.jit import Lazy
from shoal.kernels.cpu.pack import GROUP, LAYOUTS, PackedMatrix, PackedPart, pack_matrix
from shoal.kernels.cpu.paged import PagedCache, PagedOps
from shoal.kernels.cpu.pool import CHUNKS_PER_THREAD, Pool, program

_SPARE_ROWS = attention.MAX_TILE - 1  # a tile of queries that is not full reads past the last row
_LINE = 64  # bytes of slack behind every buffer, and its alignment


class CPUBackend:
    """Numba kernels on ``threads`` threads."""

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or _usable_cores()
        self.pool = Pool(self.threads)
        self._arena = Arena()

    def describe(self) -> str:
        """Instruction set, threads, how work is shared."""
        return f"cpu: Numba kernels, {ISA}, {self.threads} threads (own pool)"

    def supports(self, format: QuantFormat) -> bool:
        """Whether there is a layout for it."""
        return format.name in LAYOUTS

    def matrix(self, parts: Sequence[RawTensor]) -> PackedMatrix:
        """Strips of 16 rows (see pack.py)."""
        return pack_matrix(list(parts), self._arena)

    def vector(self, tensor: RawTensor) -> NDArray[np.float32]:
        """float32, padded to whole registers."""
        values = tensor.dequantised()
        out = np.zeros(_padded(len(values)), np.float32)
        out[: len(values)] = values
        return out

    def kv_token_bytes(self, kv_heads: int, head_dim: int, dtype: str) -> int:
        """Head sizes are rounded up to whole registers; q8_0 has scales beside its values."""
        return 2 * kv_heads * attention.STORAGE[dtype].unit_bytes(head_dim) // PAGE_SIZE

    def kv_cache(self, groups: Sequence[KVGroup], shape: AttentionShape, dtype: str) -> PagedCache:
        """Zeroed pages; the system gives memory for a page when it is first written."""
        if shape.head_dim > attention.MAX_HEAD_DIM:
            raise UnsupportedError(f"head size {shape.head_dim}: at most {attention.MAX_HEAD_DIM} on {self.name}")
        page_bytes = PAGE_SIZE * self.kv_token_bytes(shape.kv_heads, shape.head_dim, dtype) // 2
        group_of, start, total = {}, {}, 0
        for index, group in enumerate(groups):
            for layer in group.layers:
                group_of[layer], start[layer] = index, total
                total += group.pages * page_bytes
        try:
            k, v = (np.zeros(total + _LINE, np.uint8) for _ in range(2))
        except MemoryError:
            raise MemoryLimitError(f"KV cache: {2 * total} bytes are not available") from None
        return PagedCache(k, v, dtype, group_of, start)

    def bind(self, layers: Layers, head: Head, cache: PagedCache, limits: StepLimits) -> BoundNetwork:
        """Record both programs and compile what they use."""
        return _Bound(self, layers, head, cache, limits)

    def close(self) -> None:
        """Stop the workers."""
        self.pool.close()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _whole(count: int, unit: int) -> int:
    """``count`` rounded up to a multiple of ``unit``."""
    return -(-count // unit) * unit


def _padded(width: int) -> int:
    return _whole(width, 16)


def _address(array: NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class _Buffer:
    """Workspace that goes back to the free ones of its size when nobody holds it any more: later operations may use it anew."""

    __slots__ = ("_free", "address", "row_bytes")

    def __init__(self, address: int, row_bytes: int, free: list[int]) -> None:
        self.address, self.row_bytes, self._free = address, row_bytes, free

    def __del__(self) -> None:
        self._free.append(self.address)


@dataclass(slots=True)
class _Rounded:
    """int8 rows of an activation with their scales and sums (see elementwise.py)."""

    q8: _Buffer
    scales: _Buffer
    sums: _Buffer
    minus_sums: _Buffer
    half_sums: _Buffer

    @property
    def buffers(self) -> tuple[_Buffer, ...]:
        """All of them."""
        return self.q8, self.scales, self.sums, self.minus_sums, self.half_sums


@dataclass(slots=True)
class _Rows:
    """float32 rows in the workspace. ``producer`` are the arguments of the kernel that writes them, if it can round them too, and
    ``ready`` is the number of operations after which they are written; ``index`` is where row numbers stand if only some rows are
    meant."""

    buffer: _Buffer
    address: int
    stride: int
    width: int
    producer: NDArray[np.int64] | None = None
    ready: int = 0
    rounded: _Rounded | None = None
    index: int = 0

    def changed(self) -> None:
        """Other values stand there now: what was rounded is out of date, and their producer was not the last to write them."""
        self.producer = self.rounded = None


class _Recorder:
    """Ops that append to a program. ``space`` is the address of the row space that its rows come from."""

    def __init__(
        self, backend: CPUBackend, cache: PagedCache, step: NDArray[np.int64], space: int, limits: StepLimits
    ) -> None:
        self.backend, self.step, self.space, self.max_rows = backend, step, space, limits.max_rows
        self.paged = PagedOps(cache, _address(step), limits, backend.threads)
        self.ops: list[tuple[Lazy, NDArray[np.int64], int]] = []
        self.keep: list[NDArray[np.generic]] = []
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # addresses of workspace by bytes of a row
        self.choices: dict[tuple[int, int], Choices] = {}

    # --- what the network calls --------------------------------------------------------------------------------------

    def embed(self, table: PackedMatrix) -> _Rows:
        return self._table_rows(table, attention.TOKENS)

    def positions(self, table: PackedMatrix) -> _Rows:
        return self._table_rows(table, attention.POSITIONS)

    def norm(self, x: _Rows, norm: Norm) -> _Rows:
        out = self._rows(x.width)
        args = self._norm_args(x, out, norm)
        args[elementwise.INDEX // 8] = x.index
        return self._produce(out, elementwise.layer_norm if norm.centred else elementwise.rms_norm, args)

    def norm_heads(self, x: _Rows, heads: Heads, norm: Norm) -> None:
        part = self.columns(x, heads.first, heads.width)
        args = self._norm_args(part, part, norm)
        args[elementwise.HEADS // 8] = heads.count
        self._each_row(elementwise.layer_norm_heads if norm.centred else elementwise.rms_norm_heads, args)
        x.changed()

    def linear(self, x: _Rows, linear: Linear) -> _Rows:
        out = self._rows(linear.matrix.rows)
        self._multiply(out, x, linear.matrix, add=False)
        if linear.scale is not None:
            self._change(elementwise.multiply_columns, out, columns=linear.scale)
        if linear.bias is not None:
            self._change(elementwise.add_bias, out, columns=linear.bias)
        return out

    def linear_add(self, residual: _Rows, x: _Rows, linear: Linear) -> None:
        if linear.scale is not None:
            self.add(residual, self.linear(x, linear))
            return
        self._multiply(residual, x, linear.matrix, add=True)
        residual.changed()
        if linear.bias is not None:
            self._change(elementwise.add_bias, residual, columns=linear.bias)

    def add(self, residual: _Rows, x: _Rows) -> None:
        self._change(elementwise.add_rows, residual, other=x)

    def multiply(self, x: _Rows, factor: float) -> None:
        self._change(elementwise.multiply, x, constant=factor)

    def soft_cap(self, x: _Rows, cap: float) -> None:
        self._change(elementwise.soft_cap, x, constant=cap)

    def clamp(self, x: _Rows, limit: float) -> None:
        self._change(elementwise.clamp, x, constant=limit)

    def gated(self, gate_up: _Rows, activation: Activation) -> _Rows:
        out = self._rows(gate_up.width // 2)
        return self._produce(out, elementwise.GATED[activation], self._row_args(gate_up, out))

    def activate(self, x: _Rows, activation: Activation) -> _Rows:
        out = self._rows(x.width)
        return self._produce(out, elementwise.ACTIVATE[activation], self._row_args(x, out))

    def gate_rows(self, x: _Rows, h: _Rows, gate: Linear) -> None:
        self._each_row(elementwise.gate_rows, self._row_args(self.linear(h, gate), x))
        x.changed()

    def experts(self, residual: _Rows, x: _Rows, experts: Experts) -> None:
        record_experts(self, residual, x, experts)

    def columns(self, x: _Rows, first: int, width: int) -> _Rows:
        return _Rows(x.buffer, x.address + 4 * first, x.stride, width)

    def concat(self, parts: Sequence[_Rows]) -> _Rows:
        out, first = self._rows(sum(part.width for part in parts)), 0
        for part in parts:
            self._each_row(elementwise.copy, self._row_args(part, self.columns(out, first, part.width)))
            first += part.width
        return out

    def rope_store(self, qkv: _Rows, layer: int, shape: AttentionShape, rope: Rope | None) -> _Rows:
        self._each_row(*self.paged.rope_store(qkv, layer, shape, rope))
        return qkv

    def attention(self, q: _Rows, layer: int, shape: AttentionShape) -> _Rows:
        out = self._rows(shape.heads * shape.head_dim)
        self.ops += self.paged.attention(q, out, layer, shape)
        return out

    def logit_rows(self, x: _Rows) -> _Rows:
        self.logit_index = np.zeros(LOGIT_ROWS, np.int32)
        pointer = np.array([self._kept(self.logit_index)], np.int64)
        return _Rows(x.buffer, x.address, x.stride, x.width, index=self._kept(pointer))

    def over(self, space: int, max_rows: int) -> _Recorder:
        """One that appends to the same program, for rows from another space."""
        other = copy(self)
        other.space, other.max_rows, other._free, other.choices = space, max_rows, defaultdict(list), {}
        return other

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _table_rows(self, table: PackedMatrix, numbers: int) -> _Rows:
        """The rows of ``table`` that the step's array of this field names."""
        if len(table.parts) != 1:
            raise UnsupportedError("an embedding of more than one tensor type")
        part = table.parts[0]
        x = self._rows(table.columns)
        args = self._fields(embed.EMBED_FIELDS)
        args[:6] = self._row_args(x, x)[:6]
        shift = None if part.layout.is_float else groups.GROUPS[part.layout.name].shift
        kind = embed.FLOATS if part.layout.is_float else embed.AFFINE if shift is None else embed.CENTRED
        for field, value in (
            (embed.DECODE, linear.DECODE[part.layout.name].address),
            (embed.STRIPS, _address(part.data)),
            (embed.STRIP_BYTES, part.data.shape[1]),
            (embed.COLUMNS_PER_BLOCK, GROUP * part.layout.groups_per_block),
            (embed.SCALE, _address(part.scale)),
            (embed.OFFSET, 1 << (shift or 0)),
            (embed.KIND, kind),
            (embed.TOKENS, self.step.ctypes.data + numbers),
        ):
            args[field // 8] = value
        self._each_row(embed.embed, args)
        return x

    def _norm_args(self, x: _Rows, out: _Rows, norm: Norm) -> NDArray[np.int64]:
        args = self._row_args(x, out)
        args[elementwise.EXTRA // 8] = self._kept(norm.weight)
        args[elementwise.EPS // 8] = self._kept(np.array([norm.eps], np.float32))
        args[elementwise.BIAS // 8] = 0 if norm.bias is None else self._kept(norm.bias)
        return args

    def _produce(self, out: _Rows, kernel: Lazy, args: NDArray[np.int64]) -> _Rows:
        """An operation that can round its rows as well."""
        self._each_row(kernel, args)
        out.producer, out.ready = args, len(self.ops)
        return out

    def _change(
        self, kernel: Lazy, x: _Rows, *, columns: Array | None = None, other: _Rows | None = None, constant: float = 0.0
    ) -> None:
        """x in place."""
        args = self._row_args(other or x, x)
        args[elementwise.EXTRA // 8] = 0 if columns is None else self._kept(columns)
        args[elementwise.EPS // 8] = self._kept(np.array([constant], np.float32))
        self._each_row(kernel, args)
        x.changed()

    def _multiply(self, out: _Rows, x: _Rows, matrix: PackedMatrix, *, add: bool) -> None:
        strips = sum(len(part.data) for part in matrix.parts)
        chunk = max(1, strips // (self.backend.threads * CHUNKS_PER_THREAD))
        parts = [self._part(out, x, matrix.columns, part, chunk, add=add) for part in matrix.parts]
        total = sum(chunks for _, _, chunks in parts)
        kernel, args, _ = parts[0]
        if len(parts) > 1:  # types side by side are one operation
            kernel, args = linear.linear_parts, self._fields(3 * len(parts))
            ends = accumulate(chunks for _, _, chunks in parts)
            args[:] = [n for end, (k, a, _) in zip(ends, parts, strict=True) for n in (end, k.address, _address(a))]
        self.ops.append((kernel, args, self._kept(np.array([total], np.int64))))

    def _part(
        self, out: _Rows, x: _Rows, columns: int, part: PackedPart, chunk: int, *, add: bool
    ) -> tuple[Lazy, NDArray[np.int64], int]:
        """Kernel, arguments and number of chunks of one part of a matrix."""
        args = self._fields(linear.LINEAR_FIELDS)
        strips, strip_bytes = part.data.shape
        for field, value in (
            (groups.TENSOR_SCALE, _address(part.scale)),
            (linear.WEIGHTS, _address(part.data)),
            (linear.STRIPS, strips),
            (linear.STRIP_BYTES, strip_bytes),
            (linear.STRIPS_PER_CHUNK, chunk),
            (linear.COLUMNS, columns),
            (linear.ROWS, self.space),
            (linear.OUT, out.address + 4 * part.first_row),
            (linear.OUT_STRIDE, out.stride),
            (linear.OUT_ROWS, part.rows),
            (linear.ADD, int(add)),
            *self._input(x, part.layout.is_float),
        ):
            args[field // 8] = value
        return linear.LINEAR[part.layout.name], args, -(-strips // chunk)

    def _input(self, x: _Rows, as_float: bool) -> list[tuple[int, int]]:
        if as_float:
            return [(linear.X, x.address), (linear.X_STRIDE, x.stride)]
        rounded = self._rounded(x)
        return [
            (linear.X, rounded.q8.address),
            (linear.X_STRIDE, x.width),
            (linear.SCALES, rounded.scales.address),
            (linear.SUMS, rounded.sums.address),
            (linear.MINUS_SUMS, rounded.minus_sums.address),
            (linear.HALF_SUMS, rounded.half_sums.address),
        ]

    def _rounded(self, x: _Rows) -> _Rounded:
        """x as int8: written by the kernel that makes x if that was the last one (what came after it may have used the same buffers),
        or by one of its own."""
        if x.rounded is None:
            x.rounded = self._rounded_rows(x.width)
            args = x.producer
            if args is None or x.ready != len(self.ops):
                args = self._row_args(x, x)
                self._each_row(elementwise.quantise, args)
            args[elementwise.Q8 // 8] = x.rounded.q8.address
            args[elementwise.SCALES // 8] = x.rounded.scales.address
            args[elementwise.SUMS // 8] = x.rounded.sums.address
            args[elementwise.MINUS_SUMS // 8] = x.rounded.minus_sums.address
            args[elementwise.HALF_SUMS // 8] = x.rounded.half_sums.address
        return x.rounded

    def _rounded_rows(self, width: int) -> _Rounded:
        q, e = width, width // 4
        row_bytes = {"q8": q, "scales": e, "minus_sums": e, "half_sums": e, "sums": e // 2}
        return _Rounded(**{name: self._buffer(size) for name, size in row_bytes.items()})

    def _row_args(self, x: _Rows, out: _Rows) -> NDArray[np.int64]:
        args = self._fields(elementwise.ROW_FIELDS)
        args[:6] = self.space, x.address, x.stride, out.width, out.address, out.stride
        return args

    def _each_row(self, kernel: Lazy, args: NDArray[np.int64]) -> None:
        self.ops.append((kernel, args, self.space + 16))

    def _rows(self, width: int) -> _Rows:
        stride = 4 * _padded(width)
        buffer = self._buffer(stride)
        return _Rows(buffer, buffer.address, stride, width)

    def _buffer(self, row_bytes: int) -> _Buffer:
        """Workspace for all rows: some that is free, or new."""
        free = self._free[row_bytes]
        address = (
            free.pop() if free else self._kept(np.zeros((self.max_rows + _SPARE_ROWS) * row_bytes + _LINE, np.uint8))
        )
        return _Buffer(address, row_bytes, free)

    def _fields(self, count: int) -> NDArray[np.int64]:
        args = np.zeros(count, np.int64)
        self.keep.append(args)
        return args

    def _kept(self, array: NDArray[np.generic]) -> int:
        self.keep.append(array)
        return _address(array)

    def program(self) -> NDArray[np.int64]:
        """What was recorded; compiles the kernels it uses."""
        return program([(kernel.address, _address(args), count) for kernel, args, count in self.ops])


class _Bound:
    """A recorded network: the step header, the programs of the layers and of the head."""

    def __init__(self, backend: CPUBackend, layers: Layers, head: Head, cache: PagedCache, limits: StepLimits) -> None:
        self._pool, self._threads = backend.pool, backend.threads
        self._step = np.zeros(attention.STEP_FIELDS, np.int64)
        self._logit_space = np.zeros(3, np.int64)
        body = _Recorder(backend, cache, self._step, _address(self._step), limits)
        hidden = layers(body)
        tail = _Recorder(backend, cache, self._step, _address(self._logit_space), replace(limits, max_rows=LOGIT_ROWS))
        logits = head(tail, hidden)
        self._recorders = (body, tail)
        self._index = tail.logit_index
        self._logits = _view(logits, tail)
        self._sampler = _Sampler(backend, self._logits, _address(self._logit_space))
        self._layers, self._head = body.program(), tail.program()
        self._head_and_sample = np.concatenate([self._head, self._sampler.program()])
        self.last_logits: NDArray[np.float32] = self._logits[:0]

    def layers(self, step: StepInput) -> None:
        header, rows = self._step, len(step.token_ids)
        self._set_rows(header, rows)
        header[attention.SEQS // 8] = len(step.kv_len)
        header[attention.TOKENS // 8] = _address(step.token_ids)
        header[attention.POSITIONS // 8] = _address(step.positions)
        header[attention.ROW_START // 8] = _address(step.row_start)
        header[attention.KV_LEN // 8] = _address(step.kv_len)
        header[attention.PAGE_TABLE // 8] = _address(step.page_table)
        header[attention.GROUP_STRIDE // 8], header[attention.SEQUENCE_STRIDE // 8] = step.page_table.strides[:2]
        self._pool.run(self._layers)

    def logits(self, rows: IntArray) -> NDArray[np.float32]:
        self._choose(rows)
        self._pool.run(self._head)
        return self.last_logits

    def sample(self, rows: IntArray, how: SampleRows) -> IntArray:
        self._choose(rows)
        self._sampler.set(how)
        self._pool.run(self._head_and_sample)
        return self._sampler.tokens[: len(rows)].copy()

    def _choose(self, rows: IntArray) -> None:
        self._index[: len(rows)] = rows
        self._set_rows(self._logit_space, len(rows))
        self.last_logits = self._logits[: len(rows)]

    def _set_rows(self, space: NDArray[np.int64], rows: int) -> None:
        per_chunk = max(1, rows // (self._threads * CHUNKS_PER_THREAD))
        space[:3] = rows, per_chunk, -(-rows // per_chunk)


def _view(rows: _Rows, recorder: _Recorder) -> NDArray[np.float32]:
    """The recorder's buffer that ``rows`` lie in, as [LOGIT_ROWS, width]."""
    memory = next(array for array in recorder.keep if _address(array) == rows.address)
    whole: NDArray[np.float32] = memory[: LOGIT_ROWS * rows.stride].view(np.float32).reshape(LOGIT_ROWS, -1)
    return whole[:, : rows.width]


class _Sampler:
    """The last operation of the head: one token for each row of logits."""

    def __init__(self, backend: CPUBackend, logits: NDArray[np.float32], space: int) -> None:
        self.tokens = np.zeros(LOGIT_ROWS, np.int32)
        self._temperature, self._top_p, self._min_p = (np.zeros(LOGIT_ROWS, np.float32) for _ in range(3))
        self._top_k = np.zeros(LOGIT_ROWS, np.int32)
        self._seed = np.zeros(LOGIT_ROWS, np.uint64)
        self._sample, self._position = (np.zeros(LOGIT_ROWS, np.uint32) for _ in range(2))
        self._banned_start = np.zeros(LOGIT_ROWS + 1, np.int32)
        self._banned = np.zeros(1, np.int32)
        self._banned_address = np.array([_address(self._banned)], np.int64)
        vocab = logits.shape[1]
        scratch = -(-sample.scratch_bytes(vocab) // _LINE) * _LINE
        self._scratch = np.zeros(backend.threads * scratch + _LINE, np.uint8)
        self._count = np.array([backend.threads], np.int64)
        self._args = np.array(
            [
                space,
                backend.threads,
                _address(logits),
                logits.strides[0],
                vocab,
                _address(self._temperature),
                _address(self._top_k),
                _address(self._top_p),
                _address(self._min_p),
                _address(self._seed),
                _address(self._sample),
                _address(self._position),
                _address(self._banned_start),
                _address(self._banned_address),
                _address(self.tokens),
                _address(self._scratch),
                scratch,
            ],
            np.int64,
        )

    def set(self, how: SampleRows) -> None:
        """Take over the rows' parameters."""
        n = len(how.temperature)
        self._temperature[:n], self._top_p[:n], self._min_p[:n] = how.temperature, how.top_p, how.min_p
        self._top_k[:n], self._seed[:n] = how.top_k, how.seed
        self._sample[:n], self._position[:n] = how.sample, how.position
        if any(ids is not None for ids in how.banned):
            ids = [np.zeros(0, np.int32) if b is None else b for b in how.banned]
            self._banned = np.concatenate(ids).astype(np.int32)
            self._banned_start[1 : n + 1] = np.cumsum([len(b) for b in ids])
            self._banned_address[0] = _address(self._banned)
        else:
            self._banned_start[:] = 0

    def program(self) -> NDArray[np.int64]:
        """One operation: thread by thread, so that each has scratch memory of its own."""
        return program([(sample.sample.address, _address(self._args), _address(self._count))])
