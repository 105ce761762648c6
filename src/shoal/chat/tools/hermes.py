"""Hermes and Qwen, and most models with ChatML: ``<tool_call>{"name": "f", "arguments": {...}}</tool_call>``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from shoal.chat.events import Parsing, Said
from shoal.chat.json_calls import any_name, json_calls
from shoal.chat.reader import Reader
from shoal.chat.tools.base import Call, ToolFormat, Tools

START, END = "<tool_call>", "</tool_call>"


def parse(reader: Reader, tools: Tools) -> Parsing[None]:
    """Calls between the marks; some models put several or a list there, or forget the end."""
    while (yield from reader.until((START,))) is not None:
        yield from call_behind(reader, START, END)


def call_behind(reader: Reader, mark: str, end_mark: str) -> Parsing[None]:
    """What follows a mark that has been read: calls and the end mark. Without a call, the mark was text."""
    start = reader.at
    yield from reader.spaces()
    if not (yield from json_calls(reader, any_name)):
        yield Said(mark)
        reader.at = start
        return
    yield from reader.closing(end_mark)


def write(calls: Sequence[Call]) -> str:
    """Each call between marks of its own."""
    return "\n".join(f"{START}\n{as_json(call, 'arguments')}\n{END}" for call in calls)


def as_json(call: Call, arguments_key: str) -> str:
    """A call as an object of JSON."""
    return json.dumps({"name": call.name, arguments_key: call.arguments}, ensure_ascii=False)


def around(name: str, template: str) -> tuple[str, str]:
    """What stands before and behind the arguments."""
    return f'{START}\n{{"name": "{name}", "arguments": ', f"}}\n{END}"


HERMES = ToolFormat(
    "hermes",
    parse,
    write,
    f'{START}\n{{"name": "<function>", "arguments": {{"<parameter>": <value>}}}}\n{END}',
    (START, END),
    around,
)
