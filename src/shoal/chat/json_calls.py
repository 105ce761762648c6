"""Tool calls that are written as JSON objects, which most models do, while they arrive.

Arguments are given out as the model wrote them, piece by piece: they are parsed by whoever gets them. Two things are put
right on the way: control characters inside strings are escaped, and arguments that the model wrote as a string of JSON are
taken out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import TypeAlias

from shoal.chat.events import Arguments, CallEnd, CallStart, Parsing, Reading
from shoal.chat.reader import Reader

Known: TypeAlias = Callable[[str], bool]  # whether a name is that of a tool

_NAME_KEYS = ("name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters", "args")
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_BETWEEN = re.compile(r'[^"{}\[\]]+')
_CLOSING = {"{": "}", "[": "]"}
_SCALAR_ENDS = frozenset(',:]}"{[ \t\r\n')


def any_name(name: str) -> bool:
    """For calls that stand behind a mark, which says that they are calls."""
    return bool(name)


def json_calls(reader: Reader, known: Known) -> Parsing[bool]:
    """A call, several in a row, or a list of them. False, with nothing given out, where there is none.

    The reader may then stand anywhere; otherwise it stands behind the last call.
    """
    listed = yield from reader.literal("[")
    yield from reader.spaces()
    if not (yield from json_call(reader, known)):
        return False
    while True:
        end = reader.at
        yield from reader.spaces()
        if listed and (yield from reader.literal("]")):
            return True
        if (yield from reader.peek()) in (",", ";"):
            reader.at += 1
            yield from reader.spaces()
        if (yield from reader.peek()) != "{" or not (yield from json_call(reader, known)):
            reader.at = end
            return True


def json_call(reader: Reader, known: Known) -> Parsing[bool]:
    """``{"name": "f", "arguments": {...}}``, with the keys in any order and others among them.

    False, with nothing given out, where it is none, or one of a tool that is not ``known``.
    """
    name: str | None = None
    early: str | None = None  # arguments that come before the name
    has_arguments = False
    if not (yield from reader.literal("{")):
        return False
    yield from reader.spaces()
    closed = yield from reader.literal("}")
    while not closed:
        key = yield from json_string(reader)
        yield from reader.spaces()
        if key is None or not (yield from reader.literal(":")):
            break
        first = yield from reader.spaces()
        if key in _NAME_KEYS and name is None and first == '"':
            name = yield from json_string(reader)
            if name is None or not known(name):
                return False
            yield CallStart(name)
            yield from _pieces_of(early)
        elif key in _ARGUMENT_KEYS and not has_arguments:
            if name is None:
                early = yield from _whole_arguments(reader)
                has_arguments = early is not None
            else:
                has_arguments = yield from json_arguments(reader)
            if not has_arguments:
                break
        elif (yield from _whole(_value(reader))) is None:
            break
        yield from reader.spaces()
        yield from reader.literal(",")
        yield from reader.spaces()
        closed = yield from reader.literal("}")
    if name is None:
        return False
    if closed or has_arguments:
        yield CallEnd()
    return True


def json_arguments(reader: Reader) -> Parsing[bool]:
    """The arguments of a call that has begun, given out as they come; False where they break off."""
    if (yield from reader.peek()) not in _CLOSING:
        text = yield from _whole_arguments(reader)
        yield from _pieces_of(text)
        return text is not None
    pieces = _value(reader)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as done:
            return bool(done.value)
        yield None if piece is None else Arguments(piece)


def json_string(reader: Reader) -> Reading[str | None]:
    """What a JSON string stands for; None where there is none, or no end of it."""
    if (yield from reader.peek()) != '"':
        return None
    text = yield from _whole(_value(reader))
    return None if text is None else _decoded(text)


def _pieces_of(text: str | None) -> Parsing[None]:
    if text:
        yield Arguments(text)


def _whole_arguments(reader: Reader) -> Reading[str | None]:
    """The text of arguments: what a string holds, nothing for null."""
    text = yield from _whole(_value(reader))
    if text is not None and text.startswith('"'):
        text = _decoded(text)
        text = None if text is None else text.strip()
    return "" if text == "null" else text


def _decoded(text: str) -> str | None:
    try:
        found = str(json.loads(text))
        found.encode()
    except ValueError:  # an escape that JSON does not have, or half of a surrogate pair
        return None
    return found


_Pieces: TypeAlias = Generator[
    str | None, None, bool
]  # None where more text is needed; False where the value breaks off


def _whole(pieces: _Pieces) -> Reading[str | None]:
    """All of a value, None where it breaks off."""
    text = ""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as done:
            return text if done.value else None
        if piece is None:
            yield None
        else:
            text += piece


def _value(reader: Reader) -> _Pieces:
    """The text of one JSON value. Only strings and brackets are looked at, not what stands between them."""
    char = yield from reader.peek()
    if char == '"':
        return (yield from _string(reader))
    if char not in _CLOSING:
        scalar = yield from reader.run(lambda char: char not in _SCALAR_ENDS)
        yield scalar
        return bool(scalar)
    expected: list[str] = []  # the brackets that close those that are open
    while True:
        char = yield from reader.peek()
        if char == '"':
            if not (yield from _string(reader)):
                return False
        elif run := _BETWEEN.match(reader.text, reader.at):
            reader.at = run.end()
            yield run[0]
        elif char in _CLOSING:
            expected.append(_CLOSING[char])
            reader.at += 1
            yield char
        elif char != expected.pop():  # also at the end of the text
            return False
        else:
            reader.at += 1
            yield char
            if not expected:
                return True


def _string(reader: Reader) -> _Pieces:
    reader.at += 1
    yield '"'
    while char := (yield from reader.peek()):
        if run := _IN_STRING.match(reader.text, reader.at):
            reader.at = run.end()
            yield run[0]
        elif char == "\\":
            while len(reader.text) < reader.at + 2 and not reader.ended:
                yield None
            yield reader.text[reader.at : reader.at + 2]
            reader.at = min(reader.at + 2, len(reader.text))
        else:
            reader.at += 1
            yield char if char == '"' else json.dumps(char)[1:-1]
            if char == '"':
                return True
    return False
