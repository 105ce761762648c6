"""GGUF blocks -> small integers and what scales them: the first half of packing, before the kernels' own layouts.

A code q is one weight; ``Codes`` says where its scales stand. f16 and f32 are floats that the file stores, the others
integers; products go left to right, and every weight has the float32 bits of the `gguf` package's dequantisation.

             bits  head     scales per 32      weight
    Q4_0      4    -        d f16              d * (q - 8)
    Q4_1      4    -        d, m f16           d * q + m
    Q5_0      5    -        d f16              d * (q - 16)
    Q5_1      5    -        d, m f16           d * q + m
    Q8_0      8    -        d f16              d * (q - 128)
    Q8_K      8    d f32    -                  d * (q - 128)
    Q2_K      2    d, n f16 b0, b1             (d * (b & 15)) * q - n * (b >> 4)
    Q3_K      3    d f16    s0, s1 int8        (d * s) * (q - 4)
    Q4_K      4    d, n f16 s, m               (d * s) * q - n * m
    Q5_K      5    d, n f16 s, m               (d * s) * q - n * m
    Q6_K      6    d f16    s0, s1 int8        (d * s) * (q - 32)
    IQ4_NL    4    -        d f16              d * IQ4_VALUES[q]
    IQ4_XS    4    d f16    s int8             (d * s) * IQ4_VALUES[q]
    MXFP4     4    -        e                  2^(e - 128) * MXFP4_VALUES[q]
    IQ3_XXS   4    d f16    s                  (d * s / 4) * IQ3_XXS_LEVELS[q & 7], negative where q & 8
    IQ3_S     4    d f16    s                  (d * s) * (2 * q - 15)
    IQ2_XXS   3    d f16    s0 | s1 << 4       (d * (2 * s + 1) / 8) * IQ2_LEVELS[q & 3], negative where q & 4
    IQ2_XS    3    the same
    IQ2_S     3    the same
    IQ1_S     2    d f16    b0, b1             (d * (2 * (b >> 2) + 1)) * (q - 1 + delta)
    IQ1_M     2    the same                    delta: 1/8 where bit 0 (octet 0) or bit 1 (octet 1) of b is set, else -1/8
    TQ1_0     2    d f16    -                  d * (q - 1)
    TQ2_0     2    d f16    -                  d * (q - 1)
    I2_S      2    -        -                  scale of the tensor * (q - 1)

Of two scales the first is that of columns 0 to 15, the second that of columns 16 to 31.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.gguf.bits import bit_fields, i2_s_digits, iq1_m_scale, k_scales, q3_k_scales, single_bits, trits
from shoal.gguf.quants import format_named

Bytes = NDArray[Any]  # uint8
Shorts = NDArray[np.uint16]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
IQ3_XXS_LEVELS = (4, 12, 20, 28, 36, 44, 52, 62)
IQ2_LEVELS = (8, 25, 43)


@dataclass(frozen=True, slots=True)
class Codes:
    """Some rows of a matrix, unpacked. The dtype of ``head`` and ``scales`` is that in which the file stores them."""

    values: Bytes  # [rows, columns], below 2^bits
    head: NDArray[Any]  # [rows, columns // 256, n]: uint16 (float16 bits) or float32, n = 0 to 2
    scales: NDArray[Any]  # [rows, columns // 32, n]: uint16 (float16 bits) or uint8 (also the bits of int8), n = 0 to 2


def codes(name: str, raw: Bytes) -> Codes:
    """Rows of the format called ``name`` as codes: uint8 [rows, row_bytes] -> [rows, columns]."""
    fmt = format_named(name)
    rows, blocks = len(raw), raw.shape[1] // fmt.block_bytes
    columns = blocks * fmt.block_size
    block = _BLOCKS[name](raw.reshape(rows * blocks, fmt.block_bytes))
    return Codes(
        block.values.reshape(rows, columns),
        block.head.reshape(rows, columns // 256, block.head.shape[2]),
        block.scales.reshape(rows, columns // 32, block.scales.shape[2]),
    )


# One format each: uint8 [blocks, block_bytes] -> the codes of each block as of a row.


def _q4_0(blocks: Bytes) -> Codes:
    return _without_head(bit_fields(blocks[:, 2:], 4, 16), _halves(blocks, 0, 1))


def _q4_1(blocks: Bytes) -> Codes:
    return _without_head(bit_fields(blocks[:, 4:], 4, 16), _halves(blocks, 0, 2))


def _q5_0(blocks: Bytes) -> Codes:
    fifth = single_bits(blocks[:, 2:6]) << 4
    return _without_head(bit_fields(blocks[:, 6:], 4, 16) | fifth, _halves(blocks, 0, 1))


def _q5_1(blocks: Bytes) -> Codes:
    fifth = single_bits(blocks[:, 4:8]) << 4
    return _without_head(bit_fields(blocks[:, 8:], 4, 16) | fifth, _halves(blocks, 0, 2))


def _q8_0(blocks: Bytes) -> Codes:
    return _without_head(blocks[:, 2:] ^ 0x80, _halves(blocks, 0, 1))


def _q8_k(blocks: Bytes) -> Codes:
    return _without_scales(blocks[:, 4:260] ^ 0x80, blocks[:, 0:4].view("<f4"))


def _q2_k(blocks: Bytes) -> Codes:
    return Codes(bit_fields(blocks[:, 16:80], 2, 32), _head(blocks, 80, 2), _pairs(blocks[:, 0:16]))


def _q3_k(blocks: Bytes) -> Codes:
    third = bit_fields(blocks[:, 0:32], 1, 32) << 2
    values = bit_fields(blocks[:, 32:96], 2, 32) | third
    return Codes(values, _head(blocks, 108, 1), _pairs(q3_k_scales(blocks[:, 96:108])))


def _q4_k(blocks: Bytes) -> Codes:
    return Codes(bit_fields(blocks[:, 16:], 4, 32), _head(blocks, 0, 2), np.stack(k_scales(blocks[:, 4:16]), axis=2))


def _q5_k(blocks: Bytes) -> Codes:
    fifth = bit_fields(blocks[:, 16:48], 1, 32) << 4
    values = bit_fields(blocks[:, 48:], 4, 32) | fifth
    return Codes(values, _head(blocks, 0, 2), np.stack(k_scales(blocks[:, 4:16]), axis=2))


def _q6_k(blocks: Bytes) -> Codes:
    high = bit_fields(blocks[:, 128:192], 2, 32) << 4
    return Codes(bit_fields(blocks[:, 0:128], 4, 64) | high, _head(blocks, 208, 1), _pairs(blocks[:, 192:208]))


def _mxfp4(blocks: Bytes) -> Codes:
    return _without_head(bit_fields(blocks[:, 1:], 4, 16), blocks[:, 0:1, None])


def _iq4_xs(blocks: Bytes) -> Codes:
    high = (blocks[:, 2:4].view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    scales = (bit_fields(blocks[:, 4:8], 4, 1) | (high.astype(np.uint8) << 4)) - np.uint8(32)
    return Codes(bit_fields(blocks[:, 8:], 4, 16), _head(blocks, 0, 1), scales[:, :, None])


def _iq3_xxs(blocks: Bytes) -> Codes:
    signs, scales = _signs_and_scales(blocks[:, 66:98].view("<u4"))
    return Codes(_grid("IQ3_XXS", blocks[:, 2:66]) | (signs << 3), _head(blocks, 0, 1), scales[:, :, None])


def _iq3_s(blocks: Bytes) -> Codes:
    """Level l is the odd number 2l + 1, so q = l + 8 where it is positive and 7 - l, all bits turned, where negative."""
    index = blocks[:, 2:66] | (single_bits(blocks[:, 66:74]).astype(np.uint16) << 8)
    negative = single_bits(blocks[:, 74:106]) * np.uint8(15)
    values = (_grid("IQ3_S", index) | 8) ^ negative
    return Codes(values, _head(blocks, 0, 1), _odd(bit_fields(blocks[:, 106:110], 4, 1))[:, :, None])


def _iq2_xxs(blocks: Bytes) -> Codes:
    words = blocks[:, 2:66].view("<u4").reshape(len(blocks), 8, 2)
    index = np.ascontiguousarray(words[:, :, 0]).view(np.uint8)
    signs, scales = _signs_and_scales(words[:, :, 1])
    values = _grid("IQ2_XXS", index) | (signs << 2)
    return Codes(values, _head(blocks, 0, 1), ((scales >> 1) * np.uint8(17))[:, :, None])


def _iq2_xs(blocks: Bytes) -> Codes:
    words = blocks[:, 2:66].view("<u2")
    values = _grid("IQ2_XS", words & 511) | (_even_signs(words >> 9) << 2)
    return Codes(values, _head(blocks, 0, 1), blocks[:, 66:74, None])


def _iq2_s(blocks: Bytes) -> Codes:
    index = blocks[:, 2:34] | (bit_fields(blocks[:, 66:74], 2, 1).astype(np.uint16) << 8)
    values = _grid("IQ2_S", index) | (single_bits(blocks[:, 34:66]) << 2)
    return Codes(values, _head(blocks, 0, 1), blocks[:, 74:82, None])


def _iq1_s(blocks: Bytes) -> Codes:
    """Of each group's 16 bits: 4 x 3 high bits of grid indices, 3 of the scale, one that is set for a negative delta."""
    words = blocks[:, 34:50].view("<u2")
    high = ((words[:, :, None] >> np.array([0, 3, 6, 9], dtype=np.uint16)) & 7).reshape(len(blocks), 32)
    deltas = ((words >> 15) ^ 1) * 3
    scales = (deltas | ((words >> 12 & 7) << 2)).astype(np.uint8)
    return Codes(_grid("IQ1_S", blocks[:, 2:34] | (high << 8)), _head(blocks, 0, 1), np.stack((scales, scales), axis=2))


