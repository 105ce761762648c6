"""Jobs whose output is a folder of parts, on a disk: run, stopped, gone on with, looked at, cancelled, refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest

from shoal import jobs
from shoal.errors import JobError, MemoryLimitError, ParameterError
from shoal.jobs.durable import parts
from shoal.jobs.durable.lease import LEASE, Holder, Lease
from shoal.jobs.durable.numbered import TakenOverError
from shoal.jobs.running.file_place import FilePlace
from shoal.jobs.running.files import JobFiles, place_of
from shoal.jobs.running.launch import run_job
from shoal.jobs.running.parts_place import PartsPlace
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.task import JobOptions
from shoal.params import EngineConfig
from tests.support.tiny_model import write_tiny_model

ENGINE: dict[str, Any] = {"device": "reference", "max_num_seqs": 4}
ROWS = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"prompt": f"row {i}", "max_tokens": 1 + i % 5, "ignore_eos": True} for i in range(ROWS)]
    lines = [json.dumps(row) for row in rows]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([*lines, json.dumps({"prompt": "x" * 500}), "no json"]) + "\n")
    return path


@pytest.fixture(autouse=True)
def _frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row that ends is committed."""
    monkeypatch.setattr(parts, "_LOCAL_INTERVAL", 0.0)
    monkeypatch.setattr(parts, "_INTERVAL_PER_COST", 0)


def run(model: Path, source: Path, output: Path | str, **keywords: Any) -> jobs.Summary:
    return jobs.run(model, source, output, **{"show_progress": False, **ENGINE, **keywords})


def records(*files: Path) -> dict[str, Any]:
    """What was answered, and what failed how, by custom_id; ids, times and what was cached aside."""
    found: dict[str, Any] = {}
    for line in [line for path in files if path.exists() for line in path.read_text().splitlines()]:
        record = json.loads(line)
        body = (record["response"] or {}).get("body") or record["error"]
        name = str(record["custom_id"] or f"line {body['error']['line']}")
        assert name not in found
        found[name] = {key: value for key, value in body.items() if key not in ("id", "created", "usage")}
    return found


def in_folder(folder: Path) -> dict[str, Any]:
    """The same of the parts that the manifest lists."""
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = [*manifest["results"], *manifest["errors"]]
    for part in listed:
        data = (folder / part["name"]).read_bytes()
        assert (len(data), crc32(data), data.count(b"\n")) == (part["bytes"], part["crc32"], part["rows"])
    there = {str(path.relative_to(folder)) for path in folder.glob("*/part-*.jsonl")}
    assert there == {part["name"] for part in listed}
    return records(*(folder / part["name"] for part in listed))


def stopping_after(rows: int) -> Callable[[JobProgress], None]:
    def report(progress: JobProgress) -> None:
        if progress.behind >= rows:
            raise RuntimeError("enough")

    return report


