"""How kernels are compiled and where the machine code is kept.

`inline` marks helpers that vanish into their callers; `kernel` makes a C function void f(int64 args, int64 chunk) that the pool
can call through its address; `function` is a plain compiled function called from Python, without the interpreter lock.

Compiled code is kept in a folder named after everything that went into it (source of all kernels, Numba, CPU, instruction set),
so that a change of any of them is a new folder and never a stale kernel.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
from llvmlite import binding
from numba import cfunc, config, njit, types
from platformdirs import user_cache_dir

from shoal.kernels.cpu.isa import ISA

_OPTIONS = {"error_model": "numpy", "boundscheck": False}
_SIGNATURE = types.void(types.int64, types.int64)


def cache_folder() -> Path:
    """Where this version's machine code lies: SHOAL_KERNEL_CACHE or the user's cache folder, then a folder for the key."""
    root = os.environ.get("SHOAL_KERNEL_CACHE") or os.path.join(user_cache_dir("shoal"), "kernels")
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    cpu = config.CPU_NAME or binding.get_host_cpu_name()
    for part in (numba.__version__, cpu, binding.get_host_cpu_features().flatten(), ISA):
        digest.update(str(part).encode() + b"\0")
    return Path(root) / digest.hexdigest()[:20]


_FOLDER = cache_folder()


@contextmanager
def _our_cache() -> Iterator[None]:
    """Numba picks a function's cache folder when it is decorated; others in this process keep theirs."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(_FOLDER)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def inline(function: Callable[..., Any]) -> Any:
    """A helper that becomes part of whoever calls it, before types are inferred: no code of its own is made."""
    return njit(inline="always", **_OPTIONS)(function)


def shared(function: Callable[..., Any]) -> Any:
    """A helper that is compiled once and called: for what is long and the same for every tile."""
    return njit(**_OPTIONS)(function)


def function(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function called from Python; it runs without the interpreter lock. Compiled when it is first asked for."""

    def decorate(body: Callable[..., Any]) -> Lazy:
        return Lazy(body, lambda: njit(signature, nogil=True, cache=True, **_OPTIONS)(body))

    return decorate


def kernel(body: Callable[[int, int], None]) -> Lazy:
    """A C function void f(int64 args, int64 chunk). Compiled when its address is first asked for."""
    return Lazy(body, lambda: cfunc(_SIGNATURE, cache=True, **_OPTIONS)(body))


def specialised(template: Callable[..., Any], name: str, **names: Any) -> Callable[..., Any]:
    """The template's code with some of its global names standing for something else: Numba finds them as constants, and finds
    the result in its cache under ``name``."""
    made = FunctionType(template.__code__, {**template.__globals__, **names}, name)
    made.__qualname__, made.__doc__, made.__module__ = name, template.__doc__, template.__module__
    return made


class Lazy:
    """Compiled when first used, so that a program pays only for the kernels it runs; ``on_compile`` hears what was not in
    the cache."""

    on_compile: Callable[[str], None] | None = None

    def __init__(self, body: Callable[..., Any], build: Callable[[], Any]) -> None:
        self.name = body.__name__
        self.__doc__ = body.__doc__
        self._build = build
        self._made: Any = None

    def get(self) -> Any:
        """The compiled function."""
        if self._made is None:
            with _our_cache():
                self._made = self._build()
            if not self._made._cache_hits and Lazy.on_compile is not None:
                Lazy.on_compile(self.name)
        return self._made

    @property
    def address(self) -> int:
        """The address of a `kernel`."""
        return int(self.get().address)

    def __call__(self, *args: Any) -> Any:
        """Call a `function`."""
        return self.get()(*args)
