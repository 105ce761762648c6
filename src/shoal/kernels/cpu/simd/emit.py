"""Writing LLVM IR, and making operations of what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, signature
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from shoal.kernels.cpu.simd.vectors import F32, I32, I64, Tile, vector

Builder = Any


def pointer(b: Builder, address: ir.Value, to: ir.Type) -> ir.Value:
    """An address as a pointer to a type."""
    return b.inttoptr(address, to.as_pointer())


def load(b: Builder, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
    """The value of a type at an address."""
    value = b.load(pointer(b, address, kind))
    value.align = align
    return value


def store(b: Builder, value: ir.Value, address: ir.Value) -> None:
    """Write a value to an address."""
    b.store(value, pointer(b, address, value.type)).align = 1


def splat(b: Builder, scalar: ir.Value, lanes: int) -> ir.Value:
    """A vector of one scalar."""
    kind = vector(scalar.type, lanes)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(vector(I32, lanes), [0] * lanes))


def const(value: float, kind: ir.Type) -> ir.Constant:
    """A number as a constant of a type, in every lane of a vector."""
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def like(element: ir.Type, kind: ir.Type) -> ir.Type:
    """A vector of ``element`` with as many lanes as ``kind``, or ``element`` where that is no vector."""
    return vector(element, kind.count) if isinstance(kind, ir.VectorType) else element


def call(b: Builder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an intrinsic, or a C function, by name."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def assembly(b: Builder, kind: ir.FunctionType, text: str, constraints: str, args: Sequence[ir.Value]) -> ir.Value:
    """Inline assembly, with what it does besides its results."""
    binding.initialize_native_asmparser()  # without it LLVM ends the process
    return b.asm(kind, text.replace("$", "$$"), constraints, args, True)


def pure_assembly(b: Builder, kind: ir.FunctionType, text: str, constraints: str, args: Sequence[ir.Value]) -> ir.Value:
    """Inline assembly that has results of its operands, $0 and so on, and does nothing else."""
    binding.initialize_native_asmparser()
    return b.asm(kind, text, constraints, args, False)


def as_f32(b: Builder, value: ir.Value) -> ir.Value:
    """A float of any size as float32."""
    return value if value.type == F32 else b.fptrunc(value, F32)


def at(b: Builder, address: ir.Value, stride: ir.Value, index: int) -> ir.Value:
    """address + stride * index."""
    return b.add(address, b.mul(stride, ir.Constant(I64, index))) if index else address


def shuffle(b: Builder, x: ir.Value, y: ir.Value, mask: list[int]) -> ir.Value:
    """The lanes of x and y that ``mask`` names."""
    return b.shuffle_vector(x, y, ir.Constant(vector(I32, len(mask)), mask))


def fold(b: Builder, x: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Combine all lanes by halves: 16, 8, 4, 2, 1. A fixed tree, whatever the machine."""
    lanes = 16
    while lanes > 1:
        lanes //= 2
        x = combine(shuffle(b, x, x, list(range(lanes))), shuffle(b, x, x, list(range(lanes, 2 * lanes))))
    return b.extract_element(x, ir.Constant(I32, 0))


def each(b: Builder, tile: Tile, make: Callable[[int], ir.Value]) -> ir.Value:
    """A tile of what ``make`` gives for each of its vectors."""
    out = ir.Constant(ir.ArrayType(tile.vector.llvm, tile.count), ir.Undefined)
    for t in range(tile.count):
        out = b.insert_value(out, make(t), t)
    return out


Emit = Callable[..., Any]


def operation(result: types.Type | Callable[..., types.Type]) -> Callable[[Emit], Any]:
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
