"""Which instructions the int8 dot product uses, and what else there are instructions for; decided once, when this module is
imported.

avx512vnni  vpdpbusd on 16 rows at once
avx2        vpmaddubsw and vpaddw in int16, widened in time
portable    plain LLVM IR: arm64 and everything else

What counts is the CPU that Numba compiles for: this one, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES make of it.
``SHOAL_ISA`` forces one of them, for tests and comparisons; the results are the same, bit for bit.
"""

from __future__ import annotations

import os
import re

from llvmlite import binding
from numba import config
from numba.core.codegen import get_host_cpu_features

from shoal.errors import ParameterError

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni"})

# Plain IR, for which LLVM has an answer on any CPU; the assembly shows whether it is an instruction.
_QUESTIONS = """
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)

define <8 x float> @one(<8 x float> %x) {
  %y = call <8 x float> @llvm.fma.v8f32(<8 x float> %x, <8 x float> %x, <8 x float> %x)
  ret <8 x float> %y
}

define <32 x i8> @two(<32 x i8> %x) {
  %y = add <32 x i8> %x, %x
  ret <32 x i8> %y
}

define <8 x i16> @three(<8 x i16> %x) {
  %half = bitcast <8 x i16> %x to <8 x half>
  %wide = fpext <8 x half> %half to <8 x float>
  %sum = fadd <8 x float> %wide, %wide
  %narrow = fptrunc <8 x float> %sum to <8 x half>
  %y = bitcast <8 x half> %narrow to <8 x i16>
  ret <8 x i16> %y
}
"""


def cpu_features() -> frozenset[str]:
    """Names of the features LLVM sees on this CPU."""
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def target() -> tuple[str, str]:
    """Name and features (+this,-that) of the CPU that Numba compiles for."""
    features = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return binding.get_host_cpu_name() if config.CPU_NAME is None else config.CPU_NAME, features


def target_features() -> frozenset[str]:
    """What of _AVX2 and _AVX512 can be relied upon. "f16c" is any CPU's way to convert halves without calling a function."""
    name, features = target()
    if config.CPU_FEATURES is None and name != binding.get_host_cpu_name():
        # Numba switches on whatever this CPU has; who names another one means that one, less what this one lacks. 64 bits stay: a
        # name that LLVM does not know would end the process.
        features = ",".join(re.findall(r"-[^,]+|\+64bit", features))
    switched_on = frozenset(re.findall(r"\+([^,]+)", features))
    if switched_on >= _AVX2:
        return switched_on
    return switched_on & _AVX512 | _asked(name, features)


def _asked(name: str, features: str) -> frozenset[str]:
    """Those of _AVX2 that LLVM uses for a CPU."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(name, features)
    assembly = machine.emit_assembly(binding.parse_assembly(_QUESTIONS))
    has = {
        "fma": not re.search(r"\bfmaf?\b", assembly),
        "avx2": bool(re.search(r"vpaddb.*ymm", assembly)),
        "f16c": not re.search(r"hfsf|sfhf|h2f|f2h", assembly),
    }
    return frozenset(feature for feature, is_there in has.items() if is_there)


def possible() -> list[str]:
    """What the CPU that Numba compiles for can run, best first."""
    features, names = target_features(), ["portable"]
    if features >= _AVX2:
        names.insert(0, "avx2")
        if features >= _AVX512:
            names.insert(0, "avx512vnni")
    return names


def choose() -> str:
    """The best, or what ``SHOAL_ISA`` says. Raises ParameterError if that cannot run here."""
    forced = os.environ.get("SHOAL_ISA", "")
    if forced and forced not in possible():
        name, _ = target()
        raise ParameterError("SHOAL_ISA", forced, f"one of {', '.join(possible())} on this machine ({name})")
    return forced or possible()[0]


ISA = choose()
CONVERTS_HALVES = "f16c" in target_features()
MULTIPLIES_AND_ADDS = "fma" in target_features()

# With a lesser instruction set the compiler must not use the greater one either, or the comparison would mean nothing.
if ISA == "avx2" and "avx512f" in cpu_features() and config.CPU_NAME is None:
    config.CPU_NAME = "x86-64-v3"
    config.CPU_FEATURES = ""
