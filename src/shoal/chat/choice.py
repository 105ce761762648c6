"""The tools of a request and which of them must be called: checked, and as a schema for the reply."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shoal.chat.events import CallEnd, CallStart, Parsing
from shoal.chat.json_calls import any_name, json_arguments, json_calls
from shoal.chat.reader import Reader
from shoal.chat.tools.base import ToolFormat
from shoal.errors import RequestError

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.:/-]{1,128}")
# With no other words than these a schema says nothing about properties that it does not list.
_PLAIN = {"$schema", "$defs", "definitions", "title", "description", "type", "properties", "required", "examples"}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is a JSON schema, None for a function without any."""

    name: str
    description: str
    parameters: Mapping[str, Any] | None
    strict: bool

    @property
    def schema(self) -> Mapping[str, Any]:
        """What its arguments have to be. Where its parameters are listed there are no others, unless the schema speaks of them: small
        models invent some, and functions fail that get what they do not know."""
        if self.parameters is None:
            return _NO_PARAMETERS
        if "properties" in self.parameters and self.parameters.keys() <= _PLAIN:
            return {**self.parameters, "additionalProperties": False}
        return self.parameters

    @property
    def parameter_schemas(self) -> Mapping[str, Any]:
        """Its parameters in order, each with its schema."""
        properties = self.schema.get("properties")
        return properties if isinstance(properties, Mapping) else {}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a request says about calls; ``name`` of the tool that must be called, for "named"."""

    kind: Literal["none", "auto", "required", "named"] = "auto"
    name: str = ""

    @property
    def forces(self) -> bool:
        """Whether there must be a call."""
        return self.kind in ("required", "named")


def checked_tools(tools: Any) -> list[Tool]:
    """``tools`` of a request, as OpenAI has them. Raises RequestError that names the place at fault."""
    if not isinstance(tools, (list, tuple)):
        raise RequestError(f"tools: got {type(tools).__name__}, must be a list of functions", "tools")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools: got {len(tools)}, at most {MAX_TOOLS} are allowed", "tools")
    found: dict[str, Tool] = {}
    for index, given in enumerate(tools):
        tool = _checked_tool(given, f"tools[{index}]")
        if tool.name in found:
            raise _error(f"tools[{index}].function.name", f"{tool.name!r} is there twice")
        found[tool.name] = tool
    return list(found.values())


def checked_choice(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """``tool_choice`` of a request: a word, or ``{"type": "function", "function": {"name": ...}}``. Raises RequestError."""
    if choice is None or choice in ("auto", "none"):
        return ToolChoice(choice or "auto")
    if choice == "required":
        kind, name = ToolChoice("required"), None
    else:
        function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            wanted = 'none, auto, required or {"type": "function", "function": {"name": "..."}}'
            raise RequestError(f"tool_choice: got {str(choice)[:60]!r}, must be {wanted}", "tool_choice")
        kind = ToolChoice("named", name)
    if not tools:
        raise RequestError("tool_choice: asks for a call, but there are no tools", "tool_choice")
    if name is not None and name not in [tool.name for tool in tools]:
        raise RequestError(f"tool_choice: {name!r} is none of the tools", "tool_choice")
    return kind


def schema_of(choice: ToolChoice, tools: Sequence[Tool], *, most_calls: int | None) -> dict[str, Any] | None:
    """The JSON schema of a reply in which a call is forced, as ``named_call`` and ``required_calls`` read it; else None."""
    if choice.kind == "named":
        return dict(next(tool for tool in tools if tool.name == choice.name).schema)
    if choice.kind != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "parameters": {"$ref": f"#/$defs/tool{index}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if most_calls is not None:
        schema["maxItems"] = most_calls
    return schema | {"$defs": {f"tool{i}": _moved(tool.schema, f"#/$defs/tool{i}") for i, tool in enumerate(tools)}}


def strict_tag(
    form: ToolFormat | None, template: str, tools: Sequence[Tool], *, most_calls: int | None
) -> dict[str, Any] | None:
    """A structural tag that holds the arguments of ``strict`` tools to their schemas wherever a call begins; those of other tools to
    any object. None where no tool is strict, or calls of the format have no mark to begin with."""
    if form is None or form.around is None or not any(tool.strict for tool in tools):
        return None
    tags = []
    for tool in tools:
        begin, end = form.around(tool.name, template)
        schema = dict(tool.schema) if tool.strict else {"type": "object"}
        tags.append({"begin": begin, "content": {"type": "json_schema", "json_schema": schema}, "end": end})
    triggered = {"type": "triggered_tags", "triggers": [form.marks[0]], "tags": tags}
    return {"type": "structural_tag", "format": triggered | ({"stop_after_first": True} if most_calls == 1 else {})}


def named_call(reader: Reader, name: str) -> Parsing[None]:
    """A reply that is the arguments of a call."""
    if (yield from reader.spaces()):
        yield CallStart(name)
        if (yield from json_arguments(reader)):
            yield CallEnd()


def required_calls(reader: Reader) -> Parsing[None]:
    """A reply that is a list of calls. One that breaks off before the name of its function is known is none, and no content either."""
    yield from reader.spaces()
    yield from json_calls(reader, any_name)


def _checked_tool(given: Any, place: str) -> Tool:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or given.get("type", "function") != "function":
        raise _error(place, 'must be {"type": "function", "function": {...}}')
    name, description = function.get("name"), function.get("description")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _error(f"{place}.function.name", f"got {str(name)[:60]!r}, must be 1 to 128 letters, digits or _ - . : /")
    if not isinstance(description, (str, type(None))):
        raise _error(f"{place}.function.description", "must be a text")
    if not isinstance(parameters, (Mapping, type(None))):
        raise _error(f"{place}.function.parameters", "must be a JSON schema, an object")
    if not isinstance(strict, (bool, type(None))):
        raise _error(f"{place}.function.strict", "must be true or false")
    return Tool(name, description or "", parameters, bool(strict))


def _error(place: str, problem: str) -> RequestError:
    return RequestError(f"{place}: {problem}", place)


def _moved(schema: Any, root: str) -> Any:
    """A schema with its references to itself as they have to be where it stands at ``root`` of another."""
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, root)
            for key, value in schema.items()
        }
    if isinstance(schema, (list, tuple)):
        return [_moved(item, root) for item in schema]
    return schema
