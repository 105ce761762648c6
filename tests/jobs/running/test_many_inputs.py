"""A job whose input is many files, here or elsewhere, is the job whose input is one file with all of their rows."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shoal import jobs
from shoal.errors import JobError
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.launch import run_job
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.task import JobOptions
from shoal.params import EngineConfig
from tests.support.tiny_model import write_tiny_model

ROWS = [{"prompt": f"row {i}", "max_tokens": 1 + i % 3, "ignore_eos": True} for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ROWS in four files, one of which has none."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:3]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[3:8])))
    (folder / "c.jsonl").write_bytes(b"")
    (folder / "d.jsonl").write_bytes(b"".join(lines[8:]))
    return folder


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The URL of the same files in a store."""
    for path in folder.iterdir():
        with fsspec.open(f"memory://bucket/in/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    yield "memory://bucket/in/*"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def run(model: Path, source: Any, output: Path, **keywords: Any) -> jobs.Summary:
    return jobs.run(
        model, source, output, **{"show_progress": False, "device": "reference", "max_num_seqs": 4, **keywords}
    )


def answers(output: Path) -> dict[str, Any]:
    """The choices by custom_id."""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    found = {record["custom_id"]: record["response"]["body"]["choices"] for record in records}
    assert len(found) == len(records)
    return found


def errors(output: Path) -> list[dict[str, Any]]:
    lines = output.with_name(output.name + ".errors.jsonl").read_text().splitlines()
    return [json.loads(line)["response"]["body"]["error"] for line in lines]


def stop(model: Path, source: Any, output: Path, rows: int) -> None:
    """Run a job that commits every row, and let it fall over when so many are durable."""

    def report(progress: JobProgress) -> None:
        if progress.behind >= rows:
            raise RuntimeError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.jobs.durable.ledger._SHORTEST_INTERVAL", 0.0)
        patch.setattr("shoal.jobs.durable.ledger._INTERVAL_PER_COST", 0)
        with pytest.raises(RuntimeError, match="enough"):
            run_job(
                model,
                JobFiles.named(source, output),
                JobOptions(),
                EngineConfig(device="reference", max_num_seqs=2),
                say=lambda text: None,
                report=report,
            )


@pytest.fixture
def expected(model: Path, tmp_path: Path) -> dict[str, Any]:
    """What one file with all rows gives."""
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run(model, whole, tmp_path / "expected.jsonl")
    return answers(tmp_path / "expected.jsonl")


def test_many_files_give_what_one_with_all_rows_gives(
    model: Path, folder: Path, memory: str, tmp_path: Path, expected: dict[str, Any]
) -> None:
    sources = {
        "folder": folder,
        "glob": f"{folder}/*.jsonl*",
        "list": [folder / "d.jsonl", folder / "a.jsonl", folder / "b.jsonl.gz"],
        "store": memory,
        "both": ["memory://bucket/in/a.jsonl", folder / "b.jsonl.gz", folder / "d.jsonl"],
    }
    for name, source in sources.items():
        summary = run(model, source, tmp_path / name)
        assert (summary.state, summary.rows, summary.done) == ("finished", 12, 12)
        # Paths come before URLs in order, so the rows of "both" have other numbers.
        assert name == "both" or answers(tmp_path / name) == expected
        assert len(answers(tmp_path / name)) == 12
        assert run(model, source, tmp_path / name) == summary


@pytest.mark.parametrize("where", ["here", "store"])
def test_a_job_goes_on_in_the_middle_of_a_file(
    model: Path, folder: Path, memory: str, tmp_path: Path, expected: dict[str, Any], where: str
) -> None:
    source, output = folder if where == "here" else memory, tmp_path / "out.jsonl"
    for rows in (2, 5, 9):
        stop(model, source, output, rows)
    summary = run(model, source, output)
    assert (summary.rows, summary.done, summary.resumed) == (12, 12, 3)
    assert answers(output) == expected


def run_while(model: Path, source: Path, output: Path, change: Callable[[], object]) -> jobs.Summary:
    """Run a job in which ``change`` happens after the first row is taken in."""
    changes = iter([change])

    def report(progress: JobProgress) -> None:
        next(changes, lambda: None)()

    config = EngineConfig(device="reference", max_num_seqs=2)
    files = JobFiles.named(source, output)
    return run_job(model, files, JobOptions(), config, say=lambda text: None, report=report)


def append(path: Path, rows: int) -> None:
    with path.open("a") as file:
        file.write('{"prompt": "new", "max_tokens": 1}\n' * rows)


@pytest.mark.parametrize("begun", [False, True])
def test_rows_that_are_written_while_the_job_runs_take_no_place_of_others(
    model: Path, folder: Path, tmp_path: Path, expected: dict[str, Any], begun: bool
) -> None:
    output = tmp_path / "out.jsonl"
    if begun:
        stop(model, folder, output, 2)

    def grow() -> None:
        for name in ("a.jsonl", "c.jsonl", "d.jsonl"):
            append(folder / name, 3)

    summary = run_while(model, folder, output, grow)
    assert (summary.state, summary.rows, summary.done, summary.resumed) == ("finished", 12, 12, int(begun))
    assert answers(output) == expected


@pytest.mark.parametrize(
    ("text", "counted"), [("", "11 of its 12 rows"), ('{"prompt": "a"}\n' * 2, "13 of its 12 rows")]
)
def test_rows_that_come_and_go_in_a_file_are_found_out(
    model: Path, folder: Path, tmp_path: Path, text: str, counted: str
) -> None:
    one = '{"prompt": "a"}\n'
    (folder / "c.jsonl").write_text(f"\n{one}")
    (folder / "d.jsonl").write_text("".join((folder / "d.jsonl").read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(JobError, match=rf"4 files .*: was changed while the job ran \({counted} are finished\)"):
        run_while(model, folder, tmp_path / "out.jsonl", lambda: (folder / "c.jsonl").write_text(text))


def test_files_that_were_moved_together_are_the_same_job(model: Path, folder: Path, tmp_path: Path) -> None:
    stop(model, folder, tmp_path / "out.jsonl", 5)
    moved = folder.rename(tmp_path / "moved")
    assert run(model, moved, tmp_path / "out.jsonl").resumed == 1


def test_another_list_is_another_job(model: Path, folder: Path, memory: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    stop(model, folder, output, 5)
    shutil.copy(folder / "a.jsonl", tmp_path / "e.jsonl")
    with pytest.raises(JobError, match=r"input.files: was 4, is 5; input.bytes: was \d+, is \d+; input.blake2b"):
        run(model, [folder, tmp_path / "e.jsonl"], output)
    with pytest.raises(JobError, match=r"input.files: was 4, is absent"):
        run(model, folder / "a.jsonl", output)
    text = (folder / "d.jsonl").read_text()
    (folder / "d.jsonl").write_text(text.replace("row", "Row"))
    with pytest.raises(JobError, match=r"belongs to another job: input.blake2b: was .*, is [^;]* \("):
        run(model, folder, output)
    (folder / "d.jsonl").write_text(text)
    assert run(model, folder, output).done == 12


def test_an_object_that_was_replaced_is_another_job(model: Path, memory: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    stop(model, memory, output, 5)
    with fsspec.open("memory://bucket/in/a.jsonl") as file:
        text = file.read()
    with fsspec.open("memory://bucket/in/a.jsonl", "wb") as file:
        file.write(text.replace(b"row", b"Row"))
    with pytest.raises(JobError, match=r"belongs to another job: input.blake2b: was .*, is "):
        run(model, memory, output)


def test_what_is_wrong_is_told_with_its_file_and_its_line_there(model: Path, folder: Path, tmp_path: Path) -> None:
    with (folder / "d.jsonl").open("a") as file:
        file.write("\nno json\n" + json.dumps({"prompt": "x" * 500}))
    summary = run(model, folder, tmp_path / "out.jsonl")
    assert (summary.rows, summary.done, summary.failed) == (14, 12, 2)
    not_json, too_long = errors(tmp_path / "out.jsonl")
    assert not_json["message"].startswith("d.jsonl, line 6: ")
    assert not_json["line"] == 14
    assert too_long["message"].startswith("d.jsonl, line 7: ")
    assert too_long["line"] == 15
    with pytest.raises(JobError, match=r"^1 bad lines, nothing was run; d.jsonl, line 6: "):
        run(model, folder, tmp_path / "strict.jsonl", strict=True)


def test_rows_that_end_with_the_job_are_told_so_too(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "d.jsonl").write_text('{"prompt": "a"}\nno json\n')
    assert run(model, folder, tmp_path / "out.jsonl", deadline=1e-9).state == "expired"
    lines = tmp_path.joinpath("out.jsonl.errors.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["response"]["body"]["error"]["message"].startswith("d.jsonl, line 2: ")


def test_an_id_in_two_files_is_told_with_both(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "e.csv").write_text("prompt\na\n")
    with (folder / "a.jsonl").open("a") as file:
        file.write(json.dumps({"custom_id": "row-14", "prompt": "a"}) + "\n")
    with pytest.raises(JobError, match=r"'row-14' is in a.jsonl, line 4 and e.csv, line 1, must be in one"):
        run(model, folder, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_several_tables_do_not_become_one(model: Path, tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("prompt\nhello\n")
    with pytest.raises(JobError, match=r"out.csv: only a .csv input can become this table, not 2 files"):
        run(model, [tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out.csv")
    assert run(model, [tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out.jsonl").done == 2


def test_a_table_in_a_store_becomes_one_here(model: Path, tmp_path: Path, memory: str) -> None:
    with fsspec.open("memory://bucket/in.csv", "wb") as file:
        file.write(b"id,prompt\n1,hello\n2,you\n")
    run(model, "memory://bucket/in.csv", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "prompt", "output"]
    assert [row[:2] for row in rows] == [["1", "hello"], ["2", "you"]]
