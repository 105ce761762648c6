"""The memory of jobs: real processes on a model of their own, checked to have done what is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.bench.jobs import memory
from shoal.bench.jobs.memory import JobMemory, JobSize, measure_memory
from shoal.errors import EngineError
from shoal.gguf.reader import GGUFFile
from shoal.models.config import ModelConfig


def test_a_process_for_each_kind_and_size(vocabulary: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = measure_memory(vocabulary, tmp_path, (2, 30), said.append)
    assert [(size.kind, size.rows) for size in found.sizes] == [
        (kind, rows) for kind in ("fail", "generate one token") for rows in (2, 30)
    ]
    assert all(30 << 20 < size.peak_rss < 1 << 30 and size.seconds > 0 for size in found.sizes)
    assert [line.partition(" that ")[0] for line in said] == ["memory: 2 rows", "memory: 30 rows"] * 2
    with GGUFFile.open(tmp_path / "random.gguf") as file:
        assert ModelConfig.from_gguf(file).n_layers == 1


def test_a_job_that_cannot_run_is_an_error(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SMALLEST", replace(memory._SMALLEST, n_heads=3, n_kv_heads=2))
    with pytest.raises(EngineError, match="run-batch failed: shoal: "):
        measure_memory(vocabulary, tmp_path, (2,), lambda line: None)


def test_the_report() -> None:
    memory = JobMemory([JobSize("fail", 1_000_000, 100.0, 201_500_000), JobSize("generate one token", 3, 2.0, 9)])
    assert memory.as_markdown().splitlines()[4:] == [
        "| fail | 1,000,000 | 201.5 | 100.0 | 10000 |",
        "| generate one token | 3 | 0.0 | 2.0 | 2 |",
    ]
    assert json.loads(json.dumps(memory.as_json()))["sizes"][0]["peak_rss"] == 201_500_000
