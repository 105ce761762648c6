"""The machine under the benchmark: what it is called, how fast it reads memory, how fast it multiplies."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.bench.products import Products
from shoal.bench.timing import seconds
from shoal.gguf.quants import format_named
from shoal.kernels.base import Backend
from shoal.kernels.load import load_backend
from shoal.system.machine_limits import memory_room, usable_cores

READ_BYTES = 512 << 20  # far more than any cache holds
_SIDE = 512  # rows and columns of the probe's matrix: 160 KiB of Q4_1, at home in a core's L2
_TOKENS = 32
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """``cores`` and ``memory`` (bytes): what this process may use. ``read_bandwidth`` in bytes a second, ``mac_rate`` in
    multiply-adds a second, both with ``threads``."""

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


@dataclass(frozen=True, slots=True)
class Peaks:
    """What ``threads`` threads reach at best: bytes a second read, and read and written by a copy; multiply-adds a second of
    float32 and of int8."""

    threads: int
    read_bandwidth: float
    copy_bandwidth: float
    float_rate: float
    int8_rate: float

    def __str__(self) -> str:
        return (
            f"{self.threads} threads read {self.read_bandwidth / 1e9:.1f} GB/s, copy {self.copy_bandwidth / 1e9:.1f} GB/s"
            f" (read and written), multiply {self.float_rate / 1e9:.0f} GMAC/s in float32 and"
            f" {self.int8_rate / 1e9:.0f} GMAC/s in int8"
        )


def measure_peaks(threads: int) -> Peaks:
    """Measure this machine, in a few seconds; nothing else should be running."""
    return Peaks(
        threads=threads,
        read_bandwidth=measure_read_bandwidth(threads, READ_BYTES),
        copy_bandwidth=measure_copy_bandwidth(threads, READ_BYTES),
        float_rate=measure_peak(threads, floats=True),
        int8_rate=measure_peak(threads, floats=False),
    )


def measure_machine(threads: int, device: str = "cpu") -> Machine:
    """Name and measure this machine, in a few seconds; nothing else should be running."""
    backend = load_backend(device, threads)
    try:
        mac_rate = measure_mac_rate(backend)
    finally:
        backend.close()
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory=memory_room().limit,
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


def measure_copy_bandwidth(threads: int, num_bytes: int) -> float:
    """Bytes a second that ``threads`` threads read and write, both counted, while they copy ``num_bytes`` bytes."""
    sources = np.array_split(np.ones(num_bytes // 8, np.uint64), threads)
    targets = np.array_split(np.ones(num_bytes // 8, np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return 2 * num_bytes / _best_seconds(lambda: list(pool.map(np.copyto, targets, sources)))


def measure_peak(threads: int, *, floats: bool) -> float:
    """Multiply-adds a second of ``threads`` threads, float32 or int8, on registers: what no product of matrices exceeds."""
    from shoal.kernels.cpu.probe import Probe

    probe = Probe(threads, floats=floats)
    try:
        return probe.macs / _best_seconds(probe.run)
    finally:
        probe.close()


def _read(part: NDArray[np.uint64]) -> int:
    return int(np.bitwise_or.reduce(part))


def measure_mac_rate(backend: Backend, repeats: int = 64) -> float:
    """Multiply-adds a second of the backend's ``linear`` where memory plays no part.

    A Q4_1 matrix of 512 x 512 that stays in the cache, times 32 tokens, ``repeats`` times in one pass: the best of a few.
    This is what the kernel reaches at its best, not what the data sheet of the CPU promises.
    """
    products = Products(backend, format_named("Q4_1"), (_SIDE, _SIDE), _TOKENS, copies=1, repeats=repeats)
    return repeats * _TOKENS * _SIDE * _SIDE / _best_seconds(lambda: products.run(_TOKENS))


def _best_seconds(run: Callable[[], object]) -> float:
    """The quickest of a few runs after one to warm up."""
    run()
    return min(seconds(run) for _ in range(_ROUNDS))
