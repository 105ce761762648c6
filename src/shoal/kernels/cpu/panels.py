"""Products of many tokens with 16 registers of 256 bits: a strip's codes are unpacked once, 256 columns at a time, for all tokens
of a pass, which go through them four at a time (simd/panels.py, in assembly).

Where sums are int16 they hold some quads of codes up to 127; larger codes become int16 themselves.
"""

from __future__ import annotations

from typing import Any

from shoal.kernels.cpu.groups import GROUPS
from shoal.kernels.cpu.isa import HAS
from shoal.kernels.cpu.jit import inline, specialised
from shoal.kernels.cpu.later import Later
from shoal.kernels.cpu.pack import Layout
from shoal.kernels.cpu.simd import (
    Address,
    Function,
    load_i64,
    scratch,
    splat,
    store_f32x16,
    store_i64,
    store_words,
    tile_load,
)
from shoal.kernels.cpu.simd.panel_format import (
    FLOAT_BYTES,
    P_AHEAD,
    P_AHEAD_END,
    P_CODES,
    P_FLOATS,
    P_GROUPS,
    P_OFFSETS,
    P_SCALES,
    P_STRIDE,
    P_SUMS,
    P_TILES,
    P_X,
    PANEL_GROUPS,
    PANEL_TOKENS,
    Dots,
    Product,
)
from shoal.kernels.cpu.strips import (
    COLUMNS,
    HALF_SUMS,
    MINUS_SUMS,
    STRIP_BYTES,
    SUMS,
    WEIGHTS,
    put_tile,
    store_codes,
    token_input,
)

_LEAST, _LEAST_OF_LIGHT = 8, 32  # tokens; codes of _LIGHT are as quickly unpacked for every tile
_LIGHT = ("Q4_0", "Q4_1")
_T4 = (0,) * PANEL_TOKENS
_K2, _K8 = (0,) * 2, (0,) * 8
_AHEAD = 1024  # bytes behind a panel's weights: the core reads those before them early enough by itself

# Set for each type at the end.
HEAD: Function = None
READ: Function = None
UNPACK: Function = None
STORE: Function = None
UNPACK_PANEL: Function = None
PRODUCT: Function = None
GROUPS_PER_BLOCK = HEAD_BYTES = GROUP_BYTES = CODE_BYTES = PANEL_BYTES = OFFSETS = OFFSETS_PER = SHIFT = 0
HALVES = AFFINE = False


@inline
def _no_panels(args: Address, index: int, t: int, end: int) -> None:
    pass


