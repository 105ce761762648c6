"""One group of a packed matrix, 32 columns of 16 rows, taken into registers: codes, scales, offsets.

Every GGUF type is two small functions. The first reads what stands before a block (float scales of 256 columns), the second
reads a group and returns eight vectors of codes, one for each *quad* of 4 columns, with what makes weights of them:

    weight = code * d + m                 16 rows of d and m
    weight = (code - 2^shift) * d         codes are unsigned bytes: where a type has signed values, this much is added to them

There is one d for the group, or one for each half of 16 columns. Layouts: pack.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.kernels.cpu.jit import inline
from shoal.kernels.cpu.simd import (
    Address,
    Register,
    bits,
    bits_up,
    either,
    every_byte,
    fma,
    load_bits16,
    load_e8m0x16,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i8x16,
    load_i64,
    load_u8x16,
    load_u8x64,
    lookup,
    mul,
    plus,
    splat,
    spread,
)

TENSOR_SCALE = 0  # where a kernel's arguments hold the address of a float32 that scales the whole matrix

# --- codes -----------------------------------------------------------------------------------------------------------


@inline
def _codes2(w: Address) -> Any:
    """2-bit codes: vector i holds quads 4i ... 4i + 3 in bits 0-1, 2-3, 4-5 and 6-7."""
    a, b = load_u8x64(w), load_u8x64(w + 64)
    return (
        bits(a, 0, 3),
        bits(a, 2, 3),
        bits(a, 4, 3),
        bits(a, 6, 3),
        bits(b, 0, 3),
        bits(b, 2, 3),
        bits(b, 4, 3),
        bits(b, 6, 3),
    )


@inline
def _codes3(w: Address) -> Any:
    """2-bit codes, and bit q of a plane for the third bit of quad q."""
    c0, c1, c2, c3, c4, c5, c6, c7 = _codes2(w)
    p = load_u8x64(w + 128)
    return (
        either(c0, bits_up(p, 2, 4)),
        either(c1, bits_up(p, 1, 4)),
        either(c2, bits(p, 0, 4)),
        either(c3, bits(p, 1, 4)),
        either(c4, bits(p, 2, 4)),
        either(c5, bits(p, 3, 4)),
        either(c6, bits(p, 4, 4)),
        either(c7, bits(p, 5, 4)),
    )


@inline
def _codes4(w: Address) -> Any:
    """Nibbles: vector i holds quad i low and quad i + 4 high."""
    a, b, c, d = load_u8x64(w), load_u8x64(w + 64), load_u8x64(w + 128), load_u8x64(w + 192)
    return (
        bits(a, 0, 15),
        bits(b, 0, 15),
        bits(c, 0, 15),
        bits(d, 0, 15),
        bits(a, 4, 15),
        bits(b, 4, 15),
        bits(c, 4, 15),
        bits(d, 4, 15),
    )


@inline
def _codes5(w: Address) -> Any:
    """Nibbles, and bit q of a plane for the fifth bit of quad q."""
    c0, c1, c2, c3, c4, c5, c6, c7 = _codes4(w)
    p = load_u8x64(w + 256)
    return (
        either(c0, bits_up(p, 4, 16)),
        either(c1, bits_up(p, 3, 16)),
        either(c2, bits_up(p, 2, 16)),
        either(c3, bits_up(p, 1, 16)),
        either(c4, bits(p, 0, 16)),
        either(c5, bits(p, 1, 16)),
        either(c6, bits(p, 2, 16)),
        either(c7, bits(p, 3, 16)),
    )


@inline
def _codes6(w: Address) -> Any:
    """Nibbles, and 2-bit codes for the two upper bits."""
    c0, c1, c2, c3, c4, c5, c6, c7 = _codes4(w)
    p, q = load_u8x64(w + 256), load_u8x64(w + 320)
    return (
        either(c0, bits_up(p, 4, 48)),
        either(c1, bits_up(p, 2, 48)),
        either(c2, bits(p, 0, 48)),
        either(c3, bits(p, 2, 48)),
        either(c4, bits_up(q, 4, 48)),
        either(c5, bits_up(q, 2, 48)),
        either(c6, bits(q, 0, 48)),
        either(c7, bits(q, 2, 48)),
    )


@inline
def _codes8(w: Address) -> Any:
    """Bytes: vector q holds quad q."""
    return (
        load_u8x64(w),
        load_u8x64(w + 64),
        load_u8x64(w + 128),
        load_u8x64(w + 192),
        load_u8x64(w + 256),
        load_u8x64(w + 320),
        load_u8x64(w + 384),
        load_u8x64(w + 448),
    )


@inline
def _odd(w: Address) -> Any:
    """2 n + 1 for nibbles n."""
    a, b, c, d = load_u8x64(w), load_u8x64(w + 64), load_u8x64(w + 128), load_u8x64(w + 192)
    one = every_byte(1)
    return (
        either(bits_up(a, 1, 30), one),
        either(bits_up(b, 1, 30), one),
        either(bits_up(c, 1, 30), one),
        either(bits_up(d, 1, 30), one),
        either(bits(a, 3, 30), one),
        either(bits(b, 3, 30), one),
        either(bits(c, 3, 30), one),
        either(bits(d, 3, 30), one),
    )


@inline
def _through(table: tuple[int, ...], codes: Any) -> Any:
    """table[code] for every code."""
    c0, c1, c2, c3, c4, c5, c6, c7 = codes
    return (
        lookup(c0, table),
        lookup(c1, table),
        lookup(c2, table),
        lookup(c3, table),
        lookup(c4, table),
        lookup(c5, table),
        lookup(c6, table),
        lookup(c7, table),
    )


# --- what stands before a block --------------------------------------------------------------------------------------


@inline
def _nothing(args: Address, w: Address) -> Any:
    return 0


@inline
def _d_f16(args: Address, w: Address) -> Any:
    return load_f16x16(w)


@inline
def _d_f32(args: Address, w: Address) -> Any:
    return load_f32x16(w)


@inline
def _d_tensor(args: Address, w: Address) -> Any:
    return splat(load_f32(load_i64(args + TENSOR_SCALE)))


@inline
def _d_min(args: Address, w: Address) -> Any:
    """d and -dmin."""
    return load_f16x16(w), mul(load_f16x16(w + 32), splat(-1.0))


# --- groups with one scale: codes, d and perhaps m ------------------------------------------------------------------------------


@inline
def _q4_0(w: Address, head: Any) -> Any:
    return _codes4(w), load_f16x16(w + 256)


@inline
def _q4_1(w: Address, head: Any) -> Any:
    return _codes4(w), load_f16x16(w + 256), load_f16x16(w + 288)


@inline
def _q5_0(w: Address, head: Any) -> Any:
    return _codes5(w), load_f16x16(w + 320)


@inline
def _q5_1(w: Address, head: Any) -> Any:
    return _codes5(w), load_f16x16(w + 320), load_f16x16(w + 352)


@inline
def _q8_0(w: Address, head: Any) -> Any:
    return _codes8(w), load_f16x16(w + 512)


@inline
def _q8_k(w: Address, d: Register) -> Any:
    return _codes8(w), d


@inline
def _q4_k(w: Address, head: Any) -> Any:
    d, least = head
    return _codes4(w), mul(d, load_u8x16(w + 256)), mul(least, load_u8x16(w + 272))


@inline
def _q5_k(w: Address, head: Any) -> Any:
    d, least = head
    return _codes5(w), mul(d, load_u8x16(w + 320)), mul(least, load_u8x16(w + 336))


_IQ4 = tuple(v + 128 for v in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_E2M1 = tuple(v + 16 for v in (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
_IQ3 = (4, 12, 20, 28, 36, 44, 52, 62)
_IQ3_SIGNED = tuple(64 + v for v in _IQ3) + tuple(64 - v for v in _IQ3)
_IQ2_SIGNED = (64 + 8, 64 + 25, 64 + 43, 64, 64 - 8, 64 - 25, 64 - 43, 64) * 2


@inline
def _iq4_nl(w: Address, head: Any) -> Any:
    return _through(_IQ4, _codes4(w)), load_f16x16(w + 256)


@inline
def _iq4_xs(w: Address, d: Register) -> Any:
    return _through(_IQ4, _codes4(w)), mul(d, load_i8x16(w + 256))


@inline
def _mxfp4(w: Address, head: Any) -> Any:
    return _through(_E2M1, _codes4(w)), load_e8m0x16(w + 256)


@inline
def _iq3_xxs(w: Address, d: Register) -> Any:
    return _through(_IQ3_SIGNED, _codes4(w)), mul(mul(d, load_u8x16(w + 256)), splat(0.25))


@inline
def _iq3_s(w: Address, d: Register) -> Any:
    """Odd numbers -15 ... 15: codes 2 q + 1."""
    return _odd(w), mul(d, load_u8x16(w + 256))


@inline
def _ternary(w: Address, d: Register) -> Any:
    return _codes2(w), d


# --- groups with a scale for each half: codes, d, d or d, m, d, m ------------------------------------------------------------


@inline
def _q6_k(w: Address, d: Register) -> Any:
    return _codes6(w), mul(d, load_i8x16(w + 384)), mul(d, load_i8x16(w + 400))


@inline
def _q3_k(w: Address, d: Register) -> Any:
    return _codes3(w), mul(d, load_i8x16(w + 192)), mul(d, load_i8x16(w + 208))


@inline
def _q2_k(w: Address, head: Any) -> Any:
    """A byte a half: scale in the low nibble, minimum in the high one."""
    d, least = head
    a, m = mul(d, load_bits16(w + 128, 0, 15)), mul(least, load_bits16(w + 128, 4, 15))
    b, n = mul(d, load_bits16(w + 144, 0, 15)), mul(least, load_bits16(w + 144, 4, 15))
    return _codes2(w), a, m, b, n


@inline
def _iq2(w: Address, d: Register) -> Any:
    """A byte holds s of both halves: scales are d (2 s + 1) / 8. That is exact: 11 bits of d times 5 bits."""
    quarter, eighth = mul(d, splat(0.25)), mul(d, splat(0.125))
    a, b = load_bits16(w + 192, 0, 15), load_bits16(w + 192, 4, 15)
    return _through(_IQ2_SIGNED, _codes3(w)), fma(quarter, a, eighth), fma(quarter, b, eighth)


@inline
def _octets(w: Address) -> Any:
    """2-bit codes g times 8, plus 7, or 9 where a bit is set for the octet: 8 (g - 1 +- 1/8) + 16. Bits 0 and 1 of the bytes
    at w + 128 are those of the octets of the first half, at w + 144 of the second."""
    a, b = load_u8x64(w), load_u8x64(w + 64)
    o0, o1 = spread(w + 128, 0, 1, 2, 7), spread(w + 128, 1, 1, 2, 7)
    o2, o3 = spread(w + 144, 0, 1, 2, 7), spread(w + 144, 1, 1, 2, 7)
    return (
        plus(bits_up(a, 3, 24), o0),
        plus(bits_up(a, 1, 24), o0),
        plus(bits(a, 1, 24), o1),
        plus(bits(a, 3, 24), o1),
        plus(bits_up(b, 3, 24), o2),
        plus(bits_up(b, 1, 24), o2),
        plus(bits(b, 1, 24), o3),
        plus(bits(b, 3, 24), o3),
    )


@inline
def _iq1(w: Address, d: Register) -> Any:
    """Bits 2-4 of a half's byte are s: its scale is d (2 s + 1), an eighth of that for codes that count eighths."""
    quarter, eighth = mul(d, splat(0.25)), mul(d, splat(0.125))
    a, b = load_bits16(w + 128, 2, 7), load_bits16(w + 144, 2, 7)
    return _octets(w), fma(quarter, a, eighth), fma(quarter, b, eighth)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GroupReader:
    """How one type is read. ``largest``: the largest code, which says how many products fit 16 bits; ``halves``: a scale for
    each half; ``shift``: codes are 2^shift more than what they stand for, None where there is an m instead."""

    head: Callable[..., Any]
    group: Callable[..., Any]
    largest: int
    halves: bool = False
    shift: int | None = None


