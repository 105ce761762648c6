"""Which instructions the int8 dot product uses, and what else there are instructions for; decided once, when this module is
imported.

avx512vnni    vpdpbusd on 16 rows at once
avxvnni       vpdpbusd on 8 rows, in 16 registers: CPUs with VNNI but without AVX-512
avx2          vpmaddubsw and vpaddw in int16, widened in time
neon-i8mm     usdot on 4 rows: arm64, unsigned bytes by signed ones
neon-dotprod  sdot on 4 rows: arm64, signed bytes
portable      plain LLVM IR: everything else

What counts is the CPU that Numba compiles for: this one, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES make of it.
``SHOAL_ISA`` forces one of them, for tests and comparisons; the results are the same, bit for bit.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from llvmlite import binding

from shoal.errors import ParameterError

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_SLOW_AVX = ("corei7-avx", "core-avx-i", "sandybridge", "ivybridge", "nocona")
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni"})
_decided: dict[str, str] = {}  # settings that Numba will be given


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """``needs``: features, all of one of these sets; ``vectors``: so many of 16 float32 fit the registers; ``panels``: there are
    products in assembly (simd/panels.py). Of the dot product ``int16_sums``: it sums in int16, which must be widened in time;
    ``by_lane``: it takes four int8 out of any part of a register; ``signed``: its weights are signed too."""

    needs: tuple[frozenset[str], ...]
    vectors: int = 8
    panels: bool = False
    int16_sums: bool = False
    by_lane: bool = False
    signed: bool = False


_SETS = {  # best first
    "avx512vnni": InstructionSet((_AVX2 | _AVX512,), vectors=32),
    # The same instruction of 256 bits, as VEX and as EVEX encode it: AVX-512 machines can run it too.
    "avxvnni": InstructionSet((_AVX2 | {"avxvnni"}, _AVX2 | {"avx512vl", "avx512vnni"}), panels=True),
    "avx2": InstructionSet((_AVX2,), panels=True, int16_sums=True),
    "neon-i8mm": InstructionSet((frozenset({"dotprod", "i8mm"}),), by_lane=True),
    "neon-dotprod": InstructionSet((frozenset({"dotprod"}),), by_lane=True, signed=True),
    "portable": InstructionSet((frozenset(),)),
}

# Plain IR, for which LLVM has an answer on any CPU; the assembly shows whether it is an instruction.
_QUESTIONS = """
declare <8 x float> @llvm.fma.v8f32(<8 x float>, <8 x float>, <8 x float>)
declare i32 @llvm.vector.reduce.add.v32i32(<32 x i32>)

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

define i32 @four(<32 x i8> %x, <32 x i8> %y) {
  %a = zext <32 x i8> %x to <32 x i32>
  %b = sext <32 x i8> %y to <32 x i32>
  %products = mul <32 x i32> %a, %b
  %sum = call i32 @llvm.vector.reduce.add.v32i32(<32 x i32> %products)
  ret i32 %sum
}

define i32 @five(<32 x i8> %x, <32 x i8> %y) {
  %a = sext <32 x i8> %x to <32 x i32>
  %b = sext <32 x i8> %y to <32 x i32>
  %products = mul <32 x i32> %a, %b
  %sum = call i32 @llvm.vector.reduce.add.v32i32(<32 x i32> %products)
  ret i32 %sum
}
"""


def cpu_features() -> frozenset[str]:
    """Names of the features LLVM sees on this CPU."""
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def setting(name: str, default: Any) -> Any:
    """A setting of Numba's, whose ``default`` it is unless somebody has told Numba something: then Numba is asked, which takes a while
    to import."""
    if not _numba_was_told():
        return _decided.get(name, default)
    from numba import config

    while _decided:
        setattr(config, *_decided.popitem())
    return getattr(config, name, default)


def _numba_was_told() -> bool:
    return (
        "numba" in sys.modules
        or any(name.startswith("NUMBA_") for name in os.environ)
        or os.path.exists(".numba_config.yaml")
    )


def target() -> tuple[str, str]:
    """Name and features (+this,-that) of the CPU that Numba compiles for."""
    name, features = setting("CPU_NAME", None), setting("CPU_FEATURES", None)
    return binding.get_host_cpu_name() if name is None else name, _host_features() if features is None else features


def _host_features() -> str:
    """As Numba has it: CPUs that slow down for AVX go without."""
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know
        return ""
    if not setting("ENABLE_AVX", binding.get_host_cpu_name() not in _SLOW_AVX):
        for name in features:
            if name.startswith("avx"):
                features[name] = False
    return str(features.flatten())


def target_features() -> frozenset[str]:
    """What of the features that _SETS name can be relied upon. "f16c" is any CPU's way to convert halves without calling a function."""
    name, features = target()
    if setting("CPU_FEATURES", None) is None and name != binding.get_host_cpu_name():
        # Numba switches on whatever this CPU has; who names another one means that one, less what this one lacks. 64 bits stay: a
        # name that LLVM does not know would end the process.
        features = ",".join(re.findall(r"-[^,]+|\+64bit", features))
    switched_on = frozenset(re.findall(r"\+([^,]+)", features))
    if switched_on >= _AVX2:
        return switched_on
    return switched_on & _AVX512 | _asked(name, features)


def _asked(name: str, features: str) -> frozenset[str]:
    """Those that LLVM uses for a CPU by itself."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(name, features)
    assembly = machine.emit_assembly(binding.parse_assembly(_QUESTIONS))
    has = {
        "fma": not re.search(r"\bfmaf?\b", assembly),
        "avx2": bool(re.search(r"vpaddb.*ymm", assembly)),
        "f16c": not re.search(r"hfsf|sfhf|h2f|f2h", assembly),
        "avxvnni": "{vex}\tvpdpbusd" in assembly,
        "dotprod": bool(re.search(r"\bsdot\b", assembly)),
        "i8mm": bool(re.search(r"\busdot\b", assembly)),
    }
    return frozenset(feature for feature, is_there in has.items() if is_there)


def possible() -> list[str]:
    """What the CPU that Numba compiles for can run, best first."""
    features = target_features()
    return [name for name, has in _SETS.items() if any(features >= needs for needs in has.needs)]


def choose() -> str:
    """The best, or what ``SHOAL_ISA`` says. Raises ParameterError if that cannot run here."""
    forced = os.environ.get("SHOAL_ISA", "")
    if forced and forced not in possible():
        name, _ = target()
        raise ParameterError("SHOAL_ISA", forced, f"one of {', '.join(possible())} on this machine ({name})")
    return forced or possible()[0]


ISA = choose()
HAS = _SETS[ISA]
CONVERTS_HALVES = "f16c" in target_features()
MULTIPLIES_AND_ADDS = "fma" in target_features()
ON_X86 = binding.get_process_triple().startswith("x86_64")
# How assembly says which of the two encodings of 256-bit vpdpbusd this CPU has.
VPDPBUSD = "{vex} vpdpbusd" if "avxvnni" in target_features() else "{evex} vpdpbusd"

# With a lesser instruction set the compiler must not use the greater one either, or the comparison would mean nothing. In assembly
# EVEX's vpdpbusd can stand all the same.
if ISA in ("avxvnni", "avx2") and "avx512f" in cpu_features() and setting("CPU_NAME", None) is None:
    _features = "+avxvnni" if ISA == "avxvnni" and "avxvnni" in target_features() else ""
    _decided.update(CPU_FEATURES=_features, CPU_NAME="x86-64-v3")

# What Numba has to compile for: what was decided here, whatever it thinks of this CPU itself.
TARGET = target()
