"""Bits of float16 <-> float32, as LLVM values.

Where the CPU has no instruction for it LLVM would call a function that need not be there; then it is done by hand, bit for bit as
x86's instructions do it.
"""

from __future__ import annotations

from llvmlite import ir

from shoal.kernels.cpu.isa import CONVERTS_HALVES
from shoal.kernels.cpu.simd import emit
from shoal.kernels.cpu.simd.emit import Builder
from shoal.kernels.cpu.simd.vectors import F32, HALF, I16, I32


def widen(b: Builder, bits: ir.Value) -> ir.Value:
    """Bits of float16, one or a vector, as float32."""
    if CONVERTS_HALVES:
        return b.fpext(b.bitcast(bits, emit.like(HALF, bits.type)), emit.like(F32, bits.type))
    return widen_by_hand(b, bits)


def narrow(b: Builder, value: ir.Value) -> ir.Value:
    """float32, one or a vector, rounded to the bits of float16."""
    if CONVERTS_HALVES:
        return b.bitcast(b.fptrunc(value, emit.like(HALF, value.type)), emit.like(I16, value.type))
    return narrow_by_hand(b, value)


def widen_by_hand(b: Builder, bits: ir.Value) -> ir.Value:
    """As vcvtph2ps does it: NaN stays NaN with its payload, and is quiet."""
    i32, f32 = emit.like(I32, bits.type), emit.like(F32, bits.type)
    bits = b.zext(bits, i32)
    rest = b.and_(bits, emit.const(0x7FFF, i32))
    moved = b.shl(rest, emit.const(13, i32))
    normal = b.add(moved, emit.const(112 << 23, i32))  # another bias of the exponent
    # A denormal is a fraction of 2^-14: put behind the 1 of that number, which is then taken away.
    least = emit.const(113 << 23, i32)
    denormal = b.bitcast(b.fsub(b.bitcast(b.add(moved, least), f32), b.bitcast(least, f32)), i32)
    endless = b.or_(moved, emit.const(0x7F800000, i32))
    quiet = b.or_(endless, emit.const(0x00400000, i32))
    endless = b.select(b.icmp_unsigned(">", rest, emit.const(0x7C00, i32)), quiet, endless)
    out = b.select(b.icmp_unsigned("<", rest, emit.const(0x0400, i32)), denormal, normal)
    out = b.select(b.icmp_unsigned(">=", rest, emit.const(0x7C00, i32)), endless, out)
    sign = b.shl(b.and_(bits, emit.const(0x8000, i32)), emit.const(16, i32))
    return b.bitcast(b.or_(out, sign), f32)


def narrow_by_hand(b: Builder, value: ir.Value) -> ir.Value:
    """As vcvtps2ph does it: to the nearest, ties to even; NaN stays NaN with the upper part of its payload, and is quiet."""
    i32, f32 = emit.like(I32, value.type), value.type
    bits = b.bitcast(value, i32)
    rest = b.and_(bits, emit.const(0x7FFFFFFF, i32))
    # Half of what is cut off, less one, plus the last bit that stays: a tie goes to even. A carry makes the next exponent.
    odd = b.and_(b.lshr(rest, emit.const(13, i32)), emit.const(1, i32))
    normal = b.lshr(b.add(b.add(rest, odd), emit.const(0xFFF - (112 << 23), i32)), emit.const(13, i32))
    # Next to 0.5 a float32 counts in 2^-24, as denormal halves do: adding rounds.
    half = emit.const(0x3F000000, i32)
    denormal = b.sub(b.bitcast(b.fadd(b.bitcast(rest, f32), b.bitcast(half, f32)), i32), half)
    quiet = b.or_(b.and_(b.lshr(rest, emit.const(13, i32)), emit.const(0x3FF, i32)), emit.const(0x7E00, i32))
    endless = b.select(b.icmp_unsigned(">", rest, emit.const(0x7F800000, i32)), quiet, emit.const(0x7C00, i32))
    out = b.select(b.icmp_unsigned("<", rest, emit.const(113 << 23, i32)), denormal, normal)
    out = b.select(b.icmp_unsigned(">=", rest, emit.const(143 << 23, i32)), endless, out)
    sign = b.and_(b.lshr(bits, emit.const(16, i32)), emit.const(0x8000, i32))
    return b.trunc(b.or_(out, sign), emit.like(I16, value.type))
