"""Products of four tokens and weights that are unpacked once for many, with 16 registers of 256 bits, as assembly.

With so few registers LLVM moves sums and codes to memory and back so often that it loses a third of the time (lab log); here
each register has its place. A *panel* is what a strip of 16 weight rows has for up to 8 groups of 32 columns:

    codes     group by group: bytes [8 quads, 16 rows, 4], or words [8 quads, 2, 16 rows, 2]
    floats    group by group: d, m, e, n [4, 16 rows] float32: scale and offset of the first half, and of the second

Words are int16 of what a code stands for: first columns 0 and 2 of the quad, then 1 and 3. Lane r of a pair of registers is weight
row r. Products are exact integers, and float operations are those of the other instruction sets in their order: so are the bits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from llvmlite import ir
from numba import types

from shoal.kernels.cpu.isa import VPDPBUSD
from shoal.kernels.cpu.simd import emit
from shoal.kernels.cpu.simd.emit import Builder
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
    PANEL_TOKENS,
    Product,
)

_ONES, _PARTS, _WORDS = 128, 192, 448  # to 704
_TOKENS = range(PANEL_TOKENS)
_SIDES = (0, 1)  # weight rows 0-7 and 8-15


def panel_product(product: Product) -> Any:
    """The operation that runs a product on what stands at an address."""
    text = "\n".join(_Assembly(product).lines())
    touched = [*_POINTERS, *(f"ymm{i}" for i in range(16)), "memory", "dirflag", "fpsr", "flags"]
    constraints = ",".join(["{rdi}", *(f"~{{{name}}}" for name in touched)])

    @emit.operation(types.void)
    def run(b: Builder, _: Any, address: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [address.type])
        emit.assembly(b, kind, text, constraints, [address])

    return run


# rdi: what is given · rsi: codes · rdx: floats · rcx: sums. A token's index is an eighth of its distance, in columns, from the first.
_INDEX, _X, _SCALES, _OFFSETS, _GROUPS, _AHEAD = ("rax", "r8", "r9", "r10"), "r11", "r12", "r13", "r14", "r15"
_POINTERS = (*_INDEX, _X, _SCALES, _OFFSETS, _GROUPS, _AHEAD, "rcx", "rdx", "rsi")

_W0, _W1, _V, _P, _Q, _W2, _W3, _LAST = range(8, 16)
_ONE = _R = _LAST


def _sum(t: int, side: int) -> int:
    return 2 * t + side


def _x(t: int, offset: int) -> str:
    return f"{offset}(%{_X},%{_INDEX[t]},8)"


def _scale(t: int, half: int) -> str:
    return f"{4 * half}(%{_SCALES},%{_INDEX[t]},2)"


class _Assembly:
    """Writes a product, instruction by instruction (AT&T: the destination comes last)."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._lines: list[str] = []

    def lines(self) -> list[str]:
        self._begin()
        self._line("1:")
        self._next_tile()
        self._line("2:")
        for line in range(self._product.lines):
            self._line(f"prefetcht0 {64 * line}(%{_AHEAD})")
        if self._product.dots == "words":
            self._activations_to_words()
        for half in (0, 1):
            self._dots(half)
        self._next_group()
        return self._lines

    def _line(self, text: str) -> None:
        self._lines.append(text)

    def _op(self, name: str, *operands: int | str) -> None:
        self._line(f"{name} {', '.join(o if isinstance(o, str) else f'%ymm{o}' for o in operands)}")

    def _begin(self) -> None:
        fields = {
            _X: P_X,
            _SCALES: P_SCALES,
            _OFFSETS: P_OFFSETS,
            _AHEAD: P_AHEAD,
            "rcx": P_SUMS,
        }
        for register, field in fields.items():
            self._line(f"movq {field}(%rdi), %{register}")
        self._line("xorl %eax, %eax")
        if self._product.dots == "int32":
            return
        self._op("vpcmpeqw", _ONE, _ONE, _ONE)
        self._op("vpsrlw", "$15", _ONE, _ONE)
        if self._product.dots == "by 2":
            self._op("vmovdqa", _ONE, f"{_ONES}(%rdi)")

    def _next_tile(self) -> None:
        for before, register in pairwise(_INDEX):
            self._line(f"movq {P_STRIDE}(%rdi), %{register}")
            self._line(f"shrq $3, %{register}")
            self._line(f"addq %{before}, %{register}")
        for register, field in {"rsi": P_CODES, "rdx": P_FLOATS, _GROUPS: P_GROUPS}.items():
            self._line(f"movq {field}(%rdi), %{register}")

    def _next_group(self) -> None:
        """And from the last group of a tile to the next tile."""
        for register, step in {
            "rsi": self._product.bytes,
            "rdx": FLOAT_BYTES,
            **dict.fromkeys(_INDEX, 4),
            _AHEAD: 64 * self._product.lines,
        }.items():
            self._line(f"addq ${step}, %{register}")
        self._line(f"cmpq {P_AHEAD_END}(%rdi), %{_AHEAD}")
        self._line(f"cmovaq {P_AHEAD_END}(%rdi), %{_AHEAD}")
        self._line(f"decq %{_GROUPS}")
        self._line("jnz 2b")
        # Token 0's index goes back to the first group, and on by four tokens: an eighth of four strides.
        self._line(f"movq {P_STRIDE}(%rdi), %r8")
        self._line("shrq $1, %r8")
        self._line("addq %r8, %rax")
        self._line(f"movq {P_GROUPS}(%rdi), %r8")
        self._line("shlq $2, %r8")
        self._line("subq %r8, %rax")
        self._line("addq $256, %rcx")
        self._line(f"decq {P_TILES}(%rdi)")
        self._line("jnz 1b")

    @property
    def _affine(self) -> bool:
        return self._product.shift is None

    # --- integers ---

    def _dots(self, half: int) -> None:
        """Sums of products of 16 columns, and what becomes of them."""
        {
            "int32": self._dots_in_int32,
            "by 4": self._dots_by_4,
            "by 2": self._dots_by_2,
            "by 1": self._dots_by_1,
            "words": self._dots_of_words,
        }[self._product.dots](half)
        if half == 1 or self._product.halves:
            self._into_sums(half)

    def _codes(self, quad: int, to: tuple[int, int]) -> None:
        for side in _SIDES:
            self._op("vmovdqa", f"{64 * quad + 32 * side}(%rsi)", to[side])

    def _dots_in_int32(self, half: int) -> None:
        for t in _TOKENS:
            for side in _SIDES:
                self._op("vpxor", _sum(t, side), _sum(t, side), _sum(t, side))
        for quad in range(4 * half, 4 * half + 4):
            self._codes(quad, (_W0, _W1))
            for t in _TOKENS:
                self._op("vpbroadcastd", _x(t, 4 * quad), _V)
                self._op(VPDPBUSD, _V, _W0, _sum(t, 0))
                self._op(VPDPBUSD, _V, _W1, _sum(t, 1))
                if quad % 4 == 3:
                    self._finish(half, t)

    def _dots_by_4(self, half: int) -> None:
        """int16 holds the sums of four quads. Each token's are finished as soon as they are there: that mixes the instructions."""
        for quad in range(4 * half, 4 * half + 4):
            self._codes(quad, (_W0, _W1))
            for t in _TOKENS:
                self._op("vpbroadcastd", _x(t, 4 * quad), _V)
                self._sum_up("vpmaddubsw", "vpaddw", t, (_V, _W0), (_V, _W1), first=quad % 4 == 0)
                if quad % 4 == 3:
                    for side in _SIDES:
                        self._op("vpmaddwd", _ONE, _sum(t, side), _sum(t, side))
                    self._finish(half, t)

    def _dots_by_2(self, half: int) -> None:
        for quad in (4 * half, 4 * half + 2):
            self._codes(quad, (_W0, _W1))
            self._codes(quad + 1, (_W2, _W3))
            for t in _TOKENS:
                self._op("vpbroadcastd", _x(t, 4 * quad), _V)
                self._op("vpmaddubsw", _V, _W0, _P)
                self._op("vpmaddubsw", _V, _W1, _Q)
                self._op("vpbroadcastd", _x(t, 4 * quad + 4), _V)
                self._op("vpmaddubsw", _V, _W2, _R)
                self._op("vpmaddubsw", _V, _W3, _V)
                self._op("vpaddw", _R, _P, _P)
                self._op("vpaddw", _V, _Q, _Q)
                ones = f"{_ONES}(%rdi)"
                self._sum_up("vpmaddwd", "vpaddd", t, (ones, _P), (ones, _Q), first=quad % 4 == 0)
                if quad % 4 == 2:
                    self._finish(half, t)

    def _dots_by_1(self, half: int) -> None:
        for quad in range(4 * half, 4 * half + 4):
            self._codes(quad, (_W0, _W1))
            for t in _TOKENS:
                self._op("vpbroadcastd", _x(t, 4 * quad), _V)
                self._op("vpmaddubsw", _V, _W0, _P)
                self._op("vpmaddubsw", _V, _W1, _Q)
                self._sum_up("vpmaddwd", "vpaddd", t, (_ONE, _P), (_ONE, _Q), first=quad % 4 == 0)
                if quad % 4 == 3:
                    self._finish(half, t)

    def _sum_up(self, multiply: str, add: str, t: int, *factors: tuple[int | str, int], first: bool) -> None:
        """Products of both sides: the first of a token's sums, or added to them."""
        products = (_sum(t, 0), _sum(t, 1)) if first else (_P, _Q)
        for pair, product in zip(factors, products, strict=True):
            self._op(multiply, *pair, product)
        for side in () if first else _SIDES:
            self._op(add, products[side], _sum(t, side), _sum(t, side))

    def _activations_to_words(self) -> None:
        """32 columns of each token: all even ones, then all odd ones."""
        for t in _TOKENS:
            self._op("vmovdqu", _x(t, 0), _V)
            self._op("vpsllw", "$8", _V, _P)
            self._op("vpsraw", "$8", _P, _P)
            self._op("vpsraw", "$8", _V, _V)
            self._op("vmovdqa", _P, f"{_WORDS + 64 * t}(%rdi)")
            self._op("vmovdqa", _V, f"{_WORDS + 64 * t + 32}(%rdi)")

    def _dots_of_words(self, half: int) -> None:
        for pair in range(8 * half, 8 * half + 8):
            for side, weights in ((0, _W0), (1, _W1)):
                self._op("vmovdqa", f"{64 * pair + 32 * side}(%rsi)", weights)
            for t in _TOKENS:
                self._op("vpbroadcastd", f"{_WORDS + 64 * t + 32 * (pair % 2) + 4 * (pair // 2)}(%rdi)", _V)
                self._sum_up("vpmaddwd", "vpaddd", t, (_V, _W0), (_V, _W1), first=pair % 8 == 0)
                if pair % 8 == 7:
                    self._finish(half, t)

    # --- floats ---

    def _finish(self, half: int, t: int) -> None:
        """Scale the int32 sums of a half: into what the first half leaves for the second, or into the token's sums."""
        if not self._affine and self._product.dots != "words":
            self._op("vpbroadcastd", f"{4 * half}(%{_OFFSETS},%{_INDEX[t]},2)", _V)
            self._op("vpslld", f"${self._product.shift}", _V, _V)
            for side in _SIDES:
                self._op("vpaddd", _V, _sum(t, side), _sum(t, side))
        for side in _SIDES:
            self._op("vcvtdq2ps", _sum(t, side), _sum(t, side))
        self._op("vbroadcastss", _scale(t, half), _V)
        if self._product.halves:
            self._op("vmulps", f"{128 * half}(%rdx)", _V, _P)
            self._op("vmulps", f"{128 * half + 32}(%rdx)", _V, _Q)
            self._op("vfmadd213ps", f"{64 * t}(%rcx)", _P, _sum(t, 0))
            self._op("vfmadd213ps", f"{64 * t + 32}(%rcx)", _Q, _sum(t, 1))
        elif half == 0:
            for side in _SIDES:
                self._op("vmulps", _V, _sum(t, side), _sum(t, side))
                self._op("vmovaps", _sum(t, side), f"{_PARTS + 64 * t + 32 * side}(%rdi)")
        else:
            for side in _SIDES:
                self._op("vfmadd213ps", f"{_PARTS + 64 * t + 32 * side}(%rdi)", _V, _sum(t, side))

    def _into_sums(self, half: int) -> None:
        """What is scaled, to the sums of all tokens: times d, which halves that have their own are already, and m."""
        halves = self._product.halves
        if not halves:
            self._load_floats(0)
            for t in _TOKENS:
                self._op("vfmadd213ps", f"{64 * t}(%rcx)", _W0, _sum(t, 0))
                self._op("vfmadd213ps", f"{64 * t + 32}(%rcx)", _W1, _sum(t, 1))
        if self._affine:
            self._load_floats(128 * half + 64 if halves else 64)
        for t in _TOKENS:
            if self._affine:
                self._op(
                    "vbroadcastss",
                    f"{4 * half}(%{_OFFSETS},%{_INDEX[t]},2)" if halves else f"(%{_OFFSETS},%{_INDEX[t]})",
                    _V,
                )
                self._op("vfmadd231ps", _V, _W0, _sum(t, 0))
                self._op("vfmadd231ps", _V, _W1, _sum(t, 1))
            for side in _SIDES:
                self._op("vmovaps", _sum(t, side), f"{64 * t + 32 * side}(%rcx)")

    def _load_floats(self, offset: int) -> None:
        self._op("vmovaps", f"{offset}(%rdx)", _W0)
        self._op("vmovaps", f"{offset + 32}(%rdx)", _W1)
