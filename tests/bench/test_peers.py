"""shoal beside llama.cpp: whose turn it is, what is asked of each, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.bench import machine, peers
from shoal.bench.peers import Case, Plan, compare_with_llama_cpp, require_llama_cpp
from shoal.bench.report import Report
from shoal.bench.turns import Answer, OtherLoad, Turn, Worker
from shoal.errors import ParameterError

# Stands in for llama.cpp where only the turns matter: writes down what it hears and says what it took.
SCRIPTED = """
import json, sys
log = open(sys.argv[1], "a", buffering=1)
print(json.dumps({"version": "9"}), flush=True)
for line in sys.stdin:
    log.write(line)
    seconds = 1.0 if json.loads(line)["flash_attn"] else 2.0
    print(json.dumps({"prefill_seconds": seconds, "decode_seconds": 10 - seconds}), flush=True)
"""


def plan(model: Path, **settings: Any) -> Plan:
    small: dict[str, Any] = {
        "prompt_len": 6,
        "output_len": 3,
        "batches": (1, 2),
        "prefill_lens": (9,),
        "rounds": 2,
        "threads": 1,
        "device": "reference",
    }
    return Plan(model=model, peer_python=sys.executable, **(small | settings))


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "measure_mac_rate", lambda backend: 1e9)


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """llama.cpp's side is scripted; this is what it was asked."""
    log = tmp_path / "heard.jsonl"
    monkeypatch.setattr(peers, "require_llama_cpp", lambda python: None)
    monkeypatch.setattr(peers, "_peer_command", lambda plan: [sys.executable, "-c", SCRIPTED, str(log)])
    return log


def test_each_round_measures_each_case_with_each_setting(tiny: Path, heard: Path) -> None:
    said: list[str] = []
    compare_with_llama_cpp(plan(tiny), said.append)
    turns = [json.loads(line) for line in heard.read_text().splitlines()]
    asked = [(len(t["prompts"]), len(t["prompts"][0]), t["steps"], t["flash_attn"], t["kv_unified"]) for t in turns]
    one = [(1, 6, 3, True, False), (1, 6, 3, False, False)]
    two = [(2, 6, 3, fa, unified) for fa in (True, False) for unified in (True, False)]
    only_prefill = [(1, 9, 0, True, False), (1, 9, 0, False, False)]
    assert asked == one + 2 * (one + two + only_prefill)  # the first pair warms up
    assert [line for line in said if line.startswith("round 2")] == [
        "round 2/2: 1 x 6 tokens, 3 steps",
        "round 2/2: 2 x 6 tokens, 3 steps",
        "round 2/2: 1 x 9 tokens, 0 steps",
    ]


def rows(report: Report, phase: str) -> list[tuple[int, int, str, float]]:
    return [(r.phase.batch, r.phase.prompt_len, r.setting, r.peer.median) for r in getattr(report, phase)]


@pytest.mark.usefixtures("heard")
def test_each_phase_takes_the_peers_better_setting(tiny: Path) -> None:
    report = compare_with_llama_cpp(plan(tiny), lambda line: None)
    assert rows(report, "prefill") == [
        (1, 6, "fa on", 6.0),
        (2, 6, "fa on, unified kv", 12.0),
        (1, 9, "fa on", 9.0),
    ]
    assert rows(report, "decode") == [(1, 6, "fa off", 3 / 8), (2, 6, "fa off, unified kv", 6 / 8)]
    assert report.versions["llama-cpp-python"] == "9"
    assert report.memory.file == tiny.stat().st_size
    assert report.memory.peak_rss > report.memory.kv > 0
    json.dumps(report.as_json())


def test_both_sides_get_the_same_prompts(tiny: Path, heard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = OtherLoad.watch

    def remember(self: OtherLoad, worker: Worker, turn: Turn) -> Answer:
        if worker.name == "shoal":
            asked.append(turn["prompts"])
        return original(self, worker, turn)

    monkeypatch.setattr(OtherLoad, "watch", remember)
    compare_with_llama_cpp(plan(tiny, rounds=1, batches=(2,), prefill_lens=()), lambda line: None)
    turns = [json.loads(line)["prompts"] for line in heard.read_text().splitlines()]
    assert asked == turns[::4]
    assert all(turn == turns[0] for turn in turns)


def test_the_context_has_room_for_those_who_start_early() -> None:
    assert Case(1, 512, 0).context == 512 + 2 + 0 + 1
    assert Case(32, 128, 32).context == 128 + 9 + 32 + 1  # 4096 prompt tokens in 480 rows a step


def without_llama_cpp(folder: Path) -> str:
    """A Python that has the standard library alone."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("python", ["no/such/python", None])
def test_a_python_without_llama_cpp_is_refused(tmp_path: Path, python: str | None) -> None:
    chosen = python or without_llama_cpp(tmp_path)
    with pytest.raises(ParameterError, match="pip install llama-cpp-python") as refused:
        require_llama_cpp(chosen)
    assert refused.value.field == "peer_python"
    assert chosen in str(refused.value)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_takes_its_turns(smollm2_path: Path) -> None:
    report = compare_with_llama_cpp(plan(smollm2_path, device="cpu", rounds=1), lambda line: None)
    assert [row.peer.median > 0 for row in report.decode] == [True, True]
