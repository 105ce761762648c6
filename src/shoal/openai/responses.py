"""/v1/responses, OpenAI's newer form of a chat: its bodies as bodies of /v1/chat/completions, and answers in its form.

Nothing is stored: a body brings the whole conversation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from shoal.chat.reply import CallDelta, Delta
from shoal.openai import dialect
from shoal.openai.convert import Call
from shoal.openai.dialect import Dialect, one_of, only, record, records, text
from shoal.openai.fields import given_fields
from shoal.openai.schema import APIError, ChatCompletion, FinishReason, TokenLogprob, Usage

Event = dict[str, Any]
Item = dict[str, Any]

_STATELESS = "nothing is stored; the whole conversation has to be in input"
_FUNCTIONS_ALONE = "the tools of a model are functions that the client runs"
_LOGPROBS = "message.output_text.logprobs"
# What an answer would hold besides; nothing here has such things, or (the encrypted thoughts) they are in the answer as they are.
_INCLUDABLE = (
    _LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)

RESPONSES = Dialect(
    endpoint="/v1/responses",
    own=frozenset(
        (
            "include",
            "input",
            "instructions",
            "max_output_tokens",
            "model",
            "reasoning",
            "stream",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "truncation",
        )
    ),
    passed=dialect.PASSED | {"parallel_tool_calls"},
    ignored=frozenset(("max_tool_calls", "stream_options")),  # the first counts calls of built-in tools
    lacks={
        "background": ("answers are waited for", (False,)),
        "background_options": ("answers are waited for", ({},)),
        "context_management": ("a conversation is taken whole or refused", ([],)),
        "conversation": (_STATELESS, ()),
        "moderation": ("nothing is moderated", ({},)),
        "previous_response_id": (_STATELESS, ()),
        "prompt": ("there are no stored prompts", ({},)),
    },
    names={
        "max_completion_tokens": "max_output_tokens",
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "verbosity": "text.verbosity",
    },
)


# From a body to one of /v1/chat/completions ---------------------------------------------------------------------------


def parse_response(body: Any) -> Call:
    """A body of /v1/responses, decoded from JSON. Raises APIError that names the field at fault.

    What is found wrong with the call later is told to the client by ``RESPONSES.in_its_words``.
    """
    return RESPONSES.call(chat_body(body))


def chat_body(body: Any) -> dict[str, Any]:
    """A body of /v1/responses as one of /v1/chat/completions, which finds out what is wrong with sampling fields. Raises APIError."""
    try:
        return _chat_body(body)
    except RecursionError:
        raise APIError("the body is nested too deeply") from None


def _chat_body(body: Any) -> dict[str, Any]:
    own, chat = RESPONSES.parted(body, ("model", "input"))
    chat["model"] = own["model"]
    chat["messages"] = _messages(own["input"], own.get("instructions"))
    if "max_output_tokens" in own:
        chat["max_completion_tokens"] = own["max_output_tokens"]
    chat |= _tools(own) | _reasoning(own.get("reasoning", {})) | _form(own.get("text", {})) | _logprobs(own)
    one_of(
        own.get("truncation", "disabled"), "truncation", ("disabled",), {"auto": "a prompt is taken whole or refused"}
    )
    return chat


def _logprobs(own: dict[str, Any]) -> dict[str, Any]:
    include, most = own.get("include", []), own.get("top_logprobs", 0)
    if not isinstance(include, list):
        raise APIError(f"include: got {type(include).__name__}, must be a list", "include")
    for index, name in enumerate(include):
        one_of(name, f"include[{index}]", _INCLUDABLE)
    if _LOGPROBS not in include and not most:
        return {}
    return {"logprobs": True, "top_logprobs": most}


def _reasoning(reasoning: Any) -> dict[str, Any]:
    """The effort. No summary is made: what the model thinks comes back as it is."""
    given = record(reasoning, "reasoning")
    only(given, "reasoning", ("effort", "summary", "generate_summary"))
    return {"reasoning_effort": given["effort"]} if "effort" in given else {}


def _form(form: Any) -> dict[str, Any]:
    given = record(form, "text")
    only(given, "text", ("format", "verbosity"))
    chat = {"verbosity": given["verbosity"]} if "verbosity" in given else {}
    if "format" in given:
        chat["response_format"] = _response_format(record(given["format"], "text.format"))
    return chat


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    kind = one_of(form.get("type"), "text.format.type", ("text", "json_object", "json_schema"))
    if kind != "json_schema":
        return {"type": kind}
    if "schema" not in form:
        raise APIError("text.format.schema: this field is required", "text.format.schema")
    record(form["schema"], "text.format.schema")
    return {"type": kind, "json_schema": {"name": form.get("name"), "schema": form["schema"]}}


def _tools(own: dict[str, Any]) -> dict[str, Any]:
    """Tools and the choice among them. Of "allowed_tools" the others are left out."""
    tools = [_tool(given, place) for given, place in records(own.get("tools", []), "tools")]
    choice = own.get("tool_choice", "auto")
    if isinstance(choice, dict):
        if one_of(choice.get("type"), "tool_choice.type", ("function", "allowed_tools")) == "function":
            choice = dialect.named_function(text(choice, "name", "tool_choice"))
        else:
            tools = _allowed(tools, choice)
            choice = one_of(choice.get("mode"), "tool_choice.mode", ("auto", "required"))
    return {"tools": tools, "tool_choice": choice} if tools or choice != "auto" else {}


def _allowed(tools: list[dict[str, Any]], choice: dict[str, Any]) -> list[dict[str, Any]]:
    place = "tool_choice.tools"
    names = {text(given, "name", where) for given, where in records(choice.get("tools"), place)}
    unknown = names - {tool["function"]["name"] for tool in tools}
    if unknown:
        raise APIError(f"{place}: {min(unknown)!r:.80} is not among tools", place)
    return [tool for tool in tools if tool["function"]["name"] in names]


def _tool(given: dict[str, Any], place: str) -> dict[str, Any]:
    kind = given.get("type")
    if isinstance(kind, str) and kind != "function":
        raise APIError(f"{place}.type: {kind!r:.80} is not supported: {_FUNCTIONS_ALONE}", f"{place}.type")
    one_of(kind, f"{place}.type", ("function",))
    asked = {name: value for name, value in given.items() if value is not False}
    only(asked, place, ("type", "name", "description", "parameters", "strict"))
    return dialect.function_tool(given, place, "parameters")


# The items of the input -> messages

_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # where each has its text
_PARTS_LACKING = dict.fromkeys(("input_audio", "input_file", "input_image", "input_video"), "models read text alone")
_OF_PARTS = ("type", "text", "refusal", "annotations", "logprobs", "prompt_cache_breakpoint")
_OF_ITEMS = ("type", "id", "status")
_ITEMS_LACKING = {"item_reference": "nothing is stored; give the item itself"}
_ROLES = ("user", "assistant", "system", "developer")


def _messages(given: Any, instructions: Any) -> list[dict[str, Any]]:
    """The conversation. Instructions and a system message that comes first are one: many templates know only one."""
    messages = _said(given) if isinstance(given, str) else _Conversation().read(given)
    if not messages:
        raise APIError("input: is empty; it needs at least 1 message", "input")
    if instructions is None:
        return messages
    if not isinstance(instructions, str):
        raise APIError(f"instructions: got {type(instructions).__name__}, must be a text", "instructions")
    if messages[0]["role"] in ("system", "developer"):
        messages[0]["content"].insert(0, _text_part(instructions))
        return messages
    return [{"role": "system", "content": [_text_part(instructions)]}, *messages]


def _said(by_user: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [_text_part(by_user)]}] if by_user else []


def _text_part(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


class _Conversation:
    """Reads items into messages: what the assistant thought, said and called in one go is one message."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._thought = ""  # waits for what was said or called after it

    def read(self, items: Any) -> list[dict[str, Any]]:
        """Messages for all of the input."""
        readers = {
            "message": self._message,
            "reasoning": self._reasoning,
            "function_call": self._call,
            "function_call_output": self._result,
        }
        for item, place in records(items, "input"):
            kind = item.get("type", "message" if "role" in item else None)
            readers[one_of(kind, f"{place}.type", tuple(readers), _ITEMS_LACKING)](item, place)
        return self._messages

    def _message(self, item: dict[str, Any], place: str) -> None:
        only(item, place, (*_OF_ITEMS, "role", "content", "phase"))
        role = one_of(item.get("role"), f"{place}.role", _ROLES)
        self._add({"role": role, "content": _parts(item.get("content"), f"{place}.content")})

    def _reasoning(self, item: dict[str, Any], place: str) -> None:
        """Its text, or a summary where that is all there is."""
        only(item, place, (*_OF_ITEMS, "summary", "content", "encrypted_content"))
        name = "content" if item.get("content") else "summary"
        parts = records(item.get(name, []), f"{place}.{name}")
        self._thought = "\n".join(filter(None, [self._thought, *(text(part, "text", where) for part, where in parts)]))

    def _call(self, item: dict[str, Any], place: str) -> None:
        only(item, place, (*_OF_ITEMS, "call_id", "name", "arguments"))
        names = ("call_id", "name", "arguments")
        call = dialect.function_call(*(text(item, name, place) for name in names))
        if self._thought or not self._messages or self._messages[-1]["role"] != "assistant":
            self._add({"role": "assistant", "content": None})
        self._messages[-1].setdefault("tool_calls", []).append(call)

    def _result(self, item: dict[str, Any], place: str) -> None:
        only(item, place, (*_OF_ITEMS, "call_id", "name", "output"))
        content = _parts(item.get("output"), f"{place}.output")
        self._add({"role": "tool", "tool_call_id": text(item, "call_id", place), "content": content})

    def _add(self, message: dict[str, Any]) -> None:
        if self._thought and message["role"] == "assistant":
            message["reasoning"] = self._thought
        self._thought = ""
        self._messages.append(message)


