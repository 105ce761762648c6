"""Replies as models write them, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.chat.formats import REASONING_FORMATS, TOOL_FORMATS
from shoal.chat.reply import Delta, Reply, ReplyFormat, ReplyStream
from shoal.chat.tools.base import Tools

TOOLS: Tools = {
    "get_weather": {"city": {"type": "string"}, "unit": {}},
    "now": {},
    "run": {"code": {"type": "string"}, "options": {"type": "object"}},
    "save": {"note": {"type": ["string", "null"]}, "flag": {"type": "boolean"}},
}


@dataclass(frozen=True)
class Case:
    """A text, and what it has to be read as: ``calls`` are (name, arguments as JSON text)."""

    text: str
    calls: list[tuple[str, str]] = field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    whole: bool = True


def form(
    calls: str | None = None, reasoning: str | None = None, offered: Tools = TOOLS, **fields: object
) -> ReplyFormat:
    return ReplyFormat(
        reasoning=REASONING_FORMATS[reasoning] if reasoning else None,
        tool_format=TOOL_FORMATS[calls] if calls else None,
        tools=offered,
        **{"key": "k", **fields},  # type: ignore[arg-type]
    )


def chunkings(text: str) -> Iterator[list[str]]:
    """The whole text, every way to cut it in two, and one character at a time."""
    yield [text]
    yield from ([text[:place], text[place:]] for place in range(1, len(text)))
    yield list(text)


def streamed(fmt: ReplyFormat, pieces: list[str]) -> Reply:
    """What the deltas of a reply in pieces add up to; and each must say where it belongs."""
    stream = ReplyStream(fmt)
    deltas = [delta for piece in pieces for delta in stream.push(piece)] + stream.flush()
    joined = joined_deltas(deltas)
    assert joined == (
        stream.reply.content,
        stream.reply.reasoning,
        [(call.id, call.name, call.arguments) for call in stream.reply.tool_calls],
    )
    return stream.reply


def joined_deltas(deltas: list[Delta]) -> tuple[str, str, list[tuple[str, str, str]]]:
    """As a client joins them."""
    content = reasoning = ""
    calls: list[tuple[str, str, str]] = []
    for delta in deltas:
        assert bool(delta.content) + bool(delta.reasoning) + (delta.call is not None) == 1
        content += delta.content
        reasoning += delta.reasoning
        if delta.call is None:
            continue
        if delta.call.id is not None:
            assert delta.call.index == len(calls), "calls begin in order"
            assert delta.call.name is not None
            calls.append((delta.call.id, delta.call.name, ""))
        assert delta.call.index == len(calls) - 1, "only the last call grows"
        call_id, name, arguments = calls[-1]
        calls[-1] = (call_id, name, arguments + delta.call.arguments)
    return content, reasoning, calls


def check(fmt: ReplyFormat, case: Case) -> None:
    """The case is read right in whatever pieces it comes."""
    for pieces in chunkings(case.text):
        reply = streamed(fmt, pieces)
        found = [(call.name, call.arguments) for call in reply.tool_calls]
        assert (found, reply.content, reply.reasoning) == (case.calls, case.content, case.reasoning), pieces
        assert reply.calls_whole == (case.whole and bool(case.calls)), pieces
