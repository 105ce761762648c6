"""Fields of bodies that say what an answer may be."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import ParameterError
from shoal.openai.convert import parse_chat, parse_completion, refusal
from shoal.openai.schema import APIError
from shoal.params import StructuredOutputsParams

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}


def chat(**fields: Any) -> StructuredOutputsParams | None:
    return parse_chat({"messages": [{"role": "user", "content": "hi"}], **fields}).params.structured_outputs


def completion(**fields: Any) -> StructuredOutputsParams | None:
    return parse_completion({"prompt": "hi", **fields}).params.structured_outputs


@pytest.mark.parametrize("parse", [chat, completion])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "grammar": "", "structured_outputs": {}}, None),
        ({"response_format": {}, "structured_outputs": {"json": None, "regex": ""}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"json": SCHEMA}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            {"json": SCHEMA},
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, {"json": "{}"}),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"response_format": {"type": "structural_tag", **TAG}}, {"structural_tag": {"type": "structural_tag", **TAG}}),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": SCHEMA}),
        ({"structured_outputs": {"choice": ["a", "b"], "json_object": False}}, {"choice": ["a", "b"]}),
        (
            {"structured_outputs": {"json": "{}", "whitespace_pattern": " ?"}},
            {"json": "{}", "whitespace_pattern": " ?"},
        ),
        ({"grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"json_schema": SCHEMA}, {"json": SCHEMA}),
    ],
)
def test_fields(parse: Any, fields: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert parse(**fields) == (None if expected is None else StructuredOutputsParams(**expected))


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "got 'xml'"),
        ({"response_format": "json"}, "response_format", "Expected `object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "schema: this"),
        ({"response_format": {"type": "json_schema", "json_schema": 3}}, "response_format", "required"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml", "no such field"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "not empty"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice", "not empty"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "a text"),
        ({"grammar": 'root ::= "a"', "json_schema": SCHEMA}, "json_schema", "given together with grammar"),
        ({"guided_json": SCHEMA}, "guided_json", "give structured_outputs.json"),
        ({"guided_regex": "a"}, "guided_regex", "give structured_outputs.regex"),
        ({"guided_decoding_backend": "x"}, "guided_decoding_backend", "one backend"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(APIError) as refused:
        chat(**fields)
    assert refused.value.param == param
    assert said.replace("`", "") in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        (
            {"structured_outputs": {"json": SCHEMA}},
            "structured_outputs.json",
            "structured_outputs.json: got 'uniqueItems",
        ),
        ({"json_schema": SCHEMA}, "json_schema", "json_schema: got 'uniqueItems at #/a'"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format: got 'uniqueItems"),
    ],
)
def test_what_the_compiler_refuses_is_said_in_the_words_of_the_body(
    fields: dict[str, Any], param: str, said: str
) -> None:
    call = parse_completion({"prompt": "hi", **fields})
    error = refusal(call, ParameterError("structured_outputs.json", "uniqueItems at #/a", "left out"))
    assert (error.param, error.status) == (param, 400)
    assert str(error).startswith(said)


NULLS = {
    "anyOf": [{"const": None}, {"type": "string", "const": None, "items": None}, {"enum": [None, 1], "type": None}]
}


def test_null_in_a_schema_is_a_value_or_a_hole_in_a_table() -> None:
    expected = {"anyOf": [{"const": None}, {"type": "string"}, {"enum": [None, 1]}]}
    for fields in ({"json_schema": NULLS}, {"structured_outputs": {"json": NULLS, "regex": None}}):
        assert chat(**fields) == StructuredOutputsParams(json=expected)
    either = {"type": ["string", "null"], "const": None, "default": None}
    assert chat(json_schema=either) == StructuredOutputsParams(json={"type": ["string", "null"], "const": None})
