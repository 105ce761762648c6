"""/v1/messages, Anthropic's form of a chat: its bodies as bodies of /v1/chat/completions, and answers in its form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from shoal.chat.reply import CallDelta, Delta
from shoal.openai import dialect
from shoal.openai.convert import Call
from shoal.openai.dialect import Dialect, one_of, only, record, records, text
from shoal.openai.schema import APIError, ChatCompletion, FinishReason, Usage

Event = dict[str, Any]
Block = dict[str, Any]

PING: Event = {"type": "ping"}  # keeps a stream alive

# Anthropic signs what its models think, and asks for the signature with it; here nobody does.
_SIGNATURE = "unsigned"
_TEXT_ALONE = "models read text alone"
_FUNCTIONS_ALONE = "the tools of a model are functions that the client runs"
_UNKNOWN_HERE = frozenset(
    ("logprob_token_ids", "stop")
)  # no log-probabilities in answers; stop is called stop_sequences

MESSAGES = Dialect(
    endpoint="/v1/messages",
    own=frozenset(
        (
            "max_tokens",
            "messages",
            "model",
            "output_config",
            "stop_sequences",
            "stream",
            "system",
            "thinking",
            "tool_choice",
            "tools",
        )
    ),
    passed=dialect.PASSED - _UNKNOWN_HERE,
    ignored=frozenset(("cache_control", "diagnostics", "inference_geo", "user_profile_id", "workspace_id")),
    lacks={
        "container": ("nothing runs code", ()),
        "context_management": ("a conversation is taken whole or refused", ({},)),
        "mcp_servers": (_FUNCTIONS_ALONE, ([],)),
        "speed": ("there is one speed", ("standard",)),
    },
    names={
        "max_completion_tokens": "max_tokens",
        "reasoning_effort": "output_config.effort",
        "response_format": "output_config.format",
        "stop": "stop_sequences",
        "thinking_token_budget": "thinking.budget_tokens",
    },
)


# From a body to one of /v1/chat/completions ---------------------------------------------------------------------------


def parse_message(body: Any) -> Call:
    """A body of /v1/messages, decoded from JSON. Raises APIError that names the field at fault.

    What is found wrong with the call later is told to the client by ``MESSAGES.in_its_words``.
    """
    return MESSAGES.call(chat_body(body))


def parse_counted(body: Any) -> Call:
    """A body of /v1/messages/count_tokens as the call whose prompt is counted. Raises APIError that names the field at fault."""
    return MESSAGES.call(counted_body(body))


def chat_body(body: Any) -> dict[str, Any]:
    """A body of /v1/messages as one of /v1/chat/completions, which finds out what is wrong with sampling fields. Raises APIError."""
    return _translated(body, ("model", "max_tokens", "messages"))


def counted_body(body: Any) -> dict[str, Any]:
    """A body of /v1/messages/count_tokens, which may lack ``max_tokens``, as one of /v1/chat/completions. Raises APIError."""
    return _translated(body, ("model", "messages"))


def _translated(body: Any, required: tuple[str, ...]) -> dict[str, Any]:
    try:
        return _chat_body(*MESSAGES.parted(body, required))
    except RecursionError:
        raise APIError("the body is nested too deeply") from None


def _chat_body(own: dict[str, Any], chat: dict[str, Any]) -> dict[str, Any]:
    chat["model"] = own["model"]
    chat["messages"] = _messages(own["messages"], own.get("system"))
    if chat["messages"][-1]["role"] == "assistant":
        chat["continue_final_message"] = True
    if "max_tokens" in own:
        chat["max_tokens"] = own["max_tokens"]
    if "stop_sequences" in own:
        if not isinstance(own["stop_sequences"], list):
            raise APIError("stop_sequences: must be a list of texts", "stop_sequences")
        chat["stop"] = own["stop_sequences"]
    chat |= _tools(own) | _form(own.get("output_config", {}))
    return chat | _thinking(own.get("thinking"), chat)


_EFFORTS = {
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "xhigh",
}  # as Anthropic's: as ours


def _form(config: Any) -> dict[str, Any]:
    given = record(config, "output_config")
    only(given, "output_config", ("effort", "format"))
    chat: dict[str, Any] = {}
    if "effort" in given:
        chat["reasoning_effort"] = _EFFORTS[one_of(given["effort"], "output_config.effort", tuple(_EFFORTS))]
    if "format" in given:
        place = "output_config.format"
        form = record(given["format"], place)
        one_of(form.get("type"), f"{place}.type", ("json_schema",))
        if "schema" not in form:
            raise APIError(f"{place}.schema: this field is required", f"{place}.schema")
        record(form["schema"], f"{place}.schema")
        chat["response_format"] = {"type": "json_schema", "json_schema": {"schema": form["schema"]}}
    return chat


def _thinking(thinking: Any, chat: Mapping[str, Any]) -> dict[str, Any]:
    """Whether and how long the model is to think, for templates that ask. Where the body says nothing, the model's way is taken."""
    if thinking is None:
        return {}
    given = record(thinking, "thinking")
    kind = one_of(given.get("type"), "thinking.type", ("enabled", "disabled", "adaptive"))
    only(given, "thinking", ("type", "display", *(["budget_tokens"] if kind == "enabled" else [])))
    said = {"enable_thinking": kind != "disabled"} | record(
        chat.get("chat_template_kwargs", {}), "chat_template_kwargs"
    )
    asked: dict[str, Any] = {"chat_template_kwargs": said}
    if one_of(given.get("display", "summarized"), "thinking.display", ("summarized", "omitted")) == "omitted":
        asked["include_reasoning"] = False
    if kind == "enabled":
        if "budget_tokens" not in given:
            raise APIError("thinking.budget_tokens: this field is required", "thinking.budget_tokens")
        asked["thinking_token_budget"] = given["budget_tokens"]
    return asked


