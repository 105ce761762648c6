"""How kernels are compiled.

`inline` marks helpers that vanish into their callers; `kernel` makes a C function void f(int64 args, int64 chunk) that the pool
can call through its address; `function` is a plain compiled function called from Python, without the interpreter lock.

Compiled code is kept in a folder named after everything that went into it (source of all kernels, Numba, CPU, instruction set),
so that a change of any of them is a new folder and never a stale kernel. Numba's own cache is not used: it believes whatever its
files hold, and gives up where it cannot write.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import llvmlite
import numba
from llvmlite import binding
from numba import config, njit, types
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.core.sigutils import normalize_signature

from shoal.errors import ParameterError
from shoal.kernels.cpu.cache import KernelStore
from shoal.kernels.cpu.isa import ISA, target
from shoal.system.folders import cache_folder

_OPTIONS = {"error_model": "numpy", "boundscheck": False}
_SIGNATURE = types.void(types.int64, types.int64)
# Of Numba's settings those that make other machine code.
_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "EXTEND_VARIABLE_LIFETIMES")


def _key() -> str:
    """Names everything that went into this version's machine code."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    versions = (numba.__version__, llvmlite.__version__, sys.implementation.cache_tag, sys.abiflags)
    settings = (getattr(config, name, None) for name in _SETTINGS)
    for part in (*versions, binding.get_process_triple(), *target(), ISA, *settings):
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()[:20]


STORE = KernelStore(cache_folder("SHOAL_KERNEL_CACHE", "kernels"), _key())


class _Cache(NullCache):  # type: ignore[misc]
    """What Numba asks for one function, answered from the store; ``hit``: it was there. None for a name: it is never kept."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self.hit = False

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None."""
        target_context.refresh()
        content = None if self._name is None else STORE.load(self._name)
        if self._name is None or content is None:
            return None
        try:
            made = CompileResult._rebuild(target_context, *pickle.loads(content))
        except Exception as error:  # whole, but of a Numba that calls itself by the same version
            STORE.refuse(self._name, f"cannot be read ({type(error).__name__}: {error})")
            return None
        self.hit = True
        return made

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function."""
        if self._name is not None and not data.library.has_dynamic_globals:  # those are addresses of this process
            STORE.save(self._name, dumps(data._reduce()))


def inline(function: Callable[..., Any]) -> Any:
    """A helper that becomes part of whoever calls it, before types are inferred: no code of its own is made."""
    return njit(inline="always", **_OPTIONS)(function)


def shared(function: Callable[..., Any]) -> Any:
    """A helper that is compiled once and called: for what is long and the same for every tile."""
    return njit(**_OPTIONS)(function)


def function(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function called from Python; it runs without the interpreter lock. Compiled when it is first asked for."""

    def decorate(body: Callable[..., Any]) -> Lazy:
        def build(cache: NullCache) -> Any:
            made = njit(nogil=True, **_OPTIONS)(body)
            made._cache = cache
            made.compile(signature)
            made.disable_compile()
            return made

        return Lazy(body, build)

    return decorate


def kernel(body: Callable[[int, int], None]) -> Lazy:
    """A C function void f(int64 args, int64 chunk). Compiled when its address is first asked for."""

    def build(cache: NullCache) -> Any:
        made: Any = CFunc(body, normalize_signature(_SIGNATURE), {}, _OPTIONS)
        made._cache = cache
        made.compile()
        return made

    return Lazy(body, build)


def specialised(template: Callable[..., Any], name: str, **names: Any) -> Callable[..., Any]:
    """The template's code with some of its global names standing for something else: Numba finds them as constants. The result is
    kept under ``name``, which no other kernel of the module may have."""
    made = FunctionType(template.__code__, {**template.__globals__, **names}, name)
    made.__qualname__, made.__doc__, made.__module__ = name, template.__doc__, template.__module__
    return made


class Lazy:
    """Compiled when first used, so that a program pays only for the kernels it runs; ``on_compile`` hears what was not in
    the cache."""

    on_compile: Callable[[str], None] | None = None
    known: ClassVar[dict[tuple[str, str], Lazy]] = {}
    """All that there are, by module and name."""

    def __init__(self, body: Callable[..., Any], build: Callable[[NullCache], Any]) -> None:
        self.name = body.__name__
        self.module = body.__module__
        self.__doc__ = body.__doc__
        self._build = build
        self._made: Any = None
        Lazy.known[self.module, self.name] = self

    @property
    def is_at_hand(self) -> bool:
        """Whether it need not be compiled, unless its file turns out to be of no use."""
        return self._made is not None or (self.cache_name is not None and STORE.has(self.cache_name))

    def get(self) -> Any:
        """The compiled function. Raises ParameterError if Numba is told not to compile."""
        if self._made is None:
            if config.DISABLE_JIT:
                raise ParameterError(
                    "NUMBA_DISABLE_JIT", config.DISABLE_JIT, "0 or not set: the kernels are compiled by Numba"
                )
            cache = _Cache(self.cache_name)
            self._made = self._build(cache)
            if not cache.hit and Lazy.on_compile is not None:
                Lazy.on_compile(self.name)
        return self._made

    @property
    def cache_name(self) -> str | None:
        """What it is kept under; None for code that is not part of this package, and so not of the folder's name either."""
        package, _, module = self.module.rpartition(".")
        return f"{module}.{self.name}" if f"{package}.".startswith(f"{__package__}.") else None

    @property
    def address(self) -> int:
        """The address of a `kernel`."""
        return int(self.get().address)

    def __call__(self, *args: Any) -> Any:
        """Call a `function`."""
        return self.get()(*args)
