"""Numbers of a few bits, as the blocks of GGUF formats hold them -> one number a byte.

Layouts are those of ggml (`ggml-common.h`). Every function takes uint8 [blocks, bytes of the field].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[Any]  # uint8; the stubs of NumPy lose the type at every shift


def bit_fields(packed: Bytes, bits: int, group: int) -> Bytes:
    """[blocks, n] -> [blocks, n * 8 / bits]: of each ``group`` bytes first the lowest ``bits`` of all, then the next."""
    source = packed.reshape(len(packed), packed.shape[1] // group, group)
    fields = np.empty((*source.shape[:2], 8 // bits, group), dtype=np.uint8)
    for i in range(8 // bits):
        np.right_shift(source, i * bits, out=fields[:, :, i])
    fields &= (1 << bits) - 1
    return fields.reshape(len(packed), packed.shape[1] * (8 // bits))


def single_bits(packed: Bytes) -> Bytes:
    """[blocks, n] -> [blocks, 8n]: the bits of each byte, lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def trits(packed: Bytes, count: int, group: int) -> Bytes:
    """[blocks, n] -> [blocks, n * count]: of each ``group`` bytes first the leading base-3 digit of all, then the next.

    A byte holds ceil(256 / 243 * number), so its leading digit is byte * 3 / 256 rounded down: 1 from 86, 2 from 171.
    """
    rest = packed.reshape(len(packed), packed.shape[1] // group, group)
    digits = np.empty((*rest.shape[:2], count, group), dtype=np.uint8)
    for i in range(count):
        digits[:, :, i] = rest > 85
        digits[:, :, i] += rest > 170
        rest = rest * np.uint8(3)  # the digit that was read goes over the top
    return digits.reshape(len(packed), packed.shape[1] * count)


def k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Scales and minima of a Q4_K or Q5_K block, 6 bits each: [blocks, 12] -> twice [blocks, 8]."""
    low_d, low_m, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((low_d & 0x3F, (high & 0x0F) | ((low_d >> 2) & 0x30)), axis=1)
    minima = np.concatenate((low_m & 0x3F, (high >> 4) | ((low_m >> 2) & 0x30)), axis=1)
    return scales, minima


def q3_k_scales(packed: Bytes) -> Bytes:
    """Scales of a Q3_K block, 6 bits each, less 32: [blocks, 12] -> the bits of int8 [blocks, 16]."""
    low, high = bit_fields(packed[:, 0:8], 4, 8), bit_fields(packed[:, 8:12], 2, 4)
    scales: Bytes = (low | (high << 4)) - np.uint8(32)
    return scales


def iq1_m_scale(scales: Bytes) -> NDArray[np.uint16]:
    """The float16 bits that an IQ1_M block keeps in the top nibbles of its four 16-bit scales: [blocks, 8] -> [blocks, 1]."""
    nibbles = scales.view("<u2") >> 12
    return np.bitwise_or.reduce(nibbles << np.array([0, 4, 8, 12], dtype=np.uint16), axis=1, keepdims=True)


def i2_s_digits(packed: Bytes) -> Bytes:
    """Digits 0, 1, 2 of I2_S blocks, the highest bits first: [blocks, 32] -> [blocks, 128].

    Weights are digits less 1. The digit 3, which bitnet.cpp never writes, it reads as weight 0: here it becomes 1.
    """
    without_threes = packed ^ (packed & (packed << 1) & 0xAA)
    fields = bit_fields(without_threes, 2, 32).reshape(len(packed), 4, 32)
    return fields[:, ::-1].reshape(len(packed), 128)
