"""GGUF blocks -> the layouts the kernels read: strips of 16 weight rows, so that one register holds 16 rows.

A strip is stored group by group (32 columns), and within a group *quad* by quad: the 4 columns 4q ... 4q + 3 of 16 rows are
64 bytes, row by row. Everything a group needs lies together, in the order it is read. Numbers are bytes.

    Q4_0   nibbles 256 | d f16 32                             vector j: low nibbles quad j, high nibbles quad j + 4
    Q4_1   nibbles 256 | d f16 32 | m f16 32
    Q8_0   bytes 512 (value + 128) | d f16 32                 vector q: quad q
    Q4_K   d, dmin f16 64, then 8 x (nibbles 256 | scale u8 16 | min u8 16)
    Q5_K   d, dmin f16 64, then 8 x (nibbles 256 | bits 64 | scale u8 16 | min u8 16)      bit q: quad q
    Q6_K   d f16 32,       then 8 x (nibbles 256 | pairs 128 | scales i8 2 x 16)           2 bits of quads 0-3, 4-7
    F32 F16 BF16   column by column, 16 rows each

Rows past the last are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.kernels.base import RawTensor

STRIP = 16
GROUP = 32
Bytes = NDArray[Any]  # uint8


@dataclass(frozen=True, slots=True)
class Layout:
    """How one GGUF type is laid out: bytes of a group (or of one column, for floats) of a strip, and of what stands before
    every ``per_header`` groups."""

    name: str
    group_bytes: int
    pack: Callable[[Bytes, int], Bytes]
    header_bytes: int = 0
    is_float: bool = False

    def strip_bytes(self, columns: int) -> int:
        """Bytes of one strip."""
        if self.is_float:
            return columns * self.group_bytes
        return columns // GROUP * self.group_bytes + (columns // 256 * self.header_bytes if self.header_bytes else 0)


@dataclass(frozen=True, slots=True)
class PackedPart:
    """Rows ``first_row`` ... ``first_row`` + ``rows`` - 1 of a matrix, all of one type: [strips, strip bytes]."""

    layout: Layout
    first_row: int
    rows: int
    data: Bytes


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


def pack_matrix(tensors: list[RawTensor]) -> PackedMatrix:
    """Stack matrices that read the same input; neighbours of one type become one part."""
    parts: list[PackedPart] = []
    row = 0
    for same in _runs(tensors):
        layout = LAYOUTS[same[0].format.name]
        rows, columns = sum(t.shape[0] for t in same), same[0].shape[1]
        raw = same[0].data if len(same) == 1 else np.concatenate([t.data for t in same])
        parts.append(PackedPart(layout, row, rows, _pack_strips(layout, raw, columns)))
        row += rows
    return PackedMatrix(row, tensors[0].shape[1], tuple(parts))


def _runs(tensors: list[RawTensor]) -> list[list[RawTensor]]:
    runs: list[list[RawTensor]] = []
    for tensor in tensors:
        if runs and runs[-1][0].format == tensor.format:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return runs


def _pack_strips(layout: Layout, raw: Bytes, columns: int) -> Bytes:
    """[rows, row bytes] -> [strips, strip bytes], a few strips at a time so that scratch memory stays small."""
    rows = len(raw)
    strips = -(-rows // STRIP)
    out = np.empty((strips, layout.strip_bytes(columns)), np.uint8)
    step = max(1, (4 << 20) // (raw.shape[1] * STRIP))
    for first in range(0, strips, step):
        last = min(first + step, strips)
        block = raw[first * STRIP : last * STRIP]
        if len(block) < (last - first) * STRIP:
            padded = np.zeros(((last - first) * STRIP, raw.shape[1]), np.uint8)
            padded[: len(block)] = block
            block = padded
        out[first:last] = layout.pack(block, columns).reshape(last - first, -1)
    return out


# --- pieces ----------------------------------------------------------------------------------------------------------


def _by_quads(x: Bytes) -> Bytes:
    """[rows, groups, 4n] bytes -> [strips, groups, n, 16 rows, 4] -> [strips, groups, 64 n]."""
    rows, groups, width = x.shape
    quads = np.ascontiguousarray(x).view(np.uint32).reshape(rows // STRIP, STRIP, groups, width // 4)
    return (
        np.ascontiguousarray(quads.transpose(0, 2, 3, 1)).view(np.uint8).reshape(rows // STRIP, groups, width * STRIP)
    )


def _by_rows(x: NDArray[Any]) -> Bytes:
    """[rows, groups, n] values -> [strips, groups, n, 16 rows] as bytes [strips, groups, ...]."""
    rows, groups, width = x.shape
    lanes = np.ascontiguousarray(x.reshape(rows // STRIP, STRIP, groups, width).transpose(0, 2, 3, 1))
    return lanes.view(np.uint8).reshape(rows // STRIP, groups, -1)


def _join_nibbles(values: Bytes) -> Bytes:
    """[..., 32] values below 16 -> [..., 16]: low nibbles columns 0-15, high nibbles columns 16-31."""
    joined: Bytes = values[..., :16] | (values[..., 16:] << 4)
    return joined


def _join_bits(values: Bytes, width: int) -> Bytes:
    """[..., 32] values of ``width`` bits -> [..., 4 * width]: byte i of word v holds column i of its 8 / width quads."""
    per_word = 8 // width
    quads = values.reshape(*values.shape[:-1], width, per_word, 4)
    shifts = (np.arange(per_word, dtype=np.uint8) * width)[:, None]
    joined: Bytes = np.bitwise_or.reduce(quads << shifts, axis=-2)
    return joined.reshape(*values.shape[:-1], 4 * width)


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 8 six-bit scales and mins in the 12 bytes of a Q4_K or Q5_K block: [..., 12] -> [..., 8] each."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=-1)
    mins = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=-1)
    return scales, mins


# --- one function a type: [rows, row bytes] (rows a multiple of 16) -> [strips, ...] ---------------------------------


def _pack_q4_0(raw: Bytes, columns: int) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 18)
    return np.concatenate([_by_quads(blocks[..., 2:]), _by_rows(_halves(blocks[..., :2]))], axis=-1)


def _pack_q4_1(raw: Bytes, columns: int) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 20)
    return np.concatenate([_by_quads(blocks[..., 4:]), _by_rows(_halves(blocks[..., :4]))], axis=-1)


def _pack_q8_0(raw: Bytes, columns: int) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 34)
    return np.concatenate([_by_quads(blocks[..., 2:] ^ 0x80), _by_rows(_halves(blocks[..., :2]))], axis=-1)


def _pack_q4_k(raw: Bytes, columns: int) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 144)
    scales, mins = _k_scales(blocks[..., 4:16])
    nibbles = _join_nibbles(_k_low(blocks[..., 16:]))
    return _super_blocks(blocks[..., :4], [_by_quads(_groups(nibbles)), *_lane_bytes(scales, mins)])


def _pack_q5_k(raw: Bytes, columns: int) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 176)
    scales, mins = _k_scales(blocks[..., 4:16])
    nibbles = _join_nibbles(_k_low(blocks[..., 48:]))
    high = blocks[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    planes = [_by_quads(_groups(nibbles)), _by_quads(_groups(_join_bits(high, 1)))]
    return _super_blocks(blocks[..., :4], [*planes, *_lane_bytes(scales, mins)])


def _pack_q6_k(raw: Bytes, columns: int) -> Bytes:
    blocks = raw.reshape(len(raw), -1, 210)
    low, high = _q6_parts(blocks)
    scales = blocks[..., 192:208].reshape(len(raw), -1, 2)
    planes = [_by_quads(_groups(_join_nibbles(low))), _by_quads(_groups(_join_bits(high, 2)))]
    return _super_blocks(blocks[..., 208:210], [*planes, _by_rows(scales)])


def _pack_float(size: int) -> Callable[[Bytes, int], Bytes]:
    kind = {2: np.uint16, 4: np.uint32}[size]

    def pack(raw: Bytes, columns: int) -> Bytes:
        values = np.ascontiguousarray(raw).view(kind).reshape(-1, STRIP, columns)
        return np.ascontiguousarray(values.transpose(0, 2, 1)).view(np.uint8)

    return pack


def _halves(raw: Bytes) -> NDArray[np.uint16]:
    return np.ascontiguousarray(raw).view(np.uint16)


def _groups(x: Bytes) -> Bytes:
    """[rows, blocks, 8, n] -> [rows, groups, n]."""
    return x.reshape(len(x), -1, x.shape[-1])


def _lane_bytes(scales: Bytes, mins: Bytes) -> list[Bytes]:
    return [_by_rows(x.reshape(len(x), -1, 1)) for x in (scales, mins)]


def _k_low(qs: Bytes) -> Bytes:
    """The low 4 bits of a Q4_K or Q5_K block, [..., 128] -> [..., 8 groups, 32]."""
    pairs = qs.reshape(*qs.shape[:-1], 4, 1, 32)
    return np.concatenate([pairs & 15, pairs >> 4], axis=-2).reshape(*qs.shape[:-1], 8, 32)


def _q6_parts(blocks: Bytes) -> tuple[Bytes, Bytes]:
    """Low 4 and high 2 bits of Q6_K blocks [..., 210], each [..., 8 groups, 32]."""
    lead = blocks.shape[:-1]
    ql = blocks[..., :128].reshape(*lead, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    qh = blocks[..., 128:192].reshape(*lead, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    return ql.reshape(*lead, 8, 32), qh.reshape(*lead, 8, 32)


def _super_blocks(head: Bytes, planes: list[Bytes]) -> Bytes:
    """Headers and the 8 groups after each: [strips, blocks, header + 8 * group]."""
    header = _by_rows(_halves(head))
    groups = np.concatenate(planes, axis=-1)
    strips, blocks = header.shape[:2]
    return np.concatenate([header, groups.reshape(strips, blocks, -1)], axis=-1)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("F32", 64, _pack_float(4), is_float=True),
        Layout("F16", 32, _pack_float(2), is_float=True),
        Layout("BF16", 32, _pack_float(2), is_float=True),
        Layout("Q4_0", 288, _pack_q4_0),
        Layout("Q4_1", 320, _pack_q4_1),
        Layout("Q8_0", 544, _pack_q8_0),
        Layout("Q4_K", 288, _pack_q4_k, header_bytes=64),
        Layout("Q5_K", 352, _pack_q5_k, header_bytes=64),
        Layout("Q6_K", 416, _pack_q6_k, header_bytes=32),
    )
}
