"""``shoal bench startup``: stages that add up, kernels that are compiled once, failures that are told."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from shoal.bench.startup.measure import Start, StartupPlan, StartupReport, measure_startup
from shoal.errors import EngineError
from shoal.llm import LLM
from shoal.params import SamplingParams

STAGES = [
    "start Python",
    "import shoal",
    "import shoal.llm",
    "open the file",
    "import backend, start threads",
    "tokenizer",
    "chat template",
    "pack weights",
    "KV cache, bind, compile",
    "first token",
]


def test_the_stages_of_a_start_add_up(tiny: Path) -> None:
    said: list[str] = []
    report = measure_startup(StartupPlan(model=tiny, rounds=2, device="reference"), said.append)
    assert len(report.cold) == len(report.warm) == 2
    for start in (*report.cold, *report.warm):
        assert list(start.stages) == STAGES
        assert min(start.stages.values()) >= 0
        assert 0 < sum(start.stages.values()) <= start.total
        assert start.compiled == 0
        assert start.peak_rss > 10 << 20
    assert [line.partition(":")[0] for line in said] == [
        f"round {n}/2, {kind}" for n in (1, 2) for kind in ("cold", "warm")
    ]


def test_kernels_are_compiled_in_a_cold_start_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel for all of them: of the others the cold start finds what the tests have compiled before it."""
    with LLM(tiny, device="cpu", threads=1) as llm:
        llm.generate("x", SamplingParams(max_tokens=1))
    monkeypatch.setattr("tempfile.TemporaryDirectory", AlmostFilled)
    report = measure_startup(StartupPlan(model=tiny, rounds=1, device="cpu", threads=1), lambda line: None)
    assert AlmostFilled.made == 1
    assert report.cold[0].compiled > 0
    assert report.warm[0].compiled == 0


class AlmostFilled(tempfile.TemporaryDirectory[str]):
    """A new folder, with all of this process's kernels in it but one."""

    made = 0

    def __init__(self, prefix: str) -> None:
        from shoal.kernels.cpu.jit import STORE

        super().__init__(prefix=prefix)
        AlmostFilled.made += 1
        if STORE.folder is not None and STORE.folder.exists():
            shutil.copytree(STORE.folder, Path(self.name) / STORE.folder.name)
            (Path(self.name) / STORE.folder.name / "pool.wake").unlink(missing_ok=True)


def test_without_a_tokenizer_there_is_no_such_stage(tiny: Path) -> None:
    plan = StartupPlan(model=tiny, rounds=1, device="reference", skip_tokenizer_init=True)
    (start,) = measure_startup(plan, lambda line: None).cold
    assert [stage for stage in STAGES if stage not in start.stages] == ["tokenizer", "chat template"]


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(EngineError, match=r"starting broken\.gguf failed: .*GGUFError"):
        measure_startup(StartupPlan(model=broken, rounds=1, device="reference"), lambda line: None)


def start(total: float, imported: float, compiled: int) -> Start:
    return Start({"import shoal": imported, "pack weights": 0.5}, total, compiled, 300_000_000)


@pytest.fixture
def report() -> StartupReport:
    cold = [start(9.0, 0.06, 20), start(11.0, 0.04, 20), start(10.0, 0.05, 20)]
    warm = [start(1.0, 0.02, 0), start(1.2, 0.04, 0), start(1.1, 0.03, 0)]
    return StartupReport("m.gguf", 98_000_000, "Some CPU", cold, warm)


def test_markdown_has_a_line_a_stage(report: StartupReport) -> None:
    lines = report.as_markdown().splitlines()
    assert lines[0].startswith("m.gguf (98 MB), shoal ")
    assert lines[2:] == [
        "| stage | cold kernel cache | warm |",
        "| :--- | ---: | ---: |",
        "| import shoal | 0.050 (0.040-0.060) | 0.030 (0.020-0.040) |",
        "| pack weights | 0.500 (0.500-0.500) | 0.500 (0.500-0.500) |",
        "| the rest | 9.450 (8.440-10.460) | 0.570 (0.480-0.660) |",
        "| **to the first token** | 10.000 (9.000-11.000) | 1.100 (1.000-1.200) |",
        "| kernels compiled | 20 | 0 |",
        "| peak memory | 300 MB | 300 MB |",
    ]


def test_json_has_the_medians_that_matter(report: StartupReport) -> None:
    found = json.loads(json.dumps(report.as_json()))
    assert (found["import_shoal_seconds"], found["cold_seconds"], found["warm_seconds"]) == (0.03, 10.0, 1.1)
    assert found["cold"][2]["stages"]["import shoal"] == 0.05
