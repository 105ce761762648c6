"""The fields of a body that say what the text of an answer may be: OpenAI's, vLLM's and llama.cpp's, as StructuredOutputsParams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from shoal.errors import ParameterError
from shoal.openai.schema import APIError, RequestBody
from shoal.params import StructuredOutputsParams
from shoal.text.given import is_given

# Fields of bodies that this module reads; at most one of them may ask for anything.
FIELDS = ("response_format", "structured_outputs", "grammar", "json_schema")


def structured_outputs(body: RequestBody) -> tuple[str, StructuredOutputsParams | None]:
    """The field that asks for a constraint, and what it asks for; None where none does. Raises APIError that names the field."""
    found = [(name, params) for name in FIELDS if (params := _asked(name, getattr(body, name))) is not None]
    if len(found) > 1:
        first, second = found[0][0], found[1][0]
        raise APIError(f"{second}: given together with {first}; an answer can follow one of them", second)
    return found[0] if found else ("structured_outputs", None)


def in_words_of(field: str, error: ParameterError) -> APIError:
    """An error of StructuredOutputsParams as the error of the field that it was made from."""
    prefix, _, kind = error.field.partition(".")
    name = field if field != prefix else f"{prefix}.{kind}".rstrip(".")
    return APIError(f"{name}{str(error).removeprefix(error.field)}", name)


def _asked(name: str, value: Any) -> StructuredOutputsParams | None:
    if value is None or value == "":
        return None
    try:
        if name == "response_format":
            return _response_format(value)
        if name == "structured_outputs":
            return _vllm(value)
        if name == "grammar":
            return StructuredOutputsParams(grammar=value)
        return _schema(value)
    except ParameterError as error:
        raise in_words_of(name, error) from None


def _response_format(form: Mapping[str, Any]) -> StructuredOutputsParams | None:
    if not is_given(form):
        return None
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _schema(form["schema"]) if form.get("schema") else StructuredOutputsParams(json_object=True)
    if kind == "json_schema":
        inner = form.get("json_schema", form)
        if not isinstance(inner, Mapping) or inner.get("schema") is None:
            raise APIError("response_format.json_schema.schema: this field is required", "response_format")
        return _schema(inner["schema"])
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=dict(form))
    known = "text, json_object, json_schema or structural_tag"
    raise APIError(f"response_format.type: got {kind!r}, must be {known}", "response_format")


def _schema(schema: Any) -> StructuredOutputsParams:
    """A constraint to a schema; an empty one allows any JSON."""
    schema = _given_schema(schema)
    return StructuredOutputsParams(json="{}" if schema == {} else schema)


_DATA = ("const", "default", "enum", "examples")  # what these hold is no schema


def _given_schema(schema: Any) -> Any:
    """A schema without keywords that are null, as tables fill them in; but null is a value that ``const`` may ask for."""
    if isinstance(schema, list):
        return [_given_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: item if name in _DATA else _given_schema(item)
        for name, item in schema.items()
        if item is not None or (name == "const" and _asks_for_null(schema))
    }


def _asks_for_null(schema: dict[str, Any]) -> bool:
    kinds, others = schema.get("type"), schema.keys() - {"const", "title", "description"}
    return "null" in kinds if isinstance(kinds, list) else not any(schema[name] is not None for name in others)


def _vllm(given: Mapping[str, Any]) -> StructuredOutputsParams | None:
    known = [field.name for field in fields(StructuredOutputsParams)]
    used = {name: value for name, value in given.items() if value is not None and value != ""}
    for name in used:
        if name not in known:
            raise APIError(f"structured_outputs.{name}: no such field", f"structured_outputs.{name}")
    if used.get("json_object") is False:
        del used["json_object"]
    if isinstance(used.get("json"), dict):
        used["json"] = _given_schema(used["json"]) or "{}"
    return StructuredOutputsParams(**used) if used else None
