"""The layout of pack.py read by kernels: 32 columns of some rows at a time, in registers.

Every number is the float32 of the `gguf` package, bit by bit: the operations are those of the table in kernels/codes.py, from left to
right. tl.fma stands where its product is exact. ``factor`` is 1, or the power of two that the weights of a part are divided by; it
goes into the scales and changes no other bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.codes import IQ4_VALUES, MXFP4_VALUES
from shoal.kernels.cuda.pack import BLOCK, GROUP, HEADER

_HEADER = tl.constexpr(HEADER)
_BLOCK = tl.constexpr(BLOCK)
_GROUP = tl.constexpr(GROUP)
_MAGIC = tl.constexpr(0x4B000000)  # 2^23 as float32: a number below 2^23 in its lower bits is added to it
_MAGIC_VALUE = tl.constexpr(float(1 << 23))


def _bytes(values: tuple[int, ...], offset: int) -> int:
    """Four numbers plus an offset as a word, the first in its lowest bits; as int32."""
    return int.from_bytes(bytes(value + offset for value in values), "little", signed=True)


_IQ4_0 = tl.constexpr(_bytes(IQ4_VALUES[0:4], 128))
_IQ4_1 = tl.constexpr(_bytes(IQ4_VALUES[4:8], 128))
_IQ4_2 = tl.constexpr(_bytes(IQ4_VALUES[8:12], 128))
_IQ4_3 = tl.constexpr(_bytes(IQ4_VALUES[12:16], 128))
_MXFP4 = tl.constexpr(sum(value << (4 * i) for i, value in enumerate(MXFP4_VALUES[:8])) - (1 << 32))


@triton.jit
def decode(weights, R, block, row, factor,  # type: ignore[no-untyped-def]
           G: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    """Columns 256 ``block`` + 32 ``G`` ... + 31 of rows ``row`` (int32 [M], below R) times ``factor``: float32 [M, 32].
    ``weights``: address of a part's data (uint8 pointer)."""
    at = weights + _HEADER + tl.cast(block, tl.int64) * R * ROW_BYTES
    if BITS == 0:
        weight = _floats(at, R, row, G, FORMAT) * factor
    else:
        value = _value(_code(at, R, row, G, BITS), FORMAT)
        if FORMAT == "Q4_0" or FORMAT == "Q5_0" or FORMAT == "Q8_0" or FORMAT == "IQ4_NL":
            weight = _each(_half_scale(at, R, row, 0, G, BITS) * factor) * value
        elif FORMAT == "Q4_1" or FORMAT == "Q5_1":
            d, m = _half_scale(at, R, row, 0, G, BITS) * factor, _half_scale(at, R, row, 1, G, BITS) * factor
            weight = tl.fma(_each(d), value, _each(m))
        elif FORMAT == "MXFP4":
            weight = _each(_power(_byte_scale(at, R, row, 0, G, BITS)) * factor) * value
        elif FORMAT == "Q4_K" or FORMAT == "Q5_K" or FORMAT == "Q2_K":
            weight = _with_minimum(at, R, row, factor, value, G, FORMAT, BITS, ROW_BYTES)
        else:
            weight = _with_head(at, R, row, _head(at, R, row, ROW_BYTES) * factor, value, G, FORMAT, BITS)
    return weight


