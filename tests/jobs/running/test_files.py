"""Which files a job may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.errors import ParameterError
from shoal.jobs.input.inputs import Inputs
from shoal.jobs.input.remote import RemoteFile
from shoal.jobs.running.files import JobFiles, place_of


def test_an_input_that_can_be_read_only_once_is_refused(tmp_path: Path) -> None:
    """It would be used up by the check of its rows, and none would be left to run."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ParameterError, match=r"input file: got '.*pipe', must be a regular file, or - for stdin"):
        JobFiles.named(pipe, tmp_path / "out.jsonl").check()


@pytest.mark.parametrize(
    ("name", "says"), [("", "a file, a folder or a glob of files that exist"), ("absent.jsonl", "a file that exists")]
)
def test_an_input_that_leads_to_no_file_is_refused(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ParameterError, match=f"input file: got '.*', must be {says}"):
        JobFiles.named(tmp_path / name, tmp_path / "out.jsonl").check()


@pytest.mark.parametrize("given", ["in", "in/*.jsonl", ["in/b.jsonl", "in/a.jsonl"]])
@pytest.mark.parametrize("role", ["output file", "error file"])
def test_an_output_that_is_one_of_the_inputs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | list[str], role: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "in" / name).write_text("{}")
    outputs = {"output file": tmp_path / "out.jsonl", "error file": None} | {role: tmp_path / "in" / "a.jsonl"}
    files = JobFiles.named(given, *outputs.values())  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match=f"{role}: got '.*in/a.jsonl', must be another file than the input"):
        files.check()


def test_results_into_the_folder_of_the_inputs_are_refused_before_they_are_there(tmp_path: Path) -> None:
    """They would be inputs when the job goes on."""
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ParameterError, match=r"output file: got '.*out.jsonl', must be another file than the input"):
        JobFiles.named(tmp_path, tmp_path / "out.jsonl").check()
    JobFiles.named(tmp_path, tmp_path / "out", tmp_path / "errors").check()
    JobFiles.named(tmp_path / "*", "-").check()


def test_inputs_are_not_in_what_is_written(tmp_path: Path) -> None:
    results = tmp_path / "out" / "results"
    results.mkdir(parents=True)
    for path in (results / "part.jsonl", tmp_path / "out" / "in.jsonl"):
        path.write_text("{}")
    with pytest.raises(ParameterError, match=r"folder results/: got '.*', must be another file than the input"):
        JobFiles.named(results, tmp_path / "out").check()
    JobFiles.named(tmp_path / "out" / "in.jsonl", tmp_path / "out").check()


@pytest.mark.parametrize(
    ("given", "output", "what"),
    [
        ("in", "in/", "manifest"),
        ("in/*.json*", "in/", "manifest"),
        ("in/**/*.jsonl", "in/out/", "output file"),
        ("in/**/errors/*", "in/out/", "error file"),
        ("in/*/_shoal/*.json", "in/out/", "job"),
        ("in/**/*.jsonl", "in/out.jsonl", "output file"),
        ("in/**/*.json", "in/out.csv", "manifest"),
        ("in/*.jsonl", "in/out/", None),
        ("in", "in/out/", None),
        ("in/**/a.jsonl", "in/out/", None),
    ],
)
def test_what_a_later_run_would_take_for_inputs_is_refused_by_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, output: str, what: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("in/a.jsonl"), Path("in/old/errors/b.json"), Path("in/old/_shoal/c.json")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    files = JobFiles.named(given, output)
    if what is None:
        files.check()
        return
    with pytest.raises(ParameterError, match=f"^{what}: got '.*', must be another file than the input"):
        files.check()


def test_an_empty_text_is_not_the_current_folder() -> None:
    with pytest.raises(ParameterError, match="output file: got '', must be a file, a folder, a URL, or - for stdout"):
        place_of("")


def test_what_is_refused_is_told_without_its_login() -> None:
    inputs = Inputs((RemoteFile("memory://me:secret@b/out/results/a.jsonl", 2, ""),), ("memory://b/out/**",))
    with pytest.raises(ParameterError, match=r"folder results/: got 'memory://b/out/results'"):
        JobFiles(inputs, place_of("memory://me:secret@b/out/")).check()
    with pytest.raises(ParameterError, match=r"output file: got 's3://b/out.csv'"):
        place_of("s3://me:secret@b/out.csv").check()


def test_inputs_in_a_store_are_not_in_what_is_written() -> None:
    inputs = Inputs((RemoteFile("memory://b/out/results/a.jsonl", 2, ""),), ("memory://b/out/**",))
    with pytest.raises(ParameterError, match=r"folder results/: got 'memory:.*', must be another file than the input"):
        JobFiles(inputs, place_of("memory://b/out/")).check()
    assert inputs.are_in("memory://b/")
    assert not inputs.are_in("memory://b/o")
