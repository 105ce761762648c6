"""GGUF blocks -> the planes that kernels read, on the device. Codes and scales are those of kernels/codes.py, bit by bit.

A matrix is cut into *blocks* of 256 columns, a block into 8 groups of 32. All rows of a block lie together, plane by plane, so that
the tile of any number of neighbouring rows is contiguous in each plane. A *word* is 32 bits; R is the number of rows, rounded up to
a multiple of 128; rows and columns past the last are zeros.

    header            float32 scale, float32 1 / scale, nothing up to byte 128
    block 0           planes of codes | words of scales [n, R] | head [R]
    block 1 ...

    bits of a code    planes of codes                        lane j of a row holds, of columns 256 block + 32 g + j:
    4                 uint16 [2, R, 32]                      in lane h code g in bits 4 (g - 4h) ..., g = 4h to 4h + 3
    8                 uint16 [4, R, 32]                      in lane h code g in bits 8 (g - 2h) ..., g = 2h and 2h + 1
    2                 uint16 [R, 32]                         code g in bits 2g, 2g + 1
    3                 uint16 [R, 32], uint8 [R, 32]          its lower 2 bits so; in the byte its upper bit in bit g
    5                 uint16 [2, R, 32], uint8 [R, 32]       its lower 4 bits so; in the byte its upper bit in bit g
    6                 uint16 [2, R, 32], uint16 [R, 32]      its lower 4 bits so; its upper 2 bits in bits 2g, 2g + 1
    F32 F16 BF16      as stored, [8, R, 32]                  in tile g the column itself

    scales of bytes   words [2n, R]: of scale i and groups 4h to 4h + 3 in word 2i + h, the first in its lowest bits
    scales of float16 words [4n, R]: of scale i and groups 2h, 2h + 1 in word 4i + h
    head              one word of two float16 (the first in the lower half), or the one there is as float32

The head of I2_S is the scale of the tensor. A weight divided by ``scale``, a power of two, is no larger than 2^15: kernels round
that to float16 and multiply their sums by ``scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.kernels.base import RawTensor
from shoal.kernels.codes import IQ2_LEVELS, IQ3_XXS_LEVELS, IQ4_VALUES, MXFP4_VALUES, Codes, codes
from shoal.kernels.cuda.launch import Tensor, device

HEADER = 128  # bytes
BLOCK = 256  # columns
GROUP = 32
ROW_TILE = 128  # R is a multiple of it
_LARGEST_EXPONENT = 15  # weights are divided so that none is above 2^15
_CHUNK = 1 << 22  # weights that are packed at a time, so that scratch memory stays small

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """Of one type: bits of a code, words of scales of a row and block, and whether it has a head. Float types have ``bits`` 0 and
    ``value_bytes``."""

    name: str
    bits: int
    scale_words: int = 0
    head: bool = False
    value_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a block."""
        return 32 * self.bits + 4 * self.scale_words + 4 * self.head + BLOCK * self.value_bytes

    @property
    def constants(self) -> dict[str, Any]:
        """What decoders (unpack.py) are compiled for."""
        return {"FORMAT": self.name, "BITS": self.bits, "ROW_BYTES": self.row_bytes}


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("F32", 0, value_bytes=4),
        Layout("F16", 0, value_bytes=2),
        Layout("BF16", 0, value_bytes=2),
        Layout("Q4_0", 4, 4),
        Layout("Q4_1", 4, 8),
        Layout("Q5_0", 5, 4),
        Layout("Q5_1", 5, 8),
        Layout("Q8_0", 8, 4),
        Layout("Q8_K", 8, 0, True),
        Layout("Q2_K", 2, 4, True),
        Layout("Q3_K", 3, 4, True),
        Layout("Q4_K", 4, 4, True),
        Layout("Q5_K", 5, 4, True),
        Layout("Q6_K", 6, 4, True),
        Layout("IQ4_NL", 4, 4),
        Layout("IQ4_XS", 4, 2, True),
        Layout("MXFP4", 4, 2),
        Layout("IQ3_XXS", 4, 2, True),
        Layout("IQ3_S", 4, 2, True),
        Layout("IQ2_XXS", 3, 2, True),
        Layout("IQ2_XS", 3, 2, True),
        Layout("IQ2_S", 3, 2, True),
        Layout("IQ1_S", 2, 4, True),
        Layout("IQ1_M", 2, 4, True),
        Layout("TQ1_0", 2, 0, True),
        Layout("TQ2_0", 2, 0, True),
        Layout("I2_S", 2, 0, True),
    )
}

