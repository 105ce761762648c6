"""Which instructions the int8 dot product uses; decided once, when this module is imported.

avx512vnni  vpdpbusd on 16 rows at once
avx2        vpmaddubsw and vpaddw in int16, widened in time
portable    plain LLVM IR: arm64 and everything else

``SHOAL_ISA`` forces one of them, for tests and comparisons; the results are the same, bit for bit.
"""

from __future__ import annotations

import os

from llvmlite import binding
from numba import config

from shoal.errors import ParameterError


def cpu_features() -> frozenset[str]:
    """Names of the features LLVM sees on this CPU."""
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def possible() -> list[str]:
    """What this CPU can run, best first."""
    features, names = cpu_features(), ["portable"]
    if {"avx2", "fma", "f16c"} <= features:
        names.insert(0, "avx2")
        if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features:
            names.insert(0, "avx512vnni")
    return names


def choose() -> str:
    """The best, or what ``SHOAL_ISA`` says. Raises ParameterError if that cannot run here."""
    forced = os.environ.get("SHOAL_ISA", "")
    if forced and forced not in possible():
        raise ParameterError("SHOAL_ISA", forced, "one of " + ", ".join(possible()) + " on this machine")
    return forced or possible()[0]


ISA = choose()

# With a lesser instruction set the compiler must not use the greater one either, or the comparison would mean nothing.
if ISA == "avx2" and "avx512f" in cpu_features() and not config.CPU_NAME:
    config.CPU_NAME = "x86-64-v3"
    config.CPU_FEATURES = ""
