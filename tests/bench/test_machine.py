"""The probes: what they compute is known, so a rate is that over the time; here the time is set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoal.bench import machine
from shoal.bench.machine import Machine, Peaks
from shoal.kernels import reference


@pytest.fixture
def two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe runs once and is said to have taken two seconds."""

    def run_once(run: Callable[[], object]) -> float:
        run()
        return 2.0

    monkeypatch.setattr(machine, "_best_seconds", run_once)


@pytest.mark.usefixtures("two_seconds")
@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_is_bytes_over_time(threads: int) -> None:
    assert machine.measure_read_bandwidth(threads, 3 << 20) == 3 * 2**20 / 2


@pytest.mark.usefixtures("two_seconds")
def test_a_copy_counts_what_is_read_and_what_is_written() -> None:
    assert machine.measure_copy_bandwidth(2, 3 << 20) == 2 * 3 * 2**20 / 2


@pytest.mark.usefixtures("two_seconds")
def test_peaks_in_one_line() -> None:
    found = machine.measure_peaks(threads=1)
    assert (found.threads, found.read_bandwidth, found.copy_bandwidth) == (1, 2**19, 2**20)
    assert found.int8_rate == 4 * found.float_rate > 0  # the time is set; a register holds four times as many
    line = str(Peaks(2, read_bandwidth=58.3e9, copy_bandwidth=50e9, float_rate=117e9, int8_rate=470e9))
    assert line.startswith("2 threads read 58.3 GB/s, copy 50.0 GB/s (read and written), multiply 117 GMAC/s")


@pytest.mark.usefixtures("two_seconds")
def test_mac_rate_is_the_products_done_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []
    multiply = reference.matmul

    def count(x: reference.F32, weight: reference.F64) -> reference.F32:
        products.append(len(x) * weight.size)
        return multiply(x, weight)

    monkeypatch.setattr(reference, "matmul", count)
    rate = machine.measure_mac_rate(reference.ReferenceBackend(), repeats=3)
    assert rate == sum(products) / 2 == 3 * 32 * 512 * 512 / 2


def test_the_quickest_pass_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0, 30.0, 34.0, 40.0, 49.0])
    passes: list[None] = []
    monkeypatch.setattr("shoal.bench.timing.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert machine._best_seconds(lambda: passes.append(None)) == 2.0
    assert len(passes) == 6  # the first warms up


@pytest.mark.usefixtures("two_seconds")
def test_the_machine_in_one_line() -> None:
    found = machine.measure_machine(threads=2, device="reference")
    assert found.cpu
    assert found.cores >= 1
    assert found.memory > 1 << 28
    line = str(Machine("Some CPU", 2, 24 << 30, 2, 31.2e9, 118e9))
    assert line == "Some CPU, 2 cores, 24 GiB; with 2 threads: reads 31.2 GB/s, multiplies 118 GMAC/s"


def test_the_cpu_has_a_name_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: Path, **options: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert machine.cpu_name()