SUPPORTED = frozenset(LAYOUTS)
"""Names of the formats that can be packed."""


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Rows ``first_row`` ... ``first_row`` + ``rows`` - 1 of a matrix, all of one type: ``data`` uint8 as drawn above."""

    layout: Layout
    first_row: int
    rows: int
    columns: int
    data: Tensor
    scale: float

    @property
    def padded_rows(self) -> int:
        """R."""
        return _padded(self.rows, ROW_TILE)

    @property
    def blocks(self) -> int:
        """Blocks of 256 columns, the last of which may be filled with zeros."""
        return -(-self.columns // BLOCK)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight matrix [rows, columns] as the kernels read it."""

    rows: int
    columns: int
    parts: tuple[PackedPart, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the memory of the device."""
        return sum(part.data.numel() for part in self.parts)


def pack_matrix(tensors: Sequence[RawTensor]) -> PackedMatrix:
    """Stack matrices that read the same input; neighbours of one type become one part."""
    parts: list[PackedPart] = []
    row, columns = 0, tensors[0].shape[1]
    for same in _runs(tensors):
        rows = sum(tensor.shape[0] for tensor in same)
        data, scale = _pack(same, rows, columns)
        parts.append(PackedPart(LAYOUTS[same[0].format.name], row, rows, columns, data, scale))
        row += rows
    return PackedMatrix(row, columns, tuple(parts))


def _runs(tensors: Sequence[RawTensor]) -> list[list[RawTensor]]:
    """Neighbours of one type."""
    runs: list[list[RawTensor]] = []
    for tensor in tensors:
        if runs and runs[-1][0].format == tensor.format:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# --- writing planes --------------------------------------------------------------------------------------------------


def _pack(tensors: Sequence[RawTensor], rows: int, columns: int) -> tuple[Tensor, float]:
    """Tensors of one type, one below the other: their planes on the device, and the scale."""
    layout, padded, blocks = LAYOUTS[tensors[0].format.name], _padded(rows, ROW_TILE), -(-columns // BLOCK)
    data = np.zeros(HEADER + blocks * padded * layout.row_bytes, np.uint8)
    planes = _Planes(data[HEADER:].reshape(blocks, padded * layout.row_bytes), padded)
    write = _write_floats if layout.bits == 0 else _write_codes
    step, largest, row = max(1, _CHUNK // columns), 0.0, 0
    for tensor in tensors:
        for first in range(0, tensor.shape[0], step):
            raw = tensor.data[first : first + step]
            largest = max(largest, write(planes, layout, row, raw, tensor))
            row += len(raw)
    scale = _scale_for(largest)
    data[:8].view(np.float32)[:] = scale, 1 / scale
    return torch.from_numpy(data).to(device()), scale


def _scale_for(largest: float) -> float:
    """The power of two that brings weights up to ``largest`` in magnitude to 2^15 at most."""
    if largest == 0:
        return 1.0
    return float(2.0 ** np.clip(np.frexp(largest)[1] - _LARGEST_EXPONENT, -126, 126))


class _Planes:
    """The bytes of all blocks [blocks, block bytes], written plane after plane: ``rows`` of each are R times its own row's bytes."""

    def __init__(self, data: Bytes, padded_rows: int) -> None:
        self._data, self._rows, self._offset = data, padded_rows, 0

    def rewind(self) -> None:
        """Begin with the first plane."""
        self._offset = 0

    def put(self, first_row: int, values: NDArray[Any]) -> None:
        """Some rows of the next plane: values [rows, blocks] or [rows, blocks, lanes]."""
        lanes = values.reshape(*values.shape[:2], -1)
        size = lanes.shape[2] * lanes.itemsize
        plane = self._data[:, self._rows * self._offset : self._rows * (self._offset + size)]
        rows = plane.view(lanes.dtype).reshape(len(plane), self._rows, lanes.shape[2])
        rows[:, first_row : first_row + len(lanes)] = lanes.transpose(1, 0, 2)
        self._offset += size


def _write_floats(planes: _Planes, layout: Layout, row: int, raw: Bytes, tensor: RawTensor) -> float:
    """Rows of floats, as they are. Returns their largest magnitude that is finite."""
    kind = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}[layout.name]
    values = _fill(np.ascontiguousarray(raw).view(kind), BLOCK)
    tiles = values.reshape(len(raw), -1, BLOCK // GROUP, GROUP)
    planes.rewind()
    for tile in tiles.transpose(2, 0, 1, 3):
        planes.put(row, np.ascontiguousarray(tile))
    return _largest(_as_floats(layout.name, values))


def _as_floats(name: str, values: NDArray[Any]) -> F32:
    if name == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.view({"F32": np.float32, "F16": np.float16}[name]).astype(np.float32)


def _write_codes(planes: _Planes, layout: Layout, row: int, raw: Bytes, tensor: RawTensor) -> float:
    """Rows of codes. Returns a bound of the magnitude of their weights."""
    rows = codes(layout.name, raw)
    if layout.name == "I2_S":
        rows = Codes(rows.values, _tensor_scale(rows.values, tensor.scale), rows.scales)
    planes.rewind()
    for lanes in _code_planes(_fill(rows.values, BLOCK).reshape(len(raw), -1, BLOCK // GROUP, GROUP), layout.bits):
        planes.put(row, lanes)
    for words in _scale_words(rows.scales):
        planes.put(row, words)
    if layout.head:
        planes.put(row, _head_words(rows.head))
    return _bound(layout.name, rows)


def _tensor_scale(values: Bytes, scale: float) -> F32:
    return np.full((len(values), -(-values.shape[1] // BLOCK), 1), scale, np.float32)


def _fill(values: NDArray[Any], multiple: int) -> NDArray[Any]:
    """[rows, n, ...] with zeros up to a multiple of n."""
    missing = -values.shape[1] % multiple
    return np.pad(values, [(0, 0), (0, missing)] + [(0, 0)] * (values.ndim - 2)) if missing else values


def _code_planes(values: Bytes, bits: int) -> list[NDArray[Any]]:
    """Codes [rows, blocks, 8, 32] -> lanes [rows, blocks, 32] of each plane."""
    low = next(width for width in (8, 4, 2) if bits >= width)
    lanes, per_lane = values & np.uint8((1 << low) - 1), 16 // low
    planes = [_join(lanes[:, :, g : g + per_lane], low, np.uint16) for g in range(0, BLOCK // GROUP, per_lane)]
    if bits > low:
        planes.append(_join(values >> np.uint8(low), bits - low, {1: np.uint8, 2: np.uint16}[bits - low]))
    return planes


def _join(values: Bytes, width: int, kind: Any) -> NDArray[Any]:
    """Numbers of ``width`` bits [rows, blocks, n, 32] -> one of n times as many [rows, blocks, 32], the first in the lowest bits."""
    joined = values[:, :, 0].astype(kind)
    for i in range(1, values.shape[2]):
        joined |= values[:, :, i].astype(kind) << kind(i * width)
    return joined


def _scale_words(scales: NDArray[Any]) -> list[Words]:
    """Scales [rows, groups, n] -> words, each [rows, blocks]."""
    filled = _fill(scales, BLOCK // GROUP)
    rows, groups, count = filled.shape
    each = np.ascontiguousarray(filled.transpose(2, 0, 1)).reshape(count, rows, groups // 8, 8)
    words = each.view(np.uint32)
    return [np.ascontiguousarray(words[i, :, :, h]) for i in range(count) for h in range(words.shape[3])]


def _head_words(head: NDArray[Any]) -> NDArray[Any]:
    """[rows, blocks, n] -> [rows, blocks]: two float16 in a word, or one as float32."""
    if head.shape[2] == 2:
        return np.ascontiguousarray(head).view(np.uint32)[:, :, 0]
    return _floats(head[:, :, 0])


# --- how large weights can be ----------------------------------------------------------------------------------------


def _floats(stored: NDArray[Any]) -> F32:
    """The bits of float16 as float32; float32 as it is."""
    if stored.dtype == np.float32:
        return stored
    return np.ascontiguousarray(stored).view(np.float16).astype(np.float32)


def _largest(values: F32) -> float:
    """The largest magnitude that is finite, 0 if none is."""
    return float(np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0))


def _bound(name: str, rows: Codes) -> float:
    """Of the magnitudes of all finite weights: the largest scales times the largest code, from scales and heads alone."""
    heads = [_largest(_floats(rows.head[:, :, i])) for i in range(rows.head.shape[2])]
    return _BOUNDS[name](rows.scales, heads)


def _of_floats(largest_code: int) -> Callable[[NDArray[Any], list[float]], float]:
    """Scales are floats: d, and m, which is added once."""

    def bound(scales: NDArray[Any], heads: list[float]) -> float:
        largest = [_largest(_floats(scales[:, :, i])) for i in range(scales.shape[2])]
        return largest[0] * largest_code + sum(largest[1:])

    return bound


def _of_heads(factor: float) -> Callable[[NDArray[Any], list[float]], float]:
    """d times at most ``factor``, and n at most 63 times."""
    return lambda scales, heads: heads[0] * factor + sum(heads[1:]) * 63


def _of_exponents(scales: NDArray[Any], heads: list[float]) -> float:
    return float(2.0 ** (int(scales.max()) - 128)) * max(MXFP4_VALUES)


_BOUNDS: dict[str, Callable[[NDArray[Any], list[float]], float]] = {
    "Q4_0": _of_floats(8),
    "Q4_1": _of_floats(15),
    "Q5_0": _of_floats(16),
    "Q5_1": _of_floats(31),
    "Q8_0": _of_floats(128),
    "Q8_K": _of_heads(128),
    "Q2_K": _of_heads(15 * 3),
    "Q3_K": _of_heads(32 * 4),
    "Q4_K": _of_heads(63 * 15),
    "Q5_K": _of_heads(63 * 31),
    "Q6_K": _of_heads(128 * 32),
    "IQ4_NL": _of_floats(-min(IQ4_VALUES)),
    "IQ4_XS": _of_heads(-32 * min(IQ4_VALUES)),
    "MXFP4": _of_exponents,
    "IQ3_XXS": _of_heads(31 / 4 * max(IQ3_XXS_LEVELS)),
    "IQ3_S": _of_heads(31 * 15),
    "IQ2_XXS": _of_heads(31 / 8 * max(IQ2_LEVELS)),
    "IQ2_XS": _of_heads(31 / 8 * max(IQ2_LEVELS)),
    "IQ2_S": _of_heads(31 / 8 * max(IQ2_LEVELS)),
    "IQ1_S": _of_heads(15 * 1.125),
    "IQ1_M": _of_heads(15 * 1.125),
    "TQ1_0": _of_heads(2),
    "TQ2_0": _of_heads(2),
    "I2_S": _of_heads(2),
}
