"""Answers as a model would give them, for the tests of dialects: as deltas, and whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import httpx2
import msgspec

from shoal.chat.formats import REASONING_FORMATS, TOOL_FORMATS
from shoal.chat.reply import Delta, Reply, ReplyFormat, ReplyStream
from shoal.openai.schema import (
    ChatAnswer,
    ChatChoice,
    ChatCompletion,
    FinishReason,
    FunctionCall,
    PromptTokensDetails,
    ToolCall,
    Usage,
)

FORM = ReplyFormat(
    reasoning=REASONING_FORMATS["think"], tool_format=TOOL_FORMATS["hermes"], tools={"add": {}, "look": {}}, key="test"
)
USAGE = Usage(20, 7, 27, PromptTokensDetails(16))
CALLS = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": null}}\n</tool_call>\n'
    '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
)
EVERYTHING = f"<think>\nOne and two.\n</think>\n\nI will add.\n{CALLS}"


def deltas(text: str) -> Iterator[Delta]:
    """What a text grows by that comes three characters at a time."""
    stream = ReplyStream(FORM)
    for start in range(0, len(text), 3):
        yield from stream.push(text[start : start + 3])
    yield from stream.flush()


def completion(text: str, finish_reason: FinishReason = "stop") -> ChatCompletion:
    """The answer of a chat that says ``text``."""
    reply: Reply = FORM.parse(text)
    answer = ChatAnswer(reply.content or None)
    if reply.tool_calls:
        answer.tool_calls = [ToolCall(one.id, FunctionCall(one.name, one.arguments)) for one in reply.tool_calls]
    if reply.reasoning:
        answer.reasoning = answer.reasoning_content = reply.reasoning
    return ChatCompletion("chatcmpl-1", 1, "tiny", [ChatChoice(0, answer, None, finish_reason)], USAGE)


def plain(value: Any) -> Any:
    """As a client gets it."""
    return msgspec.json.decode(msgspec.json.encode(value))


def served(events: Iterable[dict[str, Any]]) -> httpx2.Client:
    """A client of a server that answers every request with a stream of ``events``."""
    stream = b"".join(b"event: %s\ndata: %s\n\n" % (e["type"].encode(), msgspec.json.encode(e)) for e in events)
    return client(httpx2.Response(200, content=stream, headers={"content-type": "text/event-stream"}))


def client(response: httpx2.Response) -> httpx2.Client:
    """A client of a server that answers every request with ``response``."""
    return httpx2.Client(transport=httpx2.MockTransport(lambda request: response))
