"""The kernel cache: the first process compiles and says so, the second finds everything there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from shoal.kernels.cpu import elementwise
from shoal.kernels.cpu.jit import Lazy
from shoal.kernels.cpu.pool import Pool

Lazy.on_compile = print
Pool(2).close()
assert elementwise.add_bias.address
"""


def _compiled(cache: Path) -> list[str]:
    environment = {**os.environ, "SHOAL_KERNEL_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert _compiled(tmp_path) == ["run_program", "work", "wake", "add_bias"]
    assert _compiled(tmp_path) == []
