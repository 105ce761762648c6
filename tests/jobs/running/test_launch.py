"""Jobs from Python, on a small random model: begun, taken up again, refused, looked at, cancelled."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import jobs
from shoal.errors import JobError, MemoryLimitError, ParameterError
from shoal.jobs.durable import file_systems
from shoal.jobs.durable import manifest as manifests
from shoal.jobs.input.check import check_input
from shoal.jobs.running.files import JobFiles
from shoal.jobs.running.launch import Host, local_half, run_job, run_task
from shoal.jobs.running.progress import JobProgress
from shoal.jobs.running.task import JobOptions, Task, names_of
from shoal.llm import LLM
from shoal.params import EngineConfig
from tests.support.tiny_model import write_tiny_model

ENGINE = {"device": "reference", "max_num_seqs": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"prompt": f"row {i}", "max_tokens": 1 + i % 5, "ignore_eos": True} for i in range(20)]
    return write(tmp_path / "in.jsonl", *rows, {"prompt": "x" * 500}, "no json")


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def run(model: Path, source: Path, output: Path, **keywords: Any) -> jobs.Summary:
    return jobs.run(model, source, output, **{"show_progress": False, **ENGINE, **keywords})


def records(output: Path) -> dict[str, Any]:
    """What was answered, and what failed how, by custom_id; ids and times aside."""
    found: dict[str, Any] = {}
    for path in (output, output.with_name(output.name + ".errors.jsonl")):
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            body = (record["response"] or {}).get("body") or record["error"]
            name = str(record["custom_id"] or f"line {body['error']['line']}")
            assert name not in found
            found[name] = {key: value for key, value in body.items() if key not in ("id", "created", "usage")}
    return found


def stopping_after(rows: int) -> Callable[[JobProgress], None]:
    """A report that ends the job, as a crash would, once so many rows are durable."""

    def report(progress: JobProgress) -> None:
        if progress.behind >= rows:
            raise RuntimeError("enough")

    return report


def stop(model: Path, source: Path, output: Path, rows: int, config: EngineConfig | None = None) -> None:
    """Run a job that commits every row, and let it fall over."""
    files, config = JobFiles.named(source, output), config or EngineConfig(device="reference", max_num_seqs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.jobs.durable.ledger._SHORTEST_INTERVAL", 0.0)
        patch.setattr("shoal.jobs.durable.ledger._INTERVAL_PER_COST", 0)
        with pytest.raises(RuntimeError, match="enough"):
            run_job(model, files, JobOptions(), config, say=lambda text: None, report=stopping_after(rows))


def test_a_job_gives_a_summary_and_keeps_it(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    summary = run(model, source, output)
    assert (summary.state, summary.rows, summary.done, summary.failed, summary.resumed) == ("finished", 22, 20, 2, 0)
    assert summary.generated_tokens == sum(1 + i % 5 for i in range(20))
    manifest = json.loads((tmp_path / "out.jsonl.shoal" / "manifest.json").read_text())
    assert manifest["summary"]["generated_tokens"] == summary.generated_tokens
    assert records(output).keys() == {f"row-{i}" for i in range(1, 22)} | {"line 22"}


@pytest.mark.parametrize(("name", "known"), [("fish", ["fish"]), (b"Mod\xe8le", []), ("", [])])
def test_a_model_is_called_by_its_own_name_if_that_is_text(tmp_path: Path, name: str | bytes, known: list[str]) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", name=name)
    assert names_of("short:1b", path) == ("short:1b", str(path), "tiny.gguf", *known)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv", "/dev/stdout"])
def test_a_model_that_cannot_be_loaded_leaves_nothing(model: Path, source: Path, tmp_path: Path, target: str) -> None:
    if target == "out.csv":
        source = tmp_path / "in.csv"
        source.write_text("prompt\na\nb\n")
    before = contents(tmp_path)
    with pytest.raises(MemoryLimitError):
        run(model, source, tmp_path / target, kv_cache_memory=1)
    assert contents(tmp_path) == before


def test_a_restart_whose_model_cannot_be_loaded_leaves_the_old_results(
    model: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run(model, source, output)
    before = contents(tmp_path)
    with pytest.raises(MemoryLimitError):
        run(model, source, output, restart=True, kv_cache_memory=1)
    after = contents(tmp_path)
    assert [name for name in before if after.get(name) != before[name]] == []
    assert run(model, source, output).resumed == 0


def test_a_job_that_fell_over_goes_on(model: Path, source: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(model, source, whole)
    stop(model, source, parts, 5)
    first = parts.read_bytes()
    found = jobs.status(parts)
    assert (found.state, found.pid, found.resumed) == ("interrupted", None, 0)
    assert 5 <= found.done + found.failed < 22
    stop(model, source, parts, 12)
    summary = run(model, source, parts)
    assert (summary.state, summary.resumed, summary.done, summary.failed) == ("finished", 2, 20, 2)
    assert parts.read_bytes().startswith(first)
    assert records(parts) == records(whole)


@pytest.mark.parametrize("begun_with", [True, False])
def test_a_job_goes_on_with_or_without_a_draft_model(
    model: Path, source: Path, tmp_path: Path, begun_with: bool
) -> None:
    """What it answers does not depend on that."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(model, source, whole)
    itself = {"method": "draft_model", "model": model}
    guesses = EngineConfig(device="reference", max_num_seqs=4, speculative_config=itself)
    if begun_with:
        stop(model, source, parts, 5, guesses)
        assert run(model, source, parts).resumed == 1
    else:
        stop(model, source, parts, 5)
        assert run(model, source, parts, speculative_config=itself).resumed == 1
    assert records(parts) == records(whole)


