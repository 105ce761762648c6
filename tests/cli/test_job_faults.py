"""What befalls a batch job, through the command line in processes: signals, damaged and foreign files, limits, odd inputs.

Kills without a signal are in tests/jobs/test_kills.py, faults of single writes in tests/jobs/test_faults.py.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.main import main
from tests.cli.conftest import environment
from tests.jobs.compress import COMPRESS
from tests.jobs.kills import CONTEXT, Tally, look_at, records_of, write_rows
from tests.support.tiny_model import write_tiny_model

ROWS = 90
RESUME = "resume with the same command"
MANY = 2000
NEVER = {"prompt": "x", "ignore_eos": True, "max_tokens": 100}  # of which there are more than a test has time for
ERRORS = "out.jsonl.errors.jsonl"

Done = subprocess.CompletedProcess

# The command line that sends itself a signal as soon as a few rows are done for good and one has failed: so it comes in the middle of
# every job.
SIGNALLED = """
import os, sys
from shoal.cli.main import main
from shoal.jobs.durable import ledger
number = int(sys.argv.pop(1))
commit = ledger.Ledger.commit
def commit_and_signal(self):
    commit(self)
    if self.totals.done > 2 and self.totals.failed and not sent:
        sent.append(os.kill(os.getpid(), number))
sent = []
ledger.Ledger.commit = commit_and_signal
ledger._SHORTEST_INTERVAL, ledger._INTERVAL_PER_COST = 0.02, 1
sys.exit(main())
"""
# The command line whose first step does not end. What it does, and the signals after which it goes on, can be seen as files.
ENDLESS_STEP = """
import pathlib, sys, time
from shoal.cli.main import main
from shoal.jobs.running.interrupts import Interrupts
from shoal.kernels import reference
def attend(*arguments):
    pathlib.Path("at work").touch()
    while True:
        time.sleep(0.01)
def note_and_go_on(self, number, frame):
    interrupt(self, number, frame)
    pathlib.Path("signalled").touch()
reference.attend = attend
interrupt, Interrupts._interrupt = Interrupts._interrupt, note_and_go_on
sys.exit(main())
"""


@dataclass(frozen=True)
class Place:
    """A folder with a model in it, in which jobs run: ``in.jsonl`` to ``out.jsonl``, unless told otherwise."""

    folder: Path

    @property
    def outputs(self) -> tuple[Path, Path]:
        return self.folder / "out.jsonl", self.folder / ERRORS

    def command(self, *flags: str, source: str = "in.jsonl", output: str = "out.jsonl") -> list[str]:
        engine = ["--device", "reference", "--max-num-seqs", "8"]
        return self.shoal("run-batch", "tiny.gguf", *engine, "-i", source, "-o", output, *flags)

    def shoal(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "shoal.cli.main", *arguments]

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        pipe, env = subprocess.PIPE, environment(self.folder / "models")
        return subprocess.Popen(command, cwd=self.folder, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def finish(self, command: list[str], stdin: str = "") -> Done[str]:
        process = self.start(command)
        stdout, stderr = process.communicate(stdin, timeout=120)
        assert "Traceback" not in stderr
        return Done(command, process.returncode, stdout, stderr)

    def run(self, *flags: str, **files: str) -> Done[str]:
        """``run-batch``, to its end."""
        return self.here(self.command(*flags, **files))

    def job(self, verb: str, *flags: str) -> Done[str]:
        """``job status`` and ``job cancel`` of the job of ``out.jsonl``."""
        return self.here(self.shoal("job", verb, "out.jsonl", *flags))

    def here(self, command: list[str]) -> Done[str]:
        """As ``finish``, in the tests' own process: most of a second less."""
        stdout, stderr = io.StringIO(), io.StringIO()
        with chdir(self.folder), redirect_stdout(stdout), redirect_stderr(stderr):
            code = main(command[3:])
        return Done(command, code, stdout.getvalue(), stderr.getvalue())

    def write(self, *rows: dict[str, Any] | str, name: str = "in.jsonl") -> None:
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def records(self, *names: str) -> list[dict[str, Any]]:
        """Of these files, or of both outputs."""
        paths = [self.folder / name for name in names] or [path for path in self.outputs if path.exists()]
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]

    def codes(self) -> Counter[str | None]:
        """How often each error code is in the records, None for an answer or a row that is wrong in itself."""
        return Counter(record["error"] and record["error"]["code"] for record in self.records())

    def signalled(self, number: int, *flags: str, **files: str) -> Done[str]:
        """``run-batch``, stopped by a signal in the middle."""
        return self.finish([sys.executable, "-c", SIGNALLED, str(int(number)), *self.command(*flags, **files)[3:]])

    def wait_for_commit(self, process: subprocess.Popen[str]) -> None:
        """Until rows are finished for good: the journal holds more than its header."""
        path = self.folder / "out.jsonl.shoal" / "journal"
        while not path.exists() or path.stat().st_size < 100:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def wait_for(self, name: str, process: subprocess.Popen[str]) -> None:
        """Until the process has made this file."""
        while not (self.folder / name).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def files(self) -> dict[str, tuple[bytes, int]]:
        """Content and time of all but the lock."""
        paths = (path for path in self.folder.rglob("*") if path.is_file() and path.name != "lock")
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def end(process: subprocess.Popen[str], number: int) -> Done[str]:
    """Send a signal and wait."""
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    return Done(process.args, process.returncode, stdout, stderr)


