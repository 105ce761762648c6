"""Calls written as Python: ``[f(a=1), g(b="x")]`` (Llama 3.2 and 4), or in a block of ``tool_code`` (Gemma)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from shoal.chat.events import Arguments, CallEnd, CallStart, Parsing, Reading, Said
from shoal.chat.reader import Reader
from shoal.chat.tools.base import Call, ToolFormat, Tools
from shoal.chat.tools.mistral import is_name_character

BLOCK, BLOCK_END = "```tool_code", "```"
START, END = "<|python_start|>", "<|python_end|>"
_PRINT = "print("
_ESCAPE, _ESCAPED = re.compile(r"\\(.)", re.DOTALL), "\n\\'\"abfnrtv01234567xNuU"
_CONSTANTS = {"true": True, "false": False, "null": None}  # as models write them whose JSON comes through


def parse(reader: Reader, tools: Tools) -> Parsing[None]:
    """Only names of tools are calls: all else is a program, or a list. At the beginning a list needs no mark."""
    yield from bare_calls(reader, tools)
    while (mark := (yield from reader.until((BLOCK, START)))) is not None:
        yield from call_behind(reader, tools, mark)


def bare_calls(reader: Reader, tools: Tools) -> Parsing[bool]:
    """A list of calls without a mark; what is none is left where it is."""
    start = reader.at
    found = (yield from reader.spaces()) == "[" and (yield from _calls(reader, tools))
    if not found:
        reader.at = start
    return found


def call_behind(reader: Reader, tools: Tools, mark: str) -> Parsing[None]:
    """What follows a mark that has been read. Without a call, the mark was text."""
    start = reader.at
    yield from reader.spaces()
    if not (yield from _calls(reader, tools)):
        yield Said(mark)
        reader.at = start
        return
    yield from reader.closing(BLOCK_END if mark == BLOCK else END)


def _calls(reader: Reader, tools: Tools) -> Parsing[bool]:
    """A list of calls, or a line for each. False, with nothing given out, where the first is none."""
    listed = yield from reader.literal("[")
    found = False
    while True:
        start = reader.at
        yield from reader.spaces()
        if found and listed and (yield from reader.literal("]")):
            return True
        if found and (yield from reader.literal("," if listed else ";")):
            yield from reader.spaces()
        if not (yield from _call(reader, tools)):
            reader.at = start
            return found
        found = True


def _call(reader: Reader, tools: Tools) -> Parsing[bool]:
    """``f(a=1)``, or ``print(f(a=1))``, which Gemma likes."""
    name = yield from reader.run(is_name_character)
    if printed := name == "print" and "print" not in tools and (yield from reader.literal("(")):
        name = yield from reader.run(is_name_character)
    if name not in tools or not (yield from reader.literal("(")):
        return False
    yield CallStart(name)
    if (yield from _arguments(reader, tuple(tools[name]))):
        yield CallEnd()
    if printed:
        yield from reader.spaces()
        yield from reader.literal(")")
    return True


def _arguments(reader: Reader, parameters: tuple[str, ...]) -> Parsing[bool]:
    """The arguments as JSON, each as soon as it is whole; False where they break off."""
    count = 0
    while True:
        if (yield from reader.spaces()) == ")":
            reader.at += 1
            yield Arguments("}" if count else "{}")
            return True
        source = yield from _argument(reader)
        if source is None:
            return False
        name, value = _named(source, parameters[count] if count < len(parameters) else f"argument{count + 1}")
        yield Arguments(f"{', ' if count else '{'}{_json(name)}: {_json(value)}")
        count += 1
        yield from reader.literal(",")


def _argument(reader: Reader) -> Reading[str | None]:
    """The source of one argument: up to a comma or bracket outside strings and brackets. None if the text ends before."""
    start, depth = reader.at, 0
    while char := (yield from reader.peek()):
        if char in "\"'":
            if not (yield from _string(reader)):
                return None
            continue
        if depth == 0 and char in ",)":
            return reader.text[start : reader.at]
        depth = max(0, depth + (char in "([{") - (char in ")]}"))
        reader.at += 1
    return None


def _string(reader: Reader) -> Reading[bool]:
    """Go past a string of Python; False if the text ends in it."""
    quote = reader.text[reader.at]
    if (yield from reader.literal(quote * 3)):
        quote *= 3
    elif (yield from reader.literal(quote * 2)):
        return True
    else:
        reader.at += 1
    while not (yield from reader.literal(quote)):
        char = yield from reader.peek()
        reader.at += 1
        if char == "\\" and (yield from reader.peek()):
            reader.at += 1
        if not char:
            reader.at = len(reader.text)
            return False
    return True


def _named(source: str, place: str) -> tuple[str, Any]:
    """The name and value of an argument; ``place`` is the name of one that is given without."""
    name, equals, value = source.partition("=")
    if equals and name.strip().isidentifier():
        return name.strip(), _value(value.strip())
    return place, _value(source.strip())


def _value(source: str) -> Any:
    """A literal of Python, or of JSON; what is neither is a text without quotes."""
    try:
        value = _plain(ast.parse(_ESCAPE.sub(_escape, source), mode="eval").body)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return source
    return value


def _escape(match: re.Match[str]) -> str:
    """What Python would warn about, a backslash before something it does not escape, is a backslash."""
    return match[0] if match[1] in _ESCAPED else f"\\{match[0]}"


def _plain(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(item) for item in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {
            _plain(key): _plain(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None
        }
    return ast.literal_eval(node)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def write(calls: Sequence[Call]) -> str:
    """A list of calls."""
    return f"[{', '.join(_written(call) for call in calls)}]"


def _written(call: Call) -> str:
    return f"{call.name}({', '.join(f'{name}={value!r}' for name, value in call.arguments.items())})"


PYTHONIC = ToolFormat("pythonic", parse, write, "[<function>(<parameter>=<value>, ...)]", (START, END))