def _parts(content: Any, place: str) -> list[dict[str, Any]]:
    """The parts of a content, or the one that a text is."""
    if isinstance(content, str):
        return [_text_part(content)]
    if content is None:
        raise APIError(f"{place}: this field is required", place)
    parts = []
    for part, where in records(content, place):
        kind = one_of(part.get("type"), f"{where}.type", tuple(_PARTS), _PARTS_LACKING)
        only(part, where, _OF_PARTS)
        parts.append(_text_part(text(part, _PARTS[kind], where)))
    if not parts:
        raise APIError(f"{place}: has no parts", place)
    return parts


# From an answer to a response -----------------------------------------------------------------------------------------


def head(body: dict[str, Any], call: Call, *, response_id: str, model: str) -> Event:
    """The Response to a body, and to the ``call`` that this became, before the answer begins: it says what was asked for.
    ``response_id`` is that of the request, without a prefix."""
    given = given_fields(body)
    reasoning, shape = given.get("reasoning", {}), given.get("text", {}).get("format") or {"type": "text"}
    return {
        "id": f"resp_{response_id}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": given.get("instructions"),
        "max_output_tokens": given.get("max_output_tokens"),
        "max_tool_calls": given.get("max_tool_calls"),
        "model": model,
        "output": [],
        "parallel_tool_calls": given.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": "default",
        "store": False,
        "background": False,
        "temperature": call.params.temperature,
        "top_p": call.params.top_p,
        "presence_penalty": call.params.presence_penalty,
        "frequency_penalty": call.params.frequency_penalty,
        "top_logprobs": given.get("top_logprobs", 0),
        "text": {"format": _FORMATS.get(shape["type"], {}) | shape},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [_TOOL | tool for tool in given.get("tools", [])],
        "truncation": "disabled",
        "usage": None,
        "user": given.get("user"),
        "metadata": given.get("metadata", {}),
        "safety_identifier": given.get("safety_identifier"),
        "prompt_cache_key": given.get("prompt_cache_key"),
    }