def write_small_model(path: Path, seed: int = 0) -> Path:
    """One layer is enough for jobs."""
    return write_tiny_model(path, layers=1, context=CONTEXT, seed=seed)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def make(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    """Makes a place, with the rows of the kill harness in ``in.jsonl``."""

    def make(name: str) -> Place:
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(model, folder)
        write_rows(folder / "in.jsonl", random.Random(1), ROWS)
        return Place(folder)

    return make


@pytest.fixture
def place(make: Callable[[str], Place]) -> Place:
    return make("place")


@pytest.fixture(scope="module")
def whole(make: Callable[[str], Place]) -> dict[str, bytes]:
    """The records of the job when nothing befalls it."""
    place = make("whole")
    done = place.run()
    assert done.returncode == 0, done.stderr
    found = dict(records_of(place.outputs))
    assert len(found) == ROWS
    return found


@pytest.fixture(scope="module")
def stopped(make: Callable[[str], Place]) -> tuple[Place, Done[str]]:
    """A job stopped by Ctrl-C in the middle, and what it said. Not to be used itself: ``half`` is a copy."""
    place = make("stopped")
    return place, place.signalled(signal.SIGINT)


@pytest.fixture
def half(stopped: tuple[Place, Done[str]], tmp_path: Path) -> Place:
    return Place(Path(shutil.copytree(stopped[0].folder, tmp_path / "half")))


@pytest.fixture
def endless(place: Place) -> Iterator[tuple[Place, subprocess.Popen[str]]]:
    """A job at work that would take very long, some rows of which are finished."""
    place.write(*[NEVER] * MANY)
    process = place.start(place.command())
    place.wait_for_commit(process)
    yield place, process
    process.kill()
    process.communicate()


# Signals -------------------------------------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on(stopped: tuple[Place, Done[str]]) -> None:
    place, done = stopped
    assert done.returncode == 130
    assert RESUME in done.stderr
    assert 0 < len(place.records()) < ROWS


def test_a_stopped_job_goes_on(half: Place, whole: dict[str, bytes]) -> None:
    finished, before = len(half.records()), half.outputs[0].read_bytes()
    done = half.run()
    assert done.returncode == 0
    assert f"going on: {finished} of {ROWS} rows are finished" in done.stderr
    assert "resumed once" in done.stderr
    assert half.outputs[0].read_bytes().startswith(before)
    assert look_at(half.outputs, whole) == Tally()


def test_so_does_sigterm(place: Place, whole: dict[str, bytes]) -> None:
    done = place.signalled(signal.SIGTERM)
    assert done.returncode == 130
    assert RESUME in done.stderr
    assert place.run().returncode == 0
    assert look_at(place.outputs, whole) == Tally()


def test_a_second_signal_does_not_wait_for_the_step(place: Place) -> None:
    process = place.start([sys.executable, "-c", ENDLESS_STEP, *place.command()[3:]])
    try:
        place.wait_for("at work", process)
        process.send_signal(signal.SIGINT)
        place.wait_for("signalled", process)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate()[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert RESUME in stderr


# Finished and foreign ------------------------------------------------------------------------------------------------


def test_a_finished_job_stays_as_it_is(place: Place) -> None:
    place.write({"prompt": "a"}, {"prompt": ""})
    assert place.run().returncode == 0
    before = place.files()
    program = "import sys; from shoal.cli.main import main; code = main(); print(*sys.modules); sys.exit(code)"
    done = place.finish([sys.executable, "-c", program, *place.command()[3:]])
    assert done.returncode == 0
    assert "shoal.jobs.running.launch" in done.stdout.split()
    assert "shoal.kernels.reference" not in done.stdout.split()  # the model was not loaded
    assert "finished already" in done.stderr
    assert place.files() == before
    assert place.run("--fail-on-errors").returncode == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", "5"], "parameters.seed: was 0, is 5"),
        (["--temperature", "0.5"], "parameters.defaults.temperature: was absent, is 0.5"),
        (["--kv-cache-dtype", "f32"], 'numerics.kv_cache_dtype: was "f16", is "f32"'),
        (["--error-file", "bad.jsonl"], "parameters.error_file"),
    ],
)
def test_other_parameters_are_another_job(half: Place, flags: list[str], says: str) -> None:
    refused(half, says, *flags)


