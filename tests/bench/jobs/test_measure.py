"""``shoal bench jobs``: what is asked for is measured, in one report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.bench.jobs import memory
from shoal.bench.jobs.measure import JobsPlan, measure_jobs
from shoal.bench.jobs.memory import JobSize, RowKind


def plan(model: Path, *what: str) -> JobsPlan:
    sizes = {"journal_rows": 3, "prompt_len": 8, "output_len": 2, "prefix_rows": 3, "system_len": 40}
    return JobsPlan(model=model, what=what, rounds=1, rows=(5,), device="reference", threads=1, **sizes)


def test_what_is_asked_for_is_measured(tiny: Path) -> None:
    report = measure_jobs(plan(tiny, "prefix", "journal"), lambda line: None)
    head, *parts = report.as_markdown().split("\n\n")
    assert head.startswith("tiny.gguf, shoal ")
    assert head.endswith(" 1 threads; medians (min-max) of 1 alternating rounds.")
    assert [part.partition(":")[0] for part in parts if part.startswith("**")] == ["**Shared prefix**", "**Journal**"]
    found = json.loads(json.dumps(report.as_json()))
    assert (found["journal"]["rows"], found["journal"]["prompt_tokens"]) == (3, 24)
    assert (found["prefix"]["rows"], found["prefix"]["generated_tokens"]) == (3, 48)
    assert "memory" not in found


def test_memory_is_measured_on_a_model_of_its_own(vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes themselves are in test_memory.py."""
    models: list[str] = []

    def job(model: Path, kind: RowKind, rows: int) -> JobSize:
        models.append(model.name)
        return JobSize(kind.name, rows, seconds=1.0, peak_rss=1)

    monkeypatch.setattr(memory, "_run", job)
    found = measure_jobs(plan(vocabulary, "memory"), lambda line: None).as_json()
    assert [size["rows"] for size in found["memory"]["sizes"]] == [5, 5]
    assert set(models) == {"random.gguf"}
