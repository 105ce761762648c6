"""Bytes and int32, and the dot product of int8, which is the only arithmetic written per instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from shoal.kernels.cpu.isa import HAS, ISA, VPDPBUSD
from shoal.kernels.cpu.simd import emit
from shoal.kernels.cpu.simd.emit import Builder
from shoal.kernels.cpu.simd.vectors import (
    F32X16,
    I1,
    I8,
    I16,
    I32,
    I32X16,
    I64,
    U8X64,
    Tile,
    i16x32,
    i32x16,
    tile_of,
    u8x64,
    vector,
)

# What the int8 dot product sums in before `dot_end`: int32 lanes, or pairs of int16 with AVX2.
DOT = i16x32 if HAS.int16_sums else i32x16


@emit.operation(i32x16)
def round_i32(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Nearest integers (ties to even); |x| < 2^22."""
    # Adding 1.5 * 2^23 leaves the rounded integer in the low mantissa bits: the same on every machine.
    shifted = b.fadd(x, emit.const(12582912.0, F32X16))
    return b.sub(b.bitcast(shifted, I32X16), emit.const(0x4B400000, I32X16))


@emit.operation(i32x16)
def magnitude(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Bits of |x|: as integers they are ordered like the numbers, with infinity and then NaN above all."""
    return b.and_(b.bitcast(x, I32X16), emit.const(0x7FFFFFFF, I32X16))


@emit.operation(i32x16)
def maximum_i32(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of each pair of int32."""
    return b.select(b.icmp_signed(">", x, y), x, y)


@emit.operation(types.int32)
def sum_lanes_i32(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Sum of all int32 lanes."""
    return emit.fold(b, x, b.add)


@emit.operation(i32x16)
def count_from(b: Builder, _: Any, first: ir.Value) -> ir.Value:
    """first, first + 1, ... first + 15."""
    return b.add(emit.splat(b, b.trunc(first, I32), 16), ir.Constant(I32X16, list(range(16))))


@emit.operation(types.int64)
def ones(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """How many bits of an int64 are set."""
    return b.ctpop(x)


@emit.operation(types.int64)
def lowest_bit(b: Builder, _: Any, x: ir.Value) -> ir.Value:
    """Number of the lowest set bit of an int64 that is not 0."""
    return b.cttz(x, ir.Constant(I1, 1))


# --- bytes -----------------------------------------------------------------------------------------------------------


@emit.operation(u8x64)
def bits(b: Builder, _: Any, x: ir.Value, shift: ir.Value, mask: ir.Value) -> ir.Value:
    """(x >> shift) & mask in every byte, for a mask that keeps bits of the byte's own: mask <= 255 >> shift."""
    wide = vector(I16, 32)
    moved = b.lshr(b.bitcast(x, wide), emit.splat(b, b.trunc(shift, I16), 32))
    return b.and_(b.bitcast(moved, U8X64), emit.splat(b, b.trunc(mask, I8), 64))


@emit.operation(u8x64)
def bits_up(b: Builder, _: Any, x: ir.Value, shift: ir.Value, mask: ir.Value) -> ir.Value:
    """(x << shift) & mask in every byte, for a mask without the lowest ``shift`` bits."""
    wide = vector(I16, 32)
    moved = b.shl(b.bitcast(x, wide), emit.splat(b, b.trunc(shift, I16), 32))
    return b.and_(b.bitcast(moved, U8X64), emit.splat(b, b.trunc(mask, I8), 64))


@emit.operation(u8x64)
def either(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x | y."""
    return b.or_(x, y)


@emit.operation(u8x64)
def plus(b: Builder, _: Any, x: ir.Value, y: ir.Value) -> ir.Value:
    """x + y of bytes."""
    return b.add(x, y)


@emit.operation(u8x64)
def every_byte(b: Builder, _: Any, value: ir.Value) -> ir.Value:
    """One number in every byte."""
    return emit.splat(b, b.trunc(value, I8), 64)


@emit.operation(types.void)
def store_words(b: Builder, _: Any, address: ir.Value, x: ir.Value, shift: ir.Value) -> None:
    """What bytes stand for, byte - 2^shift, as int16: bytes 0, 2, 4 ..., and behind them 1, 3, 5 ..."""
    wide = vector(I16, 32)
    pairs = b.bitcast(x, wide)
    offset = emit.splat(b, b.shl(ir.Constant(I16, 1), b.trunc(shift, I16)), 32)
    emit.store(b, b.sub(b.and_(pairs, emit.const(255, wide)), offset), address)
    emit.store(b, b.sub(b.lshr(pairs, emit.const(8, wide)), offset), b.add(address, ir.Constant(I64, 64)))


def _by_quarters(b: Builder, make: Callable[..., ir.Value], *values: ir.Value) -> ir.Value:
    """What ``make`` gives for each quarter of some vectors, NEON's registers, as one vector."""
    parts = []
    for i in range(4):
        quarters = [(value, value.type.count // 4) for value in values]
        parts.append(make(*(emit.shuffle(b, v, v, list(range(i * n, i * n + n))) for v, n in quarters)))
    n = 2 * parts[0].type.count
    low, high = (emit.shuffle(b, x, y, list(range(n))) for x, y in (parts[:2], parts[2:]))
    return emit.shuffle(b, low, high, list(range(2 * n)))


def _lookup_avx512(b: Builder, x: ir.Value, table: ir.Value) -> ir.Value:
    repeated = emit.shuffle(b, table, table, list(range(16)) * 4)
    return emit.call(b, "llvm.x86.avx512.pshuf.b.512", U8X64, repeated, x)


def _lookup_avx2(b: Builder, x: ir.Value, table: ir.Value) -> ir.Value:
    repeated = emit.shuffle(b, table, table, list(range(16)) * 2)
    halves = [
        emit.call(
            b, "llvm.x86.avx2.pshuf.b", vector(I8, 32), repeated, emit.shuffle(b, x, x, list(range(start, start + 32)))
        )
        for start in (0, 32)
    ]
    return emit.shuffle(b, halves[0], halves[1], list(range(64)))


def _lookup_portable(b: Builder, x: ir.Value, table: ir.Value) -> ir.Value:
    """A tree of selections: by bit 0, then 1, 2 and 3."""
    entries = [emit.splat(b, b.extract_element(table, ir.Constant(I32, i)), 64) for i in range(16)]
    for bit in range(4):
        is_set = b.icmp_unsigned("!=", b.and_(x, emit.const(1 << bit, U8X64)), emit.const(0, U8X64))
        entries = [b.select(is_set, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


def _lookup_neon(b: Builder, x: ir.Value, table: ir.Value) -> ir.Value:
    name, sixteen = "llvm.aarch64.neon.tbl1.v16i8", vector(I8, 16)
    return _by_quarters(b, lambda part: emit.call(b, name, sixteen, table, part), x)


_LOOKUP = {
    "avx512vnni": _lookup_avx512,
    "avxvnni": _lookup_avx2,
    "avx2": _lookup_avx2,
    "neon-i8mm": _lookup_neon,
    "neon-dotprod": _lookup_neon,
    "portable": _lookup_portable,
}[ISA]


@emit.operation(u8x64)
def lookup(b: Builder, _: Any, x: ir.Value, table: ir.Value) -> ir.Value:
    """table[byte] for bytes below 16; the table is a constant tuple of 16 numbers below 256."""
    entries = ir.Constant(vector(I8, 16), ir.Undefined)
    for i in range(16):
        entries = b.insert_element(entries, b.trunc(b.extract_value(table, i), I8), ir.Constant(I32, i))
    return _LOOKUP(b, x, entries)


# --- tiles, and the dot product --------------------------------------------------------------------------------------


@emit.operation(lambda shape: tile_of(i32x16, shape))
def tile_zero_i32(b: Builder, args: Any, shape: ir.Value) -> ir.Value:
    """Zero int32 vectors."""
    return emit.each(b, tile_of(i32x16, args[0]), lambda t: emit.const(0, I32X16))


@emit.operation(lambda shape, *_: tile_of(i32x16, shape))
def tile_shifted(
    b: Builder, args: Any, shape: ir.Value, address: ir.Value, stride: ir.Value, shift: ir.Value
) -> ir.Value:
    """The int32 at address + t * stride, shifted left, everywhere."""

    def one(t: int) -> ir.Value:
        return b.shl(
            emit.splat(b, emit.load(b, emit.at(b, address, stride, t), I32), 16), emit.splat(b, b.trunc(shift, I32), 16)
        )

    return emit.each(b, tile_of(i32x16, args[0]), one)


@emit.operation(lambda x, *_: x)
def tile_shift_add(b: Builder, args: Any, x: ir.Value, y: ir.Value, shift: ir.Value) -> ir.Value:
    """(x << shift) + y for int32 tiles."""
    by = emit.splat(b, b.trunc(shift, I32), 16)
    return emit.each(b, args[0], lambda t: b.add(b.shl(b.extract_value(x, t), by), b.extract_value(y, t)))


@emit.operation(lambda start: Tile(DOT, start.count))
def dot_start(b: Builder, args: Any, start: ir.Value) -> ir.Value:
    """Sums for `tile_dot`: they go on from ``start`` where they are int32, else from zero (see `dot_end`)."""
    tile = Tile(DOT, args[0].count)
    return emit.each(b, tile, lambda t: b.extract_value(start, t) if i32x16 == DOT else emit.const(0, DOT.llvm))


def _dot_vnni(b: Builder, acc: ir.Value, w: ir.Value, a: ir.Value) -> ir.Value:
    return emit.call(b, "llvm.x86.avx512.vpdpbusd.512", I32X16, acc, b.bitcast(w, I32X16), a)


def _dot_avxvnni(b: Builder, acc: ir.Value, w: ir.Value, a: ir.Value) -> ir.Value:
    """In assembly: where a CPU has EVEX's encoding only, LLVM's intrinsic needs AVX-512 for the whole kernel."""
    lanes8 = vector(I32, 8)
    kind = ir.FunctionType(lanes8, [lanes8] * 3)
    w = b.bitcast(w, I32X16)
    halves = []
    for side in (list(range(8)), list(range(8, 16))):
        operands = [emit.shuffle(b, x, x, side) for x in (acc, w, a)]
        halves.append(emit.pure_assembly(b, kind, f"{VPDPBUSD} $3, $2, $0", "=x,0,x,x", operands))
    return emit.shuffle(b, halves[0], halves[1], list(range(16)))


def _dot_avx2(b: Builder, acc: ir.Value, w: ir.Value, a: ir.Value) -> ir.Value:
    words16 = vector(I16, 16)
    a = b.bitcast(a, U8X64)
    halves = [
        emit.call(b, "llvm.x86.avx2.pmadd.ub.sw", words16, emit.shuffle(b, w, w, half), emit.shuffle(b, a, a, half))
        for half in (list(range(32)), list(range(32, 64)))
    ]
    return b.add(acc, emit.shuffle(b, halves[0], halves[1], list(range(32))))


def _dot_neon(name: str) -> Callable[..., ir.Value]:
    def dot(b: Builder, acc: ir.Value, w: ir.Value, a: ir.Value) -> ir.Value:
        kind = vector(I32, 4)
        return _by_quarters(b, lambda *parts: emit.call(b, name, kind, *parts), acc, w, b.bitcast(a, U8X64))

    return dot


def _dot_portable(b: Builder, acc: ir.Value, w: ir.Value, a: ir.Value) -> ir.Value:
    wide = vector(I32, 64)
    products = b.mul(b.zext(w, wide), b.sext(b.bitcast(a, U8X64), wide))
    for i in range(4):
        acc = b.add(acc, emit.shuffle(b, products, products, list(range(i, 64, 4))))
    return acc


_DOT = {
    "avx512vnni": _dot_vnni,
    "avxvnni": _dot_avxvnni,
    "avx2": _dot_avx2,
    "neon-i8mm": _dot_neon("llvm.aarch64.neon.usdot.v4i32.v16i8"),
    "neon-dotprod": _dot_neon("llvm.aarch64.neon.sdot.v4i32.v16i8"),
    "portable": _dot_portable,
}[ISA]


@emit.operation(lambda acc, *_: acc)
def tile_dot(b: Builder, args: Any, acc: ir.Value, w: ir.Value, address: ir.Value, stride: ir.Value) -> ir.Value:
    """Add the products of 4 unsigned weight bytes (of each of 16 rows) with the 4 int8 at address + t * stride.

    With AVX2 the sums stay in int16 pairs: at most 32767 / (2 * 127 * largest weight) calls before `dot_end`. NEON without i8mm takes
    weights as signed bytes too: up to 127.
    """

    def one(t: int) -> ir.Value:
        activation = emit.splat(b, emit.load(b, emit.at(b, address, stride, t), I32), 16)
        return _DOT(b, b.extract_value(acc, t), w, activation)

    tile = emit.each(b, args[0], one)
    return _kept(b, tile, args[0].count) if HAS.int16_sums and args[0].count > 1 else tile


@emit.operation(lambda acc, *_: acc)
def tile_dots(
    b: Builder,
    args: Any,
    acc: ir.Value,
    w0: ir.Value,
    w1: ir.Value,
    w2: ir.Value,
    w3: ir.Value,
    address: ir.Value,
    stride: ir.Value,
) -> ir.Value:
    """Four times `tile_dot`, with 16 int8 read at once: NEON takes four of them out of a register."""

    def one(t: int) -> ir.Value:
        activations = emit.load(b, emit.at(b, address, stride, t), vector(I32, 4))
        total = b.extract_value(acc, t)
        for i, w in enumerate((w0, w1, w2, w3)):
            total = _DOT(b, total, w, emit.shuffle(b, activations, activations, [i] * 16))
        return total

    return emit.each(b, args[0], one)


def _kept(b: Builder, tile: ir.Value, count: int) -> ir.Value:
    """The int16 sums of a tile, in registers at this point: LLVM would go through the codes for one token after the other, and move
    them to memory and back."""
    words16 = vector(I16, 16)
    halves = []
    for t in range(count):
        x = b.extract_value(tile, t)
        halves += [emit.shuffle(b, x, x, list(range(start, start + 16))) for start in (0, 16)]
    kind = ir.FunctionType(ir.LiteralStructType([words16] * len(halves)), [words16] * len(halves))
    constraints = ",".join(["=x"] * len(halves) + [str(i) for i in range(len(halves))])
    kept = emit.assembly(b, kind, "", constraints, halves)
    halves = [b.extract_value(kept, i) for i in range(len(halves))]
    return emit.each(b, Tile(DOT, count), lambda t: emit.shuffle(b, halves[2 * t], halves[2 * t + 1], list(range(32))))


def _widen(b: Builder, x: ir.Value) -> ir.Value:
    """int16 pairs -> int32 sums."""
    words16 = vector(I16, 16)
    halves = [
        emit.call(
            b,
            "llvm.x86.avx2.pmadd.wd",
            vector(I32, 8),
            emit.shuffle(b, x, x, list(range(start, start + 16))),
            ir.Constant(words16, [1] * 16),
        )
        for start in (0, 16)
    ]
    return emit.shuffle(b, halves[0], halves[1], list(range(16)))


@emit.operation(lambda acc, start: start)
def dot_end(b: Builder, args: Any, acc: ir.Value, start: ir.Value) -> ir.Value:
    """The sums of `tile_dot` that began with `dot_start` of the same ``start``, as int32."""

    def one(t: int) -> ir.Value:
        total = b.extract_value(acc, t)
        return total if i32x16 == DOT else b.add(_widen(b, total), b.extract_value(start, t))

    return emit.each(b, args[1], one)


@emit.operation(types.void)
def byte_products(b: Builder, _: Any, address: ir.Value, steps: ir.Value) -> None:
    """AVX2's int8 products and nothing else: ``steps`` times twelve registers of pairs of them, 1 * 1 + 1 * 1 each; the last twelve are
    written to an address."""
    if not HAS.int16_sums:
        return
    lines = ["vpcmpeqb %ymm15, %ymm15, %ymm15", "vpabsb %ymm15, %ymm15", "1:"]
    lines += [f"vpmaddubsw %ymm15, %ymm15, %ymm{i}" for i in range(12)]
    lines += ["decq %rsi", "jnz 1b", *(f"vmovdqu %ymm{i}, {32 * i}(%rdi)" for i in range(12))]
    touched = ",".join(f"~{{{name}}}" for name in (*(f"ymm{i}" for i in range(16)), "memory", "flags"))
    kind = ir.FunctionType(I64, [address.type, steps.type])
    emit.assembly(b, kind, "\n".join(lines), f"={{rsi}},{{rdi}},0,{touched}", [address, steps])
