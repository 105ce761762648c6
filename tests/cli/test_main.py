"""The frame of the command line: verbs, exit codes, one line for an error, and what stdout is for."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shoal import __version__
from shoal.cli import main as cli
from shoal.errors import EngineError
from tests.cli.conftest import Shoal, environment


def verb(body: click.Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``body`` a verb called ``try``."""
    monkeypatch.setattr(cli, "probe", body, raising=False)
    monkeypatch.setitem(cli.VERBS, "try", "shoal.cli.main:probe")


def test_version_and_help_go_to_stdout(shoal_process: Shoal) -> None:
    assert shoal_process("--version").stdout == f"shoal, version {__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        done = shoal_process(*arguments)
        assert done.returncode == 0
        assert done.stderr == ""
        assert all(f"\n  {name} " in done.stdout for name in cli.VERBS)


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_help_and_takes_debug(name: str) -> None:
    result = CliRunner().invoke(cli.shoal, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "--debug" in result.output
    command = cli.shoal.get_command(click.Context(cli.shoal), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str()


def test_help_imports_nothing_heavy() -> None:
    heavy = {"numpy", "numba", "tokenizers", "jinja2", "huggingface_hub", "rich", "psutil"}
    code = (
        f"import sys; from shoal.cli.main import main; main(['--help']); print(sorted(sys.modules.keys() & {heavy!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["list", "--nosuch"], "No such option"),
        (["list", "extra"], "unexpected extra argument"),
        (["pull"], "which model?"),
        (["pull", "a.gguf", "--model", "b.gguf"], "two models given"),
        (["rm"], "Missing argument"),
        (["pull", "nosuch.gguf"], "nosuch.gguf: no such file"),
        (["pull", "hf:nosuch"], "not of the form hf:ORG/REPO:QUANT"),
        (["rm", "gemma3:270m"], "gemma3:270m: not downloaded"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(shoal: Shoal, arguments: list[str], says: str) -> None:
    done = shoal(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("shoal: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--debug", "pull", "nosuch.gguf"], ["pull", "nosuch.gguf", "--debug"]])
def test_debug_shows_the_traceback_before_the_line(shoal: Shoal, arguments: list[str]) -> None:
    done = shoal(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("shoal: nosuch.gguf")


def test_debug_reaches_the_verbs_of_a_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @click.group()
    def outer() -> None: ...

    @outer.command()
    def inner() -> None:
        raise EngineError("two\nlines")

    verb(outer, monkeypatch)
    assert cli.main(["try", "inner"]) == 2
    assert capsys.readouterr().err == "shoal: two lines\n"
    assert cli.main(["try", "inner", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_verb_chooses_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for returned, code in ((None, 0), (0, 0), (1, 1)):
        verb(click.Command("try", callback=lambda value=returned: value), monkeypatch)
        assert cli.main(["try"]) == code


def test_a_system_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    verb(click.Command("try", callback=tmp_path.read_bytes), monkeypatch)
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == f"shoal: [Errno 21] Is a directory: '{tmp_path}'\n"


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    verb(click.Command("try", callback=lambda: 1 // 0), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_the_end_of_some_file_is_no_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read_on() -> None:
        raise EOFError("Ran out of input")

    verb(click.Command("try", callback=read_on), monkeypatch)
    with pytest.raises(EOFError, match="Ran out of input"):
        cli.main(["try"])
    assert "interrupted" not in capsys.readouterr().err


def test_an_interrupt_ends_with_130(cache: Path) -> None:
    """The process waits for a lock that this one holds until it is interrupted."""
    from filelock import FileLock

    cache.mkdir()
    command = [sys.executable, "-m", "shoal.cli.main", "pull", "smollm2:135m"]
    with (
        FileLock(cache / ".smollm2-135m.lock"),
        subprocess.Popen(command, env=environment(cache), stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        assert "waiting for another process" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
        assert process.stderr.read().strip() == "shoal: interrupted"
