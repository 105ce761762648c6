"""Compiling kernels with Numba: a function becomes an object file and the name of the symbol in it. What is imported where all kernels
are found compiled does not import Numba, unless somebody has told it something (NUMBA_*, .numba_config.yaml).

The function is called as Numba's own are: int32 f(result *, error **, int64 ...), 0 if all went well. There is no wrapper around
it, so that it needs nothing of Numba where it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL
from typing import Any, NamedTuple

from numba import config, njit, types
from numba.core.compiler import Compiler, CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import _FunctionCompiler  # type: ignore[attr-defined]
from numba.core.registry import cpu_target

from shoal.kernels.cpu.isa import TARGET, setting, target
from shoal.kernels.cpu.later import resolved
from shoal.kernels.cpu.simd import operations, panels  # noqa: F401  # now: later they might be those of another version

setting("CPU_NAME", None)  # Numba hears what SHOAL_ISA makes of it
if target() != TARGET:
    config.CPU_NAME, config.CPU_FEATURES = TARGET
# False where the program has compiled something of its own before: then Numba goes on with what it had made of this CPU.
_HEARD = cpu_target.target_context.codegen()._tm_features == TARGET[1]
_OPTIONS = {"error_model": "numpy", "boundscheck": False}


class Compiled(NamedTuple):
    """An object file and its symbol. Without ``lasts`` it is of use to this process only."""

    symbol: str
    code: bytes
    lasts: bool


class _Bare(_FunctionCompiler):  # type: ignore[misc]
    """No wrappers, neither for Python nor for C."""

    def _customize_flags(self, flags: Any) -> Any:
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        flags.enable_pyobject = False
        return flags


def helper(body: Callable[..., Any], **options: Any) -> Any:
    """A function that kernels call; ``options`` are further ones of ``numba.njit``."""
    return njit(**_OPTIONS, **options)(resolved(body))


def compiled(body: Callable[..., Any]) -> Compiled:
    """Compile a function of int64."""
    result = result_of(body)
    _, _, (code, _) = result.library.serialize_using_object_code()
    unknown = [name for name in _called(result) if not hasattr(CDLL(None), name)]
    assert not unknown, f"{body.__name__} needs {unknown}, which are not there without Numba"
    return Compiled(result.fndesc.llvm_func_name, code, _HEARD and not result.library.has_dynamic_globals)


def assembly(body: Callable[..., Any]) -> str:
    """What a compiled function consists of, to be read."""
    return str(result_of(body).library.get_asm_str())


def result_of(body: Callable[..., Any]) -> CompileResult:
    """What Numba makes of a function of int64."""
    with global_compiler_lock:
        arguments = (types.int64,) * body.__code__.co_argcount
        return _Bare(resolved(body), cpu_target, _OPTIONS, {}, Compiler).compile(arguments, None)


def _called(result: CompileResult) -> list[str]:
    """Functions that are not in the object file."""
    functions = result.library._final_module.functions
    return [f.name for f in functions if f.is_declaration and not f.name.startswith("llvm.")]
