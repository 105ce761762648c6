"""shoal's worker: what it times, and that it leaves nothing behind."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.bench import shoal_worker
from shoal.bench.shoal_worker import measure, peak_rss
from shoal.bench.turns import Worker
from shoal.errors import EngineError
from shoal.llm import LLM


def test_prefill_ends_when_all_have_a_token_and_steps_are_full(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts steps: 3 prompts of 12 tokens take 3 steps of 16 rows, among them decode rows of the first."""
    clock = SimpleNamespace(
        perf_counter=lambda: llm.engine.stats().steps, process_time=lambda: 2 * llm.engine.stats().steps
    )
    monkeypatch.setattr("shoal.bench.shoal_worker.time", clock)
    found = measure(llm, [[5] * 12, [6] * 12, [7] * 12], steps=4)
    assert (found["prefill_seconds"], found["decode_seconds"]) == (3, 4)
    assert (found["step_seconds"], found["cpu_seconds"]) == ([1, 1, 1, 1], [6, 8])


def test_nothing_is_left_of_a_turn(llm: LLM) -> None:
    for _ in range(2):
        measure(llm, [[1, 2, 3]] * 4, steps=2)
        stats = llm.engine.stats()
        assert (llm.has_work, stats.running, stats.waiting) == (False, 0, 0)
        assert stats.free_pages == stats.num_pages


def test_a_prompt_may_only_be_prefilled(llm: LLM) -> None:
    assert measure(llm, [[1] * 20], steps=0)["prefill_seconds"] > 0


def test_steps_that_were_not_full_are_refused(tiny: Path) -> None:
    """Two pages for two sequences that need two each: one is preempted."""
    with (
        LLM(tiny, device="reference", max_num_seqs=2, max_model_len=32, kv_cache_memory=3 * 16 * 256) as small,
        pytest.raises(EngineError, match="12 decode steps of 2 sequences gave"),
    ):
        measure(small, [[1] * 12, [2] * 12], steps=12)


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_rss()
    ballast = bytearray(64 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    del ballast
    assert 10 << 20 < before < 64 << 30
    assert peak_rss() >= before


def test_a_turn_finds_nothing_of_the_one_before(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[LLM] = []

    def noted(*args: Any, **flags: Any) -> LLM:
        opened.append(LLM(*args, **flags))
        return opened[0]

    turn = json.dumps({"prompts": [[1] * 40], "steps": 1})
    monkeypatch.setattr(shoal_worker, "LLM", noted)
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps({"model": str(tiny), "device": "reference"})])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{turn}\n{turn}\n"))
    shoal_worker.main()
    assert len(capsys.readouterr().out.splitlines()) == 3
    stats = opened[0].engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (80, 0)


def test_the_process_answers(tiny: Path) -> None:
    settings = {"model": str(tiny), "device": "reference", "max_num_seqs": 2, "max_model_len": 64}
    with Worker("shoal", [sys.executable, "-m", "shoal.bench.shoal_worker", json.dumps(settings)]) as worker:
        assert worker.facts["kv_bytes"] == 2 * 64 * 256
        answer = worker.ask({"prompts": [[1, 2, 3], [4, 5, 6]], "steps": 3})
    assert answer.keys() == {"prefill_seconds", "decode_seconds", "step_seconds", "cpu_seconds", "peak_rss"}
    assert answer["decode_seconds"] > 0
