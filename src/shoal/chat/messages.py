"""Messages of a conversation as OpenAI has them, checked, and as chat templates take them.

A template may have words for tools, calls and results or not, want arguments as objects or as JSON text, and fail on what it
does not expect. Which of these holds is found out by rendering a small conversation. What a template has no words for is
written into the text of its messages.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from shoal.chat.tools.base import Call, ToolFormat
from shoal.errors import RequestError, TemplateError
from shoal.text.chat import ChatTemplate, Message

_PROBE_SECONDS = 5.0  # a template that does not end is killed after as long, each time
_SHORT_ID = 9  # characters; templates of Mistral refuse other ids
_THOUGHTS = ("reasoning_content", "reasoning")  # one thing under two names


@dataclass(frozen=True, slots=True)
class TemplateStyle:
    """What a chat template has words for: ``tools``, ``calls`` (and results), a ``system`` message.

    ``arguments_as_text``: it writes those of a call as they are, so they must be JSON already. ``content`` is that of a message
    with calls alone. ``short_ids``: ids of calls have nine characters.
    """

    tools: bool = False
    calls: bool = False
    system: bool = False
    arguments_as_text: bool = False
    content: str | None = ""
    short_ids: bool = False

    @classmethod
    def of(cls, template: ChatTemplate) -> TemplateStyle:
        """Found out by rendering, as far as that does not take too long."""
        end = time.monotonic() + _PROBE_SECONDS
        tools = "probe_function" in _rendered(template, [_USER], tools=[_TOOL])
        system = "probe_system" in _rendered(template, [{"role": "system", "content": "probe_system"}, _USER])
        for short_ids, as_text, content in itertools.product((False, True), (False, True), ("", None)):
            style = cls(tools, True, system, as_text, content, short_ids)
            if time.monotonic() > end:
                break
            if _shows_calls(_rendered(template, style.fitted(_PROBE), tools=[_TOOL])):
                return style
        return cls(tools, False, system)

    def fitted(self, messages: Sequence[Message]) -> list[Message]:
        """Checked messages as a template with words for calls wants them."""
        return [self._fitted(message) for message in messages]

    def _fitted(self, message: Message) -> Message:
        fitted = dict(message)
        if "tool_call_id" in fitted:
            fitted["tool_call_id"] = self._id(fitted["tool_call_id"])
        if "tool_calls" in fitted:
            fitted["content"] = fitted["content"] or self.content
            fitted["tool_calls"] = [
                {**call, "id": self._id(call["id"]), "function": self._function(call["function"])}
                for call in fitted["tool_calls"]
            ]
        return fitted

    def _id(self, given: str) -> str:
        if not self.short_ids or len(given) == _SHORT_ID:
            return given
        return blake2b(given.encode("utf-8", "replace")).hexdigest()[:_SHORT_ID]

    def _function(self, function: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.arguments_as_text:
            return function
        return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


_USER: Message = {"role": "user", "content": "probe_user"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_function",
        "description": "probe_description",
        "parameters": {
            "type": "object",
            "properties": {"probe_parameter": {"type": "string", "description": "probe_text"}},
            "required": ["probe_parameter"],
        },
    },
}
_PROBE_ID = "call_probe0000"
_PROBE: list[Message] = [
    _USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": _PROBE_ID,
                "type": "function",
                "function": {"name": "probe_function", "arguments": {"probe_key": "probe_value"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": _PROBE_ID, "name": "probe_function", "content": "probe_result"},
]
_NOT_JSON = ("'probe_key'", '\\"probe_key')  # written as Python, and as JSON inside of JSON


def _rendered(template: ChatTemplate, messages: Sequence[Message], **variables: Any) -> str:
    try:
        return template.render(messages, **variables)
    except TemplateError:
        return ""


def _shows_calls(text: str) -> bool:
    shown = all(word in text for word in ("probe_function", "probe_key", "probe_value", "probe_result"))
    return shown and not any(wrong in text for wrong in _NOT_JSON)


def checked_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages with their calls as ``TemplateStyle.fitted`` takes them: arguments as objects, each result with the name of its
    function, thoughts under both of their names. Raises RequestError that names the place at fault.

    What is wrong with roles and contents is left to the template.
    """
    names: dict[str, str] = {}  # of the function called, by the id of the call
    return [_checked(message, f"messages[{index}]", names) for index, message in enumerate(messages)]


