"""Programs as they are recorded: operations that write rows of a workspace, and the workspace itself.

An operation is a kernel, its arguments and where its number of chunks stands. What is recorded here is what both ordinary layers
(ops.py) and experts (experts.py) are made of.
"""

from __future__ import annotations

from collections import defaultdict
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.base import Activation, Array, Linear
from shoal.kernels.cpu import attention, elementwise, groups, linear, strips
from shoal.kernels.cpu.jit import Lazy
from shoal.kernels.cpu.pack import PackedMatrix, PackedPart
from shoal.kernels.cpu.pool import CHUNKS_PER_THREAD, program

LINE = 64  # bytes of slack behind every buffer, and its alignment
_SPARE_ROWS = attention.MAX_TILE - 1  # a tile of queries that is not full reads past the last row


def padded(width: int) -> int:
    """``width`` rounded up to whole registers of 16."""
    return -(-width // 16) * 16


def address_of(array: NDArray[np.generic]) -> int:
    """Where its data begin."""
    address: int = array.__array_interface__["data"][0]
    return address


class Buffer:
    """Workspace that goes back to the free ones of its size when nobody holds it any more: later operations may use it anew."""

    __slots__ = ("_free", "address", "row_bytes")

    def __init__(self, address: int, row_bytes: int, free: list[int]) -> None:
        self.address, self.row_bytes, self._free = address, row_bytes, free

    def __del__(self) -> None:
        self._free.append(self.address)


@dataclass(slots=True)
class Rounded:
    """int8 rows of an activation with their scales and sums (see elementwise.py)."""

    q8: Buffer
    scales: Buffer
    sums: Buffer
    minus_sums: Buffer
    half_sums: Buffer

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All of them."""
        return self.q8, self.scales, self.sums, self.minus_sums, self.half_sums


@dataclass(slots=True)
class Rows:
    """float32 rows in the workspace. ``producer`` are the arguments of the kernel that writes them, if it can round them too, and
    ``ready`` is the number of operations after which they are written; ``index`` is where row numbers stand if only some rows are
    meant."""

    buffer: Buffer
    address: int
    stride: int
    width: int
    producer: NDArray[np.int64] | None = None
    ready: int = 0
    rounded: Rounded | None = None
    index: int = 0

    def changed(self) -> None:
        """Other values stand there now: what was rounded is out of date, and their producer was not the last to write them."""
        self.producer = self.rounded = None


class Recording:
    """A program in the making, for at most ``max_rows`` rows of the row space at address ``space``."""

    def __init__(self, threads: int, space: int, max_rows: int) -> None:
        self.threads, self.space, self.max_rows = threads, space, max_rows
        self.ops: list[tuple[Lazy, NDArray[np.int64], int]] = []
        self.keep: list[NDArray[np.generic]] = []
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # addresses of workspace by bytes of a row

    def over(self, space: int, max_rows: int) -> Self:
        """One that appends to the same program, for rows from another space."""
        other = copy(self)
        other.space, other.max_rows, other._free = space, max_rows, defaultdict(list)
        return other

    def program(self) -> NDArray[np.int64]:
        """What was recorded; compiles the kernels it uses."""
        return program([(kernel.address, address_of(args), count) for kernel, args, count in self.ops])

    def columns(self, x: Rows, first: int, width: int) -> Rows:
        """Some columns of ``x``, where they are."""
        return Rows(x.buffer, x.address + 4 * first, x.stride, width)

    def linear(self, x: Rows, linear: Linear) -> Rows:
        """x times a matrix, scaled and with a bias where it has those."""
        out = self.new_rows(linear.matrix.rows)
        self.multiply_into(out, x, linear.matrix, add=False)
        if linear.scale is not None:
            self.change(elementwise.multiply_columns, out, columns=linear.scale)
        if linear.bias is not None:
            self.change(elementwise.add_bias, out, columns=linear.bias)
        return out

    def produce(self, out: Rows, kernel: Lazy, args: NDArray[np.int64]) -> Rows:
        """An operation that can round its rows as well."""
        self.each_row(kernel, args)
        out.producer, out.ready = args, len(self.ops)
        return out

    def change(
        self, kernel: Lazy, x: Rows, *, columns: Array | None = None, other: Rows | None = None, constant: float = 0.0
    ) -> None:
        """x in place."""
        args = self.row_args(other or x, x)
        args[elementwise.EXTRA // 8] = 0 if columns is None else self.kept(columns)
        args[elementwise.EPS // 8] = self.kept(np.array([constant], np.float32))
        self.each_row(kernel, args)
        x.changed()

    def gated(self, gate_up: Rows, activation: Activation) -> Rows:
        """The first half of the columns, activated, times the second."""
        out = self.new_rows(gate_up.width // 2)
        return self.produce(out, elementwise.GATED[activation], self.row_args(gate_up, out))

    def multiply_into(self, out: Rows, x: Rows, matrix: PackedMatrix, *, add: bool) -> None:
        """x times a matrix, into ``out`` or added to it."""
        strips = sum(len(part.data) for part in matrix.parts)
        chunk = max(1, strips // (self.threads * CHUNKS_PER_THREAD))
        parts = [self.part(out, x, matrix.columns, part, chunk, add=add) for part in matrix.parts]
        total = sum(chunks for _, _, chunks in parts)
        kernel, args, _ = parts[0]
        if len(parts) > 1:  # types side by side are one operation
            kernel, args = linear.linear_parts, self.fields(3 * len(parts))
            ends = accumulate(chunks for _, _, chunks in parts)
            args[:] = [n for end, (k, a, _) in zip(ends, parts, strict=True) for n in (end, k.address, address_of(a))]
        self.ops.append((kernel, args, self.kept(np.array([total], np.int64))))

    def part(
        self, out: Rows, x: Rows, columns: int, part: PackedPart, chunk: int, *, add: bool
    ) -> tuple[Lazy, NDArray[np.int64], int]:
        """Kernel, arguments and number of chunks of one part of a matrix."""
        args = self.fields(strips.LINEAR_FIELDS)
        count, strip_bytes = part.data.shape
        for field, value in (
            (groups.TENSOR_SCALE, address_of(part.scale)),
            (strips.WEIGHTS, address_of(part.data)),
            (strips.STRIPS, count),
            (strips.STRIP_BYTES, strip_bytes),
            (strips.STRIPS_PER_CHUNK, chunk),
            (strips.COLUMNS, columns),
            (strips.ROWS, self.space),
            (strips.OUT, out.address + 4 * part.first_row),
            (strips.OUT_STRIDE, out.stride),
            (strips.OUT_ROWS, part.rows),
            (strips.ADD, int(add)),
            *self._input(x, part.layout.is_float),
        ):
            args[field // 8] = value
        return linear.LINEAR[part.layout.name], args, -(-count // chunk)

    def _input(self, x: Rows, as_float: bool) -> list[tuple[int, int]]:
        if as_float:
            return [(strips.X, x.address), (strips.X_STRIDE, x.stride)]
        rounded = self.rounded_form(x)
        return [
            (strips.X, rounded.q8.address),
            (strips.X_STRIDE, rounded.q8.row_bytes),
            (strips.SCALES, rounded.scales.address),
            (strips.SUMS, rounded.sums.address),
            (strips.MINUS_SUMS, rounded.minus_sums.address),
            (strips.HALF_SUMS, rounded.half_sums.address),
        ]

    def rounded_form(self, x: Rows) -> Rounded:
        """x as int8: written by the kernel that makes x if that was the last one (what came after it may have used the same buffers),
        or by one of its own."""
        if x.rounded is None:
            x.rounded = self.rounded_rows(x.width)
            args = x.producer
            if args is None or x.ready != len(self.ops):
                args = self.row_args(x, x)
                self.each_row(elementwise.quantise, args)
            args[elementwise.Q8 // 8] = x.rounded.q8.address
            args[elementwise.SCALES // 8] = x.rounded.scales.address
            args[elementwise.SUMS // 8] = x.rounded.sums.address
            args[elementwise.MINUS_SUMS // 8] = x.rounded.minus_sums.address
            args[elementwise.HALF_SUMS // 8] = x.rounded.half_sums.address
        return x.rounded

    def rounded_rows(self, width: int) -> Rounded:
        """Workspace for int8 rows."""
        q = elementwise.rounded_stride(width)
        e = q // 4
        row_bytes = {"q8": q, "scales": e, "minus_sums": e, "half_sums": e, "sums": e // 2}
        return Rounded(**{name: self._buffer(size) for name, size in row_bytes.items()})

    def row_args(self, x: Rows, out: Rows) -> NDArray[np.int64]:
        """Arguments of a kernel that goes over rows (elementwise.py)."""
        args = self.fields(elementwise.ROW_FIELDS)
        args[:6] = self.space, x.address, x.stride, out.width, out.address, out.stride
        return args

    def each_row(self, kernel: Lazy, args: NDArray[np.int64]) -> None:
        """Append an operation whose chunks are some rows each."""
        self.ops.append((kernel, args, self.space + 16))

    def new_rows(self, width: int) -> Rows:
        """Workspace for float32 rows."""
        stride = 4 * padded(width)
        buffer = self._buffer(stride)
        return Rows(buffer, buffer.address, stride, width)

    def _buffer(self, row_bytes: int) -> Buffer:
        """Workspace for all rows: some that is free, or new."""
        free = self._free[row_bytes]
        address = (
            free.pop() if free else self.kept(np.zeros((self.max_rows + _SPARE_ROWS) * row_bytes + LINE, np.uint8))
        )
        return Buffer(address, row_bytes, free)

    def fields(self, count: int) -> NDArray[np.int64]:
        """Arguments of a kernel, all 0."""
        args = np.zeros(count, np.int64)
        self.keep.append(args)
        return args

    def kept(self, array: NDArray[np.generic]) -> int:
        """The address of an array, which lives as long as the program."""
        self.keep.append(array)
        return address_of(array)
