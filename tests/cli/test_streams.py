"""Verbs with standard streams closed, full, broken or in another encoding: stdout has results only, and an end is one line."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO, cast

import click
import pytest

from shoal.cli.main import main
from shoal.cli.results import write_result
from tests.cli.conftest import environment
from tests.support.streams import BROKEN, OnlyWrites, encoded
from tests.support.tiny_model import write_tiny_model

ENGINE = ("--device", "reference")
ROWS = 12

# A job during which something writes to the descriptors of stdout and stderr, as C libraries and children do.
NOISY = """
import os, sys
from shoal.cli.main import main
from shoal.jobs.running.job import Job
step = Job._step
def noisy(job):
    for fd in (1, 2):
        os.write(fd, b"noise")
    step(job)
Job._step = noisy
sys.exit(main(sys.argv[1:]))
"""


class Place:
    """A folder with a model and a batch of ``ROWS`` requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_tiny_model(folder / "tiny.gguf")
        rows = [{"prompt": f"row {i}", "max_tokens": 4, "temperature": 0, "ignore_eos": True} for i in range(ROWS)]
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, redirections: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """The command under a shell's redirections: exit code, stdout, stderr."""
        return self.finish(redirections, [sys.executable, "-m", "shoal.cli.main", *arguments], **variables)

    def finish(self, redirections: str, command: list[str], **variables: str) -> tuple[int, str, str]:
        env = {**self.environment(), **variables}
        shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", *command]
        done = subprocess.run(
            shell, capture_output=True, stdin=subprocess.DEVNULL, cwd=self.folder, env=env, timeout=120, check=False
        )
        return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")

    def environment(self) -> dict[str, str]:
        """With streams that are buffered, as they are unless somebody wants them otherwise."""
        return {**environment(self.folder / "models"), "PYTHONUNBUFFERED": ""}

    def batch(self, output: str) -> list[str]:
        return ["run-batch", "tiny.gguf", "-i", "in.jsonl", "-o", output, *ENGINE]

    def records(self, text: str | None = None) -> set[str]:
        """The custom_ids in ``text``, or out.jsonl; each line is a record."""
        lines = ((self.folder / "out.jsonl").read_text() if text is None else text).splitlines()
        return {json.loads(line)["custom_id"] for line in lines}


ALL = {f"row-{i + 1}" for i in range(ROWS)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# -- stderr ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_without_stderr_stdout_has_nothing_but_records(shared: Place, redirection: str) -> None:
    code, stdout, stderr = shared.run(redirection, *shared.batch("-"))
    assert (code, stderr) == (0, "")
    assert shared.records(stdout) == ALL


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_what_code_prints_to_sys_stderr_is_dropped_there(place: Place, redirection: str) -> None:
    (place.folder / "text").write_text("some words " * 20)
    code, stdout, _ = place.run(redirection, "perplexity", "tiny.gguf", "-f", "text", "--ctx-size", "64", *ENGINE)
    assert code == 0
    assert stdout.startswith("PPL = ")
    assert stdout.count("\n") == 1


def test_errors_are_dropped_too(shared: Place) -> None:
    assert shared.run("2>&-", "inspect", "nosuch.gguf") == (2, "", "")


def test_a_job_whose_stderr_breaks_goes_on(place: Place) -> None:
    command = [sys.executable, "-m", "shoal.cli.main", *place.batch("out.jsonl")]
    reader, writer = os.pipe()
    os.close(reader)
    env = place.environment()
    done = subprocess.run(
        command, stderr=writer, stdout=subprocess.PIPE, cwd=place.folder, env=env, timeout=120, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, b"")
    assert place.records() == ALL


def test_with_all_streams_closed_no_noise_gets_into_the_results(place: Place) -> None:
    code, _, _ = place.finish("<&- >&- 2>&-", [sys.executable, "-c", NOISY, *place.batch("out.jsonl")])
    assert code == 0
    assert place.records() == ALL


# -- stdout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("complete", "tiny.gguf", "-p", "hi", "--max-tokens", "3", *ENGINE),
        ("tokenize", "hi", "--model", "tiny.gguf", "--pieces"),
        ("pull", "tiny.gguf"),
    ],
    ids=lambda arguments: str(arguments[0]),
)
@pytest.mark.parametrize(
    ("redirection", "says"),
    [(">&-", "stdout is closed"), (">/dev/full", "stdout: No space left on device")],
    ids=["closed", "full"],
)
def test_a_result_that_cannot_be_written_is_one_line(
    shared: Place, arguments: tuple[str, ...], redirection: str, says: str
) -> None:
    code, _, stderr = shared.run(redirection, *arguments)
    assert code == 2
    assert stderr.startswith(f"shoal: {says}")
    assert stderr.count("\n") == 1