# What tools and formats have of themselves in a response.
_FORMATS = {"json_schema": {"name": "schema", "description": None, "strict": False}}
_TOOL = {"description": None, "parameters": None, "strict": False}


def response(begun: Event, completion: ChatCompletion) -> Event:
    """The whole Response, from its ``head`` and the answer of the chat. Log-probabilities are those of the message's text."""
    choice, begun_id = completion.choices[0], begun["id"]
    message = choice.message
    thought, calls = message.reasoning or "", message.tool_calls or []
    output: list[Item] = []
    if thought:
        output.append(_text_item("reasoning", begun_id, 0, thought))
    if message.content or not (thought or calls):
        logprobs = choice.logprobs.content if choice.logprobs else []
        said = message.content or ""
        shown = _of_text(logprobs, said) if thought or calls else logprobs
        output.append(_text_item("message", begun_id, len(output), said, shown))
    for call in calls:
        item = _call_item(begun_id, len(output), call.id, call.function.name, call.function.arguments)
        output.append(item)
    if choice.finish_reason == "length":
        output[-1]["status"] = "incomplete"
    return _ended(begun, output, choice.finish_reason, completion.usage)


class ResponseEvents:
    """The events of a streamed Response, from its ``head`` on; each event's ``type`` is its name in the stream as well.

    What comes in one channel is one item of the output, which ends where another channel begins. The last event has the Response as
    ``response`` makes it.
    """

    def __init__(self, begun: Event) -> None:
        self._begun = begun
        self._sequence = 0
        self._output: list[Item] = []  # items are replaced, not changed: events that were given away hold them
        self._is_open = False  # whether the last of them goes on
        self._pieces: list[str] = []  # its text or arguments
        self._logprobs: list[TokenLogprob] = []

    def start(self) -> list[Event]:
        """Before anything is known of the answer."""
        names = ("response.created", "response.in_progress")
        return [self._event(name, response=self._begun) for name in names]

    def push(self, delta: Delta, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        """More of the answer. ``logprobs``: of the tokens that brought it; only a message shows any."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._grown("reasoning", delta.reasoning)
        if delta.content:
            events += self._grown("message", delta.content, logprobs)
        if delta.call is not None:
            events += self._called(delta.call)
        return events

    def finish(self, finish_reason: FinishReason, usage: Usage) -> list[Event]:
        """The end of the answer: the last event is response.completed, or response.incomplete where tokens ran out."""
        events = [] if self._output else self._opened(_text_item("message", self._begun["id"], 0))
        events += self._closed("incomplete" if finish_reason == "length" else "completed")
        ended = _ended(self._begun, self._output, finish_reason, usage)
        return [*events, self._event(f"response.{ended['status']}", response=ended)]

    def fail(self, error: APIError) -> list[Event]:
        """An error in the middle of the answer. It stands in the event as OpenAI has it, and as the clients look for it."""
        code, events = _error_code(error), self._closed("incomplete")
        about = {"code": code, "message": str(error), "param": error.param}
        failed = {"status": "failed", "error": {"code": code, "message": str(error)}, "output": self._output}
        return [
            *events,
            self._event("error", **about, error={"type": error.kind, **about}),
            self._event("response.failed", response=self._begun | failed),
        ]

    def _event(self, kind: str, /, **about: Any) -> Event:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **about}

    def _of_item(self, kind: str, /, **about: Any) -> Event:
        """An event about the last item."""
        item = self._output[-1]
        if item["type"] in _PARTS_OF:
            about["content_index"] = 0
        return self._event(f"response.{kind}", item_id=item["id"], output_index=len(self._output) - 1, **about)

    def _of_output(self, name: str) -> Event:
        return self._event(f"response.output_item.{name}", output_index=len(self._output) - 1, item=self._output[-1])

    def _grown(self, kind: str, piece: str, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or self._output[-1]["type"] != kind:
            events += self._closed()
            events += self._opened(_text_item(kind, self._begun["id"], len(self._output)))
        self._pieces.append(piece)
        self._logprobs += logprobs
        shown = {"logprobs": list(logprobs)} if kind == "message" else {}
        return [*events, self._of_item(f"{_PARTS_OF[kind]}.delta", delta=piece, **shown)]

    def _called(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        if call.id is not None:
            events += self._closed()
            item = _call_item(self._begun["id"], len(self._output), call.id, call.name or "")
            events += self._opened(item)
        if call.arguments:
            self._pieces.append(call.arguments)
            events.append(self._of_item("function_call_arguments.delta", delta=call.arguments))
        return events

    def _opened(self, item: Item) -> list[Event]:
        kind = item["type"]
        if kind in _PARTS_OF:
            item = item | {"content": []}
        self._output.append(item | {"status": "in_progress"})
        self._is_open, self._pieces, self._logprobs = True, [], []
        events = [self._of_output("added")]
        if kind in _PARTS_OF:
            events.append(self._of_item("content_part.added", part=_part(kind, "", ())))
        return events

    def _closed(self, status: str = "completed") -> list[Event]:
        """The end of the last item, if it goes on."""
        if not self._is_open:
            return []
        item, whole = self._output[-1], "".join(self._pieces)
        self._is_open = False
        if item["type"] == "function_call":
            events = [self._of_item("function_call_arguments.done", name=item["name"], arguments=whole)]
            self._output[-1] = item | {"arguments": whole, "status": status}
            return [*events, self._of_output("done")]
        kind, part = item["type"], _part(item["type"], whole, self._logprobs)
        shown = {"logprobs": part["logprobs"]} if kind == "message" else {}
        events = [
            self._of_item(f"{_PARTS_OF[kind]}.done", text=whole, **shown),
            self._of_item("content_part.done", part=part),
        ]
        self._output[-1] = item | {"content": [part], "status": status}
        return [*events, self._of_output("done")]


# The parts of a response

_PARTS_OF = {"message": "output_text", "reasoning": "reasoning_text"}


def _part(kind: str, said: str, logprobs: Sequence[TokenLogprob]) -> Item:
    part: Item = {"type": _PARTS_OF[kind], "text": said}
    return part | {"annotations": [], "logprobs": list(logprobs)} if kind == "message" else part


def _text_item(kind: str, response_id: str, index: int, said: str = "", logprobs: Sequence[TokenLogprob] = ()) -> Item:
    """What was said or thought, as item number ``index`` of a response."""
    about: Item = {"role": "assistant"} if kind == "message" else {"summary": []}
    own_id = _item_id("msg" if kind == "message" else "rs", response_id, index)
    return {"id": own_id, "type": kind, "status": "completed", **about, "content": [_part(kind, said, logprobs)]}


def _call_item(response_id: str, index: int, call_id: str, name: str, arguments: str = "") -> Item:
    about = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"id": _item_id("fc", response_id, index), "type": "function_call", "status": "completed", **about}


def _item_id(kind: str, response_id: str, index: int) -> str:
    return f"{kind}_{response_id.removeprefix('resp_')}_{index}"


def _of_text(logprobs: Sequence[TokenLogprob], said: str) -> list[TokenLogprob]:
    """Those of an answer's tokens that spell ``said``; all of them where no run of them does."""
    data, ends = said.encode(), list(accumulate(len(one.bytes) for one in logprobs))
    start = b"".join(bytes(one.bytes) for one in logprobs).rfind(data)
    if start < 0:
        return list(logprobs)
    end = start + len(data)
    return [one for one, last in zip(logprobs, ends, strict=True) if last > start and last - len(one.bytes) < end]


def _ended(begun: Event, output: list[Item], finish_reason: FinishReason, usage: Usage) -> Event:
    ran_out = finish_reason == "length"
    return begun | {
        "status": "incomplete" if ran_out else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if ran_out else None,
        "completed_at": None if ran_out else int(time.time()),
        "output": output,
        "usage": _usage(usage),
    }


def _usage(usage: Usage) -> Event:
    """How many tokens were thoughts is not known; they are among ``output_tokens``."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def _error_code(error: APIError) -> str:
    if error.status == 429:
        return "rate_limit_exceeded"
    return "server_error" if error.status >= 500 else "invalid_prompt"
