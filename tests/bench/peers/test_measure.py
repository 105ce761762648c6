"""shoal beside its peers: whose turn it is, what is asked of each, and what happens to those that fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.bench import machine
from shoal.bench.peers import measure
from shoal.bench.peers.measure import Case, Plan, _too_slow, compare_with_peers
from shoal.bench.peers.programs import LLAMA_CPP, OPENVINO
from shoal.bench.peers.report import Report
from shoal.bench.turns import Answer, OtherLoad, Turn, Worker
from shoal.errors import ParameterError

# Stands in for a peer where only the turns matter: writes down what it hears and says what it took. A setting is either
# the best at prefill or the best at decode, but those with "kv_unified" are bad at both.
SCRIPTED = """
import json, sys
log = open(sys.argv[1], "a", buffering=1)
print(json.dumps({"version": "9"}), flush=True)
for line in sys.stdin:
    log.write(line)
    turn = json.loads(line)
    seconds = 1.0 if turn.get("flash_attn") else 2.0
    slower = 5.0 if turn.get("kv_unified") else 1.0
    print(json.dumps({"prefill_seconds": slower * seconds, "decode_seconds": slower * (10 - seconds)}), flush=True)
"""
REFUSES = "import sys; sys.exit('no such tensor type')"
FAILS_LATER = """
import sys
print('{"version": "1"}', flush=True)
for _ in range(2):
    sys.stdin.readline()
    print('{"prefill_seconds": 1, "decode_seconds": 1}', flush=True)
sys.exit("out of memory")
"""


def plan(model: Path, **settings: Any) -> Plan:
    small: dict[str, Any] = {
        "pythons": {LLAMA_CPP: sys.executable},
        "prompt_len": 6,
        "output_len": 3,
        "batches": (1, 2),
        "prefill_lens": (9,),
        "rounds": 2,
        "threads": 1,
        "device": "reference",
    }
    return Plan(model=model, **(small | settings))


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_mac_rate", lambda backend: 1e9)


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """llama.cpp's side is scripted; this is what it was asked."""
    log = tmp_path / "heard.jsonl"
    script(monkeypatch, {LLAMA_CPP.name: [sys.executable, "-c", SCRIPTED, str(log)]})
    return log


def script(monkeypatch: pytest.MonkeyPatch, commands: dict[str, list[str]]) -> None:
    """These run instead of the workers of peers, all of which can be imported."""
    monkeypatch.setattr(measure, "importable", list)
    monkeypatch.setattr(measure, "_peer_command", lambda plan, peer: commands[peer.name])


def quiet(line: str) -> None:
    """What is said on the way is of no interest."""


def test_each_round_measures_each_case_with_each_setting(tiny: Path, heard: Path) -> None:
    said: list[str] = []
    compare_with_peers(plan(tiny), said.append)
    turns = [json.loads(line) for line in heard.read_text().splitlines()]
    asked = [(len(t["prompts"]), len(t["prompts"][0]), t["steps"], t["flash_attn"], t["kv_unified"]) for t in turns]
    one = [(1, 6, 3, True, False), (1, 6, 3, False, False)]
    two = [(2, 6, 3, fa, unified) for fa in (True, False) for unified in (True, False)]
    still = [(2, 6, 3, True, False), (2, 6, 3, False, False)]  # what was slow in the first round is dropped
    only_prefill = [(1, 9, 0, True, False), (1, 9, 0, False, False)]
    warm_up = [(1, 6, 1, True, False), (1, 6, 1, False, False)]
    assert asked == warm_up + one + two + only_prefill + one + still + only_prefill
    assert [line for line in said if line.startswith("round 2")] == [
        "round 2/2: 1 x 6 tokens, 3 steps",
        "round 2/2: 2 x 6 tokens, 3 steps",
        "round 2/2: 1 x 9 tokens, 0 steps",
    ]


def test_a_setting_close_to_the_best_of_either_phase_stays() -> None:
    def turn(prefill: float, decode: float) -> list[Answer]:
        return [{"prefill_seconds": prefill, "decode_seconds": decode}]

    taken = {"a": turn(1.0, 9.0), "b": turn(1.09, 9.0), "c": turn(2.0, 5.0), "d": turn(1.2, 5.6)}
    assert _too_slow(taken) == {"d"}
    assert _too_slow({}) == set()


