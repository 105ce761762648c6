"""Mistral: ``[TOOL_CALLS][{"name": "f", "arguments": {...}}]``, in newer models ``[TOOL_CALLS]f[ARGS]{...}``."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.chat.events import CallEnd, CallStart, Parsing, Said
from shoal.chat.json_calls import any_name, json_arguments, json_calls
from shoal.chat.reader import Reader
from shoal.chat.tools.base import Call, ToolFormat, Tools
from shoal.chat.tools.hermes import as_json

MARK, ID_MARK, ARGUMENTS_MARK = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def parse(reader: Reader, tools: Tools) -> Parsing[None]:
    """A list of calls behind one mark, or a mark before each call."""
    while (yield from reader.until((MARK,))) is not None:
        yield from call_behind(reader)


def call_behind(reader: Reader) -> Parsing[None]:
    """What follows the mark. Without a call, the mark was text."""
    start = reader.at
    in_json = (yield from reader.spaces()) in ("[", "{")
    found = (yield from json_calls(reader, any_name)) if in_json else (yield from _named_call(reader))
    if not found:
        yield Said(MARK)
        reader.at = start


def _named_call(reader: Reader) -> Parsing[bool]:
    name = yield from reader.run(is_name_character)
    if not name:
        return False
    yield from reader.spaces()
    if (yield from reader.literal(ID_MARK)):
        yield from reader.run(str.isalnum)
    yield from reader.literal(ARGUMENTS_MARK)
    if (yield from reader.spaces()) != "{":
        return False
    yield CallStart(name)
    if (yield from json_arguments(reader)):
        yield CallEnd()
    return True


def is_name_character(char: str) -> bool:
    """Whether a function's name may hold this."""
    return char.isalnum() or char in "_-.:/"


def write(calls: Sequence[Call]) -> str:
    """The older spelling, a list."""
    return f"{MARK}[{', '.join(as_json(call, 'arguments') for call in calls)}]"


def around(name: str, template: str) -> tuple[str, str]:
    """The newer spelling where the template shows it."""
    return (
        (f"{MARK}{name}{ARGUMENTS_MARK}", "")
        if ARGUMENTS_MARK in template
        else (f'{MARK}[{{"name": "{name}", "arguments": ', "}]")
    )


MISTRAL = ToolFormat(
    "mistral",
    parse,
    write,
    f'{MARK}[{{"name": "<function>", "arguments": {{"<parameter>": <value>}}}}]',
    (MARK, ID_MARK, ARGUMENTS_MARK),
    around,
)
