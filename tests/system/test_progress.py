"""The bar of whatever takes long: on a terminal, and never in the way of results."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from shoal.system.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_no_stream_is_no_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes anything for a terminal then
    with Bar("requests", 2, stream=None) as bar:
        bar.update(1, 2, 10, 1.0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stdout", [io.StringIO(), Terminal()])
def test_what_is_printed_meanwhile_reaches_stdout_unless_both_are_terminals(stdout: io.StringIO) -> None:
    stderr = Terminal()
    with redirect_stdout(stdout), redirect_stderr(stderr), Bar("requests", 2, stream=sys.stderr) as bar:
        bar.update(1, 2, 10, 1.0)
        print("an answer")
    shown = stderr if stdout.isatty() else stdout
    assert "an answer\n" in shown.getvalue()
    if not stdout.isatty():
        assert stdout.getvalue() == "an answer\n"
        assert "an answer" not in stderr.getvalue()


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with Bar("requests", 2, stream=Gone(), kept=True) as bar:
        assert bar.shown
        bar.update(2, 2, 10, 1.0)