def _checked(message: Message, place: str, names: dict[str, str]) -> Message:
    checked = dict(message)
    calls = checked.pop("tool_calls", None)
    if calls:
        if message.get("role") != "assistant" or not isinstance(calls, (list, tuple)):
            raise _error(f"{place}.tool_calls", "must be a list, in a message of the assistant")
        checked["tool_calls"] = [_checked_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
        checked.setdefault("content", None)
        names.update({call["id"]: call["function"]["name"] for call in checked["tool_calls"]})
    if message.get("role") == "tool":
        call_id = checked.setdefault("tool_call_id", "")
        if not isinstance(call_id, str):
            raise _error(f"{place}.tool_call_id", "must be a text")
        if not checked.get("name") and call_id in names:
            checked["name"] = names[call_id]
    thoughts = next((checked[key] for key in _THOUGHTS if checked.get(key)), None)
    for key in _THOUGHTS:
        checked.pop(key, None)
    if thoughts is not None:
        if not isinstance(thoughts, str):
            raise _error(f"{place}.reasoning_content", "must be a text")
        checked |= dict.fromkeys(_THOUGHTS, thoughts)
    return checked


def _checked_call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise _error(place, 'must be {"id": "...", "type": "function", "function": {...}}')
    name, call_id = function.get("name"), call.get("id") or ""
    if not isinstance(name, str) or not name:
        raise _error(f"{place}.function.name", "must be a text")
    if not isinstance(call_id, str):
        raise _error(f"{place}.id", "must be a text")
    arguments = _checked_arguments(function.get("arguments"), f"{place}.function.arguments")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _checked_arguments(arguments: Any, place: str) -> Mapping[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise _error(place, f"{arguments[:60]!r} is not valid JSON") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise _error(place, "must be an object, or the JSON text of one")
    return arguments


def _error(place: str, problem: str) -> RequestError:
    return RequestError(f"{place}: {problem}", place)


def plain_messages(messages: Sequence[Message], form: ToolFormat) -> list[Message]:
    """Checked messages without calls and results: both are in the text of messages of assistant and user."""
    plain: list[Message] = []
    follows_result = False
    for message in messages:
        if message.get("tool_calls"):
            calls = [Call(**call["function"]) for call in message["tool_calls"]]
            words = [part for part in (text_of(message), form.write(calls)) if part]
            message = {"role": "assistant", "content": "\n".join(words)}
        is_result = message.get("role") == "tool"
        if is_result:
            message = {"role": "user", "content": f"<tool_response>\n{text_of(message)}\n</tool_response>"}
        # Templates may insist on turns: results, and what the user says to them, are one.
        if plain and plain[-1]["role"] == message.get("role") == "user" and (is_result or follows_result):
            message = {"role": "user", "content": f"{text_of(plain.pop())}\n{text_of(message)}"}
        plain.append(message)
        follows_result = is_result
    return plain


def told_of_tools(
    messages: Sequence[Message], tools: Sequence[Any], form: ToolFormat, *, system: bool
) -> list[Message]:
    """Messages of which the first tells about the tools: with ``system``, a system message."""
    text = (
        "You may call functions to answer. These are their signatures, one in a line:\n"
        + "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        + f"\nTo call one, answer exactly like this:\n{form.example}"
    )
    role = "system" if system else "user"
    place = next((index for index, message in enumerate(messages) if message.get("role") == role), None)
    if place is None or (system and place > 0):
        return [{"role": role, "content": text}, *messages]
    own = text_of(messages[place])
    told = {**messages[place], "content": f"{own}\n\n{text}" if system else f"{text}\n\n{own}"}
    return [*messages[:place], told, *messages[place + 1 :]]


def text_of(message: Message) -> str:
    """The content of a message as one text."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""
