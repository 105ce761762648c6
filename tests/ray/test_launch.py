"""Jobs on a cluster give what they give on one machine, from all kinds of input to all kinds of output; and end as they do there."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal import jobs
from shoal import ray as on_ray
from shoal.errors import JobError, ParameterError
from shoal.jobs.durable import ledger
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.launch import run_job
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.task import JobOptions
from shoal.params import EngineConfig
from tests.jobs.kills import records_of
from tests.ray.machines import ROOT, Machines
from tests.support.tiny_encoders import TINY_ENCODERS
from tests.support.tiny_model import write_tiny_model

ENGINE = {"device": "reference", "max_num_seqs": 4}
MANY = 2000
NEVER = {"prompt": "x", "ignore_eos": True, "max_tokens": 100}  # of which there are more than a test has time for
ROWS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"prompt": f"row {i}", "max_tokens": 1 + i % 5, "ignore_eos": True} for i in range(ROWS)]
    return write(tmp_path / "in.jsonl", *rows, {"prompt": "x" * 500}, "no json")


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def run(model: Path, source: Path, output: Path, cluster: Machines, **keywords: Any) -> jobs.Summary:
    keywords = {"show_progress": False, "workers": 2, **ENGINE, **keywords}
    return on_ray.run(model, source, output, address=cluster.address, **keywords)


def run_here(model: Path, source: Path, output: Path, **keywords: Any) -> jobs.Summary:
    return jobs.run(model, source, output, **{"show_progress": False, **ENGINE, **keywords})


def content(output: Path) -> dict[str, str]:
    """The records by name, without the names of files."""
    outputs = output, output.with_name(output.name + ".errors.jsonl")
    return {name: record.decode().partition(": ")[2] for name, record in records_of(outputs)}


def test_rows_get_the_answers_that_one_machine_gives(
    model: Path, source: Path, tmp_path: Path, cluster: Machines
) -> None:
    here = run_here(model, source, tmp_path / "here.jsonl")
    there = run(model, source, tmp_path / "there.jsonl", cluster)
    assert content(tmp_path / "there.jsonl") == content(tmp_path / "here.jsonl")
    assert (there.done, there.failed) == (here.done, here.failed) == (ROWS, 2)
    assert there.generated_tokens == here.generated_tokens


def test_embeddings(tmp_path: Path, cluster: Machines) -> None:
    model = tmp_path / "bert.gguf"
    replace(TINY_ENCODERS["bert"], words=True).write(model)
    rows = [
        {"custom_id": f"row {i}", "method": "POST", "url": "/v1/embeddings", "body": {"input": ["abc def"[i:], "a"]}}
        for i in range(5)
    ]
    source = write(tmp_path / "in.jsonl", *rows)
    run_here(model, source, tmp_path / "here.jsonl")
    summary = run(model, source, tmp_path / "there.jsonl", cluster)
    assert summary.done == 5
    assert content(tmp_path / "there.jsonl") == content(tmp_path / "here.jsonl")


def test_a_table_becomes_a_table(model: Path, tmp_path: Path, cluster: Machines) -> None:
    source = tmp_path / "in.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], *([f"row {i}"] for i in range(10))])
    run_here(model, source, tmp_path / "here.csv", defaults={"max_tokens": 4})
    run(model, source, tmp_path / "there.csv", cluster, defaults={"max_tokens": 4})
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()


def test_a_job_moves_to_the_cluster_and_back(
    model: Path, source: Path, tmp_path: Path, cluster: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_SHORTEST_INTERVAL", 0)
    monkeypatch.setattr(ledger, "_INTERVAL_PER_COST", 0)
    output = tmp_path / "moved.jsonl"
    files, config = JobFiles.named(source, output), EngineConfig(device="reference", max_num_seqs=4)
    said: list[str] = []

    def go_on(runner: Callable[..., jobs.Summary], rows: int, **more: Any) -> None:
        with pytest.raises(RuntimeError, match="enough"):
            runner(model, files, JobOptions(), config, say=said.append, report=stopping_after(rows), **more)

    go_on(run_job, 5)
    go_on(on_ray.run_job, 14, cluster=on_ray.Cluster(address=cluster.address, workers=2))
    summary = run_here(model, source, output)
    assert sum("going on: " in text for text in said) == 1, "the run on the cluster went on"
    assert summary.resumed == 2
    run_here(model, source, tmp_path / "whole.jsonl")
    assert content(output) == content(tmp_path / "whole.jsonl")


def stopping_after(rows: int) -> Callable[[JobProgress], None]:
    """A report that ends the job, as a crash would, once so many rows are durable."""

    def report(progress: JobProgress) -> None:
        if progress.totals.done + progress.totals.failed >= rows:
            raise RuntimeError("enough")

    return report


def test_a_job_is_cancelled(model: Path, tmp_path: Path, cluster: Machines) -> None:
    source, output = write(tmp_path / "in.jsonl", *([NEVER] * MANY)), tmp_path / "out.jsonl"
    timer = threading.Thread(target=cancel_soon, args=(output,))
    timer.start()
    summary = run(model, source, output, cluster)
    timer.join()
    assert summary.state == "cancelled"
    assert summary.done + summary.failed == MANY
    assert summary.failed


def cancel_soon(output: Path) -> None:
    while True:
        with suppress(JobError, ParameterError):
            if jobs.status(output).state == "running":
                jobs.cancel(output)
                return


@contextmanager
def command(cluster: Machines, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command line on the cluster, in a session of its own, as a shell has it."""
    flags = ["--ray", cluster.address, "--workers", "2", "--device", "reference", "--max-num-seqs", "4"]
    with subprocess.Popen(
        [sys.executable, "-m", "shoal.cli.main", "run-batch", *map(str, arguments), *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def worker(process: subprocess.Popen[str]) -> int:
    """Wait until a worker is at work; its pid."""
    assert process.stderr is not None
    for line in process.stderr:
        if " is at work on " in line:
            return int(line.partition(" is at work on ")[2].partition(",")[0].rpartition("/")[2])
    raise AssertionError("no worker came")


def test_ctrl_c_ends_the_job_and_its_workers(model: Path, tmp_path: Path, cluster: Machines) -> None:
    source, output = write(tmp_path / "in.jsonl", *([NEVER] * MANY)), tmp_path / "out.jsonl"
    with command(cluster, model, "-i", source, "-o", output) as process:
        pid = worker(process)
        while process.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished rows are safe: resume with the same command" in stderr
    assert "Traceback" not in stderr
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60)


def test_from_stdin_to_stdout_only_records_come_out(model: Path, cluster: Machines) -> None:
    rows = [{"prompt": f"row {i}", "max_tokens": 100, "ignore_eos": True} for i in range(60)]
    with command(cluster, model, "-i", "-", "-o", "-") as process:
        assert process.stdin is not None
        process.stdin.write("".join(json.dumps(row) + "\n" for row in rows[:30]))
        process.stdin.flush()
        os.kill(worker(process), signal.SIGKILL)
        stdout, stderr = process.communicate("".join(json.dumps(row) + "\n" for row in rows[30:]), timeout=120)
    assert process.returncode == 0, stderr
    assert "rows go back in line" in stderr
    found = [json.loads(line) for line in stdout.splitlines()]
    assert sorted(record["custom_id"] for record in found) == sorted(f"row-{i}" for i in range(1, 61))


def test_settings_that_cannot_be(model: Path, source: Path, tmp_path: Path, cluster: Machines) -> None:
    for wrong in (
        {"workers": 0},
        {"threads_per_worker": 0},
        {"gpus_per_worker": -1},
        {"threads": 3},
        {"device": "cuda"},
    ):
        with pytest.raises(ParameterError):
            run(model, source, tmp_path / "out.jsonl", cluster, **wrong)