@triton.jit
def _with_head(at, R, row, d, value, G: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What has one float for 256 columns."""
    if FORMAT == "Q8_K" or FORMAT == "TQ1_0" or FORMAT == "TQ2_0" or FORMAT == "I2_S":
        weight = _each(d) * value
    elif FORMAT == "IQ4_XS":
        weight = _each(d * _signed_scale(at, R, row, 0, G, BITS)) * value
    elif FORMAT == "Q3_K" or FORMAT == "Q6_K":
        first, second = _signed_scale(at, R, row, 0, G, BITS), _signed_scale(at, R, row, 1, G, BITS)
        weight = _each_half(d * first, d * second) * value
    elif FORMAT == "IQ1_S" or FORMAT == "IQ1_M":
        weight = _with_deltas(at, R, row, d, value, G, BITS)
    elif FORMAT == "IQ3_XXS" or FORMAT == "IQ3_S":
        step = d * _float(_byte_scale(at, R, row, 0, G, BITS), 0)
        weight = _each(step * (0.25 if FORMAT == "IQ3_XXS" else 1.0)) * value
    else:
        tl.static_assert(FORMAT == "IQ2_XXS" or FORMAT == "IQ2_XS" or FORMAT == "IQ2_S")
        s = _byte_scale(at, R, row, 0, G, BITS)
        first, second = d * _float(2 * (s & 15), -1) * 0.125, d * _float(2 * (s >> 4), -1) * 0.125
        weight = _each_half(first, second) * value
    return weight


@triton.jit
def _with_minimum(at, R, row, factor, value,  # type: ignore[no-untyped-def]
                   G: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr):  # fmt: skip
    """d s q - n m. The product d s q has 22 bits at most."""
    d, n = _heads(at, R, row, ROW_BYTES)
    d, n = d * factor, n * factor
    first, second = _byte_scale(at, R, row, 0, G, BITS), _byte_scale(at, R, row, 1, G, BITS)
    if FORMAT == "Q2_K":
        scale = _each_half(d * _float(first & 15, 0), d * _float(second & 15, 0))
        minimum = _each_half(n * _float(first >> 4, 0), n * _float(second >> 4, 0))
    else:
        scale, minimum = _each(d * _float(first, 0)), _each(n * _float(second, 0))
    return tl.fma(scale, value, -minimum)


@triton.jit
def _with_deltas(at, R, row, d, code, G: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """IQ1: q - 1 +- 1/8 is (8q - 9 + 2 bit) / 8, where the bit is one of the scale's for each octet."""
    first, second = _byte_scale(at, R, row, 0, G, BITS), _byte_scale(at, R, row, 1, G, BITS)
    lane = tl.arange(0, _GROUP)[None, :]
    bit = (_each_half(first, second) >> ((lane >> 3) & 1)) & 1
    scale = _each_half(d * _float(2 * (first >> 2), -1), d * _float(2 * (second >> 2), -1))
    return scale * (_float(8 * code + 2 * bit, 9) * 0.125)


# --- codes -----------------------------------------------------------------------------------------------------------


@triton.jit
def _lanes(at, R, row, OFFSET: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lanes of rows [M, 32] in the plane that begins after OFFSET bytes of each row."""
    plane = (at + R * OFFSET).to(tl.pointer_type(KIND))
    return tl.load(plane + row[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :])


@triton.jit
def _code(at, R, row, G: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [M, 32]."""
    if BITS == 8:
        code = (_lanes(at, R, row, 64 * (G // 2), tl.uint16).to(tl.int32) >> (8 * (G % 2))) & 255
    elif BITS < 4:
        code = (_lanes(at, R, row, 0, tl.uint16).to(tl.int32) >> (2 * G)) & 3
        if BITS == 3:
            code |= ((_lanes(at, R, row, 64, tl.uint8).to(tl.int32) >> G) & 1) << 2
    else:
        code = (_lanes(at, R, row, 64 * (G // 4), tl.uint16).to(tl.int32) >> (4 * (G % 4))) & 15
        if BITS == 5:
            code |= ((_lanes(at, R, row, 128, tl.uint8).to(tl.int32) >> G) & 1) << 4
        elif BITS == 6:
            code |= ((_lanes(at, R, row, 128, tl.uint16).to(tl.int32) >> (2 * G)) & 3) << 4
        else:
            tl.static_assert(BITS == 4)
    return code


@triton.jit
def _float(number, MINUS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 of an int32 from 0 to 2^23 - 1, minus a small number: exact."""
    return (number | _MAGIC).to(tl.float32, bitcast=True) - (_MAGIC_VALUE + MINUS)


@triton.jit
def _value(code, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a code stands for, float32; of IQ1 the code."""
    if FORMAT == "IQ1_S" or FORMAT == "IQ1_M":
        value = code
    elif FORMAT == "IQ4_NL" or FORMAT == "IQ4_XS":
        lower, upper = tl.where((code & 4) == 0, _IQ4_0, _IQ4_1), tl.where((code & 4) == 0, _IQ4_2, _IQ4_3)
        word = tl.where((code & 8) == 0, lower, upper)
        value = _float((word >> ((code & 3) << 3)) & 255, 128)
    elif FORMAT == "MXFP4":
        value = _signed(_float((tl.full((1, 1), _MXFP4, tl.int32) >> ((code & 7) << 2)) & 15, 0), code << 28)
    elif FORMAT == "IQ3_XXS":
        level = code & 7
        value = _signed(_float(8 * level + ((level + 1) >> 3 << 1), -4), code << 28)  # 4, 12, ..., 52, and 62
    elif FORMAT == "IQ3_S":
        value = _float(2 * code, 15)
    elif FORMAT == "IQ2_XXS" or FORMAT == "IQ2_XS" or FORMAT == "IQ2_S":
        level = code & 3
        value = _signed(_float(17 * level + (level >> 1), -8), code << 29)  # 8, 25, 42 + 1
    elif FORMAT == "Q4_0":
        value = _float(code, 8)
    elif FORMAT == "Q5_0":
        value = _float(code, 16)
    elif FORMAT == "Q8_0" or FORMAT == "Q8_K":
        value = _float(code, 128)
    elif FORMAT == "Q3_K":
        value = _float(code, 4)
    elif FORMAT == "Q6_K":
        value = _float(code, 32)
    elif FORMAT == "TQ1_0" or FORMAT == "TQ2_0" or FORMAT == "I2_S":
        value = _float(code, 1)
    else:
        tl.static_assert(
            FORMAT == "Q4_1" or FORMAT == "Q5_1" or FORMAT == "Q2_K" or FORMAT == "Q4_K" or FORMAT == "Q5_K"
        )
        value = _float(code, 0)
    return value


@triton.jit
def _signed(value, word):  # type: ignore[no-untyped-def]
    """A positive float32, negative where the highest bit of an int32 is set."""
    return (value.to(tl.int32, bitcast=True) | (word & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _floats(at, R, row, G: tl.constexpr, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [M, 32] of what is stored as floats."""
    if FORMAT == "F32":
        value = _lanes(at, R, row, 128 * G, tl.float32)
    elif FORMAT == "F16":
        value = _lanes(at, R, row, 64 * G, tl.float16).to(tl.float32)
    else:
        tl.static_assert(FORMAT == "BF16")
        value = (_lanes(at, R, row, 64 * G, tl.uint16).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


# --- scales ----------------------------------------------------------------------------------------------------------


@triton.jit
def _word(at, R, row, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """The word of rows [M] in the plane that begins after OFFSET bytes of each row."""
    return tl.load((at + R * OFFSET).to(tl.pointer_type(tl.int32)) + row)


@triton.jit
def _byte_scale(at, R, row, I: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    """Scale I of group G, int32 [M] from 0 to 255."""
    return (_word(at, R, row, 32 * BITS + 4 * (2 * I + G // 4)) >> (8 * (G % 4))) & 255


@triton.jit
def _signed_scale(at, R, row, I: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    """The same of int8, as float32 [M]."""
    return _float(_byte_scale(at, R, row, I, G, BITS) ^ 128, 128)


@triton.jit
def _half_scale(at, R, row, I: tl.constexpr, G: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    """Scale I of group G where scales are float16: float32 [M]."""
    return _half(_word(at, R, row, 32 * BITS + 4 * (4 * I + G // 2)) >> (16 * (G % 2)))


@triton.jit
def _half(word):  # type: ignore[no-untyped-def]
    """The float16 in the lower half of words, as float32."""
    return (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _head(at, R, row, ROW_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The head where there is one: float32 [M]."""
    return _word(at, R, row, ROW_BYTES - 4).to(tl.float32, bitcast=True)


@triton.jit
def _heads(at, R, row, ROW_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both heads: float32 [M] each."""
    word = _word(at, R, row, ROW_BYTES - 4)
    return _half(word), _half(word >> 16)


@triton.jit
def _power(e):  # type: ignore[no-untyped-def]
    """2^(e - 128) of e from 0 to 255; the two lowest are subnormal."""
    return tl.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _each(scale):  # type: ignore[no-untyped-def]
    """A number for all columns of a row."""
    return scale[:, None]


@triton.jit
def _each_half(first, second):  # type: ignore[no-untyped-def]
    """[M, 32]: numbers for the first and for the last 16 columns of a row."""
    return tl.where(tl.arange(0, _GROUP)[None, :] < 16, first[:, None], second[:, None])