def stop(model: Path, source: Path, output: Path | str, rows: int) -> None:
    """Run a job and let it fall over."""
    with pytest.raises(RuntimeError, match="enough"):
        run_job(
            model,
            JobFiles.named(source, output),
            JobOptions(),
            EngineConfig(**ENGINE),
            say=lambda text: None,
            report=stopping_after(rows),
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_which_outputs_are_folders_of_parts(tmp_path: Path) -> None:
    for output in ("new/", "s3://bucket/out", str(tmp_path), f"file://{tmp_path}", tmp_path):
        assert isinstance(place_of(output), PartsPlace)
    for output in ("new", tmp_path / "out.jsonl", "-"):
        assert isinstance(place_of(output), FilePlace)


def test_a_folder_holds_what_a_file_would(model: Path, source: Path, tmp_path: Path) -> None:
    run(model, source, tmp_path / "whole.jsonl")
    summary = run(model, source, f"{tmp_path}/out/")
    assert (summary.state, summary.rows, summary.done, summary.failed, summary.resumed) == ("finished", 22, 20, 2, 0)
    assert (summary.output, summary.errors) == (f"{tmp_path}/out/", f"{tmp_path}/out/errors/")
    whole = records(tmp_path / "whole.jsonl", tmp_path / "whole.jsonl.errors.jsonl")
    assert in_folder(tmp_path / "out") == whole
    assert len(list((tmp_path / "out" / "results").iterdir())) > 2
    assert not list((tmp_path / "out" / "_shoal").glob("staged/*"))


def test_a_job_that_fell_over_goes_on(model: Path, source: Path, tmp_path: Path) -> None:
    run(model, source, tmp_path / "whole.jsonl")
    output = f"{tmp_path}/out/"
    for rows in (3, 9):
        stop(model, source, output, rows)
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert jobs.status(output).state == "interrupted"
    summary = run(model, source, tmp_path / "out", max_num_seqs=2)
    assert (summary.state, summary.resumed, summary.done, summary.failed) == ("finished", 2, 20, 2)
    whole = records(tmp_path / "whole.jsonl", tmp_path / "whole.jsonl.errors.jsonl")
    assert in_folder(tmp_path / "out") == whole


def test_a_finished_job_is_left_alone(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = run(model, source, f"{output}/")
    before = contents(output)
    assert run(model, source, output) == first
    assert contents(output) == before


def test_the_list_of_parts_comes_back(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(model, source, f"{output}/")
    before = in_folder(output)
    (output / "manifest.json").unlink()
    assert run(model, source, output).state == "finished"
    assert in_folder(output) == before


def test_failed_rows_run_again(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(model, source, f"{output}/")
    summary = run(model, source, output, retry_errors=True)
    assert (summary.state, summary.done, summary.failed, summary.retried) == ("finished", 20, 2, 2)
    assert len(in_folder(output)) == 22


def test_a_job_goes_on_only_as_what_it_was_unless_begun_anew(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stop(model, source, f"{output}/", 3)
    with pytest.raises(JobError, match=r"out belongs to another job: parameters.seed: was 0, is 1"):
        run(model, source, output, seed=1)
    assert run(model, source, output, seed=1, restart=True).resumed == 0
    run(model, source, tmp_path / "whole.jsonl", seed=1)
    whole = records(tmp_path / "whole.jsonl", tmp_path / "whole.jsonl.errors.jsonl")
    assert in_folder(output) == whole


def test_parts_without_a_job_are_not_replaced(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(model, source, f"{output}/")
    shutil.rmtree(output / "_shoal")
    with pytest.raises(ParameterError, match=r"part-\d+.jsonl: got '\d+ bytes', must be empty or not there"):
        run(model, source, output)
    assert run(model, source, output, restart=True).state == "finished"
    assert len(in_folder(output)) == 22


def test_a_model_that_cannot_be_loaded_leaves_nothing(model: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for output in ("new/", "there"):
        with pytest.raises(MemoryLimitError):
            run(model, source, f"{tmp_path}/{output}", kv_cache_memory=1)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "there"]
    assert not any((tmp_path / "there").iterdir())


def test_a_restart_whose_model_cannot_be_loaded_leaves_the_old_results(
    model: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(model, source, f"{output}/")
    before = contents(output)
    with pytest.raises(MemoryLimitError):
        run(model, source, output, restart=True, kv_cache_memory=1)
    assert contents(output) == before
    assert run(model, source, output).resumed == 0


@pytest.mark.parametrize(
    ("output", "keywords", "says"),
    [
        (
            "out/",
            {"error_file": "errors.jsonl"},
            r"error file: .*left out where the output is a folder: failures go to .*out/errors/",
        ),
        (
            "s3://bucket/out.jsonl",
            {},
            "output file: .*a folder, whose name ends in /: tables and single files are local",
        ),
        ("s3://bucket/out.csv", {}, "output file: .*a folder, whose name ends in /"),
        ("absent/out/", {}, "output file: .*a folder in a folder that exists"),
        ("in.jsonl/", {}, "output file: .*a folder, or without the slash"),
    ],
)
def test_outputs_that_are_refused(
    model: Path, source: Path, tmp_path: Path, output: str, keywords: dict[str, Any], says: str
) -> None:
    with pytest.raises(ParameterError, match=says):
        run(model, source, output if "://" in output else f"{tmp_path}/{output}", **keywords)


def test_a_folder_that_cannot_be_written_to_is_said(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match=r"out/: No space left on device"):
        run(model, source, f"{tmp_path}/out/")


def test_an_input_that_vanishes_is_no_fault_of_the_folder(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: object, **options: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(source))

    monkeypatch.setattr("shoal.jobs.running.launch.check_input", gone)
    with pytest.raises(FileNotFoundError, match=r"in\.jsonl"):
        run(model, source, f"{tmp_path}/out/")


def test_an_input_among_the_parts_is_refused(model: Path, source: Path, tmp_path: Path) -> None:
    inside = tmp_path / "results"
    inside.mkdir()
    source.rename(inside / "in.jsonl")
    with pytest.raises(ParameterError, match=r"folder results/: got '.*results', must be another file than the input"):
        run(model, inside / "in.jsonl", tmp_path)


# Seen from outside ----------------------------------------------------------------------------------------------------


def lease_of(folder: Path, host: str) -> None:
    (folder / LEASE).write_bytes(msgspec.json.encode(Holder(host, 7, "other")))


def test_a_job_on_another_machine_is_seen_and_not_begun(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stop(model, source, f"{output}/", 3)
    lease_of(output, "elsewhere")
    found = jobs.status(output)
    assert (found.state, found.pid, found.host) == ("running", 7, "elsewhere")
    assert "process 7 on elsewhere works on it" in found.lines()
    with pytest.raises(JobError, match="process 7 on elsewhere is working on this job"):
        run(model, source, output)
    assert jobs.cancel(output) == 7


def test_a_job_that_nobody_works_on_is_cancelled_by_its_next_run(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stop(model, source, f"{output}/", 3)
    assert jobs.cancel(output) is None
    summary = run(model, source, output)
    assert summary.state == "cancelled"
    assert summary.done + summary.failed == 22
    assert len(in_folder(output)) == 22
    with pytest.raises(JobError, match="this job is cancelled already"):
        jobs.cancel(output)
    assert run(model, source, output, retry_errors=True).state == "finished"


def test_a_cancel_of_the_old_job_is_not_of_the_new_one(model: Path, source: Path, tmp_path: Path) -> None:
    output = f"{tmp_path}/out/"
    stop(model, source, output, 3)
    assert jobs.cancel(output) is None
    summary = run(model, source, output, restart=True)
    assert (summary.state, summary.done, summary.failed) == ("finished", 20, 2)
    assert not (tmp_path / "out" / "_shoal" / "cancel").exists()


def test_a_running_job_is_cancelled(model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.durable.lease._LOOK", 0.001)
    monkeypatch.setattr("shoal.jobs.running.job._SECONDS_BETWEEN_LOOKS", 0.0)
    output, asked = tmp_path / "out", list[int | None]()
    held: list[Lease] = []
    enter = Lease.__enter__

    def remember(lease: Lease) -> Lease:
        held.append(lease)
        return enter(lease)

    monkeypatch.setattr(Lease, "__enter__", remember)

    def report(progress: JobProgress) -> None:
        if not asked:
            asked.append(jobs.cancel(output))
            deadline = time.monotonic() + 60
            while not held[0].cancelled:
                assert time.monotonic() < deadline
                time.sleep(0.001)

    files, config = JobFiles.named(source, f"{output}/"), EngineConfig(**ENGINE)
    summary = run_job(model, files, JobOptions(), config, say=lambda text: None, report=report)
    assert asked == [os.getpid()]
    assert summary.state == "cancelled"
    assert not (output / "_shoal" / "cancel").exists()


def test_a_login_is_written_down_nowhere(model: Path, source: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    output = f"memory://me:secret@{source.name}/out/"
    try:
        summary = run(model, source, output)
        written = b"".join(memory.cat(memory.find("/")).values())
    finally:
        memory.store.clear()
    assert (summary.output, summary.errors) == (f"memory://{source.name}/out/", f"memory://{source.name}/out/errors/")
    assert b'"state": "finished"' in written
    assert b"secret" not in written


def test_there_is_no_job_where_none_was_begun(tmp_path: Path) -> None:
    for output in (tmp_path, f"{tmp_path}/absent/", "/"):
        for ask in (jobs.status, jobs.cancel):
            with pytest.raises(JobError, match="there is no job"):
                ask(output)
    assert not any(tmp_path.iterdir())


def test_a_driver_that_was_taken_over_ends(model: Path, source: Path, tmp_path: Path) -> None:
    """It sleeps for longer than its lease holds, and another begins the job anew and ends it."""
    output = tmp_path / "out"
    taken: list[jobs.Summary] = []

    def report(progress: JobProgress) -> None:
        if progress.behind >= 3 and not taken:
            (output / LEASE).unlink()
            taken.append(run(model, source, output))

    config = EngineConfig(**ENGINE)
    with pytest.raises(TakenOverError, match=f"process {os.getpid()} on .* took this job over"):
        run_job(model, JobFiles.named(source, f"{output}/"), JobOptions(), config, say=lambda text: None, report=report)
    assert taken[0].state == "finished"
    assert len(in_folder(output)) == 22
    assert jobs.status(output).state == "finished"