def _panels(args: Address, index: int, t: int, end: int) -> None:
    """Strip ``index`` for tokens t ... end - 1, four at a time, some groups after another, unpacked once for all of them."""
    count = end - t
    call, sums, codes, floats = scratch(_K2), scratch(_K8), scratch(_K8), scratch(_K2)
    for i in range(count):
        store_f32x16(sums + 64 * i, splat(0.0))
    w = load_i64(args + WEIGHTS) + index * load_i64(args + STRIP_BYTES)
    groups = load_i64(args + COLUMNS) // 32
    x, stride, scale, scale_stride = token_input(args, t)
    offset = load_i64(args + OFFSETS) + t * (scale_stride // OFFSETS_PER)
    store_i64(call + P_CODES, codes)
    store_i64(call + P_FLOATS, floats)
    store_i64(call + P_STRIDE, stride)
    store_i64(call + P_SUMS, sums)
    for first in range(0, groups, PANEL_GROUPS):
        here = min(PANEL_GROUPS, groups - first)
        w = UNPACK_PANEL(args, w, here, codes, floats)
        store_i64(call + P_GROUPS, here)
        store_i64(call + P_X, x + 32 * first)
        store_i64(call + P_SCALES, scale + 8 * first)
        store_i64(call + P_OFFSETS, offset + 8 // OFFSETS_PER * first)
        store_i64(call + P_TILES, count // PANEL_TOKENS)
        store_i64(call + P_AHEAD, w + _AHEAD)
        store_i64(call + P_AHEAD_END, w + _AHEAD + PANEL_BYTES)
        PRODUCT(call)
    for i in range(0, count, PANEL_TOKENS):
        put_tile(_T4, tile_load(_T4, sums + 64 * i, 64), args, index, t + i)


def _unpack_panel(args: Address, w: Address, groups: int, codes: Address, floats: Address) -> Address:
    """Some groups of a strip. Returns where the next ones are."""
    for _ in range(0, groups, GROUPS_PER_BLOCK):
        head = HEAD(args, w)
        w += HEAD_BYTES
        for _ in range(GROUPS_PER_BLOCK):
            group, d, m, e, n = UNPACK(READ(w, head))
            STORE(codes, group, SHIFT)
            store_f32x16(floats, d)
            if AFFINE:
                store_f32x16(floats + 64, m)
            if HALVES:
                store_f32x16(floats + 128, e)
            if HALVES and AFFINE:
                store_f32x16(floats + 192, n)
            w, codes, floats = w + GROUP_BYTES, codes + CODE_BYTES, floats + FLOAT_BYTES
    return w


@inline
def _store_bytes(at: Address, codes: Any, shift: int) -> None:
    store_codes(at, codes)


@inline
def _store_words(at: Address, codes: Any, shift: int) -> None:
    c0, c1, c2, c3, c4, c5, c6, c7 = codes
    store_words(at, c0, shift)
    store_words(at + 128, c1, shift)
    store_words(at + 256, c2, shift)
    store_words(at + 384, c3, shift)
    store_words(at + 512, c4, shift)
    store_words(at + 640, c5, shift)
    store_words(at + 768, c6, shift)
    store_words(at + 896, c7, shift)


def _dots(largest: int) -> Dots:
    """How to sum products of codes up to ``largest``."""
    if not HAS.int16_sums:
        return "int32"
    in_int16: list[tuple[int, Dots]] = [(4, "by 4"), (2, "by 2"), (1, "by 1"), (0, "words")]
    return next(dots for quads, dots in in_int16 if quads * 2 * 127 * largest < 32768)


def panels_of(layout: Layout, names: dict[str, Any]) -> tuple[Function, int]:
    """``_panels`` for one type, and from how many tokens on it is the best way. ``names`` are those of the type in linear.py."""
    if not HAS.panels or layout.is_float:
        return _no_panels, 1 << 62
    reader, lower = GROUPS[layout.name], layout.name.lower()
    dots, affine = _dots(reader.largest), reader.shift is None
    code_bytes = 1024 if dots == "words" else 512
    offsets = MINUS_SUMS if not affine else HALF_SUMS if reader.halves else SUMS
    names = names | {
        "STORE": _store_words if dots == "words" else _store_bytes,
        "CODE_BYTES": code_bytes,
        "OFFSETS": offsets,
        "OFFSETS_PER": 2 if offsets == SUMS else 1,
        "SHIFT": reader.shift or 0,
        "HALVES": reader.halves,
        "AFFINE": affine,
        "PANEL_BYTES": layout.strip_bytes(32 * PANEL_GROUPS),
        "PRODUCT": _product(Product(dots, code_bytes, _lines(layout), reader.halves, reader.shift)),
    }
    names["UNPACK_PANEL"] = inline(specialised(_unpack_panel, f"unpack_panel_{lower}", **names))
    least = _LEAST_OF_LIGHT if layout.name in _LIGHT else _LEAST
    return inline(specialised(_panels, f"panels_{lower}", **names)), least


def _product(kind: Product) -> Later:
    def make() -> Any:
        from shoal.kernels.cpu.simd.panels import panel_product

        return panel_product(kind)

    return Later(make)


def _lines(layout: Layout) -> int:
    """Cache lines for each of the groups that two tiles go through, so that they are a panel's weights."""
    return -(-layout.strip_bytes(32 * PANEL_GROUPS) // (64 * 2 * PANEL_GROUPS))
