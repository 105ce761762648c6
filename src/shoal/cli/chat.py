"""``shoal chat``: a conversation on the terminal."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING

import click

from shoal.cli.options import engine_options, model_argument
from shoal.cli.sampling import decoded, sampling_options, stdin, with_model_defaults, write_answer
from shoal.errors import RequestError, TemplateError
from shoal.params import EngineConfig, SamplingParams
from shoal.system.streams import say

if TYPE_CHECKING:
    from shoal.llm import LLM
    from shoal.requests.outputs import RequestOutput

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."


@click.command()
@model_argument()
@click.option("--system", metavar="TEXT", help="System message at the start of the conversation.")
@sampling_options
@engine_options
def chat(model: str, system: str | None, params: SamplingParams, engine_config: EngineConfig) -> int:
    """Talk with a model. Each line is a message; answers go to stdout as they come.

    /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer and not the program.
    The exit code is 2 if a message could not be answered and stdin is not a terminal.
    """
    from shoal.llm import LLM

    with LLM(model, config=engine_config) as llm:
        llm.refuse_encoder("chat")
        if llm.chat_template is None:
            raise RequestError(f"{llm.path.name} has no chat template; give one with --chat-template")
        interactive = stdin().isatty()
        if interactive:
            click.echo(_HELP, err=True)
        keyboard = Keyboard()
        conversation = Conversation(
            llm, with_model_defaults(params, llm.chat_defaults), system, lambda: keyboard.stopped
        )
        with keyboard.listening() if interactive else nullcontext():
            for line in keyboard.lines() if interactive else _piped_lines():
                if line.strip() == "/exit":
                    break
                if line.strip() == "/reset":
                    conversation.reset()
                elif line.strip():
                    conversation.say(line)
    return 2 if conversation.failures and not interactive else 0


class Conversation:
    """The messages so far. ``failures`` counts those that could not be answered; they are forgotten.

    ``stopped`` is asked before each step whether to leave the answer as it is.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, stopped: Callable[[], bool]) -> None:
        self.failures = 0
        self._llm = llm
        self._params = params
        self._stopped = stopped
        self._start = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._start)

    def say(self, text: str) -> None:
        """Write the answer to a message. An answer that is stopped stays in the conversation as far as it came."""
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = write_answer(self._answer(messages))
        except (RequestError, TemplateError) as error:
            self.failures += 1
            say(str(error))
            return
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _answer(self, messages: list[dict[str, str]]) -> Iterator[RequestOutput]:
        request_id = self._llm.submit({"messages": messages}, self._params)
        try:
            while self._llm.has_work and not self._stopped():
                yield from self._llm.step()
        finally:
            self._llm.abort(request_id)


class Keyboard:
    """Lines from a terminal. Ctrl-C drops the line that is being typed; at other times it only sets ``stopped``.

    So nothing is ever torn apart by it: a step that is running is completed.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._typing = False

    def lines(self) -> Iterator[str]:
        """Lines up to Ctrl-D."""
        with suppress(ImportError):  # where the system has it, input() gets a history and arrow keys
            importlib.import_module("readline")
        while True:
            try:
                yield self._line()
            except KeyboardInterrupt:
                click.echo(err=True)
            except EOFError:
                click.echo(err=True)
                return

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over Ctrl-C."""
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _line(self) -> str:
        self.stopped = False
        self._typing = True
        try:
            if sys.stdout is not None and sys.stdout.isatty():
                return input("> ")
            click.echo("> ", nl=False, err=True)  # stdout is for answers
            return input()
        finally:
            self._typing = False

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._typing:
            raise KeyboardInterrupt
        self.stopped = True


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(stdin().buffer, start=1):
        yield decoded(line, f"stdin line {number}").removesuffix("\n")
