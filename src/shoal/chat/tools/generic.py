"""For templates that show no format: every one that the others read, whichever comes."""

from __future__ import annotations

from shoal.chat.events import Parsing
from shoal.chat.reader import Reader
from shoal.chat.tools import hermes, llama3, mistral, pythonic
from shoal.chat.tools.base import ToolFormat, Tools

# Marks around JSON: of Hermes, of Phi 4 (and Granite, without the end), and of others.
_AROUND_JSON = {
    hermes.START: hermes.END,
    "<|tool_call|>": "<|/tool_call|>",
    "<function_call>": "</function_call>",
}
_MARKS = (*_AROUND_JSON, llama3.MARK, mistral.MARK, pythonic.BLOCK, pythonic.START)
_FENCE = "```"


def parse(reader: Reader, tools: Tools) -> Parsing[None]:
    """Without a mark, calls stand at the beginning and have the name of a tool; JSON may be in a fenced block."""
    for bare_calls in (llama3.bare_calls, pythonic.bare_calls, _fenced_calls):
        if (yield from bare_calls(reader, tools)):
            break
    while (mark := (yield from reader.until(_MARKS))) is not None:
        if mark == mistral.MARK:
            yield from mistral.call_behind(reader)
        elif mark == llama3.MARK:
            yield from llama3.call_behind(reader)
        elif mark in (pythonic.BLOCK, pythonic.START):
            yield from pythonic.call_behind(reader, tools, mark)
        else:
            yield from hermes.call_behind(reader, mark, _AROUND_JSON[mark])


def _fenced_calls(reader: Reader, tools: Tools) -> Parsing[bool]:
    """JSON calls in a block; what is none is left where it is."""
    start = reader.at
    yield from reader.spaces()
    found = (yield from reader.literal(_FENCE)) and (yield from _json_after_fence(reader, tools))
    if not found:
        reader.at = start
        return False
    yield from reader.closing(_FENCE)
    return True


def _json_after_fence(reader: Reader, tools: Tools) -> Parsing[bool]:
    language = yield from reader.run(str.isalpha)
    if language not in ("", "json"):
        return False
    return (yield from llama3.bare_calls(reader, tools))


GENERIC = ToolFormat(
    "generic",
    parse,
    hermes.write,
    hermes.HERMES.example,
    (*_MARKS, *_AROUND_JSON.values(), mistral.ID_MARK, mistral.ARGUMENTS_MARK, pythonic.END),
)
