"""The tables of ``shoal bench peers``."""

from __future__ import annotations

import json

import pytest

from shoal.bench.machine import Machine
from shoal.bench.peers.report import Comparison, Memory, PeerSpeed, Phase, Report
from shoal.bench.roofline import Work

MACHINE = Machine("Some CPU", 2, 24 << 30, 2, read_bandwidth=10e9, mac_rate=100e9)
PHASE = Phase(batch=4, prompt_len=128, tokens=4 * 32, work=Work(100e6, 0.54e9), passes=32)
SHOAL = [0.5, 0.8, 0.64]
PEER = {"fa on": [2.0, 1.0, 4.0], "fa off": [1.6, 1.7, 1.9]}


@pytest.fixture
def row() -> Comparison:
    return Comparison.of(PHASE, SHOAL, {"llama.cpp": PEER}, MACHINE)


@pytest.fixture
def peer(row: Comparison) -> PeerSpeed:
    return row.peers["llama.cpp"]


def test_the_peer_gets_its_better_setting(peer: PeerSpeed) -> None:
    assert peer.setting == "fa off"
    assert peer.speed.median == pytest.approx(128 / 1.7)


def test_a_ratio_is_that_of_medians_with_the_range_over_rounds(peer: PeerSpeed) -> None:
    assert peer.ratio.of_medians == pytest.approx(1.7 / 0.64)
    assert (peer.ratio.low, peer.ratio.high) == pytest.approx((1.7 / 0.8, 1.6 / 0.5))
    assert str(peer.ratio) == "2.66 (2.12-3.20)"


def test_share_of_the_roofline(row: Comparison) -> None:
    assert row.shoal.median == pytest.approx(200.0)
    assert row.roofline == pytest.approx(400.0)  # 32 steps of 10 ms (memory) for 128 tokens
    assert row.reached == pytest.approx(0.5)


def test_the_peer_has_no_say_in_shoals_speed(row: Comparison) -> None:
    faster = Comparison.of(PHASE, SHOAL, {"llama.cpp": {"fa on": [0.1] * 3}}, MACHINE)
    assert faster.shoal == row.shoal
    assert faster.peers["llama.cpp"].ratio.of_medians < 1 < row.peers["llama.cpp"].ratio.of_medians


def test_memory_adds_up() -> None:
    memory = Memory(peak_rss=300_000_000, file=98_000_000, kv=60_000_000)
    assert str(memory) == "shoal's peak memory: 300 MB = file 98 MB + KV 60 MB + 142 MB"


def report(*decode: Comparison) -> Report:
    return Report(
        model="tiny.gguf",
        formats={"Q8_0": 1, "Q4_1": 30},
        machine=MACHINE,
        threads=2,
        rounds=3,
        versions={"shoal": "1.0", "llama-cpp-python": "2.0"},
        not_run={"OpenVINO GenAI": "the OpenVINO GenAI worker ended: no such type"},
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
    llama_cpp = ["75 (67-80)", "2.66 (2.12-3.20)", "fa off"]
    assert cells == ["4", "128", "200 (160-256)", *llama_cpp, "100", "0.54", "400", "50%"]
    assert text.startswith("tiny.gguf (30 Q4_1, 1 Q8_0), shoal 1.0, llama-cpp-python 2.0, 2 threads each")
    assert "Other processes used 1.2% of it" in text
    assert "Prefill" not in text


def test_a_peer_that_cannot_run_says_why_and_has_no_columns(row: Comparison) -> None:
    text = report(row).as_markdown()
    assert "Not measured: the OpenVINO GenAI worker ended: no such type." in text.splitlines()
    assert "OpenVINO GenAI tokens/s" not in text


def test_a_peer_that_failed_later_has_dashes(row: Comparison) -> None:
    both = Comparison.of(PHASE, SHOAL, {"llama.cpp": PEER, "other": {"": [1.0]}}, MACHINE)
    lines = report(both, row).as_markdown().splitlines()
    header, _, first, second = (line.strip("|").split(" | ") for line in lines if line.startswith("|"))
    start = header.index("other tokens/s")
    assert header[start : start + 3] == ["other tokens/s", "ratio", "other settings"]
    assert first[start] == "128 (128-128)"
    assert second[start : start + 3] == ["-", "-", "-"]


def test_without_any_peer_shoal_is_still_in_the_table() -> None:
    alone = Comparison.of(PHASE, SHOAL, {}, MACHINE)
    assert "| 4 | 128 | 200 (160-256) | 100 | 0.54 | 400 | 50% |" in report(alone).as_markdown().splitlines()


def test_json_holds_what_the_table_shows(row: Comparison) -> None:
    found = json.loads(json.dumps(report(row).as_json()))
    peer = found["decode"][0]["peers"]["llama.cpp"]
    assert peer["ratio"]["of_medians"] == pytest.approx(1.7 / 0.64)
    assert (peer["setting"], peer["speed"]["median"]) == ("fa off", pytest.approx(128 / 1.7))
    assert found["decode"][0]["reached"] == pytest.approx(row.reached)
    assert found["decode"][0]["phase"]["work"] == {"num_bytes": 100e6, "macs": 0.54e9}
    assert found["prefill"] == []
    assert found["machine"]["read_bandwidth"] == 10e9