def test_another_input_is_another_job(half: Place) -> None:
    with (half.folder / "in.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    refused(half, "input.blake2b", "--max-num-seqs", "3")


def test_another_model_is_another_job(half: Place) -> None:
    write_small_model(half.folder / "tiny.gguf", seed=1)
    refused(half, "model.blake2b")


def refused(place: Place, says: str, *flags: str) -> None:
    """The job is not taken up, in one line, and nothing is changed."""
    before = place.files()
    done = place.run(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "--restart" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert place.files() == before


def test_restart_drops_what_there_is(half: Place, whole: dict[str, bytes]) -> None:
    write_small_model(half.folder / "tiny.gguf", seed=1)
    done = half.run("--restart")
    assert done.returncode == 0
    assert "resumed" not in done.stderr
    found = dict(records_of(half.outputs))
    assert found.keys() == whole.keys()
    assert found != whole


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.jsonl", ERRORS])
@pytest.mark.parametrize("garbage", [b'{"id": "batch_req_', b'{"custom_id": "row-0"}\n\0\0\xff\n'])
def test_what_a_crash_left_behind_is_cut_off(half: Place, whole: dict[str, bytes], name: str, garbage: bytes) -> None:
    with (half.folder / name).open("ab") as file:
        file.write(garbage)
    done = half.run()
    assert done.returncode == 0
    assert f"{name}: {len(garbage)} bytes after the last finished row were cut off" in done.stderr
    assert look_at(half.outputs, whole) == Tally()


@pytest.mark.parametrize("cut", [1, 44, 100])
def test_a_torn_journal_costs_only_its_last_rows(half: Place, whole: dict[str, bytes], cut: int) -> None:
    path = half.folder / "out.jsonl.shoal" / "journal"
    path.write_bytes(path.read_bytes()[:-cut])
    assert half.run().returncode == 0
    assert look_at(half.outputs, whole) == Tally()


def test_a_journal_damaged_in_the_middle_costs_what_comes_after_and_says_so(
    half: Place, whole: dict[str, bytes]
) -> None:
    path = half.folder / "out.jsonl.shoal" / "journal"
    damaged = bytearray(path.read_bytes())
    rows = [at for at in range(16, len(damaged), 44) if bytes(damaged[at : at + 4]) in (b"DONE", b"FAIL")]
    damaged[rows[2] + 10] ^= 1
    path.write_bytes(damaged)
    done = half.run()
    assert done.returncode == 0
    assert f"journal: {len(damaged) - rows[2]} bytes after the last finished row were cut off" in done.stderr
    assert "going on: 2 of " in done.stderr
    assert look_at(half.outputs, whole) == Tally()


@pytest.mark.parametrize("name", ["out.jsonl", ERRORS])
def test_lines_that_are_missing_are_not_made_up(half: Place, name: str) -> None:
    path = half.folder / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    refused(half, f"{name}: ends at byte {size - 1}, the journal vouches for {size} bytes")


@pytest.mark.parametrize("name", ["out.jsonl", ERRORS])
def test_lines_that_were_edited_are_not_gone_on_from(half: Place, name: str) -> None:
    path = half.folder / name
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first[:-9] + b"X" + first[-8:] + b"\n" + rest)
    refused(half, f"{name}: the line of row ")


def test_an_output_that_is_gone_is_missed(half: Place) -> None:
    half.outputs[0].unlink()
    refused(half, "out.jsonl: ends at byte 0")


def test_a_manifest_that_is_none_is_named(half: Place) -> None:
    (half.folder / "out.jsonl.shoal" / "manifest.json").write_text("{")
    refused(half, "manifest.json: not the manifest of a job")


# One process at a time, and others that look -------------------------------------------------------------------------


def test_others_see_a_job_at_work_and_can_cancel_it(endless: tuple[Place, subprocess.Popen[str]]) -> None:
    place, process = endless
    second = place.run()
    assert second.returncode == 2
    assert f"process {process.pid} is working on this job" in second.stderr
    shown = place.job("status")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "running" in shown.stdout
    assert f"process {process.pid}" in shown.stdout
    found = json.loads(place.job("status", "--json").stdout)
    assert (found["state"], found["pid"], found["rows"]) == ("running", process.pid, MANY)
    assert 0 < found["done"] < MANY
    asked = place.job("cancel")
    assert asked.returncode == 0
    assert str(process.pid) in asked.stderr
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "cancelled: " in stderr
    assert place.codes().keys() == {None, "batch_cancelled"}
    assert len({record["custom_id"] for record in place.records()}) == len(place.records()) == MANY
    assert json.loads(place.job("status", "--json").stdout)["state"] == "cancelled"
    again = place.job("cancel")
    assert again.returncode == 2
    assert "cancelled already" in again.stderr


def test_a_job_that_nobody_works_on_is_cancelled_by_its_next_run(half: Place) -> None:
    finished = len(half.records())
    assert "interrupted: " in half.job("status").stdout
    assert "its next run cancels what is left" in half.job("cancel").stderr
    done = half.run()
    assert done.returncode == 0
    assert "cancelled: " in done.stderr
    assert len(half.records()) == ROWS
    assert 0 < half.codes()["batch_cancelled"] <= ROWS - finished
    again = half.run("--retry-errors")
    assert again.returncode == 0
    assert half.codes() == {None: ROWS}


@pytest.mark.parametrize("verb", ["status", "cancel"])
def test_where_there_is_no_job_there_is_nothing_to_see(place: Place, verb: str) -> None:
    done = place.job(verb)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no job" in done.stderr
    assert sorted(path.name for path in place.folder.iterdir()) == ["in.jsonl", "tiny.gguf"]


# Limits --------------------------------------------------------------------------------------------------------------


def test_rows_expire_at_the_deadline(place: Place) -> None:
    place.write("no json", *[NEVER] * (MANY - 1))
    done = place.run("--deadline", "1s")
    assert done.returncode == 0
    assert "expired: " in done.stderr
    codes = place.codes()
    assert codes.keys() == {None, "batch_expired"}
    assert codes.total() == MANY == len({record["custom_id"] for record in place.records()})
    assert place.run().returncode == 0  # it is over
    assert place.codes() == codes


def test_rows_that_expired_can_be_run_after_all(place: Place, whole: dict[str, bytes]) -> None:
    assert place.run("--deadline", "0.000001").returncode == 0
    assert set(place.codes()) == {None, "batch_expired"}
    assert len(place.records()) == ROWS
    done = place.run("--retry-errors")
    assert done.returncode == 0
    assert f"{ROWS} failed rows run again" in done.stderr
    assert f", {ROWS} retried" in done.stderr
    assert look_at(place.outputs, whole) == Tally()


def test_rows_that_take_too_long_fail_alone(place: Place) -> None:
    place.write({"prompt": "x"}, "no json", {"prompt": "y"})
    done = place.run("--timeout", "0.000001")
    assert done.returncode == 0
    assert place.codes() == {"request_timeout": 2, None: 1}
    assert place.run("--retry-errors").returncode == 0
    assert place.codes() == {None: 3}
    assert len(place.records("out.jsonl")) == 2


def test_failures_among_the_results_are_not_retried(place: Place) -> None:
    place.write({"prompt": "x"}, "no json")
    same = ("--error-file", "out.jsonl")
    assert place.run(*same).returncode == 0
    before = place.files()
    done = place.run(*same, "--retry-errors")
    assert done.returncode == 2
    assert "cannot be put back" in done.stderr
    assert place.files() == before


def test_too_many_failures_stop_the_job(place: Place, whole: dict[str, bytes]) -> None:
    done = place.run("--max-errors", "3")
    assert done.returncode == 1
    assert "stopped: " in done.stderr
    assert "resume with a larger --max-errors" in done.stderr
    assert sum(record["response"]["status_code"] != 200 for record in place.records()) == 4
    assert place.run("--max-errors", "1000").returncode == 0
    assert look_at(place.outputs, whole) == Tally()


def test_strict_refuses_a_bad_row_before_any_work(place: Place) -> None:
    place.write({"prompt": "x"}, "no json")
    done = place.run("--strict")
    assert done.returncode == 2
    assert "line 2" in done.stderr
    assert sorted(path.name for path in place.folder.iterdir()) == ["in.jsonl", "tiny.gguf"]
    place.write({"prompt": "x"})
    assert place.run("--strict").returncode == 0


# Inputs --------------------------------------------------------------------------------------------------------------


def test_duplicates_are_refused_before_anything_is_made(place: Place) -> None:
    place.write({"prompt": "x", "custom_id": "twin"}, "no json", {"prompt": "y", "custom_id": "twin"})
    done = place.run()
    assert done.returncode == 2
    assert "'twin' is in rows 1 and 3" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in place.folder.iterdir()) == ["in.jsonl", "tiny.gguf"]


