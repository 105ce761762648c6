"""Kernels compiled without a GPU: launches are recorded, then each distinct one is compiled as the JIT would for a target.

A launch is known by what the JIT specialises it for: types of arguments, whether pointers and sizes are multiples of 16, constants.
It holds no tensor, so that it can be sent to another process: compiling takes a second or so on one core.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from shoal.kernels.cuda.launch import Kind, Tensor, launches_go_to, options_for

_ALIGNED = 16  # bytes of a pointer, or size: what the JIT asks of them
_INT32 = 2**31


@dataclass(frozen=True, slots=True)
class Target:
    """A device to compile for: ``shared`` is the memory in bytes that one program may have on its multiprocessor."""

    gpu: GPUTarget
    shared: int


TARGETS: Mapping[str, Target] = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),
}


@dataclass(frozen=True, slots=True)
class Pointer:
    """A tensor as an argument; ``dtype`` is torch's name of it."""

    dtype: str
    aligned: bool


@dataclass(frozen=True, slots=True)
class Function:
    """A jitted function: a kernel, or what it is given as a constant."""

    module: str
    name: str

    def load(self) -> Any:
        """Import it."""
        return getattr(importlib.import_module(self.module), self.name)

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.name}"


@dataclass(frozen=True, slots=True)
class Launch:
    """What is compiled: a kernel, its arguments by position, and options and constants by name."""

    kernel: Function
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """The kernel and what differs from one of its configurations to the next."""
        shown = [f"{name}={value}" for name, value in self.options if name != "enable_fp_fusion"]
        return f"{self.kernel} {' '.join(shown)}"


Named = Mapping[str, Any]  # arguments of a launch by the names of the kernel's parameters


def _nothing(named: Named) -> str:
    return ""


@dataclass(slots=True)
class Recorder:
    """Distinct launches, and the subjects they belong to: all of one subject must have the same matrix instruction, such as
    those of one matrix with any number of rows. ``subject_of`` names it; "": there is none."""

    subject_of: Callable[[Named], str] = _nothing
    launches: dict[Launch, set[str]] = field(default_factory=dict)

    def __call__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Take in one launch."""
        named = {param.name: value for param, value in zip(kernel.params, args, strict=False)} | options
        self.launches.setdefault(launch_of(kernel, args, options), set()).add(self.subject_of(named))


@contextmanager
def recorded() -> Iterator[Recorder]:
    """What is launched inside does not run, and its outputs are whatever they were."""
    recorder = Recorder()
    with launches_go_to(recorder):
        yield recorder


def launch_of(kernel: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Launch:
    """One launch without its tensors and without numbers that make no difference."""
    params = kernel.params
    by_position = tuple(
        _constant(value) if param.is_constexpr else _argument(value, specialised=not param.do_not_specialize)
        for param, value in zip(params, args, strict=False)
    )
    constants = {param.name for param in params if param.is_constexpr}
    known = {param.name for param in params}
    by_name = {
        name: _argument(value, specialised=True) if name in known - constants else _constant(value)
        for name, value in options.items()
    }
    return Launch(Function(kernel.__module__, kernel.__name__), by_position, tuple(by_name.items()))


def _constant(value: Any) -> Any:
    return Function(value.__module__, value.__name__) if isinstance(value, triton.JITFunction) else value


def _argument(value: Any, *, specialised: bool) -> Any:
    """What the JIT sees of an argument. A number becomes the smallest that is compiled for in the same way."""
    if isinstance(value, Tensor):
        return Pointer(str(value.dtype).removeprefix("torch."), value.data_ptr() % _ALIGNED == 0)
    if isinstance(value, float):
        return 0.5
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    wide = 0 if -_INT32 <= value < _INT32 else 2 * _INT32
    if specialised and value % _ALIGNED == 0:
        return wide + _ALIGNED
    return 1 if specialised and value == 1 else wide + 3


# Compiling -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compiled:
    """How one launch came out for one target: ``registers`` and ``spilled`` bytes of a thread, ``shared`` bytes of a program, matrix
    ``instructions`` in it; or the ``error`` of the compiler. ``hasty``: it is begun while the kernel before may still run, and may
    reach for memory before it waits for that."""

    target: str
    launch: Launch
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: tuple[str, ...] = ()
    error: str = ""
    hasty: bool = False

    @property
    def faults(self) -> list[str]:
        """Why it must not be shipped."""
        limit, found = TARGETS[self.target].shared, []
        if self.error:
            found.append(self.error)
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, at most {limit}")
        if self.hasty:
            found.append("memory may be reached for before the kernel before has ended")
        return found


def compile_all(target: str, launches: Iterable[Launch], processes: int) -> Iterator[Compiled]:
    """Each of them, in their order, as soon as it is done."""
    context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(partial(compile_launch, target), launches)


def compile_launch(target: str, launch: Launch) -> Compiled:
    """Compile one in this process. What the compiler raises is part of the result: others must still be tried."""
    try:
        kernel = _compile(TARGETS[target].gpu, launch)
    except Exception as problem:
        return Compiled(target, launch, error=_first_line(problem))
    found = Compiled(target, launch, shared=kernel.metadata.shared)
    if TARGETS[target].gpu.backend == "hip":
        return _read_amd(found, kernel.asm["amdgcn"])
    found = replace(found, hasty=kernel.metadata.launch_pdl and _is_hasty(kernel.asm["ptx"]))
    return _read_nvidia(found, kernel.asm["ptx"], kernel.asm["cubin"])


class _NoDevice:
    """What the JIT asks of a driver before it launches."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


