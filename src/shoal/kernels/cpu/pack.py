"""GGUF blocks -> the layout the kernels read: strips of 16 weight rows, so that one register holds 16 rows.

A strip is stored group by group (32 columns), and within a group *quad* by quad: the 4 columns 4q ... 4q + 3 of 16 rows are
64 bytes, row by row. Everything a group needs lies together, in the order it is read:

    strip    | block | block | ...                                       a block is 256 columns, or one group where no head is needed
    block    | head, 16 rows | group | group | ...                       head: the float scales that a K-quant keeps for 256 columns
    group    | planes of codes | scales, 16 rows | scales, 16 rows ...

    bits of a code     planes (bytes)
    2                  pairs 128               vector i: quads 4i ... 4i + 3 in bits 0-1, 2-3, 4-5, 6-7
    3                  pairs 128 | bits 64     bit q: third bit of quad q
    4                  nibbles 256             vector i: quad i low, quad i + 4 high
    5                  nibbles 256 | bits 64
    6                  nibbles 256 | pairs 128
    8                  bytes 512               vector q: quad q
    F32 F16 BF16       column by column, 16 rows each

Codes and scales of each type: codes.py. The kernels' side of the same layout: groups.py. Rows past the last are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.base import RawTensor
from shoal.kernels.codes import codes as unpacked
from shoal.kernels.cpu.arena import Arena

STRIP = 16
GROUP = 32
BLOCK = 256
_STEP = 1 << 20  # codes packed at a time
_NO_HEAD = np.empty((0, 0, 0), np.uint8)
_STORED = {"Q4_0": np.uint16, "Q4_1": np.uint16, "IQ4_NL": np.uint16, "MXFP4": np.uint8}
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
Bytes = NDArray[Any]  # uint8


@dataclass(frozen=True, slots=True)
class Layout:
    """How one type is laid out: bits of a code, and bytes for one row of a head and of a group's scales. Float types have
    ``code_bits`` 0 and ``scale_bytes`` for one column."""

    name: str
    code_bits: int
    scale_bytes: int
    row_head_bytes: int = 0
    blocks_of_256: bool = False

    @property
    def is_float(self) -> bool:
        """Whether weights are floats, column by column."""
        return self.code_bits == 0

    @property
    def head_bytes(self) -> int:
        """Bytes of a block's head in a strip."""
        return STRIP * self.row_head_bytes

    @property
    def group_bytes(self) -> int:
        """Bytes of a group in a strip (float types: of a column)."""
        return STRIP * (self.scale_bytes + GROUP * self.code_bits // 8)

    @property
    def groups_per_block(self) -> int:
        """Groups that share a head."""
        return BLOCK // GROUP if self.blocks_of_256 else 1

    def strip_bytes(self, columns: int) -> int:
        """Bytes of one strip."""
        if self.is_float:
            return columns * self.group_bytes
        groups = columns // GROUP
        return groups * self.group_bytes + groups // self.groups_per_block * self.head_bytes


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("F32", 0, 4),
        Layout("F16", 0, 2),
        Layout("BF16", 0, 2),
        Layout("Q4_0", 4, 2),
        Layout("Q4_1", 4, 4),
        Layout("Q5_0", 5, 2),
        Layout("Q5_1", 5, 4),
        Layout("Q8_0", 8, 2),
        Layout("Q8_K", 8, 0, 4, True),
        Layout("Q2_K", 2, 2, 4, True),
        Layout("Q3_K", 3, 2, 2, True),
        Layout("Q4_K", 4, 2, 4, True),
        Layout("Q5_K", 5, 2, 4, True),
        Layout("Q6_K", 6, 2, 2, True),
        Layout("IQ4_NL", 4, 2),
        Layout("IQ4_XS", 4, 1, 2, True),
        Layout("MXFP4", 4, 1),
        Layout("IQ3_XXS", 4, 1, 2, True),
        Layout("IQ3_S", 4, 1, 2, True),
        Layout("IQ2_XXS", 3, 1, 2, True),
        Layout("IQ2_XS", 3, 1, 2, True),
        Layout("IQ2_S", 3, 1, 2, True),
        Layout("IQ1_S", 2, 2, 2, True),
        Layout("IQ1_M", 2, 2, 2, True),
        Layout("TQ1_0", 2, 0, 2, True),
        Layout("TQ2_0", 2, 0, 2, True),
        Layout("I2_S", 2, 0),
    )
}


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Rows ``first_row`` ... ``first_row`` + ``rows`` - 1 of a matrix, all of one type: [strips, strip bytes]."""

    layout: Layout
    first_row: int
    rows: int
    data: Bytes
    scale: NDArray[np.float32]  # [1]: of the whole tensor


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight matrix [rows, columns] as the kernels read it."""

    rows: int
    columns: int
    parts: tuple[PackedPart, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(part.data.nbytes for part in self.parts)


def pack_matrix(tensors: list[RawTensor], arena: Arena) -> PackedMatrix:
    """Stack matrices that read the same input; neighbours of one type become one part."""
    parts: list[PackedPart] = []
    row, columns = 0, tensors[0].shape[1]
    for same in _runs(tensors):
        layout = LAYOUTS[same[0].format.name]
        rows = sum(t.shape[0] for t in same)
        raw = same[0].data if len(same) == 1 else np.concatenate([t.data for t in same])
        scale = np.array([same[0].scale], np.float32)
        parts.append(PackedPart(layout, row, rows, _pack_strips(layout, raw, columns, arena), scale))
        row += rows
    return PackedMatrix(row, columns, tuple(parts))


def _runs(tensors: list[RawTensor]) -> list[list[RawTensor]]:
    """Neighbours of one type, and of one scale where tensors have one."""
    runs: list[list[RawTensor]] = []
    for tensor in tensors:
        if runs and (runs[-1][0].format, runs[-1][0].scale) == (tensor.format, tensor.scale):
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


def _pack_strips(layout: Layout, raw: Bytes, columns: int, arena: Arena) -> Bytes:
    """[rows, row bytes] -> [strips, strip bytes], a few strips at a time so that scratch memory stays small."""
    pack = _pack_floats if layout.is_float else _pack_codes
    strips = -(-len(raw) // STRIP)
    out = arena.array(strips, layout.strip_bytes(columns))
    step = max(1, _STEP // (columns * STRIP))
    for first in range(0, strips, step):
        last = min(first + step, strips)
        pack(layout, _whole_strips(raw[first * STRIP : last * STRIP]), out[first:last])
    return out


def _whole_strips(rows: Bytes) -> Bytes:
    """Rows of zeros behind the last ones, up to a multiple of 16."""
    missing = -len(rows) % STRIP
    return np.pad(rows, ((0, missing), (0, 0))) if missing else rows


def _pack_floats(layout: Layout, raw: Bytes, out: Bytes) -> None:
    """[rows, row bytes] into [strips, strip bytes]."""
    kind = {2: np.uint16, 4: np.uint32}[layout.scale_bytes]
    _by_rows(np.ascontiguousarray(raw).view(kind), out)


def _pack_codes(layout: Layout, raw: Bytes, out: Bytes) -> None:
    """[rows, row bytes] (rows a multiple of 16) into [strips, strip bytes]."""
    codes = _stored if layout.name in _STORED else _codes
    head, *parts = codes(layout, raw)
    blocks = out.reshape(len(out), -1, layout.head_bytes + layout.groups_per_block * layout.group_bytes)
    if layout.head_bytes:
        _by_rows(head, blocks[..., : layout.head_bytes])
    by_group = (blocks.shape[1], layout.groups_per_block)
    groups = blocks[..., layout.head_bytes :].reshape(len(out), *by_group, layout.group_bytes)
    place = 0
    for part in parts:
        end = place + STRIP * part.shape[-1] * part.itemsize
        _by_rows(part.reshape(len(raw), *by_group, -1), groups[..., place:end])
        place = end


def _codes(layout: Layout, raw: Bytes) -> tuple[NDArray[Any], ...]:
    """Head [rows, blocks, n], planes and scales [rows, groups, n] of some rows."""
    rows = unpacked(layout.name, raw)
    return rows.head, *_planes(rows.values.reshape(len(raw), -1, GROUP), layout.code_bits), rows.scales


def _stored(layout: Layout, raw: Bytes) -> tuple[NDArray[Any], ...]:
    """The same of types whose blocks are scales, of this dtype, and then the plane as it is to be."""
    kind = _STORED[layout.name]
    blocks = raw.reshape(len(raw), -1, layout.scale_bytes + GROUP // 2)
    return _NO_HEAD, blocks[..., layout.scale_bytes :].view(np.uint32), blocks[..., : layout.scale_bytes].view(kind)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _planes(values: Bytes, code_bits: int) -> list[NDArray[np.uint32]]:
    """Codes [..., 32] -> planes, quad by quad [..., n]."""
    quads = np.ascontiguousarray(values).view(np.uint32)
    if code_bits == 8:
        return [quads]
    if code_bits < 4:
        planes = [_join_bits(quads, 2)]
        return planes if code_bits == 2 else [*planes, _join_bits(quads >> np.uint32(2), 1)]
    planes = [_nibbles(quads)]
    return planes if code_bits == 4 else [*planes, _join_bits(quads >> np.uint32(4), code_bits - 4)]


def _nibbles(quads: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """[..., 8] codes -> [..., 4]: the lower four bits of quad i and of quad i + 4."""
    pairs = quads.view(np.uint64) & np.uint64(_LOW_NIBBLES)
    joined = np.empty((*pairs.shape[:-1], 2), np.uint64)
    for i in range(2):  # long loops instead of many of two
        np.left_shift(pairs[..., i + 2], np.uint64(4), out=joined[..., i])
        joined[..., i] |= pairs[..., i]
    return joined.view(np.uint32)


def _join_bits(quads: NDArray[np.uint32], width: int) -> NDArray[np.uint32]:
    """[..., 8] codes, of which the lowest ``width`` bits count -> [..., width]: byte i of word v holds column i of its 8 / width
    quads."""
    per_word = 8 // width
    kept = quads & np.uint32(0x01010101 * ((1 << width) - 1))
    joined = kept[..., ::per_word].copy()
    for i in range(1, per_word):
        joined |= kept[..., i::per_word] << np.uint32(i * width)
    return joined


def _by_rows(x: NDArray[Any], out: Bytes) -> None:
    """[rows, ..., n] values into [strips, ..., 16 n values as bytes]: value by value, those of 16 rows together."""
    lanes = out.view(x.dtype).reshape(*out.shape[:-1], x.shape[-1], STRIP)
    lanes[...] = np.moveaxis(x.reshape(len(out), STRIP, *x.shape[1:]), 1, -1)
