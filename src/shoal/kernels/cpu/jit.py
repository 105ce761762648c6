"""How kernels are compiled, and kept.

`inline` marks helpers that vanish into their callers; `shared` those that are compiled once and called; `kernel` makes a function
f(int64 args, int64 chunk) that the pool can call through its address; `function` is a plain compiled function of int64, called
from Python, without the interpreter lock.

Compiled code is kept in a folder named after everything that went into it (source of all kernels, Numba, CPU, instruction set),
so that a change of any of them is a new folder and never a stale kernel. Numba's own cache is not used: it believes whatever its
files hold, gives up where it cannot write, and must have Numba to load what it has kept.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar

import llvmlite
from llvmlite import binding

from shoal.errors import ParameterError, UnsupportedError
from shoal.kernels.cpu.cache import KernelStore
from shoal.kernels.cpu.isa import ISA, setting, target
from shoal.kernels.cpu.later import Later, with_names
from shoal.kernels.cpu.machine_code import MachineCode
from shoal.system.folders import cache_folder
from shoal.version import __version__

# Of Numba's settings those that make other machine code, and how they read where nobody changes them.
_SETTINGS = {
    "OPT": "_OptLevel(3)",
    "LOOP_VECTORIZE": 1,
    "SLP_VECTORIZE": 0,
    "BOUNDSCHECK": None,
    "DEBUGINFO_DEFAULT": 0,
    "EXTEND_VARIABLE_LIFETIMES": 0,
}


def _sources() -> bytes:
    """A digest of what kernels are made of: our files, and Numba's version."""
    digest = hashlib.sha256(_numba_version())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.digest()


def _key(sources: bytes) -> str:
    """Names everything that went into this version's machine code. A program made of this one may have no source files."""
    digest = hashlib.sha256(sources)
    versions = (__version__, llvmlite.__version__, sys.implementation.cache_tag, sys.abiflags)
    settings = (setting(name, default) for name, default in _SETTINGS.items())
    for part in (*versions, binding.get_process_triple(), *target(), ISA, *settings):
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()[:20]


def _numba_version() -> bytes:
    """The file that says so, or what it says where a program made of this one has no such file. Raises ImportError without Numba."""
    found = find_spec("numba")
    if found is not None and found.origin is not None:
        with suppress(OSError):
            return Path(found.origin).with_name("_version.py").read_bytes()
    from numba import __version__

    return str(__version__).encode()


_one_at_a_time = RLock()
_SOURCES = _sources()
STORE = KernelStore(cache_folder("SHOAL_KERNEL_CACHE", "kernels"), _key(_SOURCES))


def inline(function: Callable[..., Any]) -> Any:
    """A helper that becomes part of whoever calls it, before types are inferred: no code of its own is made."""
    return _helper(function, inline="always")


def shared(function: Callable[..., Any]) -> Any:
    """A helper that is compiled once and called: for what is long and the same for every tile."""
    return _helper(function)


def _helper(function: Callable[..., Any], **options: Any) -> Later:
    return Later(lambda: _compiling().helper(function, **options))


def _compiling() -> Any:
    """What needs Numba. Raises UnsupportedError where that cannot be imported, or something else is found than when the process began:
    another version, whose code would be kept as this one's."""
    try:
        made = import_module("shoal.kernels.cpu.compiling")
    except (ImportError, ValueError, OSError) as error:  # another NumPy, memory that may not become executable
        raise UnsupportedError(f"Numba cannot be imported: {error}") from error
    if not _unchanged():
        raise UnsupportedError("the files of shoal or Numba were changed since this process began: start it again")
    return made


@cache
def _unchanged() -> bool:
    return _sources() == _SOURCES


def specialised(template: Callable[..., Any], name: str, **names: Any) -> Callable[..., Any]:
    """The template's code with some of its global names standing for something else: Numba finds them as constants. The result is
    kept under ``name``, which no other kernel of the module may have."""
    return with_names(template, {**template.__globals__, **names}, name)  # type: ignore[no-any-return]


class Lazy:
    """Loaded, or compiled, when first used, so that a program pays only for the kernels it runs; ``on_compile`` hears what was
    not in the cache."""

    on_compile: Callable[[str], None] | None = None
    known: ClassVar[dict[tuple[str, str], Lazy]] = {}
    """All that there are, by module and name."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.name = body.__name__
        self.module = body.__module__
        self.__doc__ = body.__doc__
        self.body = body
        self._made: MachineCode | None = None
        self._call: Callable[..., int] | None = None
        Lazy.known[self.module, self.name] = self

    @property
    def is_at_hand(self) -> bool:
        """Whether it need not be compiled, unless its file turns out to be of no use."""
        return self._made is not None or (self.cache_name is not None and STORE.has(self.cache_name))

    def get(self) -> MachineCode:
        """The compiled function. Raises ParameterError if Numba is told not to compile."""
        if self._made is not None:
            return self._made
        with _one_at_a_time:  # a second copy would take the place of one whose address is already known
            if told := setting("DISABLE_JIT", 0):
                raise ParameterError("NUMBA_DISABLE_JIT", told, "0 or not set: the kernels are compiled by Numba")
            if self._made is None:
                self._made = self._loaded() or self._compiled()
            return self._made

    @property
    def cache_name(self) -> str | None:
        """What it is kept under; None for code that is not part of this package, and so not of the folder's name either."""
        package, _, module = self.module.rpartition(".")
        return f"{module}.{self.name}" if f"{package}.".startswith(f"{__package__}.") else None

    @property
    def address(self) -> int:
        """The address of a `kernel`."""
        return self.get().address

    def __call__(self, *args: int) -> int:
        """Call it from Python; 0 where it gives nothing."""
        if self._call is None:
            self._call = self.get().caller(self.body.__code__.co_argcount)
        return self._call(*args)

    def _loaded(self) -> MachineCode | None:
        """From its file, if there is one that is of use."""
        content = None if self.cache_name is None else STORE.load(self.cache_name)
        if content is None:
            return None
        symbol, _, code = content.partition(b"\0")
        return MachineCode(symbol.decode(), code)

    def _compiled(self) -> MachineCode:
        symbol, code, lasts = _compiling().compiled(self.body)
        if self.cache_name is not None and lasts:
            STORE.save(self.cache_name, symbol.encode() + b"\0" + code)
        made = MachineCode(symbol, code)
        if Lazy.on_compile is not None:
            Lazy.on_compile(self.name)
        return made


def kernel(body: Callable[[int, int], None]) -> Lazy:
    """A function f(int64 args, int64 chunk). Compiled when its address is first asked for."""
    return Lazy(body)


def function(body: Callable[..., Any]) -> Lazy:
    """A function called from Python; it runs without the interpreter lock. Compiled when it is first asked for."""
    return Lazy(body)