def _iq1_m(blocks: Bytes) -> Codes:
    """Of each octet's 4 bits: 3 high bits of its grid index, one that is set for a negative delta."""
    octets = bit_fields(blocks[:, 32:48], 4, 1)
    values = _grid("IQ1_M", blocks[:, 0:32] | ((octets & 7).astype(np.uint16) << 8))
    positive = (octets >> 3) ^ 1
    words = blocks[:, 48:56].view("<u2")
    scale = ((words[:, :, None] >> np.array([0, 3, 6, 9], dtype=np.uint16)) & 7).astype(np.uint8)
    scales = positive[:, 0::2] | (positive[:, 1::2] << 1) | (scale.reshape(len(blocks), 16) << 2)
    return Codes(values, iq1_m_scale(blocks[:, 48:56])[:, :, None], _pairs(scales))


def _tq1_0(blocks: Bytes) -> Codes:
    parts = (trits(blocks[:, 0:32], 5, 32), trits(blocks[:, 32:48], 5, 16), trits(blocks[:, 48:52], 4, 4))
    return _without_scales(np.concatenate(parts, axis=1), _halves(blocks, 52, 1))


def _tq2_0(blocks: Bytes) -> Codes:
    return _without_scales(bit_fields(blocks[:, 0:64], 2, 32), _halves(blocks, 64, 1))


