"""Programs as they are recorded: launches over rows of a workspace, and the workspace itself.

A `Call` is a function that launches kernels, and its arguments; a program is a list of calls, each given the number of rows when it
runs. What it works on stays where it is, so that a program can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from shoal.kernels.base import Activation, Linear
from shoal.kernels.cuda import elementwise, grouped, linear
from shoal.kernels.cuda.launch import Tensor, device
from shoal.kernels.cuda.pack import PackedMatrix


@dataclass(slots=True)
class Call:
    """A function that launches kernels, and its arguments."""

    run: Callable[..., None]
    arguments: dict[str, Any]

    def __call__(self, rows: int) -> None:
        """Launch them over so many rows."""
        self.run(rows=rows, **self.arguments)


class Buffer:
    """Workspace that goes back to the free ones of its kind when nobody holds it any more: later calls may use it anew."""

    __slots__ = ("_free", "data")

    def __init__(self, data: Tensor, free: list[Tensor]) -> None:
        self.data, self._free = data, free

    def __del__(self) -> None:
        self._free.append(self.data)


@dataclass(slots=True)
class Half:
    """Rows rounded to float16 after division by a power of two each: values [rows, width] and the powers, float32 [rows]."""

    values: Buffer
    scale: Buffer

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both of them."""
        return self.values.data, self.scale.data


@dataclass(slots=True)
class Read:
    """What products read of some rows, and the workspace where that is."""

    source: linear.Source
    held: tuple[Buffer, ...]


@dataclass(slots=True)
class Rows:
    """float32 rows in the workspace. ``producer`` is the call that writes them, if it ``can`` do more: be fused with a gate, write the
    half form too, or the largest magnitudes of ``parts`` parts of each row; ``ready`` the number of calls after which they are
    written. ``source`` is what the producer read, if it is a product."""

    buffer: Buffer
    data: Tensor
    producer: Call | None = None
    can: Literal["", "gate", "half", "largest"] = ""
    parts: int = 0
    ready: int = 0
    source: Read | None = None
    half: Half | None = None
    read: Read | None = None
    part: bool = False  # some columns of others

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.data.shape[1])

    def changed(self) -> None:
        """Other values stand there now: what was rounded is out of date, and the producer was not the last to write them."""
        self.producer = self.source = self.half = self.read = None