def rows(report: Report, phase: str) -> list[tuple[int, int, str, float]]:
    found = [(row, row.peers["llama.cpp"]) for row in getattr(report, phase)]
    return [(row.phase.batch, row.phase.prompt_len, peer.setting, peer.speed.median) for row, peer in found]


@pytest.mark.usefixtures("heard")
def test_each_phase_takes_the_peers_better_setting(tiny: Path) -> None:
    report = compare_with_peers(plan(tiny), quiet)
    assert rows(report, "prefill") == [(1, 6, "fa on", 6.0), (2, 6, "fa on", 12.0), (1, 9, "fa on", 9.0)]
    assert rows(report, "decode") == [(1, 6, "fa off", 3 / 8), (2, 6, "fa off", 6 / 8)]
    assert report.versions["llama-cpp-python"] == "9"
    assert report.formats == {"Q4_1": 15}
    assert report.memory.file == tiny.stat().st_size
    assert report.memory.peak_rss > report.memory.kv > 0
    json.dumps(report.as_json())


def test_all_sides_get_the_same_prompts(tiny: Path, heard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = OtherLoad.watch

    def remember(self: OtherLoad, worker: Worker, turn: Turn) -> Answer:
        if worker.name == "shoal":
            asked.append(turn["prompts"])
        return original(self, worker, turn)

    monkeypatch.setattr(OtherLoad, "watch", remember)
    compare_with_peers(plan(tiny, rounds=1, batches=(2,), prefill_lens=()), quiet)
    turns = [json.loads(line)["prompts"] for line in heard.read_text().splitlines()]
    assert asked == turns[::4]
    assert all(turn == turns[0] for turn in turns)


def test_the_warm_up_is_short(tiny: Path, heard: Path) -> None:
    compare_with_peers(plan(tiny, rounds=1, batches=(2,), prompt_len=40, prefill_lens=()), quiet)
    first = json.loads(heard.read_text().splitlines()[0])
    assert ([len(prompt) for prompt in first["prompts"]], first["steps"]) == ([16, 16], 1)


def test_peers_that_fail_are_left_out_and_say_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {
        LLAMA_CPP.name: [sys.executable, "-c", FAILS_LATER],
        OPENVINO.name: [sys.executable, "-c", REFUSES],
    }
    script(monkeypatch, commands)
    pythons = {LLAMA_CPP: sys.executable, OPENVINO: sys.executable}
    report = compare_with_peers(plan(tiny, pythons=pythons, batches=(1,), prefill_lens=()), quiet)
    assert report.not_run == {
        "llama.cpp": "the llama.cpp worker ended: out of memory",
        "OpenVINO GenAI": "the OpenVINO GenAI worker ended: no such tensor type",
    }
    (row,) = report.decode
    assert row.shoal.median > 0
    assert row.peers == {}


@pytest.mark.usefixtures("heard")
def test_a_peer_that_is_not_installed_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "importable", lambda pythons: [LLAMA_CPP])
    pythons = {LLAMA_CPP: sys.executable, OPENVINO: sys.executable}
    report = compare_with_peers(plan(tiny, pythons=pythons, rounds=1), quiet)
    assert report.not_run == {"OpenVINO GenAI": "OpenVINO GenAI: cannot import openvino_genai"}
    assert list(report.decode[0].peers) == ["llama.cpp"]


def test_without_any_peer_nothing_is_measured(tiny: Path) -> None:
    with pytest.raises(ParameterError, match="pip install llama-cpp-python"):
        compare_with_peers(plan(tiny, pythons={LLAMA_CPP: "no/such/python"}), quiet)


def test_the_context_has_room_for_those_who_start_early() -> None:
    assert Case(1, 512, 0).context == 512 + 2 + 0 + 1
    assert Case(32, 128, 32).context == 128 + 9 + 32 + 1  # 4096 prompt tokens in 480 rows a step


def test_peers_are_told_how_much_room_is_needed(tiny: Path) -> None:
    chosen = plan(tiny, batches=(8, 2), prompt_len=2000, output_len=32)
    settings = json.loads(measure._peer_command(chosen, LLAMA_CPP)[-1])
    assert (settings["sequences"], settings["context"]) == (8, 2000 + 32 + 32 + 1)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_takes_its_turns(smollm2_path: Path) -> None:
    report = compare_with_peers(plan(smollm2_path, device="cpu", rounds=1), quiet)
    assert [row.peers["llama.cpp"].speed.median > 0 for row in report.decode] == [True, True]
