"""What LLVM makes of products for arm64 CPUs, on any machine: how many instructions a multiply-add takes, and how many vectors go to
memory and back for want of registers.

    python -m tests.arm64.assembly CPU [TYPE ...]
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

from llvmlite import binding
from numba import config
from numba.core import codegen

_DOT_MACS = 16
_GROUP_DOTS = 32  # of a token: 32 columns of 16 rows
_TYPES = ("Q4_0", "Q4_K", "Q6_K", "Q8_0")


@dataclass(frozen=True, slots=True)
class Loop:
    """One that multiplies: a group of columns by ``tokens``."""

    tokens: int
    instructions: int
    stores: int
    loads: int

    @property
    def per_mac(self) -> float:
        """Instructions a multiply-add, with everything that the loop does besides."""
        return self.instructions / (self.tokens * _GROUP_DOTS * _DOT_MACS)


def loops(assembly: str) -> list[Loop]:
    """Those of a kernel."""
    found = []
    for block in re.split(r"\n(?=\.LBB)", assembly):
        dots = len(re.findall(r"\bu?sdot\b", block))
        if dots >= _GROUP_DOTS:
            lines = [line for line in block.splitlines() if re.match(r"\t[a-z]", line)]
            spills = [len(re.findall(rf"\t{name}u?[rp]\tq.*\[(?:sp|x29)", block)) for name in ("st", "ld")]
            found.append(Loop(dots // _GROUP_DOTS, len(lines), *spills))
    return sorted(found, key=lambda loop: loop.tokens)


def compile_for(cpu: str) -> Any:
    """Have Numba compile for a CPU of another kind; what it makes is never run. Returns the module of the kernels."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    binding.get_process_triple = lambda: "aarch64-unknown-linux-gnu"
    config.CPU_NAME, config.CPU_FEATURES = cpu, ""
    codegen.JITCodeLibrary._finalize_specific = lambda self: None
    codegen.JITCPUCodegen.set_env = lambda self, name, env: None
    from shoal.kernels.cpu import linear

    return linear


def main(cpu: str, *types: str) -> None:
    """See above."""
    linear = compile_for(cpu)
    from shoal.kernels.cpu.compiling import assembly
    from shoal.kernels.cpu.isa import ISA

    for name in types or _TYPES:
        for loop in loops(assembly(linear.LINEAR[name].body)):
            moved = f"{loop.stores} stores, {loop.loads} loads" if loop.stores or loop.loads else "no spills"
            print(f"{cpu} {ISA} {name}, {loop.tokens} tokens: {loop.per_mac:.3f} instructions a multiply-add, {moved}")


if __name__ == "__main__":
    main(*sys.argv[1:])
