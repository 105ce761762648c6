"""y = x W^T on packed weights: a strip of 16 rows at a time, every token of the step inside, so that each weight byte crosses
memory once a step whatever the batch.

Tokens go in tiles of 8, 4, 3, 2 and 1 (fewer where registers are few). Lane r of every sum belongs to weight row r, and columns
are added one group after another, so a token's result is the same in any tile. Per group of 32 columns, with integer products p of
unsigned weights and int8 activations a, scale s and sum S of a:

    y += p * (d s) + m (s S)        where a weight is d * q + m
"""

from __future__ import annotations

from typing import Any

from shoal.kernels.cpu.isa import ISA
from shoal.kernels.cpu.jit import Lazy, inline, kernel
from shoal.kernels.cpu.simd import (
    Address,
    Function,
    Register,
    Shape,
    bits,
    bits_up,
    dot_zero,
    either,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    load_i8x16,
    load_i64,
    load_u8x16,
    load_u8x64,
    mul,
    splat,
    tile_add,
    tile_add_i32,
    tile_dot,
    tile_fma,
    tile_load,
    tile_scale,
    tile_shift_add,
    tile_store,
    tile_store_first,
    tile_widen,
    tile_zero,
)

# Arguments of a linear kernel, int64 each.
(
    WEIGHTS,  # address of the first strip
    STRIPS,  # how many
    STRIP_BYTES,
    STRIPS_PER_CHUNK,
    COLUMNS,
    ROWS,  # address of the number of tokens
    X,  # float input, or int8 input [tokens, columns]
    X_STRIDE,  # bytes from one token to the next
    PASSES,  # int8 inputs that add up to one token's: 1, or 2 where the rounding error is multiplied too
    SCALES,  # float32 [tokens, passes, groups]: activation scales
    SUMS,  # float32 [tokens, passes, groups]: scale * sum of 32 activations
    HALF_SUMS,  # float32 [tokens, passes, 2 groups]: scale * sum of 16 activations
    GROUP_STRIDE,  # bytes from one token's SCALES (and SUMS) to the next
    OUT,  # float32 output of this part's first row
    OUT_STRIDE,
    OUT_ROWS,  # weight rows of this part
    ADD,  # 1: add to what is there
) = (8 * i for i in range(17))
LINEAR_FIELDS = 17

_T8, _T4, _T3, _T2, _T1 = (0,) * 8, (0,) * 4, (0,) * 3, (0,) * 2, (0,)
_WIDE = ISA == "avx512vnni"  # 32 registers: tiles of 8 tokens
_SPLIT_BYTES = ISA == "avx2"  # 8-bit weights overflow int16 sums: take them as two nibbles


# --- integer products of one group of 32 columns ---------------------------------------------------------------------


@inline
def _pair(acc: Register, v: Register, a: Address, stride: Address) -> Any:
    """Quads j (low nibbles) and j + 4 (high nibbles) of a nibble vector."""
    acc = tile_dot(acc, bits(v, 0, 15), a, stride)
    return tile_dot(acc, bits(v, 4, 15), a + 16, stride)


@inline
def _dots4(shape: Shape, w: Address, a: Address, stride: Address) -> Any:
    acc = dot_zero(shape)
    acc = _pair(acc, load_u8x64(w), a, stride)
    acc = _pair(acc, load_u8x64(w + 64), a + 4, stride)
    acc = _pair(acc, load_u8x64(w + 128), a + 8, stride)
    acc = _pair(acc, load_u8x64(w + 192), a + 12, stride)
    return tile_widen(acc)


@inline
def _low5(v: Register, plane: Register, q: int) -> Any:
    """Quad q < 4 of 5-bit weights: low nibble and bit q of the plane."""
    return either(bits(v, 0, 15), bits_up(plane, 4 - q, 16))


@inline
def _high5(v: Register, plane: Register, q: int) -> Any:
    """Quad q + 4: high nibble and bit q + 4."""
    return either(bits(v, 4, 15), bits(plane, q, 16))


