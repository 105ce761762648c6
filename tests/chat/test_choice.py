"""Tools and the choice among them: what is refused, and the schemas of forced calls."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.chat.choice import MAX_TOOLS, ToolChoice, checked_choice, checked_tools, schema_of
from shoal.errors import RequestError
from tests.chat.replies import Case, check, form

NODE = {
    "type": "object",
    "properties": {"next": {"$ref": "#"}, "size": {"$ref": "#/$defs/size"}},
    "$defs": {"size": {"type": "integer"}},
}


def tool(name: Any = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_tools_are_read() -> None:
    parameters = {"type": "object", "properties": {"b": {}, "a": {}}}
    first, second = checked_tools([tool("f", description="d", parameters=parameters, strict=True), tool("g.h-1/x:y")])
    assert (first.name, first.description, first.parameters, first.strict) == ("f", "d", parameters, True)
    assert list(first.parameter_schemas) == ["b", "a"]
    assert (second.parameters, second.strict, second.parameter_schemas) == (None, False, {})


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ({}, "tools"),
        ("f", "tools"),
        ([tool()] * 2, "tools[1].function.name"),
        ([tool(f"f{i}") for i in range(MAX_TOOLS + 1)], "tools"),
        ([None], "tools[0]"),
        ([{"type": "function"}], "tools[0]"),
        ([{"type": "web_search", "function": {"name": "f"}}], "tools[0]"),
        ([tool(), tool("")], "tools[1].function.name"),
        ([tool("two words")], "tools[0].function.name"),
        ([tool(None)], "tools[0].function.name"),
        ([tool("x" * 129)], "tools[0].function.name"),
        ([tool(description=1)], "tools[0].function.description"),
        ([tool(parameters=[])], "tools[0].function.parameters"),
        ([tool(strict="yes")], "tools[0].function.strict"),
    ],
)
def test_bad_tools_are_refused_by_place(tools: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        checked_tools(tools)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


def test_choices() -> None:
    tools = checked_tools([tool("f"), tool("g")])
    assert checked_choice(None, tools) == checked_choice("auto", []) == ToolChoice("auto")
    assert checked_choice("none", tools) == ToolChoice("none")
    assert checked_choice("required", tools) == ToolChoice("required")
    assert checked_choice(named("g"), tools) == ToolChoice("named", "g")
    assert [ToolChoice(kind).forces for kind in ("none", "auto", "required", "named")] == [False, False, True, True]


@pytest.mark.parametrize(
    "choice", ["any", 1, {}, [], {"type": "function"}, {"type": "function", "function": {}}, named("h"), {"type": "x"}]
)
def test_bad_choices_are_refused(choice: Any) -> None:
    with pytest.raises(RequestError, match=r"^tool_choice: ") as caught:
        checked_choice(choice, checked_tools([tool("f")]))
    assert caught.value.field == "tool_choice"


@pytest.mark.parametrize("choice", ["required", named("f")])
def test_a_forced_call_needs_tools(choice: Any) -> None:
    with pytest.raises(RequestError, match="no tools"):
        checked_choice(choice, [])


def test_the_schema_of_a_named_call_is_that_of_its_arguments() -> None:
    tools = checked_tools([tool("f", parameters=NODE), tool("g")])
    assert schema_of(ToolChoice("named", "f"), tools, most_calls=None) == NODE | {"additionalProperties": False}
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert schema_of(ToolChoice("named", "g"), tools, most_calls=None) == nothing
    assert schema_of(ToolChoice("auto"), tools, most_calls=1) is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {}, "additionalProperties": True},
        {"type": "object", "properties": {}, "patternProperties": {"^x": {}}},
        {"type": "object", "properties": {}, "minProperties": 1},
        {"allOf": [{"type": "object", "properties": {"a": {}}}], "properties": {}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}},
        {"type": "object"},
        {},
    ],
)
def test_parameters_that_are_not_listed_are_allowed_where_the_schema_speaks_of_them(parameters: Any) -> None:
    tools = checked_tools([tool("f", parameters=parameters)])
    assert schema_of(ToolChoice("named", "f"), tools, most_calls=None) == parameters


def test_the_schema_of_required_calls_keeps_the_references_of_each_tool() -> None:
    schema = schema_of(ToolChoice("required"), checked_tools([tool("g"), tool("f", parameters=NODE)]), most_calls=1)
    assert schema is not None
    assert (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 1, 1)
    names = [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]]
    assert names == ["g", "f"]
    assert schema["items"]["anyOf"][1]["properties"]["parameters"] == {"$ref": "#/$defs/tool1"}
    moved = schema["$defs"]["tool1"]["properties"]
    assert moved == {"next": {"$ref": "#/$defs/tool1"}, "size": {"$ref": "#/$defs/tool1/$defs/size"}}
    assert "maxItems" not in (schema_of(ToolChoice("required"), checked_tools([tool()]), most_calls=None) or {})


def test_a_reply_that_is_the_arguments_of_a_call() -> None:
    fmt = form("hermes", "think", choice=ToolChoice("named", "get_weather"))
    for case in (
        Case(' {"city": "Paris"}\n', [("get_weather", '{"city": "Paris"}')]),
        Case("<think>Hm</think>\n{}", [("get_weather", "{}")], reasoning="Hm"),
        Case('{"city": "Pa', [("get_weather", '{"city": "Pa')], whole=False),
        Case("<think>Hm", reasoning="Hm"),
    ):
        check(fmt, case)


def test_a_reply_that_is_a_list_of_calls() -> None:
    fmt = form("harmony", choice=ToolChoice("required"))
    for case in (
        Case('[{"name": "now", "parameters": {}}]', [("now", "{}")]),
        Case(
            '[ {"name": "now", "parameters": {}},\n {"name": "save", "parameters": {"note": "]"}} ]',
            [("now", "{}"), ("save", '{"note": "]"}')],
        ),
        Case('[{"name": "now", "parameters": {}}, {"name": "sa', [("now", "{}")]),
        Case('[{"na'),
    ):
        check(fmt, case)
