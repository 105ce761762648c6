"""``python -m shoal bench gpu`` runs where there is little more than NumPy, torch and Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import shoal
from shoal.bench.gpu.main import main
from tests.bench.gpu import refusing

SOURCE = Path(shoal.__file__).parent.parent
TINY = [
    "--models",
    "tiny",
    "--types",
    "Q4_K,Q5_1",
    "--batches",
    "1,3",
    "--context",
    "20",
    "--steps",
    "2",
    "--prompt",
    "24",
]

needs_torch = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("triton")), reason="torch or triton is not installed: pip install '.[cuda]'"
)


def run(how: str, *arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, refusing.__file__, how, *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=environment)


@needs_torch
def test_without_a_gpu_it_says_so_and_has_imported_nothing_else() -> None:
    done = run("bare", interpret="0")
    assert done.returncode == 2
    assert done.stderr == "shoal: device cuda: no GPU found (torch.cuda.is_available() is false)\n"


@needs_torch
def test_a_whole_run_imports_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    done = run("whole", *TINY, "--output-json", str(path), interpret="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["errors"] == {}
    assert found["not_run"] == []
    assert found["about"]["name"].startswith("Triton's interpreter")
    checked = found["results"]["check"]
    assert {"model Q4_K_M", "linear Q4_K", "linear Q5_1", "experts", "attention window"} <= checked.keys()
    speeds = found["results"]["tiny Q4_K_M"]
    assert list(speeds) == ["load", "tune", "bind", "decode 1", "decode 3", "prefill 24", "same bits", "unload"]
    assert speeds["decode 3"]["tokens_per_second"] > 0
    assert f"{len(checked)} checks passed" in done.stdout
    assert "| tiny Q4_K_M | decode 3 |" in done.stdout


@needs_torch
def test_a_budget_of_nothing_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    done = run("whole", *TINY, "--budget", "-1", "--output-json", str(path), interpret="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["results"] == {}
    assert "device: copy" in found["not_run"]
    assert "tiny Q4_K_M: decode 1" in found["not_run"]


def test_the_refusal_refuses() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(refusing.__file__).parent)!r}); import refusing\n"
    code += "sys.meta_path.insert(0, refusing.Refuse()); import click"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.endswith("ImportError: click is refused\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "llama-70b"], "models: got 'llama-70b', must be some of llama-1b"),
        (["--types", "Q4_K,Q9_9"], "type: got 'Q9_9', must be one of Q4_K_M"),
        (["--batches", "4,0"], "batches: got '4,0', must be numbers from 1 up"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"shoal: {message}")


def test_the_flags_of_shoal_bench_gpu_are_the_modules_own() -> None:
    texts = []
    for entry in (["-m", "shoal"], ["-m", "shoal.cli.main"]):
        done = subprocess.run(
            [sys.executable, *entry, "bench", "gpu", "--help"], capture_output=True, text=True, check=True
        )
        texts.append(done.stdout)
    assert "--budget SECONDS" in texts[0]
    assert texts[0] == texts[1]


def test_python_m_shoal_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "shoal", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"shoal, version {shoal.__version__}\n"
