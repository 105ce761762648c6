"""The machine under the benchmark: what it is called, how fast it reads memory, how fast it multiplies."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from shoal.gguf.quants import format_named
from shoal.kernels.base import Array, AttentionShape, Backend, Matrix, Ops, RawTensor, StepInput, StepLimits
from shoal.kernels.load import load_backend

READ_BYTES = 512 << 20  # far more than any cache holds
_SIDE = 512  # rows and columns of the probe's matrix: 160 KiB of Q4_1, at home in a core's L2
_TOKENS = 32
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """``memory`` in bytes, ``read_bandwidth`` in bytes a second, ``mac_rate`` in multiply-adds a second, both with ``threads``."""

    cpu: str
    cores: int
    memory: int
    threads: int
    read_bandwidth: float
    mac_rate: float

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory / 2**30:.0f} GiB; with {self.threads} threads: reads"
            f" {self.read_bandwidth / 1e9:.1f} GB/s, multiplies {self.mac_rate / 1e9:.0f} GMAC/s"
        )


def measure_machine(threads: int, device: str = "auto") -> Machine:
    """Name and measure this machine, in a few seconds; nothing else should be running."""
    backend = load_backend(device, threads)
    try:
        mac_rate = measure_mac_rate(backend)
    finally:
        backend.close()
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        memory=psutil.virtual_memory().total,
        threads=threads,
        read_bandwidth=measure_read_bandwidth(threads, READ_BYTES),
        mac_rate=mac_rate,
    )


def cpu_name() -> str:
    """The CPU's marketing name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def measure_read_bandwidth(threads: int, num_bytes: int) -> float:
    """Bytes a second that ``threads`` threads read from memory together: the best of a few passes of NumPy's OR."""
    parts = np.array_split(np.ones(num_bytes // 8, np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return num_bytes / _best_seconds(lambda: list(pool.map(_read, parts)))


def _read(part: NDArray[np.uint64]) -> int:
    return int(np.bitwise_or.reduce(part))


def measure_mac_rate(backend: Backend, repeats: int = 64) -> float:
    """Multiply-adds a second of the backend's ``linear`` where memory plays no part.

    A Q4_1 matrix of 512 x 512 that stays in the cache, times 32 tokens, ``repeats`` times in one pass: the best of a few.
    This is what the kernel reaches at its best, not what the data sheet of the CPU promises.
    """
    matrix = backend.matrix([_probe_tensor()])

    def layers(ops: Ops) -> Array:
        x = ops.embed(matrix)
        for _ in range(repeats):
            out = ops.linear(x, matrix)
        return out

    seconds = _best_seconds(_probe_pass(backend, layers, matrix))
    return repeats * _TOKENS * _SIDE * _SIDE / seconds


def _probe_pass(backend: Backend, layers: Callable[[Ops], Array], matrix: Matrix) -> Callable[[], None]:
    """One pass of a network of a single sequence of 32 tokens that does not attend to anything."""
    cache = backend.kv_cache(1, 2, AttentionShape(1, 1, 16, 1.0), "f16")
    network = backend.bind(
        layers, lambda ops, x: ops.linear(ops.logit_rows(x), matrix), cache, StepLimits(_TOKENS, 1, 2)
    )
    tokens = np.arange(_TOKENS, dtype=np.int32)
    ends, pages = np.array([0, _TOKENS], np.int32), np.array([[0, 1]], np.int32)
    step = StepInput(tokens, tokens, ends, ends[1:], pages)
    return lambda: network.layers(step)


def _probe_tensor() -> RawTensor:
    """Random 4-bit weights, scaled so that no number is odd enough to be slow."""
    q4_1 = format_named("Q4_1")
    shape = (_SIDE, _SIDE // q4_1.block_size, q4_1.block_bytes)
    blocks = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    blocks[..., :4] = np.array([0.01, -0.075], np.float16).view(np.uint8)  # scale and minimum
    return RawTensor("probe", q4_1, (_SIDE, _SIDE), blocks.reshape(_SIDE, -1))


def _best_seconds(run: Callable[[], object]) -> float:
    """The quickest of a few runs after one to warm up."""
    run()
    return min(_seconds(run) for _ in range(_ROUNDS))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
