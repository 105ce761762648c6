"""Kernels that can begin while the one before still runs wait for it, on the GPUs that launch them so and only there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shoal
from shoal.kernels.cuda.launch import Kind, options_for

SOURCE = Path(shoal.__file__).parent.parent
PROGRAM = """
import json, torch
from triton.backends.compiler import GPUTarget
from shoal.kernels.cuda import compile_ahead, elementwise, embed, rotary
from shoal.kernels.cuda.launch import launches_go_to, on_compile

kernels, heard = [], []
on_compile(heard.append)
with launches_go_to(lambda *launch: kernels.append(compile_ahead.launch_of(launch[0], *launch[2:]))):
    x = torch.zeros(4, 64)
    elementwise.add(x, x, 4)
for gpu in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    done = compile_ahead._compile(gpu, kernels[0])
    text = done.asm.get("ptx") or done.asm["amdgcn"]
    lines = [line.strip() for line in text.splitlines()]
    kept = [line.split(";")[0].strip() for line in lines if line.startswith(("griddepcontrol", "ld.global", "@", "st.global"))]
    print(json.dumps([kept[:2], getattr(done.metadata, "launch_pdl", False)]))
print(json.dumps(heard))
"""


def lines(cache: Path) -> list[Any]:
    """What the program prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_wait_comes_before_all_loads_from_sm_90_on(tmp_path: Path) -> None:
    (old, old_option), (new, new_option), (other, other_option), heard = lines(tmp_path)
    assert new == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    assert not any("griddepcontrol" in line for line in [*old, *other])
    assert (old_option, new_option, other_option) == (False, True, False)
    assert heard == ["_change"] * 3
    *_, heard = lines(tmp_path)
    assert heard == []  # they are in the cache


@pytest.mark.parametrize(
    ("kind", "names", "dependent"),
    [
        (Kind("cuda", 90), ["x", "PDL"], True),
        (Kind("cuda", 120), ["x", "PDL"], True),
        (Kind("cuda", 90), ["x"], False),
        (Kind("cuda", 86), ["x", "PDL"], False),
        (Kind("cuda"), ["x", "PDL"], False),
        (Kind("hip"), ["x", "PDL"], False),
    ],
)
def test_who_is_launched_so(kind: Kind, names: list[str], dependent: bool) -> None:
    options = options_for(kind, SimpleNamespace(arg_names=names), {"num_warps": 4})
    assert (options.get("PDL"), options.get("launch_pdl")) == ((True, True) if dependent else (None, None))
    assert options["num_warps"] == 4
