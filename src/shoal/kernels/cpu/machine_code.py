"""Compiled kernels in memory: object files, loaded by LLVM alone."""

from __future__ import annotations

from ctypes import CFUNCTYPE, byref, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

from llvmlite import binding

from shoal.errors import UnsupportedError


class MachineCode:
    """The function ``symbol`` of an object file, which stays in memory as long as this does; ``address`` is where it is. What is no
    object file ends the process: LLVM believes it."""

    def __init__(self, symbol: str, code: bytes) -> None:
        target = _target()
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target.create_target_machine())
        self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.address = int(self._engine.get_function_address(symbol))
        assert self.address, f"no symbol {symbol}"

    def caller(self, arguments: int) -> Any:
        """The function as Python calls it, without the interpreter lock: with so many int64, giving one. (It is compiled as Numba
        does it: compiling.py.)"""
        function = CFUNCTYPE(c_int32, c_void_p, c_void_p, *[c_int64] * arguments)(self.address)
        error = byref(c_void_p())  # nothing raises

        def call(*args: int) -> int:
            result = c_int64()
            status = function(byref(result), error, *args)
            assert status == 0, f"compiled code ended with status {status}"
            return result.value

        return call


@cache
def _target() -> Any:
    """Raises UnsupportedError where memory may not become executable."""
    try:
        binding.check_jit_execution()  # LLVM itself says nothing, and what is called then ends the process
    except OSError as error:
        raise UnsupportedError(f"compiled kernels cannot be run here: {error.strerror or error}") from error
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_triple(binding.get_process_triple())