def _tools(own: dict[str, Any]) -> dict[str, Any]:
    tools = [_tool(given, place) for given, place in records(own.get("tools", []), "tools")]
    choice = record(own.get("tool_choice", {"type": "auto"}), "tool_choice")
    kind = one_of(choice.get("type"), "tool_choice.type", ("auto", "any", "tool", "none"))
    only(choice, "tool_choice", ("type", "disable_parallel_tool_use", *(["name"] if kind == "tool" else [])))
    if not tools and kind in ("auto", "none"):
        return {}
    chat: dict[str, Any] = {"tools": tools, "tool_choice": "required" if kind == "any" else kind}
    if kind == "tool":
        chat["tool_choice"] = dialect.named_function(text(choice, "name", "tool_choice"))
    if _is_true(choice, "disable_parallel_tool_use", "tool_choice"):
        chat["parallel_tool_calls"] = False
    return chat


# What a tool may say besides, and the values that say nothing here.
_TOOL_OFF = {"allowed_callers": ["direct"], "defer_loading": False}
_TOOL_FIELDS = ("type", "name", "description", "input_schema", "strict", "cache_control", "eager_input_streaming")


def _tool(given: dict[str, Any], place: str) -> dict[str, Any]:
    kind = given.get("type", "custom")
    if kind != "custom":
        raise APIError(f"{place}.type: {kind!r:.80} is not supported: {_FUNCTIONS_ALONE}", f"{place}.type")
    asked = {name: value for name, value in given.items() if value != _TOOL_OFF.get(name, ...)}
    only(asked, place, _TOOL_FIELDS)
    if "input_schema" not in given:
        raise APIError(f"{place}.input_schema: this field is required", f"{place}.input_schema")
    return dialect.function_tool(given, place, "input_schema")