TWINS = '{"prompt": "x", "custom_id": "a"}\n{"prompt": "y", "custom_id": "b"}\n{"prompt": "z", "custom_id": "a"}\n'


def test_on_stdin_a_duplicate_fails_alone(place: Place) -> None:
    done = place.finish(place.command(source="-"), TWINS)
    assert done.returncode == 0
    assert "the input is stdin" in done.stderr
    assert {record["custom_id"] for record in place.records("out.jsonl")} == {"a", "b"}
    (twin,) = place.records(ERRORS)
    assert twin["response"]["body"]["error"]["line"] == 3
    assert "'a' was used by line 1" in twin["response"]["body"]["error"]["message"]


def test_what_came_from_stdin_cannot_be_taken_up_again(place: Place) -> None:
    process = place.start(place.command(source="-"))
    assert process.stdin is not None
    process.stdin.write(json.dumps({"prompt": "x"}) + "\n" + json.dumps(NEVER) * 2)
    process.stdin.flush()
    place.wait_for("out.jsonl.shoal/manifest.json", process)
    assert end(process, signal.SIGTERM).returncode == 130
    done = place.finish(place.command(source="-"), TWINS)
    assert done.returncode == 2
    assert "cannot be read again" in done.stderr


def test_results_on_stdout_have_no_journal(place: Place, whole: dict[str, bytes]) -> None:
    text = (place.folder / "in.jsonl").read_text()
    done = place.finish(place.command(source="-", output="-"), text)
    assert done.returncode == 0
    assert "there is no journal" in done.stderr
    (place.folder / "all.jsonl").write_text(done.stdout)
    found = dict(records_of([place.folder / "all.jsonl"]))
    assert found.keys() == whole.keys()
    assert sorted(path.name for path in place.folder.iterdir()) == ["all.jsonl", "in.jsonl", "tiny.gguf"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_input_is_the_same_job_in_another_file(place: Place, whole: dict[str, bytes], suffix: str) -> None:
    name = f"in.jsonl{suffix}"
    data = COMPRESS[suffix]((place.folder / "in.jsonl").read_bytes())
    (place.folder / name).write_bytes(data)
    assert place.run(source=name).returncode == 0
    assert look_at(place.outputs, whole) == Tally()
    (place.folder / name).write_bytes(data[: len(data) // 2])
    done = place.run(source=name, output="other.jsonl")
    assert done.returncode == 2
    assert name in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (place.folder / "other.jsonl").exists()


def test_plain_prompts_take_what_they_do_not_say_from_flags(place: Place) -> None:
    place.write({"prompt": "x"}, {"messages": [{"role": "user", "content": "y"}], "max_tokens": 2}, {"text": "z"})
    flags = ("--max-tokens", "5", "--temperature", "0", "--chat", "--system", "Be brief.")
    assert place.run(*flags).returncode == 0
    first, second = place.records("out.jsonl")
    (bad,) = place.records(ERRORS)
    by_name = {record["custom_id"]: record["response"]["body"] for record in (first, second)}
    assert by_name.keys() == {"row-1", "row-2"}
    assert by_name["row-1"]["usage"]["completion_tokens"] <= 5
    assert by_name["row-1"]["usage"]["prompt_tokens"] > by_name["row-2"]["usage"]["prompt_tokens"]
    assert by_name["row-2"]["usage"]["completion_tokens"] <= 2
    assert {body["object"] for body in by_name.values()} == {"chat.completion"}
    assert bad["response"]["body"]["error"]["line"] == 3


def write_csv(path: Path, rows: int) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "question"], *([i, f"what,\n{i}?" if i % 9 else ""] for i in range(rows))])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


