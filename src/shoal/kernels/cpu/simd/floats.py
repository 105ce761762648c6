"""Arithmetic on float32: lanes, vectors and tiles."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from shoal.kernels.cpu.isa import MULTIPLIES_AND_ADDS
from shoal.kernels.cpu.simd import emit
from shoal.kernels.cpu.simd.emit import Builder
from shoal.kernels.cpu.simd.vectors import F32, F32X16, I1, I16, I32, I32X16, I64, f32x16, tile_of, vector


def _fma(b: Builder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    if MULTIPLIES_AND_ADDS:
        return emit.call(b, "llvm.fma.v16f32", F32X16, x, y, z)
    return _fma_by_hand(b, x, y, z)


def _fma_by_hand(b: Builder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z rounded once, for which LLVM would call a function lane by lane. In float64 the product is exact and the sum
    is rounded; where it is not exact its last bit is made 1, so that rounding it again goes the way of the exact sum."""
    f64, i64 = vector(ir.DoubleType(), 16), vector(I64, 16)
    x, y, z = (b.fpext(value, f64) for value in (x, y, z))
    product = b.fmul(x, y)
    total = b.fadd(product, z)
    added = b.fsub(total, product)
    lost = b.fadd(b.fsub(product, b.fsub(total, added)), b.fsub(z, added))
    bits, is_lost = b.bitcast(total, i64), b.fcmp_ordered("!=", lost, emit.const(0.0, f64))
    # Between two float64 the one with the odd last bit: the sum itself, or its neighbour on the side of what was lost.
    outwards = b.icmp_signed(">=", b.xor(bits, b.bitcast(lost, i64)), emit.const(0, i64))
    neighbour = b.add(bits, b.select(outwards, emit.const(1, i64), emit.const(-1, i64)))
    is_even = b.icmp_unsigned("==", b.and_(bits, emit.const(1, i64)), emit.const(0, i64))
    bits = b.select(b.and_(is_lost, is_even), neighbour, bits)
    return b.fptrunc(b.bitcast(bits, f64), F32X16)


@emit.operation(f32x16)
def splat(b: Builder, _: Any, value: ir.Value) -> ir.Value:
    """One number, as float32, in every lane."""
    return emit.splat(b, emit.as_f32(b, value), 16)


