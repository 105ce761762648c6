"""Llama 3: ``{"name": "f", "parameters": {...}}`` alone, several with semicolons between them, or behind a mark."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.chat.events import Parsing, Said
from shoal.chat.json_calls import any_name, json_calls
from shoal.chat.reader import Reader
from shoal.chat.tools.base import Call, ToolFormat, Tools
from shoal.chat.tools.hermes import as_json

MARK = "<|python_tag|>"


def parse(reader: Reader, tools: Tools) -> Parsing[None]:
    """At the beginning a call needs no mark, but then the name of a tool: other JSON is an answer."""
    yield from bare_calls(reader, tools)
    while (yield from reader.until((MARK,))) is not None:
        yield from call_behind(reader)


def bare_calls(reader: Reader, tools: Tools) -> Parsing[bool]:
    """Calls of known tools without a mark; what is none is left where it is."""
    start = reader.at
    yield from reader.spaces()
    found = yield from json_calls(reader, tools.__contains__)
    if not found:
        reader.at = start
    return found


def call_behind(reader: Reader) -> Parsing[None]:
    """What follows the mark. It may also be a program for Llama's own tools, which is text."""
    start = reader.at
    yield from reader.spaces()
    if not (yield from json_calls(reader, any_name)):
        yield Said(MARK)
        reader.at = start


def write(calls: Sequence[Call]) -> str:
    """Objects with semicolons between them."""
    return "; ".join(as_json(call, "parameters") for call in calls)


LLAMA3 = ToolFormat(
    "llama3_json", parse, write, '{"name": "<function>", "parameters": {"<parameter>": <value>}}', (MARK,)
)
