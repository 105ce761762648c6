"""OpenVINO's worker: the protocol against a stand-in for the library, and the library itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.bench.peers.programs import OPENVINO
from shoal.bench.turns import Worker
from shoal.errors import EngineError

# Gives each sequence a token a step, prefills one prompt a step, and writes down how it was set up.
STAND_IN = """
from types import SimpleNamespace
__version__ = "7"
GenerationConfig = SchedulerConfig = SimpleNamespace

class Handle:
    def __init__(self):
        self.tokens, self.started, self.cancelled = [], False, False
    def can_read(self):
        return bool(self.tokens)
    def read(self):
        tokens, self.tokens = self.tokens, []
        return {0: SimpleNamespace(generated_ids=tokens)}
    def cancel(self):
        self.cancelled = True

class ContinuousBatchingPipeline:
    def __init__(self, model, scheduler, device, properties):
        if model == "unreadable":
            raise RuntimeError("no such tensor type")
        print("loaded", vars(scheduler), properties)
        self.log, self.handles = open(model, "a", buffering=1), []
        self.kv = properties["KV_CACHE_PRECISION"]
    def add_request(self, number, tensor, config):
        self.handles.append(Handle())
        self.log.write(f"{self.kv} {number} {tensor.shape} {config.max_new_tokens > 1000}\\n")
        return self.handles[-1]
    def step(self):
        self.handles = [handle for handle in self.handles if not handle.cancelled]
        fresh = [handle for handle in self.handles if not handle.started][:1]
        for handle in fresh:
            handle.started = True
        for handle in self.handles:
            if handle.started:
                handle.tokens.append(1)
    def has_non_finished_requests(self):
        return bool(self.handles)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library is a stand-in; this file is the model and hears what requests there are."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "openvino.py").write_text("def Tensor(array): return array\n")
    (packages / "openvino_genai.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    return tmp_path / "heard"


def worker(model: Path | str) -> Worker:
    settings = {"model": str(model), "threads": 1, "sequences": 3, "context": 600}
    return Worker("OpenVINO GenAI", OPENVINO.command(sys.executable, settings))


def turn(count: int, steps: int, kv_type: str = "f16") -> dict[str, Any]:
    return {"prompts": [[1, 2, 3, 4]] * count, "steps": steps, "kv_type": kv_type}


def test_only_answers_are_on_stdout(stand_in: Path) -> None:
    with worker(stand_in) as openvino:
        assert openvino.facts == {"version": "7"}
        answer = openvino.ask(turn(2, 3))
    assert answer.keys() == {"prefill_seconds", "decode_seconds"}
    assert min(answer.values()) > 0


def test_what_is_new_runs_once_before(stand_in: Path) -> None:
    with worker(stand_in) as openvino:
        for _ in range(2):
            openvino.ask(turn(2, 3))
        openvino.ask(turn(1, 3, "u8"))
    requests = [f"f16 {number} (1, 4) True" for number in (0, 1)]
    assert stand_in.read_text().splitlines() == 3 * requests + 2 * ["u8 0 (1, 4) True"]


def test_a_file_that_it_cannot_read_is_its_last_word(stand_in: Path) -> None:
    with pytest.raises(EngineError, match="the OpenVINO GenAI worker ended: RuntimeError: no such tensor type"):
        worker("unreadable")


@pytest.fixture
def real(smollm2_path: Path) -> Iterator[Worker]:
    with worker(smollm2_path) as openvino:
        yield openvino


@pytest.mark.skipif(importlib.util.find_spec("openvino_genai") is None, reason="openvino-genai is not installed")
def test_the_library_takes_turns(real: Worker) -> None:
    for kv_type in ("f16", "u8"):
        answer = real.ask(turn(3, 4, kv_type))
        assert json.loads(json.dumps(answer))["decode_seconds"] > 0
