"""SIMD as ordinary Numba values: vectors of 16 lanes, tiles of vectors, and the few operations the kernels are made of.

Every vector is one *logical* width on every machine, 16 float32 lanes or 64 bytes; LLVM splits it into what the CPU has (one zmm,
two ymm, four NEON registers). Lane r belongs to weight row (or KV position) r, so sums run along time, never across lanes, and the
result does not depend on the width. Only the int8 dot product is written per instruction set (``ISA``); it is exact
integer arithmetic, so all of them agree bit for bit.

Addresses are plain int64 values. A *tile* holds one vector per token; its size is the length of the tuple that ``shape`` is.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once
from numba.core.datamodel import models
from numba.core.datamodel.registry import register_default
from numba.extending import intrinsic

from shoal.kernels.cpu.isa import CONVERTS_HALVES, ISA, MULTIPLIES_AND_ADDS

# What the annotations of kernels mean by their types; Numba infers its own.
Address = int
Register = Any  # a vector, or a tile of vectors
Scalar = Any  # a float32
Shape = tuple[int, ...]  # its length is the size of a tile
Function = Any  # a compiled helper, passed in

Builder = Any

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_HALF, _F32 = ir.HalfType(), ir.FloatType()


def _vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


_F32X16, _I32X16 = _vector(_F32, 16), _vector(_I32, 16)
_U8X64, _I16X32 = _vector(_I8, 64), _vector(_I16, 32)


# --- types -----------------------------------------------------------------------------------------------------------


class Vector(types.Type):  # type: ignore[misc]
    """A SIMD register value."""

    def __init__(self, name: str, llvm: ir.Type) -> None:
        self.llvm = llvm
        super().__init__(name=f"simd.{name}")


class Tile(types.Type):  # type: ignore[misc]
    """``count`` vectors of one kind, one per token; kept in registers."""

    def __init__(self, vector: Vector, count: int) -> None:
        self.vector, self.count = vector, count
        super().__init__(name=f"simd.tile({vector.name} x {count})")


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


@register_default(Tile)
class _TileModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Tile) -> None:
        super().__init__(manager, kind, ir.ArrayType(kind.vector.llvm, kind.count))


f32x16, i32x16 = Vector("f32x16", _F32X16), Vector("i32x16", _I32X16)
u8x64, i16x32 = Vector("u8x64", _U8X64), Vector("i16x32", _I16X32)

# What the int8 dot product sums in before `dot_end`: int32 lanes with VNNI, pairs of int16 with AVX2.
DOT = i16x32 if ISA == "avx2" else i32x16
_DOT_IS_WIDE = ISA != "avx2"


def _tile_of(vector: Vector, shape: Any) -> Tile:
    """A tile as large as a tuple is long, or as another tile."""
    return Tile(vector, shape.count if isinstance(shape, Tile) else len(shape))


# --- helpers for writing LLVM IR -------------------------------------------------------------------------------------


def _pointer(b: Builder, address: ir.Value, to: ir.Type) -> ir.Value:
    return b.inttoptr(address, to.as_pointer())


def _load(b: Builder, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
    value = b.load(_pointer(b, address, kind))
    value.align = align
    return value


def _store(b: Builder, value: ir.Value, address: ir.Value) -> None:
    b.store(value, _pointer(b, address, value.type)).align = 1


def _splat(b: Builder, scalar: ir.Value, lanes: int) -> ir.Value:
    kind = _vector(scalar.type, lanes)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_vector(_I32, lanes), [0] * lanes))


def _const(value: float, kind: ir.Type) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _like(element: ir.Type, kind: ir.Type) -> ir.Type:
    """A vector of ``element`` with as many lanes as ``kind``, or ``element`` where that is no vector."""
    return _vector(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _call(b: Builder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def _as_f32(b: Builder, value: ir.Value) -> ir.Value:
    return value if value.type == _F32 else b.fptrunc(value, _F32)


def _fma(b: Builder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    if MULTIPLIES_AND_ADDS:
        return _call(b, "llvm.fma.v16f32", _F32X16, x, y, z)
    return _fma_by_hand(b, x, y, z)


def _fma_by_hand(b: Builder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z rounded once, for which LLVM would call a function lane by lane. In float64 the product is exact and the sum
    is rounded; where it is not exact its last bit is made 1, so that rounding it again goes the way of the exact sum."""
    f64, i64 = _vector(ir.DoubleType(), 16), _vector(_I64, 16)
    x, y, z = (b.fpext(value, f64) for value in (x, y, z))
    product = b.fmul(x, y)
    total = b.fadd(product, z)
    added = b.fsub(total, product)
    lost = b.fadd(b.fsub(product, b.fsub(total, added)), b.fsub(z, added))
    bits, is_lost = b.bitcast(total, i64), b.fcmp_ordered("!=", lost, _const(0.0, f64))
    # Between two float64 the one with the odd last bit: the sum itself, or its neighbour on the side of what was lost.
    outwards = b.icmp_signed(">=", b.xor(bits, b.bitcast(lost, i64)), _const(0, i64))
    neighbour = b.add(bits, b.select(outwards, _const(1, i64), _const(-1, i64)))
    is_even = b.icmp_unsigned("==", b.and_(bits, _const(1, i64)), _const(0, i64))
    bits = b.select(b.and_(is_lost, is_even), neighbour, bits)
    return b.fptrunc(b.bitcast(bits, f64), _F32X16)