def _is_true(given: Mapping[str, Any], name: str, place: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise APIError(f"{place}.{name}: got {value!r:.80}, must be true or false", f"{place}.{name}")
    return value


# Messages of blocks -> messages of a chat

_LACKING = dict.fromkeys(("image", "document", "search_result", "container_upload"), _TEXT_ALONE)
_KINDS = {
    "system": ("text",),
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
}


def _messages(given: Any, system: Any) -> list[dict[str, Any]]:
    """The conversation. Messages that follow one another in one role are one, as they are to Anthropic."""
    conversation = _Conversation()
    if system is not None:
        conversation.read("system", system, "system")
    empty = True
    for message, place in records(given, "messages"):
        only(message, place, ("role", "content"))
        role = one_of(message.get("role"), f"{place}.role", tuple(_KINDS))
        conversation.read(role, message.get("content"), f"{place}.content")
        empty = False
    if empty:
        raise APIError("messages: the conversation is empty; it needs at least 1 message", "messages")
    return conversation.whole()


class _Conversation:
    """Reads blocks into messages of a chat."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []

    def whole(self) -> list[dict[str, Any]]:
        """The messages, each with a content."""
        last = self._messages[-1]
        if "tool_calls" in last:
            raise APIError("messages: end with tool_use; the next message has to bring its tool_result", "messages")
        for message in self._messages:
            message["content"] = message["content"] or (None if "tool_calls" in message else "")
        return self._messages

    def read(self, role: str, content: Any, place: str) -> None:
        """A content: a text, or blocks."""
        readers = {
            "text": self._text,
            "thinking": self._thinking,
            "redacted_thinking": self._redacted,
            "tool_use": self._call,
            "tool_result": self._result,
        }
        for block, where in _blocks(content, place):
            kind = one_of(block.get("type"), f"{where}.type", _KINDS[role], _LACKING)
            readers[kind](role, block, where)

    def _text(self, role: str, block: dict[str, Any], place: str) -> None:
        self._going_on(role)["content"].append(_text_part(block, place))

    def _thinking(self, role: str, block: dict[str, Any], place: str) -> None:
        only(block, place, ("type", "thinking", "signature", "cache_control"))
        message, thought = self._going_on(role), text(block, "thinking", place)
        message["reasoning"] = "\n".join(filter(None, [message.get("reasoning", ""), thought]))

    def _redacted(self, role: str, block: dict[str, Any], place: str) -> None:
        """Thoughts that only Anthropic can read."""
        self._going_on(role)

    def _call(self, role: str, block: dict[str, Any], place: str) -> None:
        only(block, place, ("type", "id", "name", "input", "cache_control", "caller"))
        record(block.get("input"), f"{place}.input")
        try:
            arguments = json.dumps(block["input"], ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise APIError(f"{place}.input: holds a number that is not finite", f"{place}.input") from None
        call = dialect.function_call(text(block, "id", place), text(block, "name", place), arguments)
        self._going_on(role).setdefault("tool_calls", []).append(call)

    def _result(self, role: str, block: dict[str, Any], place: str) -> None:
        only(block, place, ("type", "tool_use_id", "content", "is_error", "cache_control"))
        blocks = _blocks(block.get("content") or "", f"{place}.content")
        parts = [_text_part(item, where) for item, where in blocks]
        if _is_true(block, "is_error", place) and not any(part["text"] for part in parts):
            parts = [{"type": "text", "text": "error"}]
        self._messages.append({"role": "tool", "tool_call_id": text(block, "tool_use_id", place), "content": parts})

    def _going_on(self, role: str) -> dict[str, Any]:
        """The message that a block of ``role`` belongs to."""
        if not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": []})
        return self._messages[-1]


def _blocks(content: Any, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The blocks of a content, each with its place; a text is one."""
    if isinstance(content, str):
        yield {"type": "text", "text": content}, place
        return
    if content is None:
        raise APIError(f"{place}: this field is required", place)
    if content == []:
        raise APIError(f"{place}: has no blocks", place)
    yield from records(content, place)


def _text_part(block: dict[str, Any], place: str) -> dict[str, Any]:
    one_of(block.get("type"), f"{place}.type", ("text",), _LACKING)
    only(block, place, ("type", "text", "cache_control", "citations"))
    return {"type": "text", "text": text(block, "text", place)}


# From an answer to a message ------------------------------------------------------------------------------------------


def message(completion: ChatCompletion, *, message_id: str, stop_sequence: str | None = None) -> Event:
    """The whole Message for the answer of the chat. ``message_id`` is that of the request, without a prefix; ``stop_sequence``: the
    stop string that ended the answer, if one did. The input of a call that breaks off is empty."""
    choice = completion.choices[0]
    said = choice.message
    content: list[Block] = []
    if said.reasoning:
        content.append(_thinking_block(said.reasoning, _SIGNATURE))
    if said.content or not (content or said.tool_calls):
        content.append(_text_block(said.content or ""))
    calls = said.tool_calls or []
    content += [_call_block(one.id, one.function.name, _input(one.function.arguments)) for one in calls]
    return _message(message_id, completion.model, completion.usage) | {
        "content": content,
        **_stopped(choice.finish_reason, stop_sequence),
    }


class MessageEvents:
    """The events of a streamed Message; each event's ``type`` is its name in the stream as well. ``PING`` may come between them.

    What comes in one channel is one block, which ends where another channel begins.
    """

    def __init__(self, message_id: str, model: str) -> None:
        self._id = message_id
        self._model = model
        self._index = -1  # of the last block
        self._kind = ""  # its type; empty before the first

    def start(self, usage: Usage) -> list[Event]:
        """Before anything is known of the answer. ``usage``: of the prompt, as far as that is known; ``finish`` has the last word."""
        return [{"type": "message_start", "message": _message(self._id, self._model, usage)}, PING]

    def push(self, delta: Delta) -> list[Event]:
        """More of the answer."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._going_on(_thinking_block(""))
            events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.content:
            events += self._going_on(_text_block(""))
            events.append(self._delta({"type": "text_delta", "text": delta.content}))
        if delta.call is not None:
            events += self._called(delta.call)
        return events

    def finish(self, finish_reason: FinishReason, usage: Usage, stop_sequence: str | None = None) -> list[Event]:
        """The end of the answer. ``stop_sequence``: the stop string that ended it, if one did."""
        events = [] if self._kind else self._opened(_text_block(""))
        stopped = _stopped(finish_reason, stop_sequence) | {"stop_details": None, "container": None}
        return [
            *events,
            *self._closed(),
            {"type": "message_delta", "delta": stopped, "usage": _usage(usage)},
            {"type": "message_stop"},
        ]

    def _called(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        if call.id is not None:
            events += self._closed()
            events += self._opened(_call_block(call.id, call.name or "", {}))
        if call.arguments:
            events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return events

    def _going_on(self, block: Block) -> list[Event]:
        """What has to come before a delta to such a block."""
        return [] if self._kind == block["type"] else [*self._closed(), *self._opened(block)]

    def _opened(self, block: Block) -> list[Event]:
        self._index += 1
        self._kind = block["type"]
        return [{"type": "content_block_start", "index": self._index, "content_block": block}]

    def _closed(self) -> list[Event]:
        if not self._kind:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": _SIGNATURE})] if self._kind == "thinking" else []
        return [*signed, {"type": "content_block_stop", "index": self._index}]

    def _delta(self, delta: Block) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


# The parts of a message


def _message(message_id: str, model: str, usage: Usage) -> Event:
    return {
        "id": f"msg_{message_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": _usage(usage),
    }


def _text_block(said: str) -> Block:
    return {"type": "text", "text": said, "citations": None}


def _thinking_block(thought: str, signature: str = "") -> Block:
    return {"type": "thinking", "thinking": thought, "signature": signature}


def _call_block(call_id: str, name: str, given: dict[str, Any]) -> Block:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given, "caller": {"type": "direct"}}


def _input(arguments: str) -> dict[str, Any]:
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}


def _stopped(finish_reason: FinishReason, stop_sequence: str | None) -> Event:
    reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[finish_reason]
    if reason == "end_turn" and stop_sequence is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_sequence}
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(usage: Usage) -> Event:
    """Tokens of the prompt that were in the cache are not among ``input_tokens``."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": None,
        "server_tool_use": None,
        "cache_creation": None,
        "inference_geo": None,
        "service_tier": "standard",
    }


# Errors ---------------------------------------------------------------------------------------------------------------

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error_body(error: APIError, request_id: str | None = None) -> Event:
    """An error in Anthropic's shape, as the response of a request and as the event of a stream."""
    kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": request_id}