def _compile(gpu: GPUTarget, launch: Launch) -> Any:
    args = [_stand_in(value) for value in launch.args]
    kernel, named = launch.kernel.load(), {name: _stand_in(value) for name, value in launch.options}
    options = options_for(_kind(gpu), kernel, named)
    triton.runtime.driver.set_active(_NoDevice(gpu))
    return kernel.warmup(*args, grid=(1,), **options)


def _kind(gpu: GPUTarget) -> Kind:
    return Kind(gpu.backend, gpu.arch if isinstance(gpu.arch, int) else 0)


class _Unaligned(MockTensor):  # type: ignore[misc]
    """A tensor that begins anywhere."""

    @staticmethod
    def data_ptr() -> int:
        return _ALIGNED // 2


def _stand_in(value: Any) -> Any:
    if isinstance(value, Pointer):
        return (MockTensor if value.aligned else _Unaligned)(getattr(torch, value.dtype))
    return value.load() if isinstance(value, Function) else value


def _first_line(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[-1] if lines else ''}"


# Reading what came out -----------------------------------------------------------------------------------------------

_NVIDIA_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync[\w.]*")
_AMD_MATRIX = re.compile(r"\bv_s?mfma\w+")
_WGMMA_WIDTH = re.compile(r"(\.m64)n\d+(k\d+)")
_REACHES = re.compile(r"\b(?:ld|st|atom|red|cp|prefetch)\.[\w.:]*global")
_LOCAL_STORE = re.compile(r"\bSTL(?:\.(64|128))?\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def _read_nvidia(found: Compiled, ptx: str, cubin: bytes) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        match = _RESOURCES.search(_dumped("--dump-resource-usage", file.name))
        assert match is not None, "cuobjdump says nothing of registers"
        registers, stack, local = map(int, match.groups())
        spilled = _stored_locally(_dumped("--dump-sass", file.name)) if stack or local else 0
    instructions = _distinct(_NVIDIA_MATRIX, ptx)
    return replace(found, registers=registers, spilled=spilled, instructions=instructions)


def _is_hasty(ptx: str) -> bool:
    """Whether the first thing that a kernel does in memory comes before it waits, or it does not wait."""
    before, wait, _ = ptx[ptx.index(".entry") :].partition("griddepcontrol.wait")
    return not wait or _REACHES.search(before) is not None


def _dumped(what: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


def _stored_locally(assembly: str) -> int:
    """Bytes that a thread moves from registers to memory of its own. A stack that nothing is stored to is no spill."""
    return sum(int(bits or 32) // 8 for bits in _LOCAL_STORE.findall(assembly))


def _read_amd(found: Compiled, assembly: str) -> Compiled:
    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert match is not None, f"{key} is not in the assembly's metadata"
        return int(match[1])

    return replace(
        found,
        registers=number("vgpr_count"),
        spilled=4 * number("vgpr_spill_count"),  # scalar registers go to lanes of vector registers, not to memory
        instructions=_distinct(_AMD_MATRIX, assembly),
    )


def _distinct(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    """Matrix instructions that add up in ways of their own. How many columns one has at once makes no difference to any of them."""
    names = {_WGMMA_WIDTH.sub(r"\1\2", name) for name in pattern.findall(text)}
    return tuple(sorted(names))


def mixed_instructions(results: Iterable[Compiled], subjects: Mapping[Launch, set[str]]) -> Iterator[str]:
    """Subjects whose launches use different matrix instructions: their sums could have other bits with another number of rows."""
    kinds: dict[str, set[tuple[str, ...]]] = {}
    for result in results:
        for subject in subjects[result.launch] - {""}:
            if result.instructions:
                kinds.setdefault(subject, set()).add(result.instructions)
    for subject, found in kinds.items():
        if len(found) > 1:
            yield f"{subject}: {' or '.join(sorted(', '.join(kind) for kind in found))}"