def test_a_job_that_writes_to_a_file_needs_no_stdout(place: Place) -> None:
    code, _, stderr = place.run(">&-", *place.batch("out.jsonl"))
    assert (code, place.records()) == (0, ALL)
    assert "finished: 12 rows done" in stderr


@pytest.mark.parametrize(
    "arguments", [("tokenize", "hi", "--model", "tiny.gguf"), ("--help",)], ids=lambda a: str(a[0])
)
def test_a_reader_that_has_gone_is_one_line(shared: Place, arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command, env = [sys.executable, "-m", "shoal.cli.main", *arguments], shared.environment()
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=shared.folder, env=env, timeout=120, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "shoal: stdout: Broken pipe\n")


def test_a_closed_stdin_is_one_line(shared: Place) -> None:
    for verb in ("complete", "chat"):
        code, stdout, stderr = shared.run("<&-", verb, "tiny.gguf", *ENGINE)
        assert (code, stdout, stderr) == (2, "", "shoal: stdin is closed\n")


def test_files_are_written_before_a_stdout_that_may_be_gone(tmp_path: Path) -> None:
    from shoal.cli.bench_options import show

    with redirect_stdout(cast(TextIO, BROKEN[3]())), pytest.raises(click.ClickException, match="stdout"):
        show("text", {"a": 1}, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}


def test_prompts_of_a_chat_are_no_answers(place: Place) -> None:
    """stdin is a terminal, stdout a file."""
    keys, inside = pty.openpty()
    command = [sys.executable, "-m", "shoal.cli.main", "chat", "tiny.gguf", "--max-tokens", "3", *ENGINE]
    env = place.environment()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=inside, stdout=pipe, stderr=pipe, text=True, cwd=place.folder, env=env
    ) as process:
        os.close(inside)
        os.write(keys, b"/reset\n/exit\n")
        stdout, stderr = process.communicate(timeout=60)
    os.close(keys)
    assert (process.returncode, stdout) == (0, "")
    assert stderr.endswith("> > ")


# -- encodings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("latin-1", "caf\xe9 \\u65e5 \\U0001f600\n"),
        ("cp1252:strict", "caf\xe9 \\u65e5 \\U0001f600\n"),
        ("ascii", "café 日 😀\n".encode().decode("latin-1")),
        ("utf-8", "café 日 😀\n".encode().decode("latin-1")),
    ],
)
def test_what_stdout_cannot_say_is_escaped(shared: Place, encoding: str, expected: str) -> None:
    ids = " ".join(map(str, "café 日 😀".encode()))  # a token is a byte
    arguments = ("tokenize", "--decode", ids, "--model", "tiny.gguf")
    assert shared.run("", *arguments, PYTHONIOENCODING=encoding) == (0, expected, "")


def test_a_name_that_is_not_utf_8_comes_out_as_it_is(place: Place) -> None:
    name = os.fsdecode(b"\xff.gguf")
    (place.folder / "tiny.gguf").rename(place.folder / name)
    code, stdout, _ = place.run("", "pull", name, PYTHONIOENCODING="utf-8")
    assert (code, stdout) == (0, "\xff.gguf\n")


def test_objects_in_the_place_of_stdout() -> None:
    plain, (strict, data) = OnlyWrites(), encoded("latin-1")
    for stream in (plain, strict):
        with redirect_stdout(cast(TextIO, stream)):
            write_result("é 日")
    assert plain.text == "é 日\n"
    assert data.getvalue() == b"\xe9 \\u65e5\n"


def test_escape_sequences_of_a_result_stay(capsys: pytest.CaptureFixture[str]) -> None:
    write_result("\x1b[31mred\x1b[0m")
    assert capsys.readouterr().out == "\x1b[31mred\x1b[0m\n"


@pytest.mark.parametrize("make", BROKEN)
def test_the_command_runs_with_any_object_as_stderr(make: type[object], shared: Place) -> None:
    stdout = io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(cast(TextIO, make())):
        assert main(["tokenize", "hi", "--model", str(shared.folder / "tiny.gguf")]) == 0
        assert main(["inspect", "nosuch.gguf"]) == 2
    assert stdout.getvalue() == "104 105\n"
