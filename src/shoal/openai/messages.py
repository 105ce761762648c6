"""A conversation as it stands in a body -> as chat templates take it: a role that they know and one text a message."""

from __future__ import annotations

from typing import Any

from shoal.chat.messages import checked_messages
from shoal.errors import RequestError
from shoal.openai.fields import did_you_mean
from shoal.openai.schema import APIError
from shoal.text.given import is_given

_ROLES = ("system", "developer", "user", "assistant", "tool")

_NO_FUNCTIONS = "functions are called as tools"
_NO_AUDIO = "models read and write text alone"

# What messages and their parts have in OpenAI's and vLLM's API that shoal lacks, and why.
_ROLES_LACKING = {"function": _NO_FUNCTIONS}
_FIELDS_LACKING = {"audio": _NO_AUDIO, "function_call": _NO_FUNCTIONS}
_PARTS_LACKING = dict.fromkeys(
    ("audio_url", "file", "image", "image_embeds", "image_pil", "image_url", "input_audio", "video", "video_url"),
    "models read text alone",
)
_OF_CHAT = ("tool_calls", "tool_call_id", "reasoning", "reasoning_content")  # see ``shoal.chat.messages``
_FIELDS = ("role", "content", "name", "refusal", *_OF_CHAT)
_IGNORED = frozenset(("annotations", "prompt_cache_breakpoint"))  # says nothing about the text
_TEXTS = {"text": "text", "refusal": "refusal"}  # kinds of parts, and where each has its text


def conversation(messages: list[Any]) -> list[dict[str, Any]]:
    """The messages of a body, which has no nulls any more. Raises APIError that names the place at fault."""
    if not messages:
        raise APIError("messages: the conversation is empty; it needs at least 1 message", "messages")
    rendered = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    try:
        checked_messages(rendered)
    except RequestError as error:
        raise APIError(str(error), error.field) from None
    return rendered


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise APIError(f"{place}: must be an object with role and content", place)
    given = {name: value for name, value in message.items() if name == "content" or is_given(value)}
    role = _role(given.get("role"), f"{place}.role")
    _refuse_others(given, place, _FIELDS, _FIELDS_LACKING)
    rendered: dict[str, Any] = {"role": role, "content": _content(given, place)}
    if "name" in given:
        rendered["name"] = _text(given["name"], f"{place}.name")
    return rendered | {name: given[name] for name in _OF_CHAT if name in given}


def _role(role: Any, place: str) -> str:
    if role is None:
        raise APIError(f"{place}: this field is required", place)
    if role in _ROLES:
        return "system" if role == "developer" else str(role)
    if isinstance(role, str) and role in _ROLES_LACKING:
        raise APIError(f"{place}: {role!r} is not supported: {_ROLES_LACKING[role]}", place)
    hint = did_you_mean(role, _ROLES) if isinstance(role, str) else ""
    raise APIError(f"{place}: got {role!r:.80}, must be one of {', '.join(_ROLES)}{hint}", place)


def _content(given: dict[str, Any], place: str) -> str | None:
    """The text of a message: its parts, and after them a refusal, joined by line ends, as vLLM does. None beside calls alone."""
    content, where = given.get("content"), f"{place}.content"
    if content is None and "refusal" not in given:
        if "tool_calls" in given:
            return None
        raise APIError(f"{where}: this field is required", where)
    texts = _parts(content, where) if isinstance(content, list) else [_text(content or "", where)]
    if "refusal" in given:  # what an assistant said in place of an answer
        texts = [*filter(None, texts), _text(given["refusal"], f"{place}.refusal")]
    return "\n".join(texts)


def _parts(parts: list[Any], place: str) -> list[str]:
    if not parts:
        raise APIError(f"{place}: has no parts", place)
    return [_part(part, f"{place}[{index}]") for index, part in enumerate(parts)]


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise APIError(f'{place}: must be {{"type": "text", "text": "..."}}', place)
    if kind not in _TEXTS:
        lack = f"is not supported: {_PARTS_LACKING[kind]}" if kind in _PARTS_LACKING else _kinds(kind)
        raise APIError(f"{place}.type: {kind!r:.80} {lack}", f"{place}.type")
    field = _TEXTS[kind]
    _refuse_others({name: value for name, value in part.items() if is_given(value)}, place, ("type", field), {})
    if field not in part:
        raise APIError(f"{place}.{field}: this field is required", f"{place}.{field}")
    return _text(part[field], f"{place}.{field}")


def _kinds(kind: str) -> str:
    return f"is not known; a part must be of type {' or '.join(map(repr, _TEXTS))}{did_you_mean(kind, tuple(_TEXTS))}"


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise APIError(f"{place}: got {type(value).__name__}, must be a text", place)
    return value


def _refuse_others(given: dict[str, Any], place: str, known: tuple[str, ...], lacking: dict[str, str]) -> None:
    """Refuse the first field that is not ``known``."""
    for name in given:
        if name in lacking:
            raise APIError(f"{place}.{name}: not supported: {lacking[name]}", f"{place}.{name}")
        if name not in known and name not in _IGNORED:
            hint = did_you_mean(name, (*known, *lacking))
            raise APIError(f"{place}.{name}: no such field{hint}", f"{place}.{name}")
