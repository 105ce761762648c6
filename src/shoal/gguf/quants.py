"""How GGUF stores numbers: the table of tensor formats, and their exact decoding to float32 in NumPy.

Layouts are those of ggml (`ggml-common.h`); decoding keeps the order of float32 operations of the `gguf` package, so
that both give the same bits. Rare formats are left to that package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UnsupportedError
from shoal.gguf.bits import bit_fields, i2_s_digits, iq1_m_scale, k_scales, q3_k_scales, single_bits

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_BLOCKS = 1 << 13  # blocks decoded at a time, so that the intermediate arrays stay small


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """One way to store a row of numbers: blocks of ``block_size`` numbers in ``block_bytes`` bytes.

    ``scale_offsets``: where in a block its floating-point scales lie (of a float format: its values), () where a format
    has none that can be read on their own.
    ``tail_bytes``: bytes that follow the last row of a tensor; they begin with one float32, the scale of all its numbers.
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
    QuantFormat("Q8_K", 15, 256, 292, (0,)),
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


def dequantise(fmt: QuantFormat, data: Bytes, scale: float = 1.0) -> Floats:
    """The numbers of some rows: uint8 [..., row_bytes] -> float32 [..., columns], with the bits of the `gguf` package.

    ``scale`` is that of the whole tensor, in formats that have one (I2_S); others take no notice of it.
    Raises UnsupportedError for a format without a decoder, ValueError for rows that are no whole number of blocks.
    """
    decode = _DECODERS.get(fmt.name)
    if decode is None:
        raise UnsupportedError(f"tensor format {fmt.name} (type {fmt.type_id}): this version of shoal cannot decode it")
    if data.shape[-1] % fmt.block_bytes:
        raise ValueError(f"rows of {data.shape[-1]} bytes, not a multiple of {fmt.name}'s {fmt.block_bytes}")
    blocks = np.ascontiguousarray(data).reshape(-1, fmt.block_bytes)
    out = np.empty((len(blocks), fmt.block_size), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # an infinite scale times 0 is NaN, here as in the file
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            out[start : start + _CHUNK_BLOCKS] = decode(blocks[start : start + _CHUNK_BLOCKS])
        if fmt.tail_bytes:
            out *= np.float32(scale)
    return out.reshape(*data.shape[:-1], data.shape[-1] // fmt.block_bytes * fmt.block_size)


def non_finite_scales(fmt: QuantFormat, data: Bytes) -> NDArray[np.intp]:
    """Indices of the blocks of ``data`` (uint8 [..., row_bytes]) whose scales (or float values) hold Inf or NaN.

    Of MXFP4, those with the exponent that the OCP specification reads as NaN.
    """
    blocks = data.reshape(-1, fmt.block_bytes)
    if fmt.name == "MXFP4":
        return np.flatnonzero(blocks[:, 0] == 0xFF)
    width, exponent = _EXPONENTS.get(fmt.name, _EXPONENTS["F16"])
    bad = np.zeros(len(blocks), dtype=np.bool_)
    for bits in _scale_bits(fmt, blocks, width):
        bad |= (bits & exponent) == exponent  # all exponent bits set: Inf or NaN
    return np.flatnonzero(bad)


def _scale_bits(fmt: QuantFormat, blocks: Bytes, width: int) -> Iterator[NDArray[Any]]:
    """The bits of each floating-point scale of a block: unsigned integers [blocks]."""
    if fmt.name == "IQ1_M":
        yield iq1_m_scale(blocks[:, 48:56])[:, 0]
    for offset in fmt.scale_offsets:
        yield blocks[:, offset : offset + width].view(f"<u{width}")[:, 0]


_EXPONENTS = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F800000),
    "Q8_K": (4, 0x7F800000),
    "F64": (8, 0x7FF0000000000000),
}


# Decoders: uint8 [blocks, block_bytes] -> float32 [blocks, block_size].


def _half(blocks: Bytes, offset: int) -> Floats:
    """The float16 at ``offset`` of each block: [blocks, 1]."""
    return blocks[:, offset : offset + 2].view("<f2").astype(np.float32)


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return _half(blocks, 0)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    q = bit_fields(blocks[:, 2:], 4, 16).astype(np.int8) - np.int8(8)
    return _half(blocks, 0) * q.astype(np.float32)


