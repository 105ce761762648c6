"""``shoal chat``: with piped stdin, and on a terminal (a pseudo-terminal of the system)."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.llm import LLM
from shoal.params import SamplingParams
from tests.cli.conftest import Shoal, environment
from tests.support.tiny_model import write_tiny_model

FLAGS = ("--device", "reference", "--temperature", "0", "--ignore-eos", "--stop", "\n")
LONG = 8192
GREEDY = SamplingParams(temperature=0, ignore_eos=True, stop="\n", max_tokens=12)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.gguf")


def answers(model: Path, *messages: str, system: str | None = None) -> list[str]:
    """What the model says when each message follows the answer to the one before."""
    history = [{"role": "system", "content": system}] if system else []
    found = []
    with LLM(model, device="reference", max_num_seqs=1) as llm:
        for message in messages:
            history.append({"role": "user", "content": message})
            found.append(llm.chat(history, GREEDY)[0].outputs[0].text)
            history.append({"role": "assistant", "content": found[-1]})
    return found


def lines(*texts: str) -> str:
    return "".join(text + "\n" for text in texts)


def test_the_history_is_kept(shoal: Shoal, model: Path) -> None:
    done = shoal("chat", model, *FLAGS, "--max-tokens", "12", stdin="hi\nand now?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == lines(*answers(model, "hi", "and now?"))


def test_reset_forgets_all_but_the_system_message(shoal: Shoal, model: Path) -> None:
    first, second = answers(model, "hi", system="Be brief.")[0], answers(model, "you", system="Be brief.")[0]
    done = shoal("chat", model, *FLAGS, "--max-tokens", "12", "--system", "Be brief.", stdin="hi\n/reset\n\nyou\n")
    assert done.stdout == lines(first, second)


def test_the_model_says_how_it_wants_to_be_sampled(shoal: Shoal, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", keys={"general.sampling.temp": 0.0})
    flags = tuple(flag for flag in FLAGS if flag not in ("--temperature", "0"))
    expected = lines(*answers(model, "hi"))
    assert shoal("chat", model, *flags, "--max-tokens", "12", stdin="hi\n").stdout == expected
    assert shoal("chat", model, *flags, "--temperature", "1", "--max-tokens", "12", stdin="hi\n").stdout != expected


def test_exit_ends_it(shoal: Shoal, model: Path) -> None:
    done = shoal("chat", model, *FLAGS, "--max-tokens", "12", stdin="/exit\nhi\n")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_message_that_cannot_be_answered_is_forgotten(shoal: Shoal, model: Path) -> None:
    done = shoal("chat", model, *FLAGS, "--max-tokens", "12", stdin="hi\n" + "x" * 600 + "\nand now?\n")
    assert done.returncode == 2
    assert done.stdout == lines(*answers(model, "hi", "and now?"))
    assert "max_model_len 512" in done.stderr


def test_a_model_without_a_template_is_refused(shoal: Shoal, tmp_path: Path) -> None:
    bare = write_tiny_model(tmp_path / "bare.gguf", template=None)
    done = shoal("chat", bare, *FLAGS, stdin="hi\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "shoal: bare.gguf has no chat template; give one with --chat-template\n"
    (tmp_path / "own.jinja").write_text("{{ messages[-1]['content'] }}")
    assert shoal("chat", bare, *FLAGS, "--chat-template", "own.jinja", stdin="hi\n").returncode == 0


class Terminal:
    """The program on a pseudo-terminal: what it shows, and keys to press."""

    def __init__(self, *arguments: str, env: dict[str, str]) -> None:
        self.shown = ""
        self._keys, inside = pty.openpty()
        command = [sys.executable, "-m", "shoal.cli.main", *arguments]
        self.process = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, env=env, start_new_session=True
        )
        os.close(inside)

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until ``text`` is shown; what came with it."""
        start = len(self.shown)
        assert self.shows(text, start, seconds), f"{text!r} was not shown after {self.shown!r}"
        return self.shown[start:]

    def shows(self, text: str, start: int, seconds: float) -> bool:
        """Read for so long; whether ``text`` is there, past the first ``start`` characters."""
        end = time.monotonic() + seconds
        while text not in self.shown[start:] and time.monotonic() < end:
            if select.select([self._keys], [], [], 0.1)[0]:
                self.shown += os.read(self._keys, 4096).decode("utf-8", "replace")
        return text in self.shown[start:]

    def wait_for_more(self, characters: int) -> None:
        """Read until so many more are shown."""
        wanted = len(self.shown) + characters
        while len(self.shown) < wanted:
            self.shown += os.read(self._keys, 4096).decode("utf-8", "replace")

    def press(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C reaches every process of the terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keys)


@pytest.fixture
def terminal(tmp_path: Path, cache: Path) -> Iterator[Terminal]:
    model = write_tiny_model(tmp_path / "long.gguf", context=LONG)
    flags = ("--device", "reference", "--temperature", "0", "--ignore-eos")
    terminal = Terminal("chat", str(model), *flags, env={**environment(cache), "TERM": "dumb"})
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.press("hi\n")
    terminal.wait_for("hi\r\n")
    terminal.wait_for_more(3)  # in the midst of an answer of LONG tokens, each of them a character or so
    terminal.interrupt()
    assert len(terminal.wait_for("> ")) < LONG / 2
    terminal.press("/reset\n")
    terminal.wait_for("> ")
    terminal.press("once more\n")
    terminal.wait_for("once more\r\n")
    terminal.interrupt()
    assert len(terminal.wait_for("> ")) < LONG / 2
    assert "shoal:" not in terminal.shown
    assert terminal.process.poll() is None
    terminal.press("\x04")
    assert terminal.process.wait(timeout=120) == 0


def test_ctrl_c_at_the_prompt_drops_the_line(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.press("half a line")
    terminal.wait_for("half a line")
    start = len(terminal.shown)
    # Python's readline misses a signal that comes just before it waits for keys: then the key is pressed again.
    while not terminal.shows("> ", start, seconds=1):
        terminal.interrupt()
    terminal.press("/exit\n")
    assert terminal.process.wait(timeout=120) == 0
