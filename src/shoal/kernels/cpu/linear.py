"""y = x W^T on packed weights: a strip of 16 rows at a time, every token of the step inside, so that each weight byte crosses
memory once a step whatever the batch.

Tokens go in tiles of 8, 4, 3, 2 and 1 (fewer where registers are few). Lane r of every sum belongs to weight row r, and columns
are added one group after another, so a token's result is the same in any tile. Activations have a scale s for 16 columns. With
integer products p of unsigned codes and int8 activations, and S the sum of those activations, a group of 32 columns adds

    (p0 s0 + p1 s1) d + m (s0 S0 + s1 S1)      where a weight is code * d + m
    (p0 s0 + p1 s1) d                          where it is (code - 2^shift) * d: then p starts at -2^shift S

and likewise each half by itself where halves have their own d.

One template makes the kernels of all types; what differs is in groups.py.
"""

from __future__ import annotations

from typing import Any

from shoal.kernels.cpu.groups import GROUPS
from shoal.kernels.cpu.isa import HAS
from shoal.kernels.cpu.jit import Lazy, inline, kernel, specialised
from shoal.kernels.cpu.pack import LAYOUTS, Layout
from shoal.kernels.cpu.panels import panels_of
from shoal.kernels.cpu.simd import (
    Address,
    Function,
    Register,
    Shape,
    bits,
    call_kernel,
    dot_end,
    dot_start,
    every_byte,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    load_i64,
    plus,
    store_f32x16,
    tile_dot,
    tile_dots,
    tile_fma,
    tile_scale,
    tile_scale_halves,
    tile_shift_add,
    tile_shifted,
    tile_zero,
    tile_zero_i32,
)
from shoal.kernels.cpu.simd.panel_format import PANEL_TOKENS
from shoal.kernels.cpu.strips import (
    COLUMNS,
    HALF_SUMS,
    MINUS_SUMS,
    OUT,
    ROWS,
    STRIP_BYTES,
    STRIPS,
    STRIPS_PER_CHUNK,
    SUMS,
    WEIGHTS,
    X_STRIDE,
    X,
    ask_ahead,
    put_tile,
    store_codes,
    token_input,
)

_T8, _T4, _T3, _T2, _T1 = (0,) * 8, (0,) * 4, (0,) * 3, (0,) * 2, (0,)
_TILES_OF_8 = HAS.vectors >= 32

_TOKENS = 128  # of a step that one pass over a chunk's strips takes: their rounded values stay in the L2 cache

# --- integer products ------------------------------------------------------------------------------------------------
# With AVX2 sums are int16 until they are widened; the largest code says how often that must be. All take 16 columns, four quads,
# and go on from ``start`` (int32).


