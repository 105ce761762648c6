"""How GGUF stores numbers: the table of tensor formats, and their exact decoding to float32 in NumPy.

Layouts are those of ggml (`ggml-common.h`); decoding keeps the order of float32 operations of the `gguf` package, so
that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UnsupportedError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_BLOCKS = 1 << 13  # blocks decoded at a time, so that the intermediate arrays stay small


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """One way to store a row of numbers: blocks of ``block_size`` numbers in ``block_bytes`` bytes.

    ``scale_offsets``: where in a block its floating-point scales lie (of a float format: its values), () where a format
    has none that can be read on their own.
    ``tail_bytes``: bytes that follow the last row of a tensor (I2_S keeps its one scale there).
    """

    name: str
    type_id: int
    block_size: int
    block_bytes: int
    scale_offsets: tuple[int, ...] = ()
    tail_bytes: int = 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` numbers, a multiple of ``block_size``."""
        return columns // self.block_size * self.block_bytes


_TABLE = (
    QuantFormat("F32", 0, 1, 4, (0,)),
    QuantFormat("F16", 1, 1, 2, (0,)),
    QuantFormat("Q4_0", 2, 32, 18, (0,)),
    QuantFormat("Q4_1", 3, 32, 20, (0, 2)),
    QuantFormat("Q5_0", 6, 32, 22, (0,)),
    QuantFormat("Q5_1", 7, 32, 24, (0, 2)),
    QuantFormat("Q8_0", 8, 32, 34, (0,)),
    QuantFormat("Q8_1", 9, 32, 40),
    QuantFormat("Q2_K", 10, 256, 84, (80, 82)),
    QuantFormat("Q3_K", 11, 256, 110, (108,)),
    QuantFormat("Q4_K", 12, 256, 144, (0, 2)),
    QuantFormat("Q5_K", 13, 256, 176, (0, 2)),
    QuantFormat("Q6_K", 14, 256, 210, (208,)),
    QuantFormat("Q8_K", 15, 256, 292),
    QuantFormat("IQ2_XXS", 16, 256, 66, (0,)),
    QuantFormat("IQ2_XS", 17, 256, 74, (0,)),
    QuantFormat("IQ3_XXS", 18, 256, 98, (0,)),
    QuantFormat("IQ1_S", 19, 256, 50, (0,)),
    QuantFormat("IQ4_NL", 20, 32, 18, (0,)),
    QuantFormat("IQ3_S", 21, 256, 110, (0,)),
    QuantFormat("IQ2_S", 22, 256, 82, (0,)),
    QuantFormat("IQ4_XS", 23, 256, 136, (0,)),
    QuantFormat("I8", 24, 1, 1),
    QuantFormat("I16", 25, 1, 2),
    QuantFormat("I32", 26, 1, 4),
    QuantFormat("I64", 27, 1, 8),
    QuantFormat("F64", 28, 1, 8, (0,)),
    QuantFormat("IQ1_M", 29, 256, 56),
    QuantFormat("BF16", 30, 1, 2, (0,)),
    QuantFormat("TQ1_0", 34, 256, 54, (52,)),
    QuantFormat("TQ2_0", 35, 256, 66, (64,)),
    QuantFormat("I2_S", 36, 128, 32, tail_bytes=32),  # BitNet's; never part of llama.cpp itself
    QuantFormat("MXFP4", 39, 32, 17),
    QuantFormat("NVFP4", 40, 64, 36),
    QuantFormat("Q1_0", 41, 128, 18, (0,)),
)

FORMATS: Mapping[int, QuantFormat] = MappingProxyType({f.type_id: f for f in _TABLE})

REMOVED: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
"""Types that files once held and llama.cpp no longer reads."""

_BY_NAME = {f.name: f for f in _TABLE}