@inline
def _dots5(shape: Shape, w: Address, a: Address, stride: Address) -> Any:
    plane = load_u8x64(w + 256)
    v0, v1, v2, v3 = load_u8x64(w), load_u8x64(w + 64), load_u8x64(w + 128), load_u8x64(w + 192)
    acc = tile_dot(dot_zero(shape), _low5(v0, plane, 0), a, stride)
    acc = tile_dot(acc, _low5(v1, plane, 1), a + 4, stride)
    acc = tile_dot(acc, _low5(v2, plane, 2), a + 8, stride)
    first = tile_widen(tile_dot(acc, _low5(v3, plane, 3), a + 12, stride))
    acc = tile_dot(dot_zero(shape), _high5(v0, plane, 0), a + 16, stride)
    acc = tile_dot(acc, _high5(v1, plane, 1), a + 20, stride)
    acc = tile_dot(acc, _high5(v2, plane, 2), a + 24, stride)
    return tile_add_i32(first, tile_widen(tile_dot(acc, _high5(v3, plane, 3), a + 28, stride)))


@inline
def _half6(
    shape: Shape,
    v0: Register,
    v1: Register,
    v2: Register,
    v3: Register,
    shift: int,
    plane: Register,
    a: Address,
    stride: Address,
) -> Any:
    """16 columns of 6-bit weights: nibbles at ``shift`` of four vectors, two bits each of four quads."""
    acc = tile_dot(dot_zero(shape), either(bits(v0, shift, 15), bits_up(plane, 4, 48)), a, stride)
    one = tile_widen(tile_dot(acc, either(bits(v1, shift, 15), bits_up(plane, 2, 48)), a + 4, stride))
    acc = tile_dot(dot_zero(shape), either(bits(v2, shift, 15), bits(plane, 0, 48)), a + 8, stride)
    two = tile_widen(tile_dot(acc, either(bits(v3, shift, 15), bits(plane, 2, 48)), a + 12, stride))
    return tile_add_i32(one, two)


@inline
def _dots8(shape: Shape, w: Address, a: Address, stride: Address) -> Any:
    acc = dot_zero(shape)
    acc = tile_dot(acc, load_u8x64(w), a, stride)
    acc = tile_dot(acc, load_u8x64(w + 64), a + 4, stride)
    acc = tile_dot(acc, load_u8x64(w + 128), a + 8, stride)
    acc = tile_dot(acc, load_u8x64(w + 192), a + 12, stride)
    acc = tile_dot(acc, load_u8x64(w + 256), a + 16, stride)
    acc = tile_dot(acc, load_u8x64(w + 320), a + 20, stride)
    acc = tile_dot(acc, load_u8x64(w + 384), a + 24, stride)
    return tile_widen(tile_dot(acc, load_u8x64(w + 448), a + 28, stride))


@inline
def _nibbles8(shape: Shape, w: Address, a: Address, stride: Address, shift: int) -> Any:
    """One nibble of 8-bit weights."""
    acc = dot_zero(shape)
    acc = tile_dot(acc, bits(load_u8x64(w), shift, 15), a, stride)
    acc = tile_dot(acc, bits(load_u8x64(w + 64), shift, 15), a + 4, stride)
    acc = tile_dot(acc, bits(load_u8x64(w + 128), shift, 15), a + 8, stride)
    acc = tile_dot(acc, bits(load_u8x64(w + 192), shift, 15), a + 12, stride)
    acc = tile_dot(acc, bits(load_u8x64(w + 256), shift, 15), a + 16, stride)
    acc = tile_dot(acc, bits(load_u8x64(w + 320), shift, 15), a + 20, stride)
    acc = tile_dot(acc, bits(load_u8x64(w + 384), shift, 15), a + 24, stride)
    return tile_widen(tile_dot(acc, bits(load_u8x64(w + 448), shift, 15), a + 28, stride))


@inline
def _dots8_split(shape: Shape, w: Address, a: Address, stride: Address) -> Any:
    return tile_shift_add(_nibbles8(shape, w, a, stride, 4), _nibbles8(shape, w, a, stride, 0), 4)


if _SPLIT_BYTES:
    _dots8 = _dots8_split


# --- one strip, one tile of tokens -----------------------------------------------------------------------------------


@inline
def _affine(
    acc: Register,
    dots: Register,
    d: Register,
    m: Register,
    scale: Address,
    sums: Address,
    g: int,
    sum_g: int,
    stride: Address,
    sum_stride: Address,
) -> Any:
    """acc + dots * (d * scale) + m * sum, for activation group g (and sum_g among the sums)."""
    acc = tile_scale(acc, dots, d, scale + 4 * g, stride)
    return tile_fma(acc, m, sums + 4 * sum_g, sum_stride)