@pytest.mark.parametrize("output", ["out.jsonl", "-"])
def test_all_rows_are_told_the_time_at_which_the_job_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], output: str
) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", context=128, template="{{ strftime_now('%d %H:%M:%S.%f') }}")
    talk = [{"role": "user", "content": "x"}]
    source = write(tmp_path / "in.jsonl", *[{"messages": talk, "max_tokens": 1, "prompt_logprobs": 0}] * 6)
    target = Path("-") if output == "-" else tmp_path / output
    if output != "-":
        stop(model, source, target, 2)
        monkeypatch.setenv("TZ", "Asia/Kolkata")
        time.tzset()
    try:
        assert run(model, source, target).done == 6
    finally:
        monkeypatch.undo()
        time.tzset()
    lines = capfdbinary.readouterr().out if output == "-" else target.read_bytes()
    answers = [json.loads(line)["response"]["body"] for line in lines.splitlines()]
    prompts = {"".join(place_of(place) for place in body["prompt_logprobs"][1:]) for body in answers}
    assert len(answers) == 6
    assert len(prompts) == 1
    if output != "-":
        begun = json.loads((tmp_path / "out.jsonl.shoal" / "manifest.json").read_text())["created"]
        assert datetime.fromtimestamp(begun).strftime("%d %H:%M:%S.%f")[1:] in prompts


def place_of(place: dict[str, Any]) -> str:
    (only,) = place.values()
    return str(only["decoded_token"])


def test_a_finished_job_is_left_alone(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    summary = run(model, source, output)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("shoal.jobs.running.launch.LLM", None)  # nothing is loaded
    assert run(model, source, output) == summary
    locked = tmp_path / "out.jsonl.shoal" / "lock"
    for path, what in before.items():
        assert path == locked or (path.read_bytes(), path.stat().st_mtime_ns) == what
    output.unlink()
    with pytest.raises(JobError, match=r"out\.jsonl: is gone, though this job is finished"):
        run(model, source, output)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "parameters.seed: was 0, is 1"),
        ({"defaults": {"temperature": 0.5}}, "parameters.defaults.temperature: was absent, is 0.5"),
        ({"kv_cache_dtype": "f32"}, 'numerics.kv_cache_dtype: was "f16", is "f32"'),
        ({"max_model_len": 100}, "numerics.max_model_len: was 128, is 100"),
        ({"chat": True}, "parameters.chat: was false, is true"),
        ({"defaults": {"parse_special": True}}, "parameters.defaults.parse_special: was absent, is true"),
    ],
)
def test_another_job_does_not_go_on(
    model: Path, source: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    output = tmp_path / "out.jsonl"
    stop(model, source, output, 3)
    before = output.read_bytes()
    with pytest.raises(JobError, match="belongs to another job") as error:
        run(model, source, output, **change)
    assert says in str(error.value)
    assert output.read_bytes() == before


def test_control_tokens_in_prompts_are_said_once_a_job_and_parsed_where_asked_for(model: Path, tmp_path: Path) -> None:
    row = {
        "prompt": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
        "max_tokens": 2,
        "prompt_logprobs": 0,
    }
    talk = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "prompt_logprobs": 0}
    source = write(tmp_path / "in.jsonl", row, row, talk)

    def tokens(said: list[str], **defaults: bool) -> list[int]:
        """Of each row's prompt."""
        output, config = tmp_path / f"out{len(defaults)}.jsonl", EngineConfig(device="reference", max_num_seqs=4)
        options, files = JobOptions(defaults=defaults), JobFiles.named(source, output)
        run_job(model, files, options, config, say=said.append, report=lambda progress: None)
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        counts = {line["custom_id"]: line["response"]["body"]["usage"]["prompt_tokens"] for line in lines}
        return [counts[f"row-{number}"] for number in (1, 2, 3)]

    said: list[str] = []
    as_text = tokens(said)
    assert as_text[0] == as_text[1] > as_text[2]
    assert len(said) == 1
    assert "spells the control token '<|im_start|>', which is taken as text" in said[0]
    said.clear()
    assert tokens(said, parse_special=True) == [as_text[2]] * 3
    assert said == []


