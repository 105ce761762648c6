"""y = x W^T on packed weights: a strip of 16 rows at a time, every token of the step inside, so that each weight byte crosses
memory once a step whatever the batch.

Tokens go in tiles of 8, 4, 3, 2 and 1 (fewer where registers are few). Lane r of every sum belongs to weight row r, and columns
are added one group after another, so a token's result is the same in any tile. Activations have a scale s for 16 columns, a weight is
d * code + m. With integer products p of unsigned codes and int8 activations, and S the sum of those activations:

    y += (p0 * s0 + p1 * s1) * d + m (s0 S0 + s1 S1)      a group of 32 columns with one d and m
    y += p * (d s) + m (s S)                              each half of a group with its own

One template makes the kernels of all types; what differs is in groups.py.
"""

from __future__ import annotations

from typing import Any

from shoal.kernels.cpu.groups import GROUPS, TENSOR_SCALE
from shoal.kernels.cpu.isa import ISA
from shoal.kernels.cpu.jit import Lazy, inline, kernel, specialised
from shoal.kernels.cpu.pack import LAYOUTS, Layout
from shoal.kernels.cpu.simd import (
    Address,
    Function,
    Register,
    Shape,
    bits,
    call_kernel,
    dot_zero,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    load_i64,
    prefetch_near,
    store_f32x16,
    store_u8x64,
    tile_add,
    tile_add_i32,
    tile_dot,
    tile_fma,
    tile_load,
    tile_scale,
    tile_scale_halves,
    tile_shift_add,
    tile_store,
    tile_store_first,
    tile_widen,
    tile_zero,
)

# Arguments of a linear kernel, int64 each. A decode kernel takes the same, with WEIGHTS the strip and OUT where to write.
(
    _TENSOR_SCALE,  # address of a float32 that scales the whole matrix (I2_S)
    WEIGHTS,  # address of the first strip
    STRIPS,  # how many
    STRIP_BYTES,
    STRIPS_PER_CHUNK,
    COLUMNS,
    ROWS,  # address of the number of tokens
    X,  # float input, or int8 input [tokens, columns]
    X_STRIDE,  # bytes from one token to the next
    SCALES,  # float32 [tokens, columns / 16]: activation scales
    HALF_SUMS,  # float32 [tokens, columns / 16]: scale * sum of 16 activations
    SUMS,  # float32 [tokens, columns / 32]: sums of two of these
    OUT,  # float32 output of this part's first row
    OUT_STRIDE,
    OUT_ROWS,  # weight rows of this part
    ADD,  # 1: add to what is there
) = (8 * i for i in range(16))
LINEAR_FIELDS = 16
assert _TENSOR_SCALE == TENSOR_SCALE

_T8, _T4, _T3, _T2, _T1 = (0,) * 8, (0,) * 4, (0,) * 3, (0,) * 2, (0,)
_WIDE = ISA == "avx512vnni"  # 32 registers: tiles of 8 tokens

# A core runs ahead of a small tile by itself and reads memory early enough; from this size on it must be told.
_SLOW_TILE, _AHEAD = 4, 4096

# --- integer products ------------------------------------------------------------------------------------------------
# With AVX2 sums are int16 until they are widened; the largest code says how often that must be.


@inline
def _chain(acc: Register, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address) -> Any:
    """Four quads, 16 columns."""
    acc = tile_dot(acc, c0, a, stride)
    acc = tile_dot(acc, c1, a + 4, stride)
    acc = tile_dot(acc, c2, a + 8, stride)
    return tile_dot(acc, c3, a + 12, stride)