@inline
def _strip_q4_0(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride, gs = load_i64(args + X_STRIDE), load_i64(args + GROUP_STRIDE)
    acc = tile_zero(shape)
    for g in range(load_i64(args + COLUMNS) // 32):
        d = load_f16x16(w + 256)
        dots = _dots4(shape, w, x + 32 * g, stride)
        acc = _affine(acc, dots, d, mul(d, splat(-8.0)), scale, sums, g, g, gs, gs)
        w += 288
    return acc


@inline
def _strip_q4_1(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride, gs = load_i64(args + X_STRIDE), load_i64(args + GROUP_STRIDE)
    acc = tile_zero(shape)
    for g in range(load_i64(args + COLUMNS) // 32):
        dots = _dots4(shape, w, x + 32 * g, stride)
        acc = _affine(acc, dots, load_f16x16(w + 256), load_f16x16(w + 288), scale, sums, g, g, gs, gs)
        w += 320
    return acc


@inline
def _strip_q8_0(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride, gs = load_i64(args + X_STRIDE), load_i64(args + GROUP_STRIDE)
    acc = tile_zero(shape)
    for g in range(load_i64(args + COLUMNS) // 32):
        d = load_f16x16(w + 512)
        dots = _dots8(shape, w, x + 32 * g, stride)
        acc = _affine(acc, dots, d, mul(d, splat(-128.0)), scale, sums, g, g, gs, gs)
        w += 544
    return acc


@inline
def _strip_q4_k(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride, gs = load_i64(args + X_STRIDE), load_i64(args + GROUP_STRIDE)
    acc = tile_zero(shape)
    for block in range(load_i64(args + COLUMNS) // 256):
        d, least = load_f16x16(w), mul(load_f16x16(w + 32), splat(-1.0))
        w += 64
        for g in range(8 * block, 8 * block + 8):
            dots = _dots4(shape, w, x + 32 * g, stride)
            ds, m = mul(d, load_u8x16(w + 256)), mul(least, load_u8x16(w + 272))
            acc = _affine(acc, dots, ds, m, scale, sums, g, g, gs, gs)
            w += 288
    return acc


@inline
def _strip_q5_k(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride, gs = load_i64(args + X_STRIDE), load_i64(args + GROUP_STRIDE)
    acc = tile_zero(shape)
    for block in range(load_i64(args + COLUMNS) // 256):
        d, least = load_f16x16(w), mul(load_f16x16(w + 32), splat(-1.0))
        w += 64
        for g in range(8 * block, 8 * block + 8):
            dots = _dots5(shape, w, x + 32 * g, stride)
            ds, m = mul(d, load_u8x16(w + 320)), mul(least, load_u8x16(w + 336))
            acc = _affine(acc, dots, ds, m, scale, sums, g, g, gs, gs)
            w += 352
    return acc


@inline
def _strip_q6_k(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride, gs = load_i64(args + X_STRIDE), load_i64(args + GROUP_STRIDE)
    acc = tile_zero(shape)
    for block in range(load_i64(args + COLUMNS) // 256):
        d = load_f16x16(w)
        w += 32
        for g in range(8 * block, 8 * block + 8):
            v0, v1, v2, v3 = load_u8x64(w), load_u8x64(w + 64), load_u8x64(w + 128), load_u8x64(w + 192)
            dots = _half6(shape, v0, v1, v2, v3, 0, load_u8x64(w + 256), x + 32 * g, stride)
            ds = mul(d, load_i8x16(w + 384))
            acc = _affine(acc, dots, ds, mul(ds, splat(-32.0)), scale, half_sums, g, 2 * g, gs, 2 * gs)
            dots = _half6(shape, v0, v1, v2, v3, 4, load_u8x64(w + 320), x + 32 * g + 16, stride)
            ds = mul(d, load_i8x16(w + 400))
            acc = _affine(acc, dots, ds, mul(ds, splat(-32.0)), scale, half_sums, g, 2 * g + 1, gs, 2 * gs)
            w += 416
    return acc


@inline
def _strip_f32(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride = load_i64(args + X_STRIDE)
    acc = tile_zero(shape)
    for k in range(load_i64(args + COLUMNS)):
        acc = tile_fma(acc, load_f32x16(w + 64 * k), x + 4 * k, stride)
    return acc


@inline
def _strip_f16(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride = load_i64(args + X_STRIDE)
    acc = tile_zero(shape)
    for k in range(load_i64(args + COLUMNS)):
        acc = tile_fma(acc, load_f16x16(w + 32 * k), x + 4 * k, stride)
    return acc


@inline
def _strip_bf16(
    shape: Shape, args: Address, w: Address, x: Address, scale: Address, sums: Address, half_sums: Address
) -> Any:
    stride = load_i64(args + X_STRIDE)
    acc = tile_zero(shape)
    for k in range(load_i64(args + COLUMNS)):
        acc = tile_fma(acc, load_bf16x16(w + 32 * k), x + 4 * k, stride)
    return acc


# --- all tokens of the step ------------------------------------------------------------------------------------------


@inline
def _tile(strip: Function, shape: Shape, args: Address, index: int, t: int) -> None:
    """Tokens t ... t + len(shape) - 1 of strip ``index``."""
    gs, columns = load_i64(args + GROUP_STRIDE), load_i64(args + COLUMNS)
    w = load_i64(args + WEIGHTS) + index * load_i64(args + STRIP_BYTES)
    x = load_i64(args + X) + t * load_i64(args + X_STRIDE)
    acc = tile_zero(shape)
    for p in range(load_i64(args + PASSES)):
        at = t * gs + p * (columns // 32 * 4)
        scale, sums, halves = load_i64(args + SCALES), load_i64(args + SUMS), load_i64(args + HALF_SUMS)
        acc = tile_add(acc, strip(shape, args, w, x + p * columns, scale + at, sums + at, halves + 2 * at))
    stride = load_i64(args + OUT_STRIDE)
    out = load_i64(args + OUT) + t * stride + 64 * index
    if load_i64(args + ADD) != 0:
        acc = tile_add(acc, tile_load(shape, out, stride))
    left = load_i64(args + OUT_ROWS) - 16 * index
    if left >= 16:
        tile_store(acc, out, stride)
    else:
        tile_store_first(acc, out, stride, left)


@inline
def _run(strip: Function, args: Address, chunk: int) -> None:
    """The strips of one chunk, each over all tokens."""
    per_chunk, rows = load_i64(args + STRIPS_PER_CHUNK), load_i64(load_i64(args + ROWS))
    for index in range(chunk * per_chunk, min((chunk + 1) * per_chunk, load_i64(args + STRIPS))):
        t = 0
        if _WIDE:
            while rows - t >= 8:
                _tile(strip, _T8, args, index, t)
                t += 8
        while rows - t >= 4:
            _tile(strip, _T4, args, index, t)
            t += 4
        if rows - t == 3:
            _tile(strip, _T3, args, index, t)
        elif rows - t == 2:
            _tile(strip, _T2, args, index, t)
        elif rows - t == 1:
            _tile(strip, _T1, args, index, t)


@kernel
def linear_q4_0(args: Address, chunk: int) -> None:
    """Strips of a Q4_0 matrix."""
    _run(_strip_q4_0, args, chunk)


@kernel
def linear_q4_1(args: Address, chunk: int) -> None:
    """Strips of a Q4_1 matrix."""
    _run(_strip_q4_1, args, chunk)


@kernel
def linear_q8_0(args: Address, chunk: int) -> None:
    """Strips of a Q8_0 matrix."""
    _run(_strip_q8_0, args, chunk)


@kernel
def linear_q4_k(args: Address, chunk: int) -> None:
    """Strips of a Q4_K matrix."""
    _run(_strip_q4_k, args, chunk)


@kernel
def linear_q5_k(args: Address, chunk: int) -> None:
    """Strips of a Q5_K matrix."""
    _run(_strip_q5_k, args, chunk)


@kernel
def linear_q6_k(args: Address, chunk: int) -> None:
    """Strips of a Q6_K matrix."""
    _run(_strip_q6_k, args, chunk)


@kernel
def linear_f32(args: Address, chunk: int) -> None:
    """Strips of an F32 matrix."""
    _run(_strip_f32, args, chunk)


@kernel
def linear_f16(args: Address, chunk: int) -> None:
    """Strips of an F16 matrix."""
    _run(_strip_f16, args, chunk)


@kernel
def linear_bf16(args: Address, chunk: int) -> None:
    """Strips of a BF16 matrix."""
    _run(_strip_bf16, args, chunk)


LINEAR: dict[str, Lazy] = {
    "Q4_0": linear_q4_0,
    "Q4_1": linear_q4_1,
    "Q8_0": linear_q8_0,
    "Q4_K": linear_q4_k,
    "Q5_K": linear_q5_k,
    "Q6_K": linear_q6_k,
    "F32": linear_f32,
    "F16": linear_f16,
    "BF16": linear_bf16,
}
