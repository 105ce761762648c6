"""Tensors of a file by name: each is checked against the shape the metadata promises, then packed, and remembered as used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UnsupportedError
from shoal.gguf.header import shown
from shoal.gguf.quants import format_named
from shoal.gguf.reader import GGUFFile
from shoal.kernels.base import Array, Backend, Linear, Matrix, Norm, RawTensor

Progress = Callable[[int, int], None]  # (bytes packed, bytes in all)
F32 = NDArray[np.float32]
_F32 = format_named("F32")


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor's name without .weight, and how many rows it must have."""

    name: str
    rows: int


class Tensors:
    """Hands out the tensors of ``file`` in ``backend``'s layout. With ``pack`` False it only checks: names, shapes and types are
    looked at, data is not, and what is handed out is None.

    Raises GGUFError for a tensor that is missing or has another shape, UnsupportedError for a type the backend does not have.
    """

    def __init__(self, file: GGUFFile, backend: Backend, *, pack: bool, progress: Progress | None = None) -> None:
        self.file, self.backend, self.pack, self.progress = file, backend, pack, progress
        self.total = sum(info.nbytes for info in file.tensors.values())
        self._packed_bytes = 0
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def matrix(self, parts: Sequence[Part], columns: int) -> Matrix:
        """Matrices that read the same input, one below the other."""
        return self._pack([self._raw(part.name + ".weight", (part.rows, columns)) for part in parts])

    def matrices(self, parts: Sequence[Part], count: int, columns: int) -> tuple[Matrix, ...]:
        """``count`` matrices (experts, heads) from tensors [count, rows, columns]: the i-th from the i-th of each of ``parts``."""
        raws = [self._raw(part.name + ".weight", (count, part.rows, columns)) for part in parts]
        packed = tuple(self._pack([_item(raw, i) for raw in raws], done=False) for i in range(count))
        self._done(raws)
        return packed

    def split_heads(
        self, name: str, heads: int, sizes: tuple[int, int], columns: int
    ) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
        """Of a matrix that holds some rows of a first kind and some of a second (``sizes``) for each head in turn: the first of each
        head transposed, as float32, and the second."""
        first, second = sizes
        raw = self._raw(name + ".weight", (heads * (first + second), columns))
        if not self.pack:
            return (None,) * heads, (None,) * heads
        by_head = replace(raw, shape=(heads, first + second, columns), data=raw.data.reshape(heads, first + second, -1))
        of_heads = [_item(by_head, i) for i in range(heads)]
        packed = (
            tuple(self._pack([_transposed(_rows(head, 0, first))], done=False) for head in of_heads),
            tuple(self._pack([_rows(head, first, first + second)], done=False) for head in of_heads),
        )
        self._done([raw])
        return packed

    def linear(self, parts: Sequence[Part], columns: int, factor: float = 1.0) -> Linear:
        """The same with the biases and scales that the file has for them; ``factor`` multiplies the result."""
        bias, scale = self._stacked(parts, ".bias", 0.0), self._stacked(parts, ".scale", 1.0)
        if factor != 1.0:
            ones = np.ones(sum(part.rows for part in parts), np.float32)
            scale = (ones if scale is None else scale) * np.float32(factor)
            bias = None if bias is None else bias * np.float32(factor)
        matrix = self.matrix(parts, columns)
        first = parts[0].name
        return Linear(matrix, self._vector(first + ".bias", bias), self._vector(first + ".scale", scale))

    def norm(self, name: str, width: int, eps: float, *, centred: bool, repeat: int = 1) -> Norm:
        """A norm over ``width`` values, of all ``repeat`` heads where it is one for each or one for all."""
        weight = self._heads(name + ".weight", width, repeat)
        bias = self._heads(name + ".bias", width, repeat) if name + ".bias" in self else None
        packed = self._vector(name + ".weight", weight)
        return Norm(packed, eps, centred, self._vector(name + ".bias", bias))

    def weightless_norm(self, name: str, width: int, eps: float, *, centred: bool) -> Norm:
        """A norm that only normalises: nothing in the file belongs to it, and its name says only whose it is."""
        return Norm(self._vector(name + ".weight", np.ones(width, np.float32)), eps, centred)

    def first_row(self, name: str, columns: int) -> Array:
        """Of a matrix with any number of rows, as a vector."""
        shape = self.file.tensors[name].shape
        raw = self._raw(name, (shape[0] if len(shape) > 1 else 1, columns))
        values = _rows(raw, 0, 1).dequantised().reshape(-1)
        self._done([raw])
        return self._vector(name, values)

    def vector(self, name: str, width: int) -> Array:
        """A vector of ``width`` numbers."""
        return self._vector(name, self.numbers(name, width))

    def numbers(self, name: str, width: int) -> F32:
        """The same as float32, which also a check reads: it is small."""
        raw = self._raw(name, (width,))
        values = raw.dequantised()
        self._done([raw])
        return values

    def refuse_unused(self, architecture: str, n_layers: int) -> None:
        """A tensor that nothing asked for would be left out of the computation: raises UnsupportedError that names it. What is in
        layers from ``n_layers`` on is left out knowingly."""
        unused = [name for name in self.file.tensors if name not in self._used and _layer_of(name) < n_layers]
        if unused:
            raise UnsupportedError(f"tensor {shown(unused[0])}: not part of the {architecture} network that shoal runs")

    def _stacked(self, parts: Sequence[Part], suffix: str, missing: float) -> F32 | None:
        """Vectors of some matrices end to end, ``missing`` for those without one; None where none has one."""
        if not any(part.name + suffix in self for part in parts):
            return None
        return np.concatenate([self._numbers_of(part, suffix, missing) for part in parts])

    def _numbers_of(self, part: Part, suffix: str, missing: float) -> F32:
        name = part.name + suffix
        if name not in self:
            return np.full(part.rows, missing, np.float32)
        if self.file.tensors[name].shape == (1,):  # one number for all rows
            return np.repeat(self.numbers(name, 1), part.rows)
        return self.numbers(name, part.rows)

    def _heads(self, name: str, width: int, repeat: int) -> F32:
        """[repeat * width]: as the file has it, or its [width] again and again."""
        if name in self and repeat > 1 and self.file.tensors[name].shape != (width,):
            raw = self._raw(name, (repeat, width))
            self._done([raw])
            return raw.dequantised().reshape(-1)
        return np.tile(self.numbers(name, width), repeat)

    def _vector(self, name: str, values: F32 | None) -> Array | None:
        if values is None or not self.pack:
            return None
        values = np.ascontiguousarray(values, np.float32)
        return self.backend.vector(RawTensor(name, _F32, values.shape, values.view(np.uint8)))

    def _raw(self, name: str, shape: tuple[int, ...]) -> RawTensor:
        info = self.file.tensors.get(name)
        if info is None:
            raise self.file.error(name, "tensor is missing")
        if _without_ones(info.shape) != _without_ones(shape):
            raise self.file.error(name, f"shape {info.shape} should be {shape} by the metadata")
        for owner in self.backend.owners(name) if len(shape) > 1 else ():
            if not owner.supports(info.format):
                raise UnsupportedError(f"tensor {name}: type {info.format.name} is not supported yet on {owner.name}")
        self._used.add(name)
        data = self.file.tensor(name)
        return RawTensor(name, info.format, shape, data.reshape(*shape[:-1], data.shape[-1]), self.file.scale(name))

    def _pack(self, parts: list[RawTensor], *, done: bool = True) -> Matrix:
        if not self.pack:
            return None
        packed = self.backend.matrix(parts)
        if done:
            self._done(parts)
        return packed

    def _done(self, raws: Sequence[RawTensor]) -> None:
        """These live in the backend's layout now: let their file pages go and report."""
        if not self.pack:
            return
        for raw in raws:
            self._packed_bytes += self.file.tensors[raw.name].nbytes
            self.file.release(raw.name)
        if self.progress is not None:
            self.progress(self._packed_bytes, self.total)


def _layer_of(name: str) -> int:
    """The layer that a tensor belongs to; -1 for those of the whole model."""
    first, *rest = name.split(".")
    return int(rest[0]) if first == "blk" and rest and rest[0].isdecimal() else -1


def _rows(raw: RawTensor, first: int, end: int) -> RawTensor:
    """Some rows of a matrix."""
    return replace(raw, shape=(end - first, raw.shape[1]), data=raw.data[first:end])


def _transposed(raw: RawTensor) -> RawTensor:
    """A matrix the other way round, in float32: blocks of quantised values lie along rows."""
    values = np.ascontiguousarray(raw.dequantised().T)
    return RawTensor(raw.name, _F32, values.shape, values.view(np.uint8))


def _item(raw: RawTensor, index: int) -> RawTensor:
    """One matrix of a stack."""
    return RawTensor(raw.name, raw.format, raw.shape[1:], raw.data[index], raw.scale)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF leaves out trailing dimensions of 1, which are the first ones here."""
    return tuple(size for i, size in enumerate(shape) if size != 1 or i == len(shape) - 1)
