"""Loads and stores of numbers, vectors and tiles, atomics, and calls through addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once

from shoal.kernels.cpu.isa import ISA, ON_X86
from shoal.kernels.cpu.simd import emit
from shoal.kernels.cpu.simd.emit import Builder
from shoal.kernels.cpu.simd.halves import narrow, widen
from shoal.kernels.cpu.simd.vectors import (
    F32,
    F32X16,
    I1,
    I8,
    I16,
    I32,
    I32X16,
    I64,
    U8X64,
    f32x16,
    tile_of,
    u8x64,
    vector,
)


@emit.operation(types.int64)
def load_i64(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The int64 at an address."""
    return emit.load(b, address, I64)


@emit.operation(types.int64)
def load_i32(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The int32 at an address, widened."""
    return b.sext(emit.load(b, address, I32), I64)


@emit.operation(types.int64)
def load_u8(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The byte at an address."""
    return b.zext(emit.load(b, address, I8), I64)


@emit.operation(types.int64)
def load_u16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The uint16 at an address."""
    return b.zext(emit.load(b, address, I16), I64)


@emit.operation(types.float64)
def load_f64(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The float64 at an address."""
    return emit.load(b, address, ir.DoubleType())


@emit.operation(types.int64)
def load_u32(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The uint32 at an address."""
    return b.zext(emit.load(b, address, I32), I64)


@emit.operation(types.float32)
def load_f32(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The float32 at an address."""
    return emit.load(b, address, F32)


@emit.operation(types.void)
def store_f32(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write a number as float32."""
    emit.store(b, emit.as_f32(b, value), address)


@emit.operation(types.void)
def store_f16(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Round a float32 to float16 and write it."""
    emit.store(b, narrow(b, value), address)


@emit.operation(types.void)
def store_i32(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write an integer as int32."""
    emit.store(b, value if value.type == I32 else b.trunc(value, I32), address)


@emit.operation(types.void)
def store_i64(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write an int64."""
    emit.store(b, value, address)


# --- vectors ---------------------------------------------------------------------------------------------------------


@emit.operation(f32x16)
def load_f32x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 float32."""
    return emit.load(b, address, F32X16)


@emit.operation(f32x16)
def load_f16x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 float16, widened."""
    return widen(b, emit.load(b, address, vector(I16, 16)))


@emit.operation(f32x16)
def load_bf16x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 bfloat16, widened: they are the upper halves of float32."""
    wide = b.zext(emit.load(b, address, vector(I16, 16)), I32X16)
    return b.bitcast(b.shl(wide, emit.const(16, I32X16)), F32X16)


@emit.operation(f32x16)
def load_u8x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 unsigned bytes, as float32."""
    return b.uitofp(emit.load(b, address, vector(I8, 16)), F32X16)


@emit.operation(f32x16)
def load_i8x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """16 signed bytes, as float32."""
    return b.sitofp(emit.load(b, address, vector(I8, 16)), F32X16)


def _bits_of_bytes(b: Builder, address: ir.Value, shift: ir.Value, mask: ir.Value) -> ir.Value:
    """(byte >> shift) & mask of 16 bytes, as int32."""
    wide = b.zext(emit.load(b, address, vector(I8, 16)), I32X16)
    return b.and_(b.lshr(wide, emit.splat(b, b.trunc(shift, I32), 16)), emit.splat(b, b.trunc(mask, I32), 16))


@emit.operation(f32x16)
def load_bits16(b: Builder, _: Any, address: ir.Value, shift: ir.Value, mask: ir.Value) -> ir.Value:
    """(byte >> shift) & mask of 16 bytes, as float32."""
    return b.uitofp(_bits_of_bytes(b, address, shift, mask), F32X16)


@emit.operation(f32x16)
def load_e8m0x16(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """2^(byte - 128) of 16 bytes: MXFP4's scales, for values that count halves."""
    e = b.zext(emit.load(b, address, vector(I8, 16)), I32X16)
    normal = b.shl(b.sub(e, emit.const(1, I32X16)), emit.const(23, I32X16))
    denormal = b.shl(emit.const(0x00200000, I32X16), b.and_(e, emit.const(1, I32X16)))
    return b.bitcast(b.select(b.icmp_unsigned("<", e, emit.const(2, I32X16)), denormal, normal), F32X16)


@emit.operation(u8x64)
def spread(
    b: Builder, _: Any, address: ir.Value, shift: ir.Value, mask: ir.Value, factor: ir.Value, base: ir.Value
) -> ir.Value:
    """base + ((byte >> shift) & mask) * factor of 16 bytes, each in all 4 bytes of its lane; that must be below 256."""
    lanes = b.mul(_bits_of_bytes(b, address, shift, mask), emit.splat(b, b.trunc(factor, I32), 16))
    lanes = b.add(lanes, emit.splat(b, b.trunc(base, I32), 16))
    return b.bitcast(b.mul(lanes, emit.const(0x01010101, I32X16)), U8X64)


@emit.operation(u8x64)
def load_u8x64(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """64 bytes."""
    return emit.load(b, address, U8X64)


@emit.operation(types.void)
def store_u8x64(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write 64 bytes."""
    emit.store(b, value, address)


@emit.operation(types.void)
def store_f32x16(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write 16 float32."""
    emit.store(b, value, address)


@emit.operation(types.void)
def store_f16x16(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Round 16 float32 to float16 and write them."""
    emit.store(b, narrow(b, value), address)


@emit.operation(types.void)
def store_i8x16(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write 16 int32 in -128 ... 127 as bytes."""
    emit.store(b, b.trunc(value, vector(I8, 16)), address)


@emit.operation(types.void)
def store_i8_apart(b: Builder, _: Any, address: ir.Value, value: ir.Value, stride: ir.Value) -> None:
    """Write 16 int32 in -128 ... 127 as bytes, lane r to address + r * stride."""
    narrow = b.trunc(value, vector(I8, 16))
    for r in range(16):
        emit.store(b, b.extract_element(narrow, ir.Constant(I32, r)), emit.at(b, address, stride, r))


def _ask(b: Builder, address: ir.Value, closeness: int) -> None:
    read_close_data = [ir.Constant(I32, n) for n in (0, closeness, 1)]
    emit.call(b, "llvm.prefetch.p0", ir.VoidType(), emit.pointer(b, address, I8), *read_close_data)


@emit.operation(types.void)
def prefetch(b: Builder, _: Any, address: ir.Value) -> None:
    """Ask for the cache line of an address, which need not be ours to read, into the second-level cache: it has room for more
    requests under way than the first level."""
    _ask(b, address, 2)


@emit.operation(types.void)
def prefetch_near(b: Builder, _: Any, address: ir.Value) -> None:
    """The same into the first-level cache."""
    _ask(b, address, 3)


# --- tiles -----------------------------------------------------------------------------------------------------------


@emit.operation(types.void)
def tile_store_first(
    b: Builder, args: Any, tile: ir.Value, address: ir.Value, stride: ir.Value, count: ir.Value
) -> None:
    """Write the first ``count`` lanes of vector t to address + t * stride."""
    lanes = ir.Constant(vector(I64, 16), list(range(16)))
    mask = b.icmp_signed("<", lanes, emit.splat(b, count, 16))
    for t in range(args[0].count):
        pointer = emit.pointer(b, emit.at(b, address, stride, t), F32X16)
        value = b.extract_value(tile, t)
        name = "llvm.masked.store.v16f32.p0"
        emit.call(b, name, ir.VoidType(), value, pointer, ir.Constant(I32, 1), mask)


@emit.operation(types.void)
def tile_store(b: Builder, args: Any, tile: ir.Value, address: ir.Value, stride: ir.Value) -> None:
    """Write vector t to address + t * stride."""
    for t in range(args[0].count):
        emit.store(b, b.extract_value(tile, t), emit.at(b, address, stride, t))


@emit.operation(lambda shape, *_: tile_of(f32x16, shape))
def tile_load(b: Builder, args: Any, shape: ir.Value, address: ir.Value, stride: ir.Value) -> ir.Value:
    """Read vector t from address + t * stride."""
    return emit.each(b, tile_of(f32x16, args[0]), lambda t: emit.load(b, emit.at(b, address, stride, t), F32X16))


@emit.operation(types.void)
def pack_lanes(b: Builder, _: Any, address: ir.Value, x: ir.Value, lanes: ir.Value) -> None:
    """Write the lanes whose bit is set, one behind the other. Anything may be written up to 16 lanes from the address."""
    x = b.bitcast(x, I32X16)
    if ISA == "avx512vnni":
        mask = b.bitcast(b.trunc(lanes, I16), vector(I1, 16))
        emit.store(b, emit.call(b, "llvm.x86.avx512.mask.compress.v16i32", I32X16, x, x, mask), address)
        return
    for lane in range(16):
        emit.store(b, b.extract_element(x, ir.Constant(I32, lane)), address)
        bit = b.and_(b.lshr(lanes, ir.Constant(I64, lane)), ir.Constant(I64, 1))
        address = b.add(address, b.shl(bit, ir.Constant(I64, 2)))


# --- scratch ---------------------------------------------------------------------------------------------------------


@emit.operation(types.int64)
def scratch(b: Builder, args: Any, kilobytes: ir.Value) -> ir.Value:
    """Address of some memory of this call's own; its size in KiB is the length of a tuple."""
    memory = alloca_once(b, ir.ArrayType(vector(I8, 64), 16 * len(args[0])))
    memory.align = 64
    return b.ptrtoint(memory, I64)


# --- atomics and calls -----------------------------------------------------------------------------------------------


@emit.operation(types.int64)
def atomic_load(b: Builder, _: Any, address: ir.Value) -> ir.Value:
    """The int64 at an address; later reads see what was written before it was stored."""
    return b.load_atomic(emit.pointer(b, address, I64), "acquire", 8)


@emit.operation(types.void)
def atomic_store(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> None:
    """Write an int64 after all earlier writes."""
    b.store_atomic(value, emit.pointer(b, address, I64), "release", 8)


@emit.operation(types.int64)
def atomic_add(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> ir.Value:
    """Add to the int64 at an address; returns what it was."""
    return b.atomic_rmw("add", emit.pointer(b, address, I64), value, "acq_rel")


@emit.operation(types.int64)
def atomic_swap(b: Builder, _: Any, address: ir.Value, value: ir.Value) -> ir.Value:
    """Write an int64; returns what it was."""
    return b.atomic_rmw("xchg", emit.pointer(b, address, I64), value, "acq_rel")


@emit.operation(types.boolean)
def compare_swap(b: Builder, _: Any, address: ir.Value, old: ir.Value, new: ir.Value) -> ir.Value:
    """Write ``new`` if the int64 there is ``old``; whether it was."""
    return b.extract_value(b.cmpxchg(emit.pointer(b, address, I64), old, new, "acq_rel", "acquire"), 1)


@emit.operation(types.void)
def pause(b: Builder, _: Any) -> None:
    """Tell the core that it is waiting."""
    if ON_X86:
        emit.call(b, "llvm.x86.sse2.pause", ir.VoidType())


@emit.operation(types.void)
def call_kernel(b: Builder, _: Any, function: ir.Value, args: ir.Value, chunk: ir.Value) -> None:
    """Call the kernel at an address. It is called as Numba calls its functions (compiling.py)."""
    place = I8.as_pointer()
    kind = ir.FunctionType(I32, [place.as_pointer(), place.as_pointer(), I64, I64])
    result, error = alloca_once(b, place), alloca_once(b, place)
    b.call(b.inttoptr(function, kind.as_pointer()), [result, error, args, chunk])


@emit.operation(types.void)
def sched_yield(b: Builder, _: Any) -> None:
    """Let other threads have the core."""
    emit.call(b, "sched_yield", I32)
