"""What /v1/responses and Anthropic's /v1/messages share: their bodies become bodies of /v1/chat/completions.

Sampling fields pass as they are, the others are translated by each dialect's module. None is dropped silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from shoal.openai.convert import Call, parse_chat
from shoal.openai.fields import IGNORED, did_you_mean, given_fields
from shoal.openai.schema import APIError, ChatBody, RequestBody
from shoal.text.given import is_given

CHAT = "/v1/chat/completions"
# One answer, which is drawn, comes back in the dialect's own form; how long and in which form it may be has other names there.
_NOT_PASSED = {"model", "max_tokens", "n", "use_beam_search", "length_penalty", "response_format", "prompt_logprobs"}
PASSED = frozenset(RequestBody.__struct_fields__) - _NOT_PASSED | IGNORED
PASSED |= {"chat_template_kwargs", "thinking_token_budget", "include_reasoning", "add_special_tokens"}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The fields that bodies of ``endpoint`` have.

    ``own`` are translated, ``passed`` mean the same in /v1/chat/completions, ``ignored`` say nothing about the answer. ``lacks``: what
    asks for something that shoal does not have, each with why, and the values that ask for nothing. ``names``: what is called
    otherwise than in /v1/chat/completions.
    """

    endpoint: str
    own: frozenset[str]
    passed: frozenset[str]
    ignored: frozenset[str] = frozenset()
    lacks: Mapping[str, tuple[str, tuple[object, ...]]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def parted(self, body: Any, required: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields to translate, and those to pass. Raises APIError that names the field at fault."""
        if not isinstance(body, dict):
            raise APIError("the body must be a JSON object")
        own: dict[str, Any] = {}
        passed: dict[str, Any] = {}
        for name, value in given_fields(body).items():
            if name in self.own:
                own[name] = value
            elif name in self.passed:
                passed[name] = value
            elif name not in self.ignored:
                self._refuse_unless_off(name, value)
        for name in required:
            if name not in own:
                raise APIError(f"{name}: this field is required", name)
        if not isinstance(own.get("stream", False), bool):
            raise APIError(f"stream: got {own['stream']!r:.80}, must be true or false", "stream")
        return own, passed

    def call(self, chat: dict[str, Any]) -> Call:
        """The chat that a body became, made ready. Raises APIError in words of the body."""
        try:
            return parse_chat(chat)
        except APIError as error:
            raise self.in_its_words(error) from None

    def in_its_words(self, error: APIError) -> APIError:
        """An error of the chat that a body became, as one of the body. Messages stand elsewhere there, so their place is left out."""
        if error.param is None:
            return error
        match = _PARAM.fullmatch(error.param)
        assert match is not None, "every text matches"
        name = self.names.get(match["name"], match["name"])
        param = name if match["name"] == "messages" else name + match["rest"].replace(".function", "", 1)
        problem = str(error).removeprefix(f"{error.param}: ")
        if problem == str(error):
            problem = problem.removeprefix(match["name"]).lstrip(": ")
        told = copy(error)
        told.args, told.param = (f"{param}: {problem}",), param
        return told

    def _refuse_unless_off(self, name: str, value: object) -> None:
        if name in self.lacks:
            why, off = self.lacks[name]
            if not any(value == nothing and type(value) is type(nothing) for nothing in off):
                raise APIError(f"{name}: not supported: {why}", name)
            return
        if name in ChatBody.__struct_fields__:
            raise APIError(f"{name}: is a field of {CHAT}, not of {self.endpoint}", name)
        hint = did_you_mean(name, (*sorted(self.own), *sorted(self.passed), *self.lacks))
        raise APIError(f"{name}: no such field{hint}", name)


_PARAM = re.compile(r"(?P<name>[^.\[]*)(?P<rest>.*)", re.DOTALL)


# Places in a body -----------------------------------------------------------------------------------------------------


def record(value: Any, place: str) -> dict[str, Any]:
    """An object, without what is null in it."""
    if not isinstance(value, dict):
        raise APIError(f"{place}: got {type(value).__name__}, must be an object", place)
    return {name: item for name, item in value.items() if item is not None}


def records(value: Any, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a list, each with its place."""
    if not isinstance(value, list):
        raise APIError(f"{place}: got {type(value).__name__}, must be a list", place)
    for index, item in enumerate(value):
        yield record(item, f"{place}[{index}]"), f"{place}[{index}]"


def text(given: Mapping[str, Any], name: str, place: str) -> str:
    """The text that the object at ``place`` has to have under ``name``."""
    where = f"{place}.{name}"
    if name not in given:
        raise APIError(f"{where}: this field is required", where)
    if not isinstance(given[name], str):
        raise APIError(f"{where}: got {type(given[name]).__name__}, must be a text", where)
    return str(given[name])


def only(given: Mapping[str, Any], place: str, known: tuple[str, ...]) -> None:
    """Refuse the first field that is given and not ``known``."""
    for name, value in given.items():
        if name not in known and is_given(value):
            where = f"{place}.{name}"
            raise APIError(f"{where}: no such field{did_you_mean(name, known)}", where)


def one_of(value: Any, place: str, known: tuple[str, ...], lacking: Mapping[str, str] | None = None) -> str:
    """A word that is known. ``lacking`` says of others why they are not supported."""
    if isinstance(value, str) and value in known:
        return value
    if isinstance(value, str) and lacking and value in lacking:
        raise APIError(f"{place}: {value!r} is not supported: {lacking[value]}", place)
    if value is None:
        raise APIError(f"{place}: this field is required", place)
    hint = did_you_mean(value, known) if isinstance(value, str) else ""
    raise APIError(f"{place}: got {value!r:.80}, must be one of {', '.join(known)}{hint}", place)


def function_tool(given: Mapping[str, Any], place: str, parameters: str) -> dict[str, Any]:
    """A tool whose name stands beside its type, as /v1/chat/completions has it; ``parameters``: where the schema is."""
    function: dict[str, Any] = {"name": text(given, "name", place)}
    if parameters in given:
        record(given[parameters], f"{place}.{parameters}")
        function["parameters"] = given[parameters]
    function |= {name: given[name] for name in ("description", "strict") if name in given}
    return {"type": "function", "function": function}


def named_function(name: str) -> dict[str, Any]:
    """The choice of one tool."""
    return {"type": "function", "function": {"name": name}}


def function_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call by the model, as a message of the assistant has it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