QUESTIONS = ("--prompt-column", "question", "--output-column", "answer", "--max-tokens", "30")


def test_a_table_that_was_stopped_is_completed(place: Place) -> None:
    write_csv(place.folder / "in.csv", 120)
    table: dict[str, str] = {"source": "in.csv", "output": "out.csv"}
    assert place.signalled(signal.SIGKILL, *QUESTIONS, **table).returncode < 0
    assert not (place.folder / "out.csv").exists()
    done = place.run(*QUESTIONS, **table)
    assert done.returncode == 0
    assert "going on: " in done.stderr
    assert place.run(*QUESTIONS, source="in.csv", output="whole.csv").returncode == 0
    assert (place.folder / "out.csv").read_bytes() == (place.folder / "whole.csv").read_bytes()
    found = read_csv(place.folder / "out.csv")
    assert [{"id": row["id"], "question": row["question"]} for row in found] == read_csv(place.folder / "in.csv")
    assert sum(bool(row["answer"]) for row in found) > 60
    assert not any(row["answer"] for row in found[::9])
    assert len(place.records("out.csv.errors.jsonl")) == len(found[::9])


def test_parquet_keeps_its_types(place: Place) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"n": pa.array([1, None, 3], pa.int16()), "prompt": ["x", "", "z"]})
    parquet.write_table(table, place.folder / "in.parquet")
    done = place.run("--max-tokens", "3", source="in.parquet", output="out.parquet")
    assert done.returncode == 0, done.stderr
    found = parquet.read_table(place.folder / "out.parquet")
    assert found.select(["n", "prompt"]).equals(table)
    assert [text is None for text in found["output"].to_pylist()] == [False, True, False]
    (place.folder / "bad.parquet").write_bytes((place.folder / "in.parquet").read_bytes()[:-7])
    refusal = place.run(source="bad.parquet", output="other.parquet")
    assert refusal.returncode == 2
    assert "bad.parquet" in refusal.stderr