class Recording:
    """A program in the making, for at most ``max_rows`` rows."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.calls: list[Call] = []
        self._free: defaultdict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = defaultdict(list)

    def finish(self) -> None:
        """Give products the memory for sums of pieces that the largest of them needs; the program is complete."""
        products = [call.arguments for call in self.calls if call.run in (linear.linear, linear.linear_gated)]
        scratch = linear.scratch_for([one["matrix"] for one in products], self.max_rows)
        for one in products:
            one["scratch"] = scratch

    def run(self, rows: int) -> None:
        """Launch the program over so many rows."""
        for call in self.calls:
            call(rows)

    def call(self, run: Callable[..., None], **arguments: Any) -> Call:
        """Append a call."""
        self.calls.append(Call(run, arguments))
        return self.calls[-1]

    def produce(self, out: Rows, run: Callable[..., None], **arguments: Any) -> Rows:
        """A call that can write the half form of ``out`` as well."""
        return self._produced(out, self.call(run, out=out.data, **arguments), "half")

    def produce_largest(self, out: Rows, parts: int, run: Callable[..., None], **arguments: Any) -> Rows:
        """A call that can write the largest magnitudes of ``parts`` parts of each row of ``out`` as well: float32 [parts, max_rows]."""
        out.parts = parts
        return self._produced(out, self.call(run, out=out.data, **arguments), "largest")

    def _produced(self, out: Rows, call: Call, can: Literal["gate", "half", "largest"]) -> Rows:
        out.producer, out.can, out.ready = call, can, len(self.calls)
        return out

    def _producer(self, x: Rows, can: Literal["gate", "half", "largest"]) -> Call | None:
        """The call that makes x, if it can do that and was the last one: what came after it may have used the same buffers."""
        return x.producer if x.can == can and x.ready == len(self.calls) else None

    def change(self, x: Rows, run: Callable[..., None], **arguments: Any) -> None:
        """x in place."""
        self.call(run, x=x.data, **arguments)
        x.changed()

    def product(self, x: Rows, weights: Linear) -> Rows:
        """x times a matrix, scaled and with a bias where it has those."""
        out = self.new_rows(weights.matrix.rows)
        if x.part and weights.bias is None and weights.scale is None and self._grouped(x, weights.matrix, out):
            return out
        read = self._read(x)
        call = self._multiply(out, read, weights, add=False)
        out.source = read
        return self._produced(out, call, "gate")

    def product_add(self, out: Rows, x: Rows, weights: Linear) -> None:
        """out += that."""
        self._multiply(out, self._read(x), weights, add=True)
        out.changed()

    def _grouped(self, x: Rows, matrix: PackedMatrix, out: Rows) -> bool:
        """Products of parts, one for each head, are one launch: whether this one joined those before it, or began anew."""
        last = self.calls[-1]
        if last.run is grouped.products and last.arguments["group"].add(x.data, matrix, out.data):
            return True
        group = grouped.Group()
        if not group.add(x.data, matrix, out.data):
            return False
        self.call(grouped.products, group=group)
        return True

    def _multiply(self, out: Rows, read: Read, weights: Linear, *, add: bool) -> Call:
        epilogue = {"bias": weights.bias, "factor": weights.scale, "add": add}
        return self.call(linear.linear, source=read.source, matrix=weights.matrix, out=out.data, **epilogue)

    def gated(self, gate_up: Rows, activation: Activation) -> Rows:
        """The first half of the columns, activated, times the second: within the product that makes them, if that is the last call."""
        out, fused = self.new_rows(gate_up.width // 2), self._gate_product(gate_up)
        if fused is None:
            return self.produce(out, elementwise.gated, gate_up=gate_up.data, activation=activation)
        self.calls.pop()
        source, matrix = fused.arguments["source"], fused.arguments["matrix"]
        product = {"source": source, "matrix": matrix, "activation": activation}
        out.source = gate_up.source  # or what the product is to leave could lie where it reads
        return self.produce_largest(out, linear.gated_parts(matrix), linear.linear_gated, **product)

    def _gate_product(self, x: Rows) -> Call | None:
        """The call that makes x, if it can be fused with the gate."""
        call = self._producer(x, "gate")
        if call is None:
            return None
        plain = call.arguments["bias"] is None and call.arguments["factor"] is None
        return call if plain and linear.can_gate(call.arguments["matrix"]) else None

    def half_of(self, x: Rows) -> Half:
        """x in float16: written by the kernel that makes x, or by one of its own."""
        if x.half is None:
            x.half = self.new_half(x.width)
            producer = self._producer(x, "half")
            if producer is not None:
                producer.arguments["half"] = x.half.tensors
            else:
                self.call(elementwise.to_half, x=x.data, half=x.half.tensors)
        return x.half

    def _read(self, x: Rows) -> Read:
        """x as products read it: its half form, or as it is where the kernel that makes x can leave the largest magnitudes."""
        if x.read is None:
            producer = self._producer(x, "largest")
            if producer is None:
                half = self.half_of(x)
                x.read = Read(linear.Source(*half.tensors), (half.values, half.scale))
            else:
                half = self.new_half(x.width)
                parts = self._buffer(
                    (x.parts, 1), torch.float32
                )  # of another shape than any rows: the producer reads some
                largest = producer.arguments["largest"] = parts.data.view(x.parts, self.max_rows)
                x.read = Read(linear.Source(*half.tensors, x.data, largest), (half.values, half.scale, parts, x.buffer))
        return x.read

    def new_half(self, width: int) -> Half:
        """Workspace for a half form."""
        return Half(self._buffer((width,), torch.float16), self._buffer((), torch.float32))

    def new_rows(self, width: int) -> Rows:
        """Workspace for float32 rows."""
        buffer = self._buffer((width,), torch.float32)
        return Rows(buffer, buffer.data)

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Workspace that is not given back: ``shape`` for each row."""
        return torch.zeros((self.max_rows, *shape), dtype=dtype, device=device())

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Buffer:
        free = self._free[shape, dtype]
        return Buffer(free.pop() if free else self.new(shape, dtype), free)
