"""What shoal itself checks of a JSON schema: that it is one, of a bearable size, and says nothing that would be passed over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from shoal.errors import ParameterError

MAX_DEPTH = 100  # of nesting, in JSON; what parses it later gives up at 128
MAX_OPTIONAL = 100  # properties of one object that may be left out: each of them may follow at every place
FIELD = "structured_outputs.json"

# Where a schema holds schemas: by name, in a list, or one.
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalItems",
    "additionalProperties",
    "unevaluatedItems",
    "unevaluatedProperties",
    "propertyNames",
    "contains",
    "not",
    "if",
    "then",
    "else",
)
# With these values the keywords that follow ask for nothing.
_INERT: dict[str, tuple[object, ...]] = {
    "uniqueItems": (False,),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "propertyNames": (True, {}, {"type": "string"}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "not": (False,),
    "format": ("password",),
}
_LARGEST = 2**63 - 1
_LEAST = -(2**63) + 1024


class Node(NamedTuple):
    """A schema within a schema, and its place as a JSON pointer."""

    place: str
    schema: dict[str, Any]


def parse_schema(schema: str | dict[str, Any] | bool) -> dict[str, Any] | bool:
    """A schema from its text, or as it was given. Raises ParameterError for what is no schema or nests too deeply."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise ParameterError(FIELD, schema, f"a JSON schema; it is not valid JSON: {error}") from None
    if not isinstance(value, (dict, bool)):
        raise ParameterError(FIELD, value, "a JSON schema: an object, true or false")
    _check_depth(value)
    return value


def prepare_schema(schema: dict[str, Any] | bool, *, close_objects: bool = False) -> dict[str, Any]:
    """A copy without keywords that ask for nothing. ``close_objects``: objects have no properties but those listed, unless they say so.

    Raises ParameterError, naming keyword and place, for what would be passed over or bent silently.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"anyOf": []}
    prepared: dict[str, Any] = json.loads(json.dumps(schema))
    if "x-guidance" in prepared:
        raise cannot("x-guidance", "")
    for place, node in nodes(prepared):
        for keyword, values in _INERT.items():
            if keyword in node and any(_same(node[keyword], value) for value in values):
                del node[keyword]
        _check_bounds(node, place)
        _check_count(node, place)
        if close_objects and ("properties" in node or "patternProperties" in node):
            node.setdefault("additionalProperties", False)
    return prepared


def cannot(keyword: str, place: str, why: str = "no grammar can hold a model to it") -> ParameterError:
    """The error of a keyword that cannot be enforced."""
    return ParameterError(FIELD, f"{keyword} at #{place}", f"left out: {why}")


def nodes(schema: dict[str, Any]) -> Iterator[Node]:
    """The schema and every schema in it, but for those in const, enum, default and examples."""
    waiting = [Node("", schema)]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(list(_children(node)))


def _children(node: Node) -> Iterator[Node]:
    place, schema = node
    for keyword, value in schema.items():
        inside = f"{place}/{_escaped(keyword)}"
        if keyword in _MAPS and isinstance(value, dict):
            yield from (
                Node(f"{inside}/{_escaped(key)}", item) for key, item in value.items() if isinstance(item, dict)
            )
        elif keyword in _LISTS and isinstance(value, list):
            yield from (Node(f"{inside}/{index}", item) for index, item in enumerate(value) if isinstance(item, dict))
        elif keyword in _SINGLE and isinstance(value, dict):
            yield Node(inside, value)


def explained(reason: str, schema: dict[str, Any]) -> ParameterError:
    """What llguidance has against a schema, with the keyword's place where that can be told."""
    unknown = re.search(r'Unimplemented keys: \["([^"]+)"', reason)
    if unknown:
        return cannot(unknown[1], _place(schema, unknown[1]))
    form = re.search(r"Unknown format: (.*)", reason)
    if form:
        place = next((place for place, node in nodes(schema) if node.get("format") == form[1]), "")
        return cannot(f"format {form[1]!r}", place)
    for start, keyword, why in _REASONS:
        if reason.startswith(start):
            return cannot(keyword, _place(schema, keyword), why)
    return ParameterError(FIELD, "a schema", f"one that can be enforced: {reason}")


_REASONS = (
    ("oneOf constraints", "oneOf", "its options do not exclude each other for certain; anyOf can be enforced"),
    ("min/maxProperties only", "minProperties", "it can be enforced only where all listed properties are required"),
)


def _place(schema: dict[str, Any], keyword: str) -> str:
    return next((place for place, node in nodes(schema) if keyword in node), "")


def _check_bounds(node: dict[str, Any], place: str) -> None:
    """Bounds are kept as 64-bit floats: an integer that is none would become another, and let through what it forbids."""
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        bound = node.get(keyword)
        if not isinstance(bound, int) or isinstance(bound, bool):
            continue
        outside = bound > _LARGEST if "inimum" in keyword else bound < -_LARGEST - 1
        if outside or (abs(bound) < _LARGEST and int(float(bound)) != bound):
            raise cannot(f"{keyword} {bound}", place, "it has no exact place among 64-bit floats")
        if "inimum" in keyword:  # the least of 64-bit integers is not understood; the next float is
            node[keyword] = max(bound, _LEAST)


def _check_count(node: dict[str, Any], place: str) -> None:
    """A name that is not listed may come twice and counts twice: more than one of those cannot be asked for."""
    least, required, properties = node.get("minProperties"), node.get("required"), node.get("properties")
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set[str]()
    optional = len(properties.keys() - names) if isinstance(properties, dict) else 0
    if optional > MAX_OPTIONAL:
        value = f"{optional} optional properties at #{place}"
        raise ParameterError(FIELD, value, f"at most {MAX_OPTIONAL}; those that are required cost nothing")
    if isinstance(least, int) and least > len(names) + 1:
        raise cannot(f"minProperties {least}", place, "of properties that are not listed it can ask for one at most")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise _too_deep()
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level, depth = inner, depth + 1


def _too_deep() -> ParameterError:
    return ParameterError(FIELD, "a schema that is nested too deeply", f"nested at most {MAX_DEPTH} deep")


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
