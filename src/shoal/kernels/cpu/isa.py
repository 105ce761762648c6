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

CHOICES = ("avx512vnni", "avx2", "portable")


def cpu_features() -> frozenset[str]:
    """Names of the features LLVM sees on this CPU."""
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def _choose() -> str:
    forced = os.environ.get("SHOAL_ISA", "")
    features = cpu_features()
    possible = ["portable"]
    if {"avx2", "fma", "f16c"} <= features:
        possible.insert(0, "avx2")
        if {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= features:
            possible.insert(0, "avx512vnni")
    if not forced:
        return possible[0]
    if forced not in possible:
        raise ParameterError("SHOAL_ISA", forced, "one of " + ", ".join(possible) + " on this machine")
    return forced


ISA = _choose()

# With a lesser instruction set the compiler must not use the greater one either, or the comparison would mean nothing.
if ISA == "avx2" and "avx512f" in cpu_features() and not config.CPU_NAME:
    config.CPU_NAME = "x86-64-v3"
    config.CPU_FEATURES = ""
