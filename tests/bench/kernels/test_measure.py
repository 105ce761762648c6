"""``shoal bench kernels``: what is measured, what is refused, what the tables say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.bench.kernels import measure
from shoal.bench.kernels.measure import KernelReport, Plan, Product, measure_kernels
from shoal.bench.machine import Peaks
from shoal.errors import ParameterError, UnsupportedError
from shoal.gguf.quants import DEQUANTISABLE

PEAKS = Peaks(2, read_bandwidth=10e9, copy_bandwidth=8e9, float_rate=50e9, int8_rate=200e9)


def silent(line: str) -> None:
    """For progress that no test reads."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_peaks", lambda threads: PEAKS)
    monkeypatch.setattr(measure, "STREAM_BYTES", 100_000)
    monkeypatch.setattr(measure, "_SETTLE_SECONDS", 0.0)


def plan(**settings: Any) -> Plan:
    small: dict[str, Any] = {
        "types": ("Q4_0", "F32"),
        "rows": (1, 3),
        "shape": (64, 256),
        "cached_shape": (32, 64),
        "rounds": 2,
        "threads": 1,
        "device": "reference",
    }
    return Plan(**(small | settings))


def test_each_type_is_measured_in_both_places() -> None:
    said: list[str] = []
    report = measure_kernels(plan(), said.append)
    found = [(p.type, p.place, p.shape, p.rows) for p in report.products]
    places = (("memory", (64, 256)), ("cache", (32, 64)))
    assert found == [(t, *place, rows) for t in ("Q4_0", "F32") for place in places for rows in (1, 3)]
    assert said[1:] == ["Q4_0 from memory", "Q4_0 from cache", "F32 from memory", "F32 from cache"]
    assert all(p.seconds > 0 and p.sgemm_seconds > 0 for p in report.products)
    assert report.products[0].num_bytes == 64 * 256 * 18 // 32


def test_the_floor_is_the_slower_of_bytes_and_multiply_adds() -> None:
    floors = {(p.type, p.place, p.rows): p.floor for p in measure_kernels(plan(rows=(1, 512)), silent).products}
    macs = 64 * 256
    assert floors["Q4_0", "memory", 1] == pytest.approx(macs * 18 / 32 / 10e9)  # int8: 200 GMAC/s
    assert floors["Q4_0", "memory", 512] == pytest.approx(512 * macs / 200e9)
    assert floors["F32", "memory", 1] == pytest.approx(macs * 4 / 10e9)
    assert floors["F32", "cache", 1] == pytest.approx(32 * 64 / 50e9)


def test_without_a_choice_every_type_is_measured() -> None:
    report = measure_kernels(plan(types=(), rows=(1,), cached_shape=(16, 256), rounds=1), silent)
    assert {p.type for p in report.products} == DEQUANTISABLE


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"types": ("Q9_9",)}, UnsupportedError, "'Q9_9'"),
        ({"types": ("I8",)}, ParameterError, "type: got 'I8', must be one of F32"),
        ({"types": ("Q4_K",), "shape": (64, 96)}, ParameterError, "multiple of 256 columns for Q4_K"),
        ({"types": ("Q4_0",), "cached_shape": (32, 40)}, ParameterError, "'32x40'.*multiple of 32"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure_kernels(plan(**settings), silent)


@pytest.fixture
def report() -> KernelReport:
    """At 1 token 1 ms (half the roofline), at 16 tokens 2 ms; NumPy takes 4 ms."""
    products = [
        Product("Q4_0", place, (1000, 3200), rows, 1_800_000, seconds, seconds / 2, 0.004)
        for place in ("memory", "cache")
        for rows, seconds in ((1, 0.001), (16, 0.002))
    ]
    return KernelReport("Some CPU", "cpu: kernels", PEAKS, 5, products, other_load=0.034)


def test_markdown_has_a_line_a_type_and_a_column_a_number_of_tokens(report: KernelReport) -> None:
    text = report.as_markdown()
    assert "Machine: Some CPU; 2 threads read 10.0 GB/s, copy 8.0 GB/s (read and written), multiply 50 GMAC/s" in text
    assert "Other processes used 3.4% of it during NumPy's turns." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[:4] == [
        "| type | 1 | 16 |",
        "| :--- | ---: | ---: |",
        "| Q4_0 | 3.2 (50%) | 25.6 (50%) |",
        "| NumPy, float32 | 0.8 | 12.8 |",
    ]
    assert "| Q4_0 | 1.8 | 0.9 |" in lines  # GB/s
    assert lines.count("| Q4_0 | 4.00 | 2.00 |") == 2  # times NumPy


def test_json_holds_what_the_tables_show(report: KernelReport) -> None:
    found = json.loads(json.dumps(report.as_json()))
    assert found["peaks"]["int8_rate"] == 200e9
    product = found["products"][1]
    assert (product["type"], product["rows"], product["shape"]) == ("Q4_0", 16, [1000, 3200])
    assert product["mac_rate"] == pytest.approx(16 * 3.2e6 / 0.002)
    assert (product["reached"], product["sgemm_ratio"]) == pytest.approx((0.5, 2.0))