# The disk ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_stops_the_job_until_there_is_room(half: Place, whole: dict[str, bytes]) -> None:
    """No file may become larger than is left of a half-written output: a write then fails as on a full disk."""
    kib = half.outputs[0].stat().st_size // 1024 + 2
    limited = ["bash", "-c", f'trap "" XFSZ; ulimit -f {kib}; exec "$@"', "-", *half.command()]
    done = half.finish(limited)
    assert done.returncode == 2
    assert "out.jsonl" in done.stderr
    assert "File too large" in done.stderr
    assert RESUME in done.stderr
    assert half.run().returncode == 0
    assert look_at(half.outputs, whole) == Tally()


@pytest.mark.parametrize("name", ["-", "/dev/null"])
def test_failures_that_cannot_be_kept_are_refused(place: Place, name: str) -> None:
    done = place.run("--error-file", name)
    assert done.returncode == 2
    assert f"error file: got '{name}', must be a regular file" in done.stderr
    assert sorted(path.name for path in place.folder.iterdir()) == ["in.jsonl", "tiny.gguf"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_folder_that_takes_no_files_is_named(place: Place) -> None:
    done = place.run(output="/proc/out.jsonl")
    assert done.returncode == 2
    assert "/proc/out.jsonl" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# File systems --------------------------------------------------------------------------------------------------------

WITHOUT_LOCKS = """
import fcntl, os, sys
def flock(fd, operation):
    raise OSError(int(sys.argv[1]), os.strerror(int(sys.argv[1])))
fcntl.flock = flock
from shoal.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(place: Place, number: int) -> None:
    place.write({"prompt": "a", "max_tokens": 2})
    shoal = [sys.executable, "-c", WITHOUT_LOCKS, str(number)]
    done = place.finish([*shoal, *place.command()[3:]])
    assert (done.returncode, done.stdout, len(place.records())) == (0, "", 1)
    (warning,) = [line for line in done.stderr.splitlines() if "locks" in line]
    assert "file locks are not available in " in warning
    assert "out.jsonl.shoal" in warning
    looked = place.finish([*shoal, "job", "status", "out.jsonl"])
    assert looked.returncode == 0
    assert looked.stdout.startswith("finished: 1 rows done")
    assert "locks" in looked.stderr
