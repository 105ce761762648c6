"""Standard streams that are closed, full, or no files: what is for people is dropped, and goes nowhere else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import pytest

from shoal.llm import LLM
from shoal.params import SamplingParams
from shoal.system.streams import (
    Forgiving,
    binary_stdout,
    encoding_of,
    open_above_standard,
    say,
    sayable,
    streams_of_a_program,
)
from tests.support.streams import BROKEN, OnlyWrites, closed, encoded
from tests.support.tiny_model import write_tiny_model


@pytest.mark.parametrize("make", BROKEN)
def test_what_cannot_be_said_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Callable[[], Any]
) -> None:
    monkeypatch.setattr(sys, "stderr", make())
    say("a line")
    stream = Forgiving(make())
    assert stream.write("text") == 4
    stream.flush()
    assert not stream.isatty()
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()
    print("more", file=cast(TextIO, stream))
    assert capsys.readouterr().out == ""


def test_a_stream_that_only_writes_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = OnlyWrites()
    monkeypatch.setattr(sys, "stderr", stream)
    say("a line")
    assert stream.text == "shoal: a line\n"
    assert not Forgiving(cast(TextIO, stream)).isatty()


def test_what_an_encoding_lacks_is_escaped() -> None:
    for encoding, expected in (("ascii", rb"caf\xe9 \U0001f600"), ("iso8859-1", b"caf\xe9 \\U0001f600")):
        stream, data = encoded(encoding)
        forgiving = Forgiving(stream)
        assert forgiving.encoding == encoding
        forgiving.write("café 😀")
        forgiving.flush()
        assert data.getvalue() == expected


def test_bytes_of_file_names_stay_as_they_are_where_that_can_be_said() -> None:
    assert sayable("caf\udce9", "utf-8") == b"caf\xe9"
    assert sayable("caf\udce9 😀", "latin-1") == rb"caf\udce9 \U0001f600"


def test_a_stream_that_has_no_encoding_is_taken_for_utf_8() -> None:
    for encoding in (None, "no such", 5):
        assert encoding_of(cast(TextIO, SimpleNamespace(encoding=encoding))) == "utf-8"
    assert encoding_of(cast(TextIO, object())) == encoding_of(None) == "utf-8"


def test_bytes_are_refused_as_text_streams_do() -> None:
    with pytest.raises(TypeError, match="got bytes, must be str"):
        Forgiving(io.StringIO()).write(cast(str, b""))


def test_an_interrupt_while_writing_is_not_dropped() -> None:
    class Interrupted(OnlyWrites):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Forgiving(cast(TextIO, Interrupted())).write("x")


# -- stdout as bytes -------------------------------------------------------------------------------------------------


def test_stdout_that_is_no_file_takes_lines_of_bytes() -> None:
    for stream in (io.StringIO(), OnlyWrites()):
        with redirect_stdout(cast(TextIO, stream)), binary_stdout() or pytest.fail("closed") as out:
            out.write('{"text": "日本"}\n'.encode())
            out.flush()
        assert (stream.getvalue() if isinstance(stream, io.StringIO) else stream.text) == '{"text": "日本"}\n'


def test_stdout_that_is_closed() -> None:
    for stream in (None, closed()):
        with redirect_stdout(cast(TextIO, stream)):
            assert binary_stdout() is None


def test_closing_it_leaves_stdout_open(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w", encoding="utf-8") as file, redirect_stdout(file):
        with binary_stdout() or pytest.fail("closed") as out:
            out.write(b"bytes\n")
        print("text")
    assert (tmp_path / "file").read_text() == "bytes\ntext\n"


# -- descriptors -------------------------------------------------------------------------------------------------------

REPORT = """
import os, sys
from pathlib import Path
from shoal.jobs.durable.lock import JobLock
from shoal.jobs.durable.storage import AppendFile
from shoal.system.streams import open_above_standard, streams_of_a_program

folder, report = Path(sys.argv[1]), os.dup2(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT), 9)
for fd in map(int, sys.argv[3]):
    os.close(fd)
found = []
with AppendFile(folder / "file") as file, JobLock(folder / "job") as lock:
    found += [file._fd, lock._fd, open_above_standard(folder / "other", os.O_WRONLY | os.O_CREAT)]
with streams_of_a_program():
    found.append(os.open(folder / "file", os.O_RDONLY))
    null = [os.path.samestat(os.fstat(fd), os.stat(os.devnull)) and os.get_inheritable(fd) for fd in map(int, sys.argv[3])]
os.write(9, repr((found, all(null))).encode())
"""


@pytest.mark.parametrize("missing", ["0", "1", "2", "12", "012"])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path, missing: str) -> None:
    report = tmp_path / "report"
    subprocess.run([sys.executable, "-c", REPORT, tmp_path, report, missing], check=True, timeout=60)
    found, null = eval(report.read_text())
    assert min(found) > 2
    assert null


def test_open_streams_stay_what_they_are(tmp_path: Path) -> None:
    before = [os.fstat(fd) for fd in range(3)]
    stdout, stderr = sys.stdout, sys.stderr
    with streams_of_a_program():
        assert sys.stdout is stdout
        assert isinstance(sys.stderr, Forgiving)
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert all(os.path.samestat(one, os.fstat(fd)) for fd, one in enumerate(before))
    fd = open_above_standard(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    os.close(fd)
    assert fd > 2


# -- in Python ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.mark.parametrize("make", [*BROKEN, OnlyWrites])
def test_an_llm_says_nothing_on_stdout_and_needs_no_stderr(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Callable[[], Any]
) -> None:
    monkeypatch.setattr(sys, "stderr", make())
    with LLM(model, device="reference") as llm:
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        (output,) = llm.generate(["hello"], params)
        (lazy,) = llm.generate(iter(["hello"]), params)
    assert len(output.outputs[0].token_ids) == len(lazy.outputs[0].token_ids) == 3
    assert capsys.readouterr().out == ""


def test_kernels_that_are_compiled_are_not_told_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shoal.llm import _say_compiled

    monkeypatch.setattr(sys, "stderr", None)
    _say_compiled("a_kernel")
    assert capsys.readouterr().out == ""
    stream = io.StringIO()
    with redirect_stderr(stream):
        _say_compiled("a_kernel")
    assert stream.getvalue().startswith("shoal: compiled a_kernel")