@pytest.mark.parametrize(("defaults", "field"), [({"parse_special": 1}, "parse_special"), ({"top_p": 2}, "top_p")])
def test_defaults_are_checked_before_anything_is_done(defaults: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError, match=field):
        JobOptions(defaults=defaults)


def test_messages_are_never_parsed(model: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="parse_special: got True, must be left out with chat"):
        run(model, source, tmp_path / "out.jsonl", chat=True, defaults={"parse_special": True})


def test_defaults_may_be_numpy_s(model: Path, source: Path, tmp_path: Path) -> None:
    output, defaults = tmp_path / "out.jsonl", {"top_k": np.int64(5), "min_tokens": 1.0, "stop": "never"}
    assert run(model, source, output, defaults=defaults).done == 20
    assert run(model, source, output, defaults={"top_k": 5, "min_tokens": 1, "stop": ["never"]}).done == 20


def test_another_input_or_model_does_not_go_on(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    stop(model, source, output, 3)
    moved = source.rename(tmp_path / "moved.jsonl")
    other = write_tiny_model(tmp_path / "other.gguf", context=128, seed=1)
    with pytest.raises(JobError, match=r"model\.blake2b"):
        run(other, moved, output)
    text = moved.read_text()
    moved.write_text(text.replace("row 7", "Row 7"))
    with pytest.raises(JobError, match=r"input\.blake2b"):
        run(model, moved, output)
    moved.write_text(text)
    assert run(model, moved, output, max_num_seqs=3, threads=1).state == "finished"


def test_a_job_without_a_finished_row_may_become_another(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="enough"):
        run_job(
            model,
            JobFiles.named(source, output),
            JobOptions(),
            EngineConfig(device="reference"),
            say=lambda text: None,
            report=stopping_after(0),
        )
    assert run(model, source, output, seed=1).resumed == 0


def change_after_the_check(patch: pytest.MonkeyPatch, source: Path, text: str) -> None:
    """Let the content of ``source`` become ``text`` between the count of its rows and their run."""

    def check_and_change(*arguments: Any, **keywords: Any) -> int:
        rows = check_input(*arguments, **keywords)
        source.write_text(text)
        return rows

    patch.setattr("shoal.jobs.running.launch.check_input", check_and_change)


def test_rows_that_the_input_loses_meanwhile_are_missed(model: Path, source: Path, tmp_path: Path) -> None:
    output, text = tmp_path / "out.jsonl", source.read_text()
    with pytest.MonkeyPatch.context() as patch:
        change_after_the_check(patch, source, "".join(text.splitlines(keepends=True)[:9]))
        with pytest.raises(JobError, match=r"in\.jsonl: was changed .*9 of its 22 rows are finished"):
            run(model, source, output)
    source.write_text(text)
    assert run(model, source, output).state == "finished"
    assert len(records(output)) == 22


def test_rows_that_the_input_gains_meanwhile_are_not_run(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_after_the_check(monkeypatch, source, source.read_text() + '{"prompt": "late"}\n')
    assert run(model, source, tmp_path / "out.jsonl").rows == 22
    assert len(records(tmp_path / "out.jsonl")) == 22


def test_answers_are_not_written_beside_other_rows(model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("prompt\na\nb\n")
    with pytest.MonkeyPatch.context() as patch:
        change_after_the_check(patch, source, "prompt\nb\na\n")
        with pytest.raises(JobError, match=r"in\.csv: was changed while the job ran"):
            run(model, source, output)
    assert not output.exists()


def test_restart_begins_anew(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    with pytest.raises(ParameterError, match="it has no journal"):
        run(model, source, output)
    assert output.read_text() == "precious\n"
    assert not (tmp_path / "out.jsonl.shoal").exists()
    assert run(model, source, output, restart=True).done == 20
    assert run(model, source, output, restart=True, seed=1).done == 20
    assert len(records(output)) == 22


def test_a_restart_that_falls_over_leaves_no_word_of_the_old_job(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    run(model, source, output)
    with monkeypatch.context() as patch:
        patch.setattr("shoal.jobs.running.launch.manifests.save", raising("power failed"))
        with pytest.raises(RuntimeError, match="power"):
            run(model, source, output, restart=True)
    assert run(model, source, output).done == 20
    assert len(records(output)) == 22


def raising(text: str) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise RuntimeError(text)

    return fail


def test_the_time_of_a_retry_counts_from_its_beginning(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, folder = tmp_path / "out.jsonl", tmp_path / "out.jsonl.shoal"
    run(model, source, output, deadline=1e-9)
    begun = manifests.load(folder)
    assert begun is not None
    begun.created = begun.since = 0.0
    manifests.save(folder, begun)
    with monkeypatch.context() as patch:
        patch.setattr("shoal.jobs.running.launch._work", raising("power failed"))
        with pytest.raises(RuntimeError, match="power"):
            run(model, source, output, retry_errors=True, deadline=3600)
    assert run(model, source, output, deadline=3600).done == 20


def test_failed_rows_run_again(model: Path, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    expired = run(model, source, output, deadline=1e-9)
    assert (expired.state, expired.done, expired.failed) == ("expired", 0, 22)
    codes = {name: body.get("code") for name, body in records(output).items()}
    assert (codes["row-3"], codes["line 22"]) == ("batch_expired", None)
    assert run(model, source, output).state == "expired"
    again = run(model, source, output, retry_errors=True)
    assert (again.state, again.done, again.failed, again.retried) == ("finished", 20, 2, 22)
    assert len(records(output)) == 22


def test_a_job_is_cancelled_from_elsewhere(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"row {i}", "max_tokens": 60, "ignore_eos": True} for i in range(3000)]
    source, output = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    summaries: list[jobs.Summary] = []
    thread = threading.Thread(target=lambda: summaries.append(run(model, source, output)))
    thread.start()
    try:
        while not (tmp_path / "out.jsonl.shoal" / "manifest.json").exists() or not jobs.status(output).done:
            assert thread.is_alive()
        found = jobs.status(output)
        assert (found.state, found.pid, found.rows) == ("running", os.getpid(), 3000)
        assert jobs.cancel(output) == os.getpid()
    finally:
        thread.join(60)
    (summary,) = summaries
    assert summary.state == "cancelled"
    assert 0 < summary.done < 3000
    assert summary.done + summary.failed == 3000 == len(records(output))
    with pytest.raises(JobError, match="cancelled already"):
        jobs.cancel(output)
    assert jobs.status(output).state == "cancelled"


def test_a_job_that_nobody_works_on_is_cancelled_by_its_next_run(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    stop(model, source, output, 4)
    done = jobs.status(output).done
    assert jobs.cancel(output) is None
    monkeypatch.setattr("shoal.jobs.running.launch.LLM", None)  # nothing is loaded for that
    summary = run(model, source, output)
    assert (summary.state, summary.done) == ("cancelled", done)
    assert summary.done + summary.failed == 22


def test_there_is_no_job(tmp_path: Path) -> None:
    for look, output in itertools.product((jobs.status, jobs.cancel), (tmp_path / "out.jsonl", Path(), Path("/"))):
        with pytest.raises(JobError, match="there is no job"):
            look(output)


def test_a_table_gets_a_column(model: Path, tmp_path: Path) -> None:
    with open(tmp_path / "in.csv", "w", newline="") as stream:
        rows = [[str(i), "" if i == 3 else f"line\n{i}"] for i in range(6)]
        csv.writer(stream).writerows([["id", "question"], *rows])
    flags: dict[str, Any] = {"prompt_column": "question", "output_column": "answer"}
    summary = run(model, tmp_path / "in.csv", tmp_path / "out.csv", defaults={"max_tokens": 4}, **flags)
    assert (summary.done, summary.failed) == (5, 1)
    with open(tmp_path / "out.csv", newline="") as stream:
        header, *found = csv.reader(stream)
    assert header == ["id", "question", "answer"]
    assert [row[:2] for row in found] == rows
    assert [bool(row[2]) for row in found] == [i != 3 for i in range(6)]
    alone = run(
        model,
        write(tmp_path / "one.jsonl", {"prompt": "line\n5", "custom_id": "row-6"}),
        tmp_path / "one.out",
        defaults={"max_tokens": 4},
    )
    assert alone.done == 1
    assert records(tmp_path / "one.out")["row-6"]["choices"][0]["text"] == found[5][2]


def test_a_reader_that_went_away_ends_the_job(model: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(JobError, match=r"-: .*Broken pipe"):
            run(model, source, Path("-"))


def test_names_of_files_need_not_be_utf8(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    path = Path(shutil.copy(model, folder))
    source = write(folder / "in.jsonl", {"prompt": "x", "max_tokens": 1}, {"prompt": ""})
    output, errors = (folder / os.fsdecode(name) for name in (b"out\xff.jsonl", b"bad\xff.jsonl"))
    summary = run(path, source, output, error_file=errors)
    assert summary.output.endswith("caf\\xe9/out\\xff.jsonl")
    assert run(path, source, output, error_file=errors) == summary
    assert jobs.status(output).output == summary.output
    (answered,) = records(output).values()
    assert answered["model"].endswith("caf\\xe9/tiny.gguf")
    assert len(errors.read_text().splitlines()) == 1


def test_duplicates_are_refused_before_anything_is_made(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a", "custom_id": "row-2"}, {"prompt": "b"})
    with pytest.raises(JobError, match="custom_id 'row-2' is in rows 1 and 2"):
        run(model, source, tmp_path / "out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_errors": -1}, "max_errors"),
        ({"deadline": 0.0}, "deadline"),
        ({"timeout": float("nan")}, "timeout"),
        ({"system": "x"}, "system"),
        ({"system": "caf\udce9", "chat": True}, "system"),
        ({"served": ("a", "caf\udce9")}, "served"),
        ({"output_column": "caf\udce9"}, "output_column"),
        ({"defaults": {"temperature": -1.0}}, "temperature"),
        ({"restart": True, "retry_errors": True}, "retry_errors"),
    ],
)
def test_options_that_are_wrong_in_themselves(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as error:
        JobOptions(**options)
    assert error.value.field == field


def test_a_job_runs_on_a_file_system_without_locks_and_syncing(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def fsync(fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    usual, output = tmp_path / "usual.jsonl", tmp_path / "out.jsonl"
    run(model, source, usual)
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(file_systems, "_said", set())
    stop(model, source, output, 5)
    assert run(model, source, output).state == "finished"
    assert records(output) == records(usual)
    assert jobs.status(output).pid is None
    assert len(caplog.messages) == 4, "locks, files, folders, and who works on the job: each once"


def test_what_goes_wrong_is_told_also_where_the_folder_cannot_be_removed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a name for the lock, which is open, so that the folder is never empty."""

    def rmtree(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    twice = write(tmp_path / "in.jsonl", *[{"custom_id": "a", "prompt": "x"}] * 2)
    with pytest.raises(JobError, match="custom_id 'a' is in rows 1 and 2"):
        run(model, twice, tmp_path / "out.jsonl")


def test_no_folder_for_temporary_files_is_said_with_the_way_out(
    model: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    with pytest.raises(JobError, match=r"no folder for temporary files: .*; set TMPDIR"):
        run(model, source, Path(os.devnull))


def test_without_stderr_a_job_runs_and_says_nothing_elsewhere(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr("shoal.jobs.running.progress._SECONDS_BETWEEN_LINES", 0.0)
    run(model, source, tmp_path / "out.jsonl", show_progress=True)
    run(model, source, tmp_path / "out.jsonl", show_progress=True)  # finished already, which it says
    assert len(records(tmp_path / "out.jsonl")) == 22
    assert capsys.readouterr().out == ""


def test_a_notebooks_stdout_takes_records(model: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(model, source, Path("-")).done == 20
    assert len([json.loads(line) for line in stream.getvalue().splitlines()]) == 22


class Shared(LLM):
    """A model that outlives its jobs."""

    def close(self) -> None:
        """It stays."""


def test_jobs_run_on_a_model_that_is_there(model: Path, source: Path, tmp_path: Path) -> None:
    alone, shared, stopped = (tmp_path / f"{name}.jsonl" for name in ("alone", "shared", "stopped"))
    run(model, source, alone)
    config = EngineConfig(device="reference", max_num_seqs=2)
    llm = Shared(model, config=config)

    def task(output: Path) -> Task:
        return Task.of(model, JobFiles.named(source, output), JobOptions(), config)

    def host(cancelled: Callable[[], bool] = lambda: False) -> Host:
        return Host(
            lambda task: local_half(task, llm), say=lambda text: None, report=lambda progress: None, cancelled=cancelled
        )

    assert run_task(task(shared), host()).state == "finished"
    cancelled = run_task(task(stopped), host(lambda: True))
    assert (cancelled.state, cancelled.done, cancelled.failed) == ("cancelled", 0, 22)
    assert records(shared) == records(alone)
    assert not llm.has_work
    super(Shared, llm).close()
