"""The tables of ``shoal bench peers``."""

from __future__ import annotations

import json

import pytest

from shoal.bench.machine import Machine
from shoal.bench.report import Comparison, Memory, Phase, Report, Speed
from shoal.bench.roofline import Work

MACHINE = Machine("Some CPU", 2, 24 << 30, 2, read_bandwidth=10e9, mac_rate=100e9)
PHASE = Phase(batch=4, prompt_len=128, tokens=4 * 32, work=Work(100e6, 0.54e9), passes=32)
PEER = {"fa on": [2.0, 1.0, 4.0], "fa off": [1.6, 1.7, 1.9]}


@pytest.fixture
def row() -> Comparison:
    return Comparison.of(PHASE, [0.5, 0.8, 0.64], PEER, MACHINE)


def test_speed_is_the_median_with_its_range() -> None:
    speed = Speed.of(100, [1.0, 4.0, 2.0])
    assert speed == Speed(median=50.0, low=25.0, high=100.0)
    assert str(speed) == "50 (25-100)"


def test_the_peer_gets_its_better_setting(row: Comparison) -> None:
    assert row.setting == "fa off"
    assert row.peer.median == pytest.approx(128 / 1.7)


def test_ratio_and_share_of_the_roofline(row: Comparison) -> None:
    assert row.shoal.median == pytest.approx(200.0)
    assert row.ratio == pytest.approx(1.7 / 0.64)
    assert row.roofline == pytest.approx(400.0)  # 32 steps of 10 ms (memory) for 128 tokens
    assert row.reached == pytest.approx(0.5)


def test_the_peer_has_no_say_in_shoals_speed(row: Comparison) -> None:
    faster = Comparison.of(PHASE, [0.5, 0.8, 0.64], {"fa on": [0.1]}, MACHINE)
    assert faster.shoal == row.shoal
    assert faster.ratio < 1 < row.ratio


def test_memory_adds_up() -> None:
    memory = Memory(peak_rss=300_000_000, file=98_000_000, kv=60_000_000)
    assert str(memory) == "shoal's peak memory: 300 MB = file 98 MB + KV 60 MB + 142 MB"


def report(*decode: Comparison) -> Report:
    return Report(
        model="tiny.gguf",
        machine=MACHINE,
        threads=2,
        rounds=3,
        versions={"shoal": "1.0", "llama-cpp-python": "2.0"},
        decode=decode,
        prefill=[],
        memory=Memory(3, 1, 1),
        other_load=0.012,
    )


def test_markdown_has_a_line_for_each_row(row: Comparison) -> None:
    text = report(row, row).as_markdown()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == ["4", "128", "200 (160-256)", "75 (67-80)", "2.66", "fa off", "100", "0.54", "400", "50%"]
    assert "Other processes used 1.2% of it" in text
    assert "Prefill" not in text


def test_json_holds_what_the_table_shows(row: Comparison) -> None:
    found = json.loads(json.dumps(report(row).as_json()))
    assert found["decode"][0]["ratio"] == pytest.approx(row.ratio)
    assert found["decode"][0]["reached"] == pytest.approx(row.reached)
    assert found["decode"][0]["phase"]["work"] == {"num_bytes": 100e6, "macs": 0.54e9}
    assert found["prefill"] == []
    assert found["machine"]["read_bandwidth"] == 10e9