GROUPS: dict[str, GroupReader] = {
    "Q4_0": GroupReader(_nothing, _q4_0, 15, shift=3),
    "Q4_1": GroupReader(_nothing, _q4_1, 15),
    "Q5_0": GroupReader(_nothing, _q5_0, 31, shift=4),
    "Q5_1": GroupReader(_nothing, _q5_1, 31),
    "Q8_0": GroupReader(_nothing, _q8_0, 255, shift=7),
    "Q8_K": GroupReader(_d_f32, _q8_k, 255, shift=7),
    "Q2_K": GroupReader(_d_min, _q2_k, 3, halves=True),
    "Q3_K": GroupReader(_d_f16, _q3_k, 7, halves=True, shift=2),
    "Q4_K": GroupReader(_d_min, _q4_k, 15),
    "Q5_K": GroupReader(_d_min, _q5_k, 31),
    "Q6_K": GroupReader(_d_f16, _q6_k, 63, halves=True, shift=5),
    "IQ4_NL": GroupReader(_nothing, _iq4_nl, 241, shift=7),
    "IQ4_XS": GroupReader(_d_f16, _iq4_xs, 241, shift=7),
    "IQ3_XXS": GroupReader(_d_f16, _iq3_xxs, 126, shift=6),
    "IQ3_S": GroupReader(_d_f16, _iq3_s, 31, shift=4),
    "IQ2_XXS": GroupReader(_d_f16, _iq2, 107, halves=True, shift=6),
    "IQ2_XS": GroupReader(_d_f16, _iq2, 107, halves=True, shift=6),
    "IQ2_S": GroupReader(_d_f16, _iq2, 107, halves=True, shift=6),
    "IQ1_S": GroupReader(_d_f16, _iq1, 25, halves=True, shift=4),
    "IQ1_M": GroupReader(_d_f16, _iq1, 25, halves=True, shift=4),
    "TQ1_0": GroupReader(_d_f16, _ternary, 2, shift=0),
    "TQ2_0": GroupReader(_d_f16, _ternary, 2, shift=0),
    "I2_S": GroupReader(_d_tensor, _ternary, 2, shift=0),
    "MXFP4": GroupReader(_nothing, _mxfp4, 28, shift=4),
}