def _at(b: Builder, address: ir.Value, stride: ir.Value, index: int) -> ir.Value:
    return b.add(address, b.mul(stride, ir.Constant(_I64, index))) if index else address


def _shuffle(b: Builder, x: ir.Value, y: ir.Value, mask: list[int]) -> ir.Value:
    return b.shuffle_vector(x, y, ir.Constant(_vector(_I32, len(mask)), mask))


def _bits_of_bytes(b: Builder, address: ir.Value, shift: ir.Value, mask: ir.Value) -> ir.Value:
    """(byte >> shift) & mask of 16 bytes, as int32."""
    wide = b.zext(_load(b, address, _vector(_I8, 16)), _I32X16)
    return b.and_(b.lshr(wide, _splat(b, b.trunc(shift, _I32), 16)), _splat(b, b.trunc(mask, _I32), 16))


Emit = Callable[..., Any]


def _operation(result: types.Type | Callable[..., types.Type]) -> Callable[[Emit], Any]:
    """Make an intrinsic of ``emit(builder, argument types, *values)``, which writes its instructions and returns its value.

    ``result`` is the result's type, or what gives it from the types of the arguments.
    """

    def decorate(emit: Emit) -> Any:
        def typer(context: Any, *args: types.Type) -> Any:
            kind = result if isinstance(result, types.Type) else result(*args)

            def codegen(cgctx: Any, builder: Builder, sig: Any, values: Any) -> Any:
                out = emit(builder, sig.args, *values)
                return cgctx.get_dummy_value() if sig.return_type == types.void else out

            return kind(*args), codegen

        # Numba reads names and number of the arguments from the signature: emit's, with the context for builder and types.
        values = list(signature(emit).parameters.values())[2:]
        context = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD)
        typer.__signature__ = Signature([context, *values])  # type: ignore[attr-defined]
        typer.__name__ = typer.__qualname__ = emit.__name__
        typer.__doc__ = emit.__doc__
        return intrinsic(typer)

    return decorate


# --- halves ----------------------------------------------------------------------------------------------------------
# Bits of float16 <-> float32. Where there is no instruction LLVM would call a function that need not be there.


def _wide(b: Builder, bits: ir.Value) -> ir.Value:
    if CONVERTS_HALVES:
        return b.fpext(b.bitcast(bits, _like(_HALF, bits.type)), _like(_F32, bits.type))
    return _wide_by_hand(b, bits)


def _narrow(b: Builder, value: ir.Value) -> ir.Value:
    if CONVERTS_HALVES:
        return b.bitcast(b.fptrunc(value, _like(_HALF, value.type)), _like(_I16, value.type))
    return _narrow_by_hand(b, value)


def _wide_by_hand(b: Builder, bits: ir.Value) -> ir.Value:
    """As vcvtph2ps does it: NaN stays NaN with its payload, and is quiet."""
    i32, f32 = _like(_I32, bits.type), _like(_F32, bits.type)
    bits = b.zext(bits, i32)
    rest = b.and_(bits, _const(0x7FFF, i32))
    moved = b.shl(rest, _const(13, i32))
    normal = b.add(moved, _const(112 << 23, i32))  # another bias of the exponent
    # A denormal is a fraction of 2^-14: put behind the 1 of that number, which is then taken away.
    least = _const(113 << 23, i32)
    denormal = b.bitcast(b.fsub(b.bitcast(b.add(moved, least), f32), b.bitcast(least, f32)), i32)
    endless = b.or_(moved, _const(0x7F800000, i32))
    quiet = b.or_(endless, _const(0x00400000, i32))
    endless = b.select(b.icmp_unsigned(">", rest, _const(0x7C00, i32)), quiet, endless)
    out = b.select(b.icmp_unsigned("<", rest, _const(0x0400, i32)), denormal, normal)
    out = b.select(b.icmp_unsigned(">=", rest, _const(0x7C00, i32)), endless, out)
    sign = b.shl(b.and_(bits, _const(0x8000, i32)), _const(16, i32))
    return b.bitcast(b.or_(out, sign), f32)


def _narrow_by_hand(b: Builder, value: ir.Value) -> ir.Value:
    """As vcvtps2ph does it: to the nearest, ties to even; NaN stays NaN with the upper part of its payload, and is quiet."""
    i32, f32 = _like(_I32, value.type), value.type
    bits = b.bitcast(value, i32)
    rest = b.and_(bits, _const(0x7FFFFFFF, i32))
    # Half of what is cut off, less one, plus the last bit that stays: a tie goes to even. A carry makes the next exponent.
    odd = b.and_(b.lshr(rest, _const(13, i32)), _const(1, i32))
    normal = b.lshr(b.add(b.add(rest, odd), _const(0xFFF - (112 << 23), i32)), _const(13, i32))
    # Next to 0.5 a float32 counts in 2^-24, as denormal halves do: adding rounds.
    half = _const(0x3F000000, i32)
    denormal = b.sub(b.bitcast(b.fadd(b.bitcast(rest, f32), b.bitcast(half, f32)), i32), half)
    quiet = b.or_(b.and_(b.lshr(rest, _const(13, i32)), _const(0x3FF, i32)), _const(0x7E00, i32))
    endless = b.select(b.icmp_unsigned(">", rest, _const(0x7F800000, i32)), quiet, _const(0x7C00, i32))
    out = b.select(b.icmp_unsigned("<", rest, _const(113 << 23, i32)), denormal, normal)
    out = b.select(b.icmp_unsigned(">=", rest, _const(143 << 23, i32)), endless, out)
    sign = b.and_(b.lshr(bits, _const(16, i32)), _const(0x8000, i32))
    return b.trunc(b.or_(out, sign), _like(_I16, value.type))


