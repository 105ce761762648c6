"""Qwen 3 Coder: ``<tool_call><function=f><parameter=a>1</parameter></function></tool_call>``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.chat.events import Arguments, CallEnd, CallStart, Parsing, Said
from shoal.chat.reader import Reader
from shoal.chat.tools import hermes
from shoal.chat.tools.base import Call, ToolFormat, Tools
from shoal.chat.tools.mistral import is_name_character

FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


def parse(reader: Reader, tools: Tools) -> Parsing[None]:
    """Some models forget the outer mark, and some write JSON in it, as older ones do."""
    while (mark := (yield from reader.until((hermes.START, FUNCTION)))) is not None:
        start = reader.at
        if mark == hermes.START:
            yield from reader.spaces()
            if not (yield from reader.literal(FUNCTION)):
                reader.at = start
                yield from hermes.call_behind(reader, hermes.START, hermes.END)
                continue
        if not (yield from _call(reader, tools)):
            yield Said(mark)
            reader.at = start


def _call(reader: Reader, tools: Tools) -> Parsing[bool]:
    """What follows the mark of a function; False, with nothing given out, where that is no call."""
    name = yield from reader.run(is_name_character)
    if not name or not (yield from reader.literal(">")):
        return False
    yield CallStart(name)
    if (yield from _parameters(reader, tools.get(name, {}))):
        yield CallEnd()
        yield from reader.closing(hermes.END)
    elif reader.ended:  # what there is of a tag
        reader.at = len(reader.text)
    return True


def _parameters(reader: Reader, schemas: Mapping[str, Any]) -> Parsing[bool]:
    """The arguments as JSON, each as soon as it is whole; False where they break off."""
    count = 0
    while True:
        yield from reader.spaces()
        if (yield from reader.literal(FUNCTION_END)):
            yield Arguments("}" if count else "{}")
            return True
        if not (yield from reader.literal(PARAMETER)):
            return False
        name = yield from reader.before(">")
        text = yield from reader.before(PARAMETER_END)
        if name is None or text is None:
            return False
        value = _value(text.removeprefix("\n").removesuffix("\n"), schemas.get(name))
        yield Arguments(f"{', ' if count else '{'}{_json(name)}: {_json(value)}")
        count += 1


def _value(text: str, schema: Any) -> Any:
    """A text, or the JSON in it where the schema of the parameter asks for no text."""
    kinds = schema.get("type") if isinstance(schema, Mapping) else None
    if kinds == "string" or (isinstance(kinds, (list, tuple)) and "string" in kinds and text != "null"):
        return text
    try:
        value = json.loads(text.lower() if kinds == "boolean" else text)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def write(calls: Sequence[Call]) -> str:
    """Each call between marks of its own."""
    return "\n".join(
        f"{hermes.START}\n{FUNCTION}{call.name}>\n{_written(call.arguments)}{FUNCTION_END}\n{hermes.END}"
        for call in calls
    )


def _written(arguments: Mapping[str, Any]) -> str:
    return "".join(
        f"{PARAMETER}{name}>\n{value if isinstance(value, str) else _json(value)}\n{PARAMETER_END}\n"
        for name, value in arguments.items()
    )


QWEN3_CODER = ToolFormat(
    "qwen3_coder",
    parse,
    write,
    f"{hermes.START}\n{FUNCTION}<function>>\n{PARAMETER}<parameter>>\n<value>\n{PARAMETER_END}\n{FUNCTION_END}\n{hermes.END}",
    (hermes.START, hermes.END),
)