@emit.operation(f32x16)
def add(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x + y."""
    return b.fadd(x, y)


@emit.operation(f32x16)
def sub(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x - y."""
    return b.fsub(x, y)


@emit.operation(f32x16)
def mul(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x * y."""
    return b.fmul(x, y)


@emit.operation(f32x16)
def div(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x / y."""
    return b.fdiv(x, y)


@emit.operation(f32x16)
def fma(b: Builder, _: Any, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once."""
    return _fma(b, x, y, z)


@emit.operation(f32x16)
def maximum(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of each pair; y where either is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@emit.operation(types.float32)
def largest_magnitude(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """The float32 of the largest `magnitude` of all lanes."""
    return b.bitcast(emit.fold(b, x, lambda p, q: b.select(b.icmp_signed(">", p, q), p, q)), F32)


# exp on [-ln 2 / 2, ln 2 / 2] as a polynomial (Cephes expf); relative error below 2e-7 after scaling.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_LOW, _EXP_HIGH = -87.0, 88.0


def _exp(b: Builder, x: ir.Value) -> ir.Value:
    clamped = b.select(b.fcmp_ordered("<", x, emit.const(_EXP_LOW, F32X16)), emit.const(_EXP_LOW, F32X16), x)
    clamped = b.select(
        b.fcmp_ordered(">", clamped, emit.const(_EXP_HIGH, F32X16)), emit.const(_EXP_HIGH, F32X16), clamped
    )
    magic = emit.const(12582912.0, F32X16)
    shifted = _fma(b, clamped, emit.const(1.44269504088896341, F32X16), magic)
    whole = b.fsub(shifted, magic)
    r = _fma(b, whole, emit.const(-0.693359375, F32X16), clamped)
    r = _fma(b, whole, emit.const(2.12194440e-4, F32X16), r)
    p = emit.const(_EXP[0], F32X16)
    for coefficient in _EXP[1:]:
        p = _fma(b, p, r, emit.const(coefficient, F32X16))
    p = b.fadd(_fma(b, p, b.fmul(r, r), r), emit.const(1.0, F32X16))
    power = b.shl(b.add(b.bitcast(shifted, I32X16), emit.const(127 - 0x4B400000, I32X16)), emit.const(23, I32X16))
    result = b.fmul(p, b.bitcast(power, F32X16))
    return b.select(b.fcmp_ordered("<", x, emit.const(_EXP_LOW, F32X16)), emit.const(0.0, F32X16), result)


@emit.operation(f32x16)
def exp(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """e^x; 0 below -87, and no more than e^88. NaN stays NaN."""
    return _exp(b, x)


# tanh x = x + x^3 P(x^2) for |x| < 0.625 (Cephes tanhf), where 1 - 2 / (e^2x + 1) would lose digits.
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_TANH_NEAR = 0.625


@emit.operation(f32x16)
def tanh(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """tanh x, to a few units in the last place. NaN stays NaN."""
    square = b.fmul(x, x)
    p = emit.const(_TANH[0], F32X16)
    for coefficient in _TANH[1:]:
        p = _fma(b, p, square, emit.const(coefficient, F32X16))
    near = _fma(b, b.fmul(p, square), x, x)
    one = emit.const(1.0, F32X16)
    far = b.fsub(one, b.fdiv(emit.const(2.0, F32X16), b.fadd(_exp(b, b.fadd(x, x)), one)))
    return b.select(b.fcmp_ordered("<", square, emit.const(_TANH_NEAR**2, F32X16)), near, far)


@emit.operation(f32x16)
def rotate_pairs(b: Builder, _: Any, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Turn the 8 pairs of neighbours (a, b) into (a cos - b sin, b cos + a sin); cos holds c, c and sin -s, s for each pair."""
    swapped = emit.shuffle(b, x, x, [i ^ 1 for i in range(16)])
    return _fma(b, swapped, sin, b.fmul(x, cos))


@emit.operation(f32x16)
def first_lanes(b: Builder, _: Any, x: ir.Value, count: ir.Value, other: ir.Value) -> ir.Value:
    """x in the first ``count`` lanes, ``other`` (a float32) in the rest."""
    lanes = ir.Constant(vector(I64, 16), list(range(16)))
    return b.select(b.icmp_signed("<", lanes, emit.splat(b, count, 16)), x, emit.splat(b, other, 16))


@emit.operation(f32x16)
def hide(b: Builder, _: Any, x: ir.Value, first: ir.Value, end: ir.Value) -> ir.Value:
    """x in the lanes from ``first`` to before ``end``; -infinity in the rest."""
    lanes = ir.Constant(vector(I64, 16), list(range(16)))
    seen = b.and_(
        b.icmp_signed(">=", lanes, emit.splat(b, first, 16)), b.icmp_signed("<", lanes, emit.splat(b, end, 16))
    )
    return b.select(seen, x, emit.const(-float("inf"), F32X16))


@emit.operation(types.float32)
def sum_lanes(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Sum of all lanes."""
    return emit.fold(b, x, b.fadd)


@emit.operation(types.float32)
def max_lanes(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Largest lane."""
    return emit.fold(b, x, lambda p, q: b.select(b.fcmp_ordered(">", p, q), p, q))


# --- tiles -----------------------------------------------------------------------------------------------------------


@emit.operation(lambda shape: tile_of(f32x16, shape))
def tile_zero(b: Builder, args: Any, shape: ir.Value) -> ir.Value:
    """Zero float32 vectors."""
    return emit.each(b, tile_of(f32x16, args[0]), lambda t: emit.const(0.0, F32X16))


@emit.operation(lambda acc, *_: acc)
def tile_scale(
    b: Builder, args: Any, acc: ir.Value, dots: ir.Value, d: ir.Value, address: ir.Value, stride: ir.Value
) -> ir.Value:
    """acc + dots * (d * the float32 at address + t * stride)."""

    def one(t: int) -> ir.Value:
        factor = b.fmul(d, emit.splat(b, emit.load(b, emit.at(b, address, stride, t), F32), 16))
        return _fma(b, b.sitofp(b.extract_value(dots, t), F32X16), factor, b.extract_value(acc, t))

    return emit.each(b, args[0], one)


@emit.operation(lambda acc, *_: acc)
def tile_scale_halves(
    b: Builder,
    args: Any,
    acc: ir.Value,
    first: ir.Value,
    second: ir.Value,
    d: ir.Value,
    address: ir.Value,
    stride: ir.Value,
) -> ir.Value:
    """acc + (first * s0 + second * s1) * d for the two float32 s0, s1 at address + t * stride."""

    def one(t: int) -> ir.Value:
        at = emit.at(b, address, stride, t)
        s0, s1 = (emit.splat(b, emit.load(b, b.add(at, ir.Constant(I64, i)), F32), 16) for i in (0, 4))
        part = b.fmul(b.sitofp(b.extract_value(first, t), F32X16), s0)
        part = _fma(b, b.sitofp(b.extract_value(second, t), F32X16), s1, part)
        return _fma(b, part, d, b.extract_value(acc, t))

    return emit.each(b, args[0], one)


@emit.operation(lambda acc, *_: acc)
def tile_fma(b: Builder, args: Any, acc: ir.Value, w: ir.Value, address: ir.Value, stride: ir.Value) -> ir.Value:
    """acc + w * the float32 at address + t * stride."""

    def one(t: int) -> ir.Value:
        activation = emit.splat(b, emit.load(b, emit.at(b, address, stride, t), F32), 16)
        return _fma(b, w, activation, b.extract_value(acc, t))

    return emit.each(b, args[0], one)


@emit.operation(lambda acc, *_: acc)
def tile_fma_lanes(b: Builder, args: Any, acc: ir.Value, x: ir.Value, factor: ir.Value) -> ir.Value:
    """acc + x * factor, for a vector ``factor``."""
    return emit.each(b, args[0], lambda t: _fma(b, b.extract_value(x, t), factor, b.extract_value(acc, t)))


@emit.operation(lambda tile, *_: tile)
def tile_maximum(b: Builder, args: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of each pair; y where either is NaN."""

    def one(t: int) -> ir.Value:
        p, q = b.extract_value(x, t), b.extract_value(y, t)
        return b.select(b.fcmp_ordered(">", p, q), p, q)

    return emit.each(b, args[0], one)


@emit.operation(lambda shape, *_: tile_of(f32x16, shape))
def tile_splat(b: Builder, args: Any, shape: ir.Value, value: ir.Value) -> ir.Value:
    """One float32 everywhere."""
    return emit.each(b, tile_of(f32x16, args[0]), lambda t: emit.splat(b, emit.as_f32(b, value), 16))


@emit.operation(lambda tile, *_: tile)
def tile_hide(b: Builder, args: Any, tile: ir.Value, count: ir.Value, step: ir.Value) -> ir.Value:
    """Keep the first count + t * step lanes of vector t; -infinity in the rest."""
    lanes = ir.Constant(vector(I64, 16), list(range(16)))

    def one(t: int) -> ir.Value:
        limit = emit.splat(b, emit.at(b, count, step, t), 16)
        return b.select(b.icmp_signed("<", lanes, limit), b.extract_value(tile, t), emit.const(-float("inf"), F32X16))

    return emit.each(b, args[0], one)


@emit.operation(lambda tile, *_: tile)
def tile_add(b: Builder, args: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x + y."""
    return emit.each(b, args[0], lambda t: b.fadd(b.extract_value(x, t), b.extract_value(y, t)))


# --- lanes and bits --------------------------------------------------------------------------------------------------


@emit.operation(types.int64)
def equal_lanes(b: Builder, _: Any, x: ir.Value, value: ir.Value) -> ir.Value:
    """Bit r is set where lane r equals ``value``."""
    same = b.fcmp_ordered("==", x, emit.splat(b, emit.as_f32(b, value), 16))
    return b.zext(b.bitcast(same, I16), I64)


@emit.operation(types.int64)
def lanes_from(b: Builder, _: Any, x: ir.Value, least: ir.Value) -> ir.Value:
    """Bit r is set where lane r is at least ``least``."""
    return b.zext(b.bitcast(b.fcmp_ordered(">=", x, emit.splat(b, emit.as_f32(b, least), 16)), I16), I64)


@emit.operation(f32x16)
def keep_from(b: Builder, _: Any, x: ir.Value, least: ir.Value) -> ir.Value:
    """x where it is at least ``least``, otherwise 0."""
    return b.select(b.fcmp_ordered(">=", x, emit.splat(b, emit.as_f32(b, least), 16)), x, emit.const(0.0, F32X16))


@emit.operation(f32x16)
def keep_where(b: Builder, _: Any, x: ir.Value, y: ir.Value, least: ir.Value) -> ir.Value:
    """x where y is at least ``least``, otherwise 0."""
    return b.select(b.fcmp_ordered(">=", y, emit.splat(b, emit.as_f32(b, least), 16)), x, emit.const(0.0, F32X16))


@emit.operation(f32x16)
def keep_bits(b: Builder, _: Any, x: ir.Value, lanes: ir.Value, other: ir.Value) -> ir.Value:
    """x in the lanes whose bit is set, ``other`` (a float32) in the rest."""
    mask = b.bitcast(b.trunc(lanes, I16), vector(I1, 16))
    return b.select(mask, x, emit.splat(b, emit.as_f32(b, other), 16))


@emit.operation(f32x16)
def to_f32(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """int32 as float32."""
    return b.sitofp(x, F32X16)


@emit.operation(types.int64)
def bits_of_f32(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """The bits of a float32."""
    return b.zext(b.bitcast(x, I32), I64)


@emit.operation(types.float32)
def f32_of_bits(b: Builder, _: Any, bits: ir.Value) -> ir.Value:
    """The float32 with these bits."""
    return b.bitcast(b.trunc(bits, I32), F32)