# --- memory ----------------------------------------------------------------------------------------------------------


@_operation(types.int64)
def load_i64(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The int64 at an address."""
    return _load(b, address, _I64)


@_operation(types.int64)
def load_i32(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The int32 at an address, widened."""
    return b.sext(_load(b, address, _I32), _I64)


@_operation(types.int64)
def load_u8(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The byte at an address."""
    return b.zext(_load(b, address, _I8), _I64)


@_operation(types.int64)
def load_u16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The uint16 at an address."""
    return b.zext(_load(b, address, _I16), _I64)


@_operation(types.float64)
def load_f64(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The float64 at an address."""
    return _load(b, address, ir.DoubleType())


@_operation(types.int64)
def load_u32(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The uint32 at an address."""
    return b.zext(_load(b, address, _I32), _I64)


@_operation(types.float32)
def load_f32(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The float32 at an address."""
    return _load(b, address, _F32)


@_operation(types.void)
def store_f32(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write a number as float32."""
    _store(b, _as_f32(b, value), address)


@_operation(types.void)
def store_f16(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Round a float32 to float16 and write it."""
    _store(b, _narrow(b, value), address)


@_operation(types.void)
def store_i32(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write an integer as int32."""
    _store(b, value if value.type == _I32 else b.trunc(value, _I32), address)


@_operation(types.void)
def store_i64(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write an int64."""
    _store(b, value, address)


@_operation(f32x16)
def load_f32x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 float32."""
    return _load(b, address, _F32X16)


@_operation(f32x16)
def load_f16x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 float16, widened."""
    return _wide(b, _load(b, address, _vector(_I16, 16)))


@_operation(f32x16)
def load_bf16x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 bfloat16, widened: they are the upper halves of float32."""
    wide = b.zext(_load(b, address, _vector(_I16, 16)), _I32X16)
    return b.bitcast(b.shl(wide, _const(16, _I32X16)), _F32X16)


@_operation(f32x16)
def load_u8x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 unsigned bytes, as float32."""
    return b.uitofp(_load(b, address, _vector(_I8, 16)), _F32X16)


@_operation(f32x16)
def load_i8x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 signed bytes, as float32."""
    return b.sitofp(_load(b, address, _vector(_I8, 16)), _F32X16)


@_operation(f32x16)
def load_bits16(b: Builder, _: Any, address: ir.Value, shift: ir.Value, mask: ir.Value) -> ir.Value:
    """(byte >> shift) & mask of 16 bytes, as float32."""
    return b.uitofp(_bits_of_bytes(b, address, shift, mask), _F32X16)


@_operation(f32x16)
def load_e8m0x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """2^(byte - 128) of 16 bytes: MXFP4's scales, for values that count halves."""
    e = b.zext(_load(b, address, _vector(_I8, 16)), _I32X16)
    normal = b.shl(b.sub(e, _const(1, _I32X16)), _const(23, _I32X16))
    denormal = b.shl(_const(0x00200000, _I32X16), b.and_(e, _const(1, _I32X16)))
    return b.bitcast(b.select(b.icmp_unsigned("<", e, _const(2, _I32X16)), denormal, normal), _F32X16)


@_operation(u8x64)
def spread(
    b: Builder, _: Any, address: ir.Value, shift: ir.Value, mask: ir.Value, factor: ir.Value, base: ir.Value
) -> ir.Value:
    """base + ((byte >> shift) & mask) * factor of 16 bytes, each in all 4 bytes of its lane; that must be below 256."""
    lanes = b.mul(_bits_of_bytes(b, address, shift, mask), _splat(b, b.trunc(factor, _I32), 16))
    lanes = b.add(lanes, _splat(b, b.trunc(base, _I32), 16))
    return b.bitcast(b.mul(lanes, _const(0x01010101, _I32X16)), _U8X64)


@_operation(u8x64)
def load_u8x64(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """64 bytes."""
    return _load(b, address, _U8X64)


@_operation(types.void)
def store_u8x64(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write 64 bytes."""
    _store(b, value, address)


@_operation(types.void)
def store_f32x16(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write 16 float32."""
    _store(b, value, address)


@_operation(types.void)
def store_f16x16(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Round 16 float32 to float16 and write them."""
    _store(b, _narrow(b, value), address)


@_operation(types.void)
def store_i8x16(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write 16 int32 in -128 ... 127 as bytes."""
    _store(b, b.trunc(value, _vector(_I8, 16)), address)


@_operation(types.void)
def store_i8_apart(b: Builder, _: Any, address: ir.Value, value: ir.Value, stride: ir.Value) -> None:
    """Write 16 int32 in -128 ... 127 as bytes, lane r to address + r * stride."""
    narrow = b.trunc(value, _vector(_I8, 16))
    for r in range(16):
        _store(b, b.extract_element(narrow, ir.Constant(_I32, r)), _at(b, address, stride, r))


def _ask(b: Builder, address: ir.Value, closeness: int) -> None:
    read_close_data = [ir.Constant(_I32, n) for n in (0, closeness, 1)]
    _call(b, "llvm.prefetch.p0", ir.VoidType(), _pointer(b, address, _I8), *read_close_data)


@_operation(types.void)
def prefetch(b: Builder, _: Any, address: ir.Value) -> None:
    """Ask for the cache line of an address, which need not be ours to read, into the second-level cache: it has room for more
    requests under way than the first level."""
    _ask(b, address, 2)


@_operation(types.void)
def prefetch_near(b: Builder, _: Any, address: ir.Value) -> None:
    """The same into the first-level cache."""
    _ask(b, address, 3)


# --- float arithmetic ------------------------------------------------------------------------------------------------


@_operation(f32x16)
def splat(b: Builder, _: Any, value: ir.Value) -> ir.Value:
    """One number, as float32, in every lane."""
    return _splat(b, _as_f32(b, value), 16)


@_operation(f32x16)
def add(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x + y."""
    return b.fadd(x, y)


@_operation(f32x16)
def sub(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x - y."""
    return b.fsub(x, y)


@_operation(f32x16)
def mul(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x * y."""
    return b.fmul(x, y)


@_operation(f32x16)
def div(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x / y."""
    return b.fdiv(x, y)


@_operation(f32x16)
def fma(b: Builder, _: Any, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once."""
    return _fma(b, x, y, z)


@_operation(f32x16)
def maximum(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of each pair; y where either is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_operation(i32x16)
def round_i32(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Nearest integers (ties to even); |x| < 2^22."""
    # Adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits: the same on every machine.
    shifted = b.fadd(x, _const(12582912.0, _F32X16))
    return b.sub(b.bitcast(shifted, _I32X16), _const(0x4B400000, _I32X16))


@_operation(i32x16)
def magnitude(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Bits of |x|: as integers they are ordered like the numbers, with infinity and then NaN above all."""
    return b.and_(b.bitcast(x, _I32X16), _const(0x7FFFFFFF, _I32X16))


@_operation(i32x16)
def maximum_i32(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of each pair of int32."""
    return b.select(b.icmp_signed(">", x, y), x, y)


@_operation(types.float32)
def largest_magnitude(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """The float32 of the largest `magnitude` of all lanes."""
    return b.bitcast(_fold(b, x, lambda p, q: b.select(b.icmp_signed(">", p, q), p, q)), _F32)


# exp on [-ln 2 / 2, ln 2 / 2] as a polynomial (Cephes expf); relative error below 2e-7 after scaling.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXP_LOW, _EXP_HIGH = -87.0, 88.0


def _exp(b: Builder, x: ir.Value) -> ir.Value:
    clamped = b.select(b.fcmp_ordered("<", x, _const(_EXP_LOW, _F32X16)), _const(_EXP_LOW, _F32X16), x)
    clamped = b.select(b.fcmp_ordered(">", clamped, _const(_EXP_HIGH, _F32X16)), _const(_EXP_HIGH, _F32X16), clamped)
    magic = _const(12582912.0, _F32X16)
    shifted = _fma(b, clamped, _const(1.44269504088896341, _F32X16), magic)
    whole = b.fsub(shifted, magic)
    r = _fma(b, whole, _const(-0.693359375, _F32X16), clamped)
    r = _fma(b, whole, _const(2.12194440e-4, _F32X16), r)
    p = _const(_EXP[0], _F32X16)
    for coefficient in _EXP[1:]:
        p = _fma(b, p, r, _const(coefficient, _F32X16))
    p = b.fadd(_fma(b, p, b.fmul(r, r), r), _const(1.0, _F32X16))
    power = b.shl(b.add(b.bitcast(shifted, _I32X16), _const(127 - 0x4B400000, _I32X16)), _const(23, _I32X16))
    result = b.fmul(p, b.bitcast(power, _F32X16))
    return b.select(b.fcmp_ordered("<", x, _const(_EXP_LOW, _F32X16)), _const(0.0, _F32X16), result)


@_operation(f32x16)
def exp(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """e^x; 0 below -87, and no more than e^88. NaN stays NaN."""
    return _exp(b, x)


# tanh x = x + x^3 P(x^2) for |x| < 0.625 (Cephes tanhf), where 1 - 2 / (e^2x + 1) would lose digits.
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_TANH_NEAR = 0.625


@_operation(f32x16)
def tanh(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """tanh x, to a few units in the last place. NaN stays NaN."""
    square = b.fmul(x, x)
    p = _const(_TANH[0], _F32X16)
    for coefficient in _TANH[1:]:
        p = _fma(b, p, square, _const(coefficient, _F32X16))
    near = _fma(b, b.fmul(p, square), x, x)
    one = _const(1.0, _F32X16)
    far = b.fsub(one, b.fdiv(_const(2.0, _F32X16), b.fadd(_exp(b, b.fadd(x, x)), one)))
    return b.select(b.fcmp_ordered("<", square, _const(_TANH_NEAR**2, _F32X16)), near, far)


@_operation(f32x16)
def rotate_pairs(b: Builder, _: Any, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """Turn the 8 pairs of neighbours (a, b) into (a cos - b sin, b cos + a sin); cos holds c, c and sin -s, s for each pair."""
    swapped = _shuffle(b, x, x, [i ^ 1 for i in range(16)])
    return _fma(b, swapped, sin, b.fmul(x, cos))


@_operation(f32x16)
def first_lanes(b: Builder, _: Any, x: ir.Value, count: ir.Value, other: ir.Value) -> ir.Value:
    """x in the first ``count`` lanes, ``other`` (a float32) in the rest."""
    lanes = ir.Constant(_vector(_I64, 16), list(range(16)))
    return b.select(b.icmp_signed("<", lanes, _splat(b, count, 16)), x, _splat(b, other, 16))


@_operation(f32x16)
def hide(b: Builder, _: Any, x: ir.Value, first: ir.Value, end: ir.Value) -> ir.Value:
    """x in the lanes from ``first`` to before ``end``; -infinity in the rest."""
    lanes = ir.Constant(_vector(_I64, 16), list(range(16)))
    seen = b.and_(b.icmp_signed(">=", lanes, _splat(b, first, 16)), b.icmp_signed("<", lanes, _splat(b, end, 16)))
    return b.select(seen, x, _const(-float("inf"), _F32X16))


def _fold(b: Builder, x: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Combine all lanes by halves: 16, 8, 4, 2, 1. A fixed tree, whatever the machine."""
    lanes = 16
    while lanes > 1:
        lanes //= 2
        x = combine(_shuffle(b, x, x, list(range(lanes))), _shuffle(b, x, x, list(range(lanes, 2 * lanes))))
    return b.extract_element(x, ir.Constant(_I32, 0))


@_operation(types.float32)
def sum_lanes(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Sum of all lanes."""
    return _fold(b, x, b.fadd)


@_operation(types.float32)
def max_lanes(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Largest lane."""
    return _fold(b, x, lambda p, q: b.select(b.fcmp_ordered(">", p, q), p, q))


@_operation(types.int32)
def sum_lanes_i32(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Sum of all int32 lanes."""
    return _fold(b, x, b.add)


# --- bytes -----------------------------------------------------------------------------------------------------------


@_operation(u8x64)
def bits(b: Builder, _: Any, x: ir.Value, shift: ir.Value, mask: ir.Value) -> ir.Value:
    """(x >> shift) & mask in every byte, for a mask that keeps bits of the byte's own: mask <= 255 >> shift."""
    wide = _vector(_I16, 32)
    moved = b.lshr(b.bitcast(x, wide), _splat(b, b.trunc(shift, _I16), 32))
    return b.and_(b.bitcast(moved, _U8X64), _splat(b, b.trunc(mask, _I8), 64))


@_operation(u8x64)
def bits_up(b: Builder, _: Any, x: ir.Value, shift: ir.Value, mask: ir.Value) -> ir.Value:
    """(x << shift) & mask in every byte, for a mask without the lowest ``shift`` bits."""
    wide = _vector(_I16, 32)
    moved = b.shl(b.bitcast(x, wide), _splat(b, b.trunc(shift, _I16), 32))
    return b.and_(b.bitcast(moved, _U8X64), _splat(b, b.trunc(mask, _I8), 64))


@_operation(u8x64)
def either(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x | y."""
    return b.or_(x, y)


@_operation(u8x64)
def plus(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x + y of bytes."""
    return b.add(x, y)


@_operation(u8x64)
def every_byte(b: Builder, _: Any, value: ir.Value) -> ir.Value:
    """One number in every byte."""
    return _splat(b, b.trunc(value, _I8), 64)


def _lookup_avx512(b: Builder, x: ir.Value, table: ir.Value) -> ir.Value:
    repeated = _shuffle(b, table, table, list(range(16)) * 4)
    return _call(b, "llvm.x86.avx512.pshuf.b.512", _U8X64, repeated, x)


def _lookup_avx2(b: Builder, x: ir.Value, table: ir.Value) -> ir.Value:
    repeated = _shuffle(b, table, table, list(range(16)) * 2)
    halves = [
        _call(b, "llvm.x86.avx2.pshuf.b", _vector(_I8, 32), repeated, _shuffle(b, x, x, list(range(start, start + 32))))
        for start in (0, 32)
    ]
    return _shuffle(b, halves[0], halves[1], list(range(64)))


def _lookup_portable(b: Builder, x: ir.Value, table: ir.Value) -> ir.Value:
    """A tree of selections: by bit 0, then 1, 2 and 3."""
    entries = [_splat(b, b.extract_element(table, ir.Constant(_I32, i)), 64) for i in range(16)]
    for bit in range(4):
        is_set = b.icmp_unsigned("!=", b.and_(x, _const(1 << bit, _U8X64)), _const(0, _U8X64))
        entries = [b.select(is_set, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


_LOOKUP = {"avx512vnni": _lookup_avx512, "avx2": _lookup_avx2, "portable": _lookup_portable}[ISA]


@_operation(u8x64)
def lookup(b: Builder, _: Any, x: ir.Value, table: ir.Value) -> ir.Value:
    """table[byte] for bytes below 16; the table is a constant tuple of 16 numbers below 256."""
    entries = ir.Constant(_vector(_I8, 16), ir.Undefined)
    for i in range(16):
        entries = b.insert_element(entries, b.trunc(b.extract_value(table, i), _I8), ir.Constant(_I32, i))
    return _LOOKUP(b, x, entries)


# --- tiles -----------------------------------------------------------------------------------------------------------


def _each(b: Builder, tile: Tile, make: Callable[[int], ir.Value]) -> ir.Value:
    out = ir.Constant(ir.ArrayType(tile.vector.llvm, tile.count), ir.Undefined)
    for t in range(tile.count):
        out = b.insert_value(out, make(t), t)
    return out


@_operation(lambda shape: _tile_of(f32x16, shape))
def tile_zero(b: Builder, args: Any, shape: ir.Value) -> ir.Value:
    """Zero float32 vectors."""
    return _each(b, _tile_of(f32x16, args[0]), lambda t: _const(0.0, _F32X16))


@_operation(lambda shape: _tile_of(i32x16, shape))
def tile_zero_i32(b: Builder, args: Any, shape: ir.Value) -> ir.Value:
    """Zero int32 vectors."""
    return _each(b, _tile_of(i32x16, args[0]), lambda t: _const(0, _I32X16))


@_operation(lambda shape, *_: _tile_of(i32x16, shape))
def tile_shifted(
    b: Builder, args: Any, shape: ir.Value, address: ir.Value, stride: ir.Value, shift: ir.Value
) -> ir.Value:
    """The int32 at address + t * stride, shifted left, everywhere."""

    def one(t: int) -> ir.Value:
        return b.shl(_splat(b, _load(b, _at(b, address, stride, t), _I32), 16), _splat(b, b.trunc(shift, _I32), 16))

    return _each(b, _tile_of(i32x16, args[0]), one)


@_operation(lambda start: Tile(DOT, start.count))
def dot_start(b: Builder, args: Any, start: ir.Value) -> ir.Value:
    """Sums for `tile_dot`: they go on from ``start`` where they are int32, else from zero (see `dot_end`)."""
    tile = Tile(DOT, args[0].count)
    return _each(b, tile, lambda t: b.extract_value(start, t) if _DOT_IS_WIDE else _const(0, DOT.llvm))


def _dot_vnni(b: Builder, acc: ir.Value, w: ir.Value, a: ir.Value) -> ir.Value:
    return _call(b, "llvm.x86.avx512.vpdpbusd.512", _I32X16, acc, b.bitcast(w, _I32X16), a)


def _dot_avx2(b: Builder, acc: ir.Value, w: ir.Value, a: ir.Value) -> ir.Value:
    words16 = _vector(_I16, 16)
    a = b.bitcast(a, _U8X64)
    halves = [
        _call(b, "llvm.x86.avx2.pmadd.ub.sw", words16, _shuffle(b, w, w, half), _shuffle(b, a, a, half))
        for half in (list(range(32)), list(range(32, 64)))
    ]
    return b.add(acc, _shuffle(b, halves[0], halves[1], list(range(32))))


def _dot_portable(b: Builder, acc: ir.Value, w: ir.Value, a: ir.Value) -> ir.Value:
    wide = _vector(_I32, 64)
    products = b.mul(b.zext(w, wide), b.sext(b.bitcast(a, _U8X64), wide))
    for i in range(4):
        acc = b.add(acc, _shuffle(b, products, products, list(range(i, 64, 4))))
    return acc


_DOT = {"avx512vnni": _dot_vnni, "avx2": _dot_avx2, "portable": _dot_portable}[ISA]


@_operation(lambda acc, *_: acc)
def tile_dot(b: Builder, args: Any, acc: ir.Value, w: ir.Value, address: ir.Value, stride: ir.Value) -> ir.Value:
    """Add the products of 4 unsigned weight bytes (of each of 16 rows) with the 4 int8 at address + t * stride.

    With AVX2 the sums stay in int16 pairs: at most 32767 / (2 * 127 * largest weight) calls before `dot_end`.
    """

    def one(t: int) -> ir.Value:
        activation = _splat(b, _load(b, _at(b, address, stride, t), _I32), 16)
        return _DOT(b, b.extract_value(acc, t), w, activation)

    return _each(b, args[0], one)


def _widen(b: Builder, x: ir.Value) -> ir.Value:
    """int16 pairs -> int32 sums."""
    words16 = _vector(_I16, 16)
    halves = [
        _call(
            b,
            "llvm.x86.avx2.pmadd.wd",
            _vector(_I32, 8),
            _shuffle(b, x, x, list(range(start, start + 16))),
            ir.Constant(words16, [1] * 16),
        )
        for start in (0, 16)
    ]
    return _shuffle(b, halves[0], halves[1], list(range(16)))


@_operation(lambda acc, start: start)
def dot_end(b: Builder, args: Any, acc: ir.Value, start: ir.Value) -> ir.Value:
    """The sums of `tile_dot` that began with `dot_start` of the same ``start``, as int32."""

    def one(t: int) -> ir.Value:
        total = b.extract_value(acc, t)
        return total if _DOT_IS_WIDE else b.add(_widen(b, total), b.extract_value(start, t))

    return _each(b, args[1], one)


@_operation(lambda x, *_: x)
def tile_shift_add(b: Builder, args: Any, x: ir.Value, y: ir.Value, shift: ir.Value) -> ir.Value:
    """(x << shift) + y for int32 tiles."""
    by = _splat(b, b.trunc(shift, _I32), 16)
    return _each(b, args[0], lambda t: b.add(b.shl(b.extract_value(x, t), by), b.extract_value(y, t)))


@_operation(lambda acc, *_: acc)
def tile_scale(
    b: Builder, args: Any, acc: ir.Value, dots: ir.Value, d: ir.Value, address: ir.Value, stride: ir.Value
) -> ir.Value:
    """acc + dots * (d * the float32 at address + t * stride)."""

    def one(t: int) -> ir.Value:
        factor = b.fmul(d, _splat(b, _load(b, _at(b, address, stride, t), _F32), 16))
        return _fma(b, b.sitofp(b.extract_value(dots, t), _F32X16), factor, b.extract_value(acc, t))

    return _each(b, args[0], one)


@_operation(lambda acc, *_: acc)
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
        at = _at(b, address, stride, t)
        s0, s1 = (_splat(b, _load(b, b.add(at, ir.Constant(_I64, i)), _F32), 16) for i in (0, 4))
        part = b.fmul(b.sitofp(b.extract_value(first, t), _F32X16), s0)
        part = _fma(b, b.sitofp(b.extract_value(second, t), _F32X16), s1, part)
        return _fma(b, part, d, b.extract_value(acc, t))

    return _each(b, args[0], one)


@_operation(lambda acc, *_: acc)
def tile_fma(b: Builder, args: Any, acc: ir.Value, w: ir.Value, address: ir.Value, stride: ir.Value) -> ir.Value:
    """acc + w * the float32 at address + t * stride."""

    def one(t: int) -> ir.Value:
        activation = _splat(b, _load(b, _at(b, address, stride, t), _F32), 16)
        return _fma(b, w, activation, b.extract_value(acc, t))

    return _each(b, args[0], one)


@_operation(lambda acc, *_: acc)
def tile_fma_lanes(b: Builder, args: Any, acc: ir.Value, x: ir.Value, factor: ir.Value) -> ir.Value:
    """acc + x * factor, for a vector ``factor``."""
    return _each(b, args[0], lambda t: _fma(b, b.extract_value(x, t), factor, b.extract_value(acc, t)))


@_operation(lambda tile, *_: tile)
def tile_maximum(b: Builder, args: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of each pair; y where either is NaN."""

    def one(t: int) -> ir.Value:
        p, q = b.extract_value(x, t), b.extract_value(y, t)
        return b.select(b.fcmp_ordered(">", p, q), p, q)

    return _each(b, args[0], one)


@_operation(lambda shape, *_: _tile_of(f32x16, shape))
def tile_splat(b: Builder, args: Any, shape: ir.Value, value: ir.Value) -> ir.Value:
    """One float32 everywhere."""
    return _each(b, _tile_of(f32x16, args[0]), lambda t: _splat(b, _as_f32(b, value), 16))


@_operation(lambda tile, *_: tile)
def tile_hide(b: Builder, args: Any, tile: ir.Value, count: ir.Value, step: ir.Value) -> ir.Value:
    """Keep the first count + t * step lanes of vector t; -infinity in the rest."""
    lanes = ir.Constant(_vector(_I64, 16), list(range(16)))

    def one(t: int) -> ir.Value:
        limit = _splat(b, _at(b, count, step, t), 16)
        return b.select(b.icmp_signed("<", lanes, limit), b.extract_value(tile, t), _const(-float("inf"), _F32X16))

    return _each(b, args[0], one)


@_operation(lambda tile, *_: tile)
def tile_add(b: Builder, args: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x + y."""
    return _each(b, args[0], lambda t: b.fadd(b.extract_value(x, t), b.extract_value(y, t)))


@_operation(types.void)
def tile_store_first(
    b: Builder, args: Any, tile: ir.Value, address: ir.Value, stride: ir.Value, count: ir.Value
) -> None:
    """Write the first ``count`` lanes of vector t to address + t * stride."""
    lanes = ir.Constant(_vector(_I64, 16), list(range(16)))
    mask = b.icmp_signed("<", lanes, _splat(b, count, 16))
    for t in range(args[0].count):
        pointer = _pointer(b, _at(b, address, stride, t), _F32X16)
        value = b.extract_value(tile, t)
        name = "llvm.masked.store.v16f32.p0"
        _call(b, name, ir.VoidType(), value, pointer, ir.Constant(_I32, 1), mask)


@_operation(types.void)
def tile_store(b: Builder, args: Any, tile: ir.Value, address: ir.Value, stride: ir.Value) -> None:
    """Write vector t to address + t * stride."""
    for t in range(args[0].count):
        _store(b, b.extract_value(tile, t), _at(b, address, stride, t))


@_operation(lambda shape, *_: _tile_of(f32x16, shape))
def tile_load(b: Builder, args: Any, shape: ir.Value, address: ir.Value, stride: ir.Value) -> ir.Value:
    """Read vector t from address + t * stride."""
    return _each(b, _tile_of(f32x16, args[0]), lambda t: _load(b, _at(b, address, stride, t), _F32X16))


# --- the rest --------------------------------------------------------------------------------------------------------


@_operation(types.int64)
def equal_lanes(b: Builder, _: Any, x: ir.Value, value: ir.Value) -> ir.Value:
    """Bit r is set where lane r equals ``value``."""
    same = b.fcmp_ordered("==", x, _splat(b, _as_f32(b, value), 16))
    return b.zext(b.bitcast(same, _I16), _I64)


@_operation(types.int64)
def lanes_from(b: Builder, _: Any, x: ir.Value, least: ir.Value) -> ir.Value:
    """Bit r is set where lane r is at least ``least``."""
    return b.zext(b.bitcast(b.fcmp_ordered(">=", x, _splat(b, _as_f32(b, least), 16)), _I16), _I64)


@_operation(f32x16)
def keep_from(b: Builder, _: Any, x: ir.Value, least: ir.Value) -> ir.Value:
    """x where it is at least ``least``, otherwise 0."""
    return b.select(b.fcmp_ordered(">=", x, _splat(b, _as_f32(b, least), 16)), x, _const(0.0, _F32X16))


@_operation(f32x16)
def keep_where(b: Builder, _: Any, x: ir.Value, y: ir.Value, least: ir.Value) -> ir.Value:
    """x where y is at least ``least``, otherwise 0."""
    return b.select(b.fcmp_ordered(">=", y, _splat(b, _as_f32(b, least), 16)), x, _const(0.0, _F32X16))


@_operation(f32x16)
def keep_bits(b: Builder, _: Any, x: ir.Value, lanes: ir.Value, other: ir.Value) -> ir.Value:
    """x in the lanes whose bit is set, ``other`` (a float32) in the rest."""
    return b.select(b.bitcast(b.trunc(lanes, _I16), _vector(_I1, 16)), x, _splat(b, _as_f32(b, other), 16))


@_operation(f32x16)
def to_f32(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """int32 as float32."""
    return b.sitofp(x, _F32X16)


@_operation(i32x16)
def count_from(b: Builder, _: Any, first: ir.Value) -> ir.Value:
    """first, first + 1, ... first + 15."""
    return b.add(_splat(b, b.trunc(first, _I32), 16), ir.Constant(_I32X16, list(range(16))))


@_operation(types.void)
def pack_lanes(b: Builder, _: Any, address: ir.Value, x: ir.Value, lanes: ir.Value) -> None:
    """Write the lanes whose bit is set, one behind the other. Anything may be written up to 16 lanes from the address."""
    x = b.bitcast(x, _I32X16)
    if ISA == "avx512vnni":
        mask = b.bitcast(b.trunc(lanes, _I16), _vector(_I1, 16))
        _store(b, _call(b, "llvm.x86.avx512.mask.compress.v16i32", _I32X16, x, x, mask), address)
        return
    for lane in range(16):
        _store(b, b.extract_element(x, ir.Constant(_I32, lane)), address)
        bit = b.and_(b.lshr(lanes, ir.Constant(_I64, lane)), ir.Constant(_I64, 1))
        address = b.add(address, b.shl(bit, ir.Constant(_I64, 2)))


@_operation(types.int64)
def ones(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """How many bits of an int64 are set."""
    return b.ctpop(x)


@_operation(types.int64)
def lowest_bit(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Number of the lowest set bit of an int64 that is not 0."""
    return b.cttz(x, ir.Constant(_I1, 1))


@_operation(types.int64)
def scratch(b: Builder, args: Any, kilobytes: ir.Value) -> ir.Value:
    """Address of some memory of this call's own; its size in KiB is the length of a tuple."""
    memory = alloca_once(b, ir.ArrayType(_vector(_I8, 64), 16 * len(args[0])))
    memory.align = 64
    return b.ptrtoint(memory, _I64)


@_operation(types.int64)
def bits_of_f32(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """The bits of a float32."""
    return b.zext(b.bitcast(x, _I32), _I64)


@_operation(types.float32)
def f32_of_bits(b: Builder, _: Any, bits: ir.Value) -> ir.Value:
    """The float32 with these bits."""
    return b.bitcast(b.trunc(bits, _I32), _F32)


# --- atomics and calls -----------------------------------------------------------------------------------------------


@_operation(types.int64)
def atomic_load(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The int64 at an address; later reads see what was written before it was stored."""
    return b.load_atomic(_pointer(b, address, _I64), "acquire", 8)


@_operation(types.void)
def atomic_store(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write an int64 after all earlier writes."""
    b.store_atomic(value, _pointer(b, address, _I64), "release", 8)


@_operation(types.int64)
def atomic_add(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> ir.Value:
    """Add to the int64 at an address; returns what it was."""
    return b.atomic_rmw("add", _pointer(b, address, _I64), value, "acq_rel")


@_operation(types.int64)
def atomic_swap(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> ir.Value:
    """Write an int64; returns what it was."""
    return b.atomic_rmw("xchg", _pointer(b, address, _I64), value, "acq_rel")


@_operation(types.boolean)
def compare_swap(b: Builder, _: Any, address: ir.Value, old: ir.Value, new: ir.Value) -> ir.Value:
    """Write ``new`` if the int64 there is ``old``; whether it was."""
    return b.extract_value(b.cmpxchg(_pointer(b, address, _I64), old, new, "acq_rel", "acquire"), 1)


@_operation(types.void)
def pause(b: Builder, _: Any) -> None:
    """Tell the core that it is waiting."""
    if ISA != "portable":
        _call(b, "llvm.x86.sse2.pause", ir.VoidType())


@_operation(types.void)
def call_kernel(b: Builder, _: Any, function: ir.Value, args: ir.Value, chunk: ir.Value) -> None:
    """Call the C function at an address: void f(int64 args, int64 chunk)."""
    kind = ir.FunctionType(ir.VoidType(), [_I64, _I64])
    b.call(b.inttoptr(function, kind.as_pointer()), [args, chunk])
