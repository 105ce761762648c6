"""gpt-oss: a call is a message to a function, on a channel of its own (see ``shoal.chat.harmony``)."""

from __future__ import annotations

from shoal.chat import harmony
from shoal.chat.events import Parsing
from shoal.chat.reader import Reader
from shoal.chat.tools import hermes
from shoal.chat.tools.base import ToolFormat, Tools


def parse(reader: Reader, tools: Tools) -> Parsing[None]:
    """Nothing is left to find: who reads the channels finds the calls."""
    yield from reader.until(())


CHANNEL_CALLS = ToolFormat("harmony", parse, hermes.write, hermes.HERMES.example, harmony.MARKS)
