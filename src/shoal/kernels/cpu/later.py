"""What kernels are made of, as long as none has to be compiled: Numba takes longer to import than compiled kernels to load, so that
nothing of it is made before."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any


class Later:
    """Stands for what ``make`` gives. Kernels name it like any other function."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @cached_property
    def made(self) -> Any:
        """What it stands for, made now if it has not been."""
        return self._make()


def with_names(body: Callable[..., Any], names: dict[str, Any], name: str) -> Any:
    """The function with other globals, and called ``name``."""
    made = FunctionType(body.__code__, names, name, body.__defaults__, body.__closure__)
    made.__qualname__, made.__doc__, made.__module__ = name, body.__doc__, body.__module__
    return made


def resolved(body: Callable[..., Any]) -> Any:
    """The function with what its names stand for in place of all that is to be made later."""
    known = body.__globals__
    names = {name: known[name] for name in _names(body.__code__) if name in known}
    for name, value in names.items():
        if isinstance(value, Later):
            names[name] = value.made
    made = with_names(
        body, {"__name__": body.__module__, "__builtins__": known["__builtins__"], **names}, body.__name__
    )
    made.__qualname__ = body.__qualname__
    return made


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