@inline
def _half_by_4(
    start: Register, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """One widening."""
    acc = tile_dot(dot_start(start), c0, a, stride)
    acc = tile_dot(acc, c1, a + 4, stride)
    acc = tile_dot(acc, c2, a + 8, stride)
    return dot_end(tile_dot(acc, c3, a + 12, stride), start)


@inline
def _half_at_once(
    start: Register, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """Sums of int32, and activations read at once."""
    return tile_dots(start, c0, c1, c2, c3, a, stride)


@inline
def _half_less_128(
    start: Register, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """Products of code - 128, which is a signed byte and what codes of all types with more than 7 bits stand for: ``start``, which
    would take it away from sums of unsigned ones, is not needed."""
    less = every_byte(128)
    return tile_dots(tile_zero_i32(start), plus(c0, less), plus(c1, less), plus(c2, less), plus(c3, less), a, stride)


@inline
def _half_by_2(
    start: Register, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """A widening every two quads."""
    one = dot_end(tile_dot(tile_dot(dot_start(start), c0, a, stride), c1, a + 4, stride), start)
    return dot_end(tile_dot(tile_dot(dot_start(one), c2, a + 8, stride), c3, a + 12, stride), one)


@inline
def _half_by_1(
    start: Register, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """Every quad widened."""
    acc = dot_end(tile_dot(dot_start(start), c0, a, stride), start)
    acc = dot_end(tile_dot(dot_start(acc), c1, a + 4, stride), acc)
    acc = dot_end(tile_dot(dot_start(acc), c2, a + 8, stride), acc)
    return dot_end(tile_dot(dot_start(acc), c3, a + 12, stride), acc)


@inline
def _half_by_nibbles(
    start: Register, c0: Register, c1: Register, c2: Register, c3: Register, a: Address, stride: Address
) -> Any:
    """Bytes: high nibbles times 16, and low nibbles."""
    zero = tile_zero_i32(start)
    high = _half_by_4(zero, bits(c0, 4, 15), bits(c1, 4, 15), bits(c2, 4, 15), bits(c3, 4, 15), a, stride)
    low = _half_by_4(start, bits(c0, 0, 15), bits(c1, 0, 15), bits(c2, 0, 15), bits(c3, 0, 15), a, stride)
    return tile_shift_add(high, low, 4)


def _products(largest: int) -> Function:
    """How to multiply 16 columns of codes up to ``largest``: int16 holds n products of 2 * 127 * largest."""
    if HAS.by_lane:
        return _half_less_128 if HAS.signed and largest > 127 else _half_at_once
    if not HAS.int16_sums:
        return _half_by_4
    room = 32767 // (2 * 127 * largest)
    return {0: _half_by_nibbles, 1: _half_by_1, 2: _half_by_2, 3: _half_by_2}.get(room, _half_by_4)


# --- one strip, one tile of tokens -----------------------------------------------------------------------------------
# Templates: the names in capitals are set for each type at the end of this file.


def _strip_affine(shape: Shape, args: Address, w: Address, t: int) -> Any:
    """code * d + m."""
    x, stride, scale, scale_stride = token_input(args, t)
    sums, sum_stride = load_i64(args + SUMS) + t * (scale_stride // 2), scale_stride // 2
    acc, zero = tile_zero(shape), tile_zero_i32(shape)
    for block in range(load_i64(args + COLUMNS) // (32 * GROUPS_PER_BLOCK)):
        head = HEAD(args, w)
        w += HEAD_BYTES
        for g in range(GROUPS_PER_BLOCK * block, GROUPS_PER_BLOCK * (block + 1)):
            (c0, c1, c2, c3, c4, c5, c6, c7), d, m = READ(w, head)
            first = HALF(zero, c0, c1, c2, c3, x + 32 * g, stride)
            second = HALF(zero, c4, c5, c6, c7, x + 32 * g + 16, stride)
            acc = tile_scale_halves(acc, first, second, d, scale + 8 * g, scale_stride)
            acc = tile_fma(acc, m, sums + 4 * g, sum_stride)
            ask_ahead(shape, w, GROUP_BYTES)
            w += GROUP_BYTES
    return acc


def _strip_centred(shape: Shape, args: Address, w: Address, t: int) -> Any:
    """(code - 2^shift) * d."""
    x, stride, scale, scale_stride = token_input(args, t)
    sums = load_i64(args + MINUS_SUMS) + t * scale_stride
    acc = tile_zero(shape)
    for block in range(load_i64(args + COLUMNS) // (32 * GROUPS_PER_BLOCK)):
        head = HEAD(args, w)
        w += HEAD_BYTES
        for g in range(GROUPS_PER_BLOCK * block, GROUPS_PER_BLOCK * (block + 1)):
            (c0, c1, c2, c3, c4, c5, c6, c7), d = READ(w, head)
            start = tile_shifted(shape, sums + 8 * g, scale_stride, SHIFT)
            first = HALF(start, c0, c1, c2, c3, x + 32 * g, stride)
            start = tile_shifted(shape, sums + 8 * g + 4, scale_stride, SHIFT)
            second = HALF(start, c4, c5, c6, c7, x + 32 * g + 16, stride)
            acc = tile_scale_halves(acc, first, second, d, scale + 8 * g, scale_stride)
            ask_ahead(shape, w, GROUP_BYTES)
            w += GROUP_BYTES
    return acc


def _strip_affine_halves(shape: Shape, args: Address, w: Address, t: int) -> Any:
    """code * d + m, with d and m for each half."""
    x, stride, scale, scale_stride = token_input(args, t)
    sums = load_i64(args + HALF_SUMS) + t * scale_stride
    acc, zero = tile_zero(shape), tile_zero_i32(shape)
    for block in range(load_i64(args + COLUMNS) // (32 * GROUPS_PER_BLOCK)):
        head = HEAD(args, w)
        w += HEAD_BYTES
        for g in range(GROUPS_PER_BLOCK * block, GROUPS_PER_BLOCK * (block + 1)):
            (c0, c1, c2, c3, c4, c5, c6, c7), d, m, e, n = READ(w, head)
            dots = HALF(zero, c0, c1, c2, c3, x + 32 * g, stride)
            acc = tile_scale(acc, dots, d, scale + 8 * g, scale_stride)
            acc = tile_fma(acc, m, sums + 8 * g, scale_stride)
            dots = HALF(zero, c4, c5, c6, c7, x + 32 * g + 16, stride)
            acc = tile_scale(acc, dots, e, scale + 8 * g + 4, scale_stride)
            acc = tile_fma(acc, n, sums + 8 * g + 4, scale_stride)
            ask_ahead(shape, w, GROUP_BYTES)
            w += GROUP_BYTES
    return acc


def _strip_centred_halves(shape: Shape, args: Address, w: Address, t: int) -> Any:
    """(code - 2^shift) * d, with a d for each half."""
    x, stride, scale, scale_stride = token_input(args, t)
    sums = load_i64(args + MINUS_SUMS) + t * scale_stride
    acc = tile_zero(shape)
    for block in range(load_i64(args + COLUMNS) // (32 * GROUPS_PER_BLOCK)):
        head = HEAD(args, w)
        w += HEAD_BYTES
        for g in range(GROUPS_PER_BLOCK * block, GROUPS_PER_BLOCK * (block + 1)):
            (c0, c1, c2, c3, c4, c5, c6, c7), d, e = READ(w, head)
            start = tile_shifted(shape, sums + 8 * g, scale_stride, SHIFT)
            dots = HALF(start, c0, c1, c2, c3, x + 32 * g, stride)
            acc = tile_scale(acc, dots, d, scale + 8 * g, scale_stride)
            start = tile_shifted(shape, sums + 8 * g + 4, scale_stride, SHIFT)
            dots = HALF(start, c4, c5, c6, c7, x + 32 * g + 16, stride)
            acc = tile_scale(acc, dots, e, scale + 8 * g + 4, scale_stride)
            ask_ahead(shape, w, GROUP_BYTES)
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


# --- all tokens of the step ------------------------------------------------------------------------------------------


@inline
def _tile(strip: Function, shape: Shape, args: Address, index: int, t: int) -> None:
    """Tokens t ... t + len(shape) - 1 of strip ``index``."""
    w = load_i64(args + WEIGHTS) + index * load_i64(args + STRIP_BYTES)
    put_tile(shape, strip(shape, args, w, t), args, index, t)


def _linear(args: Address, chunk: int) -> None:
    """The strips of one chunk, each over all tokens; of many tokens as many at a time as stay in the cache."""
    per_chunk, rows = load_i64(args + STRIPS_PER_CHUNK), load_i64(load_i64(args + ROWS))
    first, last = chunk * per_chunk, min((chunk + 1) * per_chunk, load_i64(args + STRIPS))
    for start in range(0, rows, _TOKENS):
        end = min(rows, start + _TOKENS)
        left = end - (end - start) % PANEL_TOKENS if end - start >= MANY else start
        if left > start:
            for index in range(first, last):
                PANELS(args, index, start, left)
        for index in range(first, last if left < end else first):
            _strip_of_tokens(STRIP, args, index, left, end)


@inline
def _strip_of_tokens(strip: Function, args: Address, index: int, t: int, end: int) -> None:
    """Tokens t ... end - 1 of strip ``index``, in the largest tiles that fit."""
    if _TILES_OF_8:
        while end - t >= 8:
            _tile(strip, _T8, args, index, t)
            t += 8
    while end - t >= 4:
        _tile(strip, _T4, args, index, t)
        t += 4
    if end - t == 3:
        _tile(strip, _T3, args, index, t)
    elif end - t == 2:
        _tile(strip, _T2, args, index, t)
    elif end - t == 1:
        _tile(strip, _T1, args, index, t)


@kernel
def linear_parts(args: Address, chunk: int) -> None:
    """A matrix of several types: (chunks up to and with this part, kernel, its arguments) for each part in turn."""
    first = 0
    while chunk >= load_i64(args):
        first = load_i64(args)
        args += 24
    call_kernel(load_i64(args + 8), load_i64(args + 16), chunk - first)


# --- weights one by one ----------------------------------------------------------------------------------------------
# Block by block, for the embedding: of each group the codes [8 quads, 16 rows, 4] and d, m, d, m of its halves (m says nothing where a
# type has none), or floats [32, 16].

DECODED_BYTES = 512 + 4 * 64  # of a group; float types: 64 bytes a column


def _decode(args: Address, block: int) -> None:
    """One block of a strip, decoded."""
    w, out = load_i64(args + WEIGHTS) + block * (HEAD_BYTES + GROUPS_PER_BLOCK * GROUP_BYTES), load_i64(args + OUT)
    head = HEAD(args, w)
    w += HEAD_BYTES
    for _ in range(GROUPS_PER_BLOCK):
        codes, d, m, e, n = UNPACK(READ(w, head))
        _store_group(out, codes, d, m, e, n)
        w, out = w + GROUP_BYTES, out + DECODED_BYTES


@inline
def _unpack_affine(group: Any) -> Any:
    codes, d, m = group
    return codes, d, m, d, m


@inline
def _unpack_centred(group: Any) -> Any:
    codes, d = group
    return codes, d, d, d, d


@inline
def _unpack_affine_halves(group: Any) -> Any:
    return group


@inline
def _unpack_centred_halves(group: Any) -> Any:
    codes, d, e = group
    return codes, d, d, e, e


@inline
def _store_group(out: Address, codes: Any, d: Register, m: Register, e: Register, n: Register) -> None:
    store_codes(out, codes)
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
UNPACK: Function = None
HALF: Function = None
LOAD: Function = None
STRIP: Function = None
PANELS: Function = None
MANY = 0
GROUPS_PER_BLOCK = HEAD_BYTES = GROUP_BYTES = SHIFT = 0

_INTEGER_TEMPLATES = {  # (a scale for each half, an m of its own)
    (False, True): (_strip_affine, _unpack_affine),
    (False, False): (_strip_centred, _unpack_centred),
    (True, True): (_strip_affine_halves, _unpack_affine_halves),
    (True, False): (_strip_centred_halves, _unpack_centred_halves),
}


def _kernels(layout: Layout) -> tuple[Lazy, Lazy]:
    """The product and the decoder of one type."""
    names: dict[str, Any] = {"GROUP_BYTES": layout.group_bytes}
    strip, decode = _strip_of_floats, _decode_floats
    if layout.is_float:
        names["LOAD"] = {"F32": load_f32x16, "F16": load_f16x16, "BF16": load_bf16x16}[layout.name]
    else:
        reader = GROUPS[layout.name]
        strip, names["UNPACK"] = _INTEGER_TEMPLATES[reader.halves, reader.shift is None]
        decode = _decode
        names |= {"HEAD": reader.head, "READ": reader.group, "HALF": _products(reader.largest), "SHIFT": reader.shift}
        names |= {"HEAD_BYTES": layout.head_bytes, "GROUPS_PER_BLOCK": layout.groups_per_block}
    lower = layout.name.lower()
    strip, (panels, many) = inline(specialised(strip, f"strip_{lower}", **names)), panels_of(layout, names)
    product = specialised(_linear, f"linear_{lower}", PANELS=panels, MANY=many, STRIP=strip)
    return kernel(product), kernel(specialised(decode, f"decode_{lower}", **names))


LINEAR: dict[str, Lazy] = {}
DECODE: dict[str, Lazy] = {}
for _layout in LAYOUTS.values():
    LINEAR[_layout.name], DECODE[_layout.name] = _kernels(_layout)