def format_named(name: str) -> QuantFormat:
    """The format called ``name``, as in "Q4_1". Raises UnsupportedError for a name that is not in the table."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnsupportedError(f"tensor format {name!r}: not one of {', '.join(_BY_NAME)}") from None


def dequantise(fmt: QuantFormat, data: Bytes) -> Floats:
    """The numbers of some rows: uint8 [..., row_bytes] -> float32 [..., columns], with the bits of the `gguf` package.

    Raises UnsupportedError for a format without a decoder, ValueError for rows that are no whole number of blocks.
    """
    decode = _DECODERS.get(fmt.name)
    if decode is None:
        raise UnsupportedError(f"tensor format {fmt.name} (type {fmt.type_id}): this version of shoal cannot decode it")
    if data.shape[-1] % fmt.block_bytes:
        raise ValueError(f"rows of {data.shape[-1]} bytes, not a multiple of {fmt.name}'s {fmt.block_bytes}")
    blocks = np.ascontiguousarray(data).reshape(-1, fmt.block_bytes)
    out = np.empty((len(blocks), fmt.block_size), dtype=np.float32)
    with np.errstate(invalid="ignore"):  # an infinite scale times 0 is NaN, here as in the file
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            out[start : start + _CHUNK_BLOCKS] = decode(blocks[start : start + _CHUNK_BLOCKS])
    return out.reshape(*data.shape[:-1], data.shape[-1] // fmt.block_bytes * fmt.block_size)


def non_finite_scales(fmt: QuantFormat, data: Bytes) -> NDArray[np.intp]:
    """Indices of the blocks of ``data`` (uint8 [..., row_bytes]) whose scales (or float values) hold Inf or NaN."""
    width, exponent = _EXPONENTS.get(fmt.name, _EXPONENTS["F16"])
    blocks = data.reshape(-1, fmt.block_bytes)
    bad = np.zeros(len(blocks), dtype=np.bool_)
    for offset in fmt.scale_offsets:
        bits = blocks[:, offset : offset + width].view(f"<u{width}")[:, 0]
        bad |= (bits & exponent) == exponent  # all exponent bits set: Inf or NaN
    return np.flatnonzero(bad)


_EXPONENTS = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F800000),
    "F64": (8, 0x7FF0000000000000),
}


# Decoders: uint8 [blocks, block_bytes] -> float32 [blocks, block_size].


def _half(blocks: Bytes, offset: int) -> Floats:
    """The float16 at ``offset`` of each block: [blocks, 1]."""
    return blocks[:, offset : offset + 2].view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, group: int) -> Bytes:
    """[blocks, n] -> [blocks, 2n]: of each ``group`` bytes all low nibbles, then all high ones."""
    pairs = packed.reshape(len(packed), -1, 1, group)
    return np.concatenate((pairs & 0x0F, pairs >> 4), axis=2).reshape(len(packed), -1)


def _bit_planes(packed: Bytes, bits: int) -> Bytes:
    """[blocks, n] -> [blocks, planes, n]: plane i holds bits i * ``bits`` upwards of every byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[:, None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """[blocks, 4] -> [blocks, 32]: one bit a number, already at bit 4."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _k_scales(packed: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and minima of a Q4_K or Q5_K block: [blocks, 12] -> twice [blocks, 8, 1]."""
    low_d, low_m, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((low_d & 0x3F, (high & 0x0F) | ((low_d >> 2) & 0x30)), axis=1)
    minima = np.concatenate((low_m & 0x3F, (high >> 4) | ((low_m >> 2) & 0x30)), axis=1)
    return scales.astype(np.float32)[:, :, None], minima.astype(np.float32)[:, :, None]


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return _half(blocks, 0)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    q = _nibbles(blocks[:, 2:], 16).astype(np.int8) - np.int8(8)
    return _half(blocks, 0) * q.astype(np.float32)


def _q4_1(blocks: Bytes) -> Floats:
    q = _nibbles(blocks[:, 4:], 16)
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    q = (_nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])).astype(np.int8) - np.int8(16)
    return _half(blocks, 0) * q.astype(np.float32)


def _q5_1(blocks: Bytes) -> Floats:
    q = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_k(blocks: Bytes) -> Floats:
    return _k_values(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Bytes) -> Floats:
    high = _bit_planes(blocks[:, 16:48], 1).reshape(len(blocks), 256)
    return _k_values(blocks, _nibbles(blocks[:, 48:], 32) | (high << np.uint8(4)))


def _k_values(blocks: Bytes, q: Bytes) -> Floats:
    scales, minima = _k_scales(blocks[:, 4:16])
    d = _half(blocks, 0)[:, :, None] * scales
    m = _half(blocks, 2)[:, :, None] * minima
    values = d * q.reshape(len(blocks), 8, 32).astype(np.float32) - m
    return values.reshape(len(blocks), 256)


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, 0:128], 64)
    halves = blocks[:, 128:192].reshape(-1, 32)  # each 32 bytes hold the top two bits of 128 numbers
    high = _bit_planes(halves, 2).reshape(len(blocks), 256)
    q = (low | (high << 4)).astype(np.int8) - np.int8(32)
    d = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values = d[:, :, None] * q.reshape(len(blocks), 16, 16).astype(np.float32)
    return values.reshape(len(blocks), 256)


_DECODERS: Mapping[str, Callable[[Bytes], Floats]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

DEQUANTISABLE = frozenset(_DECODERS)
"""Names of the formats that ``dequantise`` knows."""