def _i2_s(blocks: Bytes) -> Codes:
    return _without_head(i2_s_digits(blocks), np.empty((len(blocks), 4, 0), dtype=np.uint8))


# Scales and heads.


def _halves(blocks: Bytes, offset: int, count: int) -> Shorts:
    """The bits of ``count`` float16s at ``offset``: [blocks, count]."""
    return blocks[:, offset : offset + 2 * count].view("<u2")


def _head(blocks: Bytes, offset: int, count: int) -> Shorts:
    """The same as what stands once in a block of 256: [blocks, 1, count]."""
    return _halves(blocks, offset, count)[:, None]


def _pairs(scales: Bytes) -> Bytes:
    """A scale for each 16 columns, as two for each 32: [blocks, 16] -> [blocks, 8, 2]."""
    return scales.reshape(len(scales), -1, 2)


def _odd(scales: Bytes) -> Bytes:
    return 2 * scales + 1


def _without_head(values: Bytes, scales: NDArray[Any]) -> Codes:
    """A block of the formats that keep all scales every 32 columns: ``scales`` [blocks, n] or [blocks, groups, n]."""
    groups = values.shape[1] // 32
    return Codes(values, np.empty((len(values), 0, 0), dtype=np.uint16), scales.reshape(len(values), groups, -1))


def _without_scales(values: Bytes, head: NDArray[Any]) -> Codes:
    """A block of the formats that have one scale for 256 columns: ``head`` [blocks, 1]."""
    return Codes(values, head[:, None], np.empty((len(values), 8, 0), dtype=np.uint8))


# Grids and signs: 8 or 4 neighbours at a time are an index into a table.


def _grid(name: str, index: NDArray[Any]) -> Bytes:
    """The levels that indices [blocks, n] stand for: [blocks, 8n] or [blocks, 4n]."""
    return np.take(_grid_table(name), index).view(np.uint8)


@cache
def _grid_table(name: str) -> NDArray[Any]:
    """The grid of a format, as level numbers from 0: a word of 8 or 4 bytes an entry."""
    import gguf.quants

    grid = getattr(gguf.quants, name)
    grid.init_grid()
    levels = np.searchsorted(grid.grid_map, grid.grid.reshape(grid.grid_shape)).astype(np.uint8)
    words: NDArray[Any] = levels.view(f"<u{levels.shape[1]}")[:, 0]
    return words


def _even_signs(index: NDArray[Any]) -> Bytes:
    """Eight signs from seven bits, the eighth making the number of set ones even: [blocks, n] -> 0 or 1 [blocks, 8n]."""
    return single_bits(np.take(_sign_table(), index))


@cache
def _sign_table() -> Bytes:
    """[128]: the sign bits of each index."""
    index: Bytes = np.arange(128, dtype=np.uint8)
    parity: Bytes = np.bitwise_xor.reduce(single_bits(index[:, None]), axis=1)
    signs: Bytes = index | (parity << 7)
    return signs


def _signs_and_scales(words: NDArray[np.uint32]) -> tuple[Bytes, Bytes]:
    """Four sign indices of 7 bits and a scale of 4: [blocks, 8] -> signs [blocks, 256], 2 * scale + 1 [blocks, 8]."""
    index = (words[:, :, None] >> np.array([0, 7, 14, 21], dtype=np.uint32)) & 127
    return _even_signs(index.reshape(len(words), 32)), _odd((words >> 28).astype(np.uint8))


_BLOCKS: Mapping[str, Callable[[Bytes], Codes]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q8_K": _q8_k,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_NL": _q4_0,  # the same but for the values that codes stand for
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "I2_S": _i2_s,
}

CODES: Mapping[str, Callable[[Bytes], Codes]] = {name: partial(codes, name) for name in _BLOCKS}
"""Name of a format -> what makes codes of its rows: uint8 [rows, row_bytes] -> Codes."""
