"""Launches are recorded and compiled for devices that are not there; what must not be shipped is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shoal

SOURCE = Path(shoal.__file__).parent.parent
Result = dict[str, Any]


def compiled(target: str) -> tuple[list[Result], list[str]]:
    """Results of the launches in ``ahead_kernels``; and the subjects with more than one kind of matrix instruction."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cuda.ahead_kernels", target],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(SOURCE)},
    )
    *results, mixed = map(json.loads, done.stdout.splitlines())
    return results, mixed


@pytest.fixture(scope="module")
def hopper() -> tuple[list[Result], list[str]]:
    return compiled("sm_90")


def of_kernel(results: list[Result], name: str) -> list[Result]:
    return [result for result in results if result["launch"].split()[0] == f"ahead_kernels.{name}"]


def test_each_distinct_launch_is_compiled_once(hopper: tuple[list[Result], list[str]]) -> None:
    found = of_kernel(hopper[0], "change")
    assert len(found) == 4  # of 7 launches: size 1, a multiple of 16, another; a pointer to anywhere
    assert all(result["registers"] > 0 and not result["faults"] for result in found)


def test_spills_and_too_much_shared_memory_are_faults(hopper: tuple[list[Result], list[str]]) -> None:
    small, one_warp, wide, spilling, large = of_kernel(hopper[0], "product")
    assert small["faults"] == one_warp["faults"] == wide["faults"] == []
    assert spilling["spilled"] > 0
    assert spilling["faults"] == [f"spills {spilling['spilled']} bytes"]
    assert large["faults"][-1] == f"{large['shared']} bytes of shared memory, at most {227 << 10}"


def test_what_does_not_compile_says_why_and_the_others_are_compiled(hopper: tuple[list[Result], list[str]]) -> None:
    (result,) = of_kernel(hopper[0], "unknown_name")
    assert "not_there is not defined" in result["faults"][0]


def test_one_matrix_with_two_kinds_of_matrix_instruction_is_found(hopper: tuple[list[Result], list[str]]) -> None:
    results, mixed = hopper
    small, one_warp, wide, *_ = of_kernel(results, "product")
    assert small["instructions"] == wide["instructions"] != one_warp["instructions"]
    assert "wgmma" in small["instructions"][0]
    assert len(mixed) == 1
    assert mixed[0].startswith("a matrix: mma.sync")


def test_what_reaches_for_memory_before_it_waits_is_found(hopper: tuple[list[Result], list[str]]) -> None:
    faults = {name: of_kernel(hopper[0], name)[0]["faults"] for name in ("patient", "hasty", "never_waiting")}
    assert faults["patient"] == []
    assert (
        faults["hasty"] == faults["never_waiting"] == ["memory may be reached for before the kernel before has ended"]
    )


def test_amd_is_compiled_for_too() -> None:
    results, mixed = compiled("gfx942")
    small, _, wide, spilling, large = of_kernel(results, "product")
    assert not small["faults"]
    assert small["registers"] > 0
    assert spilling["faults"] == [f"spills {spilling['spilled']} bytes"]
    assert large["faults"][-1].endswith(f"at most {64 << 10}")
    assert small["instructions"] == wide["instructions"] == ["v_mfma_f32_16x16x16_f16"]  # of tiles of any size
    assert mixed == []