@inline
def _half_by_4(
    shape: Shape, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """16 columns, one widening."""
    return tile_widen(_chain(dot_zero(shape), c0, c1, c2, c3, a, stride))


@inline
def _half_by_2(
    shape: Shape, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """16 columns, a widening every two quads."""
    one = tile_dot(tile_dot(dot_zero(shape), c0, a, stride), c1, a + 4, stride)
    two = tile_dot(tile_dot(dot_zero(shape), c2, a + 8, stride), c3, a + 12, stride)
    return tile_add_i32(tile_widen(one), tile_widen(two))


@inline
def _half_by_1(
    shape: Shape, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """16 columns, every quad widened."""
    one, two = tile_dot(dot_zero(shape), c0, a, stride), tile_dot(dot_zero(shape), c1, a + 4, stride)
    acc = tile_add_i32(tile_widen(one), tile_widen(two))
    one, two = tile_dot(dot_zero(shape), c2, a + 8, stride), tile_dot(dot_zero(shape), c3, a + 12, stride)
    return tile_add_i32(acc, tile_add_i32(tile_widen(one), tile_widen(two)))


@inline
def _half_by_nibbles(
    shape: Shape, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """16 columns of bytes: high nibbles times 16, and low nibbles."""
    high = _half_by_4(shape, bits(c0, 4, 15), bits(c1, 4, 15), bits(c2, 4, 15), bits(c3, 4, 15), a, stride)
    low = _half_by_4(shape, bits(c0, 0, 15), bits(c1, 0, 15), bits(c2, 0, 15), bits(c3, 0, 15), a, stride)
    return tile_shift_add(high, low, 4)


def _products(largest: int) -> Function:
    """How to multiply 16 columns of codes up to ``largest``: int16 holds n products of 2 * 127 * largest."""
    if ISA != "avx2":
        return _half_by_4
    room = 32767 // (2 * 127 * largest)
    return {0: _half_by_nibbles, 1: _half_by_1, 2: _half_by_2, 3: _half_by_2}.get(room, _half_by_4)


# --- one strip, one tile of tokens -----------------------------------------------------------------------------------
# Templates: the names in capitals are set for each type at the end of this file.


def _strip_with_one_scale(shape: Shape, args: Address, w: Address, t: int) -> Any:
    """A strip whose groups have one scale."""
    x, stride, scale, scale_stride = _input(args, t)
    sums, sum_stride = load_i64(args + SUMS) + t * (scale_stride // 2), scale_stride // 2
    acc = tile_zero(shape)
    for block in range(load_i64(args + COLUMNS) // (32 * GROUPS_PER_BLOCK)):
        head = HEAD(args, w)
        w += HEAD_BYTES
        for g in range(GROUPS_PER_BLOCK * block, GROUPS_PER_BLOCK * (block + 1)):
            (c0, c1, c2, c3, c4, c5, c6, c7), d, m = READ(w, head)
            first = HALF(shape, c0, c1, c2, c3, x + 32 * g, stride)
            second = HALF(shape, c4, c5, c6, c7, x + 32 * g + 16, stride)
            acc = tile_scale_halves(acc, first, second, d, scale + 8 * g, scale_stride)
            acc = tile_fma(acc, m, sums + 4 * g, sum_stride)
            if len(shape) >= _SLOW_TILE:
                _ask_ahead(w + _AHEAD, GROUP_BYTES)
            w += GROUP_BYTES
    return acc


def _strip_with_two_scales(shape: Shape, args: Address, w: Address, t: int) -> Any:
    """A strip whose groups have a scale for each half."""
    x, stride, scale, scale_stride = _input(args, t)
    sums = load_i64(args + HALF_SUMS) + t * scale_stride
    acc = tile_zero(shape)
    for block in range(load_i64(args + COLUMNS) // (32 * GROUPS_PER_BLOCK)):
        head = HEAD(args, w)
        w += HEAD_BYTES
        for g in range(GROUPS_PER_BLOCK * block, GROUPS_PER_BLOCK * (block + 1)):
            (c0, c1, c2, c3, c4, c5, c6, c7), d, m, e, n = READ(w, head)
            dots = HALF(shape, c0, c1, c2, c3, x + 32 * g, stride)
            acc = tile_scale(acc, dots, d, scale + 8 * g, scale_stride)
            acc = tile_fma(acc, m, sums + 8 * g, scale_stride)
            dots = HALF(shape, c4, c5, c6, c7, x + 32 * g + 16, stride)
            acc = tile_scale(acc, dots, e, scale + 8 * g + 4, scale_stride)
            acc = tile_fma(acc, n, sums + 8 * g + 4, scale_stride)
            if len(shape) >= _SLOW_TILE:
                _ask_ahead(w + _AHEAD, GROUP_BYTES)
            w += GROUP_BYTES
    return acc


def _strip_of_floats(shape: Shape, args: Address, w: Address, t: int) -> Any:
    """A strip of float weights."""
    stride = load_i64(args + X_STRIDE)
    x = load_i64(args + X) + t * stride
    acc = tile_zero(shape)
    for k in range(load_i64(args + COLUMNS)):
        acc = tile_fma(acc, LOAD(w + GROUP_BYTES * k), x + 4 * k, stride)
    return acc


@inline
def _ask_ahead(w: Address, size: int) -> None:
    for i in range(0, size, 64):
        prefetch_near(w + i)


@inline
def _input(args: Address, t: int) -> Any:
    """Token t's rounded values: int8, bytes to the next token's, scales, bytes to the next token's."""
    stride, scale_stride = load_i64(args + X_STRIDE), load_i64(args + COLUMNS) // 16 * 4
    return load_i64(args + X) + t * stride, stride, load_i64(args + SCALES) + t * scale_stride, scale_stride


# --- all tokens of the step ------------------------------------------------------------------------------------------


@inline
def _tile(strip: Function, shape: Shape, args: Address, index: int, t: int) -> None:
    """Tokens t ... t + len(shape) - 1 of strip ``index``."""
    w = load_i64(args + WEIGHTS) + index * load_i64(args + STRIP_BYTES)
    acc = strip(shape, args, w, t)
    stride = load_i64(args + OUT_STRIDE)
    out = load_i64(args + OUT) + t * stride + 64 * index
    if load_i64(args + ADD) != 0:
        acc = tile_add(acc, tile_load(shape, out, stride))
    left = load_i64(args + OUT_ROWS) - 16 * index
    if left >= 16:
        tile_store(acc, out, stride)
    else:
        tile_store_first(acc, out, stride, left)


def _linear(args: Address, chunk: int) -> None:
    """The strips of one chunk, each over all tokens."""
    per_chunk, rows = load_i64(args + STRIPS_PER_CHUNK), load_i64(load_i64(args + ROWS))
    for index in range(chunk * per_chunk, min((chunk + 1) * per_chunk, load_i64(args + STRIPS))):
        t = 0
        if _WIDE:
            while rows - t >= 8:
                _tile(STRIP, _T8, args, index, t)
                t += 8
        while rows - t >= 4:
            _tile(STRIP, _T4, args, index, t)
            t += 4
        if rows - t == 3:
            _tile(STRIP, _T3, args, index, t)
        elif rows - t == 2:
            _tile(STRIP, _T2, args, index, t)
        elif rows - t == 1:
            _tile(STRIP, _T1, args, index, t)


@kernel
def linear_parts(args: Address, chunk: int) -> None:
    """A matrix of several types: (chunks up to and with this part, kernel, its arguments) for each part in turn."""
    first = 0
    while chunk >= load_i64(args):
        first = load_i64(args)
        args += 24
    call_kernel(load_i64(args + 8), load_i64(args + 16), chunk - first)


# --- weights one by one ----------------------------------------------------------------------------------------------
# Block by block, for the embedding: codes [8 quads, 16 rows, 4] and d, m, d, m (the halves') of each group, or floats [32, 16].

DECODED_BYTES = 512 + 4 * 64  # of a group; float types: 64 bytes a column


def _decode_with_one_scale(args: Address, block: int) -> None:
    """One block of a strip, decoded."""
    w, out = load_i64(args + WEIGHTS) + block * (HEAD_BYTES + GROUPS_PER_BLOCK * GROUP_BYTES), load_i64(args + OUT)
    head = HEAD(args, w)
    w += HEAD_BYTES
    for _ in range(GROUPS_PER_BLOCK):
        codes, d, m = READ(w, head)
        _store_group(out, codes, d, m, d, m)
        w, out = w + GROUP_BYTES, out + DECODED_BYTES


def _decode_with_two_scales(args: Address, block: int) -> None:
    """One block of a strip, decoded."""
    w, out = load_i64(args + WEIGHTS) + block * (HEAD_BYTES + GROUPS_PER_BLOCK * GROUP_BYTES), load_i64(args + OUT)
    head = HEAD(args, w)
    w += HEAD_BYTES
    for _ in range(GROUPS_PER_BLOCK):
        codes, d, m, e, n = READ(w, head)
        _store_group(out, codes, d, m, e, n)
        w, out = w + GROUP_BYTES, out + DECODED_BYTES


@inline
def _store_group(out: Address, codes: Any, d: Register, m: Register, e: Register, n: Register) -> None:
    c0, c1, c2, c3, c4, c5, c6, c7 = codes
    store_u8x64(out, c0)
    store_u8x64(out + 64, c1)
    store_u8x64(out + 128, c2)
    store_u8x64(out + 192, c3)
    store_u8x64(out + 256, c4)
    store_u8x64(out + 320, c5)
    store_u8x64(out + 384, c6)
    store_u8x64(out + 448, c7)
    store_f32x16(out + 512, d)
    store_f32x16(out + 576, m)
    store_f32x16(out + 640, e)
    store_f32x16(out + 704, n)


def _decode_floats(args: Address, block: int) -> None:
    """32 columns of a strip as float32."""
    w, out = load_i64(args + WEIGHTS) + block * 32 * GROUP_BYTES, load_i64(args + OUT)
    for k in range(min(32, load_i64(args + COLUMNS) - 32 * block)):
        store_f32x16(out + 64 * k, LOAD(w + GROUP_BYTES * k))


# --- the kernels of every type ---------------------------------------------------------------------------------------

HEAD: Function = None
READ: Function = None
HALF: Function = None
LOAD: Function = None
STRIP: Function = None
GROUPS_PER_BLOCK = HEAD_BYTES = GROUP_BYTES = 0


def _kernels(layout: Layout) -> tuple[Lazy, Lazy]:
    """The product and the decoder of one type."""
    names: dict[str, Any] = {"GROUP_BYTES": layout.group_bytes}
    if layout.is_float:
        names["LOAD"] = {"F32": load_f32x16, "F16": load_f16x16, "BF16": load_bf16x16}[layout.name]
        strip, decode = _strip_of_floats, _decode_floats
    else:
        reader = GROUPS[layout.name]
        names |= {"HEAD": reader.head, "READ": reader.group, "HALF": _products(reader.largest)}
        names |= {"HEAD_BYTES": layout.head_bytes, "GROUPS_PER_BLOCK": layout.groups_per_block}
        strip = _strip_with_two_scales if reader.halves else _strip_with_one_scale
        decode = _decode_with_two_scales if reader.halves else _decode_with_one_scale
    lower = layout.name.lower()
    product = specialised(_linear, f"linear_{lower}", STRIP=inline(specialised(strip, f"strip_{lower}", **names)))
    return kernel(product), kernel(specialised(decode, f"decode_{lower}", **names))


LINEAR: dict[str, Lazy] = {}
DECODE: dict[str, Lazy] = {}
for _layout in LAYOUTS.values():
    LINEAR[_layout.name], DECODE[_layout.name] = _kernels(_layout)