def _q4_1(blocks: Bytes) -> Floats:
    return _affine(blocks, bit_fields(blocks[:, 4:], 4, 16))


def _q5_0(blocks: Bytes) -> Floats:
    fifth = single_bits(blocks[:, 2:6]) << 4
    q: Floats = (bit_fields(blocks[:, 6:], 4, 16) | fifth).astype(np.float32)
    return _half(blocks, 0) * (q - 16)


def _q5_1(blocks: Bytes) -> Floats:
    return _affine(blocks, bit_fields(blocks[:, 8:], 4, 16) | (single_bits(blocks[:, 4:8]) << 4))


def _affine(blocks: Bytes, q: Bytes) -> Floats:
    values: Floats = _half(blocks, 0) * q.astype(np.float32) + _half(blocks, 2)
    return values


def _q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def _q4_k(blocks: Bytes) -> Floats:
    return _k_values(blocks, bit_fields(blocks[:, 16:], 4, 32))


def _q5_k(blocks: Bytes) -> Floats:
    high = bit_fields(blocks[:, 16:48], 1, 32)
    return _k_values(blocks, bit_fields(blocks[:, 48:], 4, 32) | (high << 4))


def _k_values(blocks: Bytes, q: Bytes) -> Floats:
    scales, minima = k_scales(blocks[:, 4:16])
    d = _half(blocks, 0) * scales.astype(np.float32)
    m = _half(blocks, 2) * minima.astype(np.float32)
    return _by_part(d, q, m)


def _q2_k(blocks: Bytes) -> Floats:
    scales = blocks[:, 0:16]
    d = _half(blocks, 80) * (scales & 0x0F).astype(np.float32)
    m = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return _by_part(d, bit_fields(blocks[:, 16:80], 2, 32), m)


def _q3_k(blocks: Bytes) -> Floats:
    high = bit_fields(blocks[:, 0:32], 1, 32)
    q = (bit_fields(blocks[:, 32:96], 2, 32) | (high << 2)).astype(np.int8) - np.int8(4)
    return _by_part(_half(blocks, 108) * q3_k_scales(blocks[:, 96:108]).view(np.int8).astype(np.float32), q)


def _q6_k(blocks: Bytes) -> Floats:
    high = bit_fields(blocks[:, 128:192], 2, 32)
    q = (bit_fields(blocks[:, 0:128], 4, 64) | (high << 4)).astype(np.int8) - np.int8(32)
    return _by_part(_half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), q)


def _q8_k(blocks: Bytes) -> Floats:
    return blocks[:, 0:4].view("<f4") * blocks[:, 4:260].view(np.int8).astype(np.float32)


def _i2_s(blocks: Bytes) -> Floats:
    """Without the scale of the tensor, which is not in the blocks."""
    return (i2_s_digits(blocks).astype(np.int8) - np.int8(1)).astype(np.float32)


def _by_part(d: Floats, q: NDArray[Any], m: Floats | None = None) -> Floats:
    """d * q - m where each part of a block has its own d and m: d and m [blocks, parts], q [blocks, n] -> [blocks, n]."""
    values = d[:, :, None] * q.reshape(*d.shape, -1).astype(np.float32)
    if m is not None:
        values -= m[:, :, None]
    return values.reshape(q.shape)


def _by_gguf_package(name: str, blocks: Bytes) -> Floats:
    import gguf

    row = blocks.reshape(1, -1)  # as one row, since the package takes 16 rows at a time
    values: Floats = gguf.dequantize(row, gguf.GGMLQuantizationType[name])
    return values.reshape(len(blocks), -1)


_FROM_GGUF_PACKAGE = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
)

_DECODERS: Mapping[str, Callable[[Bytes], Floats]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": _q8_k,
    "I2_S": _i2_s,
    **{name: partial(_by_gguf_package, name) for name in _FROM_GGUF_PACKAGE},
}

DEQUANTISABLE = frozenset(_DECODERS)
"""Names of the formats that ``dequantise`` knows."""
