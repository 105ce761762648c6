"""The types: vectors of 16 lanes or 64 bytes, tiles of vectors, and what LLVM calls them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.core.datamodel.registry import register_default

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
HALF, F32 = ir.HalfType(), ir.FloatType()


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """LLVM's vector of so many elements."""
    return ir.VectorType(element, lanes)


F32X16, I32X16 = vector(F32, 16), vector(I32, 16)
U8X64, I16X32 = vector(I8, 64), vector(I16, 32)


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


f32x16, i32x16 = Vector("f32x16", F32X16), Vector("i32x16", I32X16)
u8x64, i16x32 = Vector("u8x64", U8X64), Vector("i16x32", I16X32)


def tile_of(vector: Vector, shape: Any) -> Tile:
    """A tile as large as a tuple is long, or as another tile."""
    return Tile(vector, shape.count if isinstance(shape, Tile) else len(shape))
