"""Schemas that hypothesis makes, of all that can be enforced."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]

_names = st.sampled_from(["a", "b", "id", "name", 'q"', "é", "x y"])
_bounds = st.tuples(st.integers(-50, 50), st.integers(0, 40)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def _integer(bounds: tuple[int, int], multiple: int | None) -> Schema:
    low, high = bounds
    schema: Schema = {"type": "integer", "minimum": low, "maximum": high}
    if multiple is not None and any(value % multiple == 0 for value in range(low, high + 1)):
        schema["multipleOf"] = multiple
    return schema


def _string(low: int, more: int) -> Schema:
    return {"type": "string", "minLength": low, "maxLength": low + more}


def _array(items: Schema, low: int, more: int) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + more}


def _tuple(items: list[Schema]) -> Schema:
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


@st.composite
def _object(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(_names, inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    extra = draw(st.sampled_from([False, {"type": "integer"}, {"type": ["null", "boolean"]}]))
    schema: Schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": extra}
    if extra and len(required) == len(properties):
        schema["maxProperties"] = len(required) + 2
    return schema


_leaves = st.one_of(
    st.builds(_integer, _bounds, st.none() | st.integers(2, 7)),
    st.builds(lambda b: {"type": "number", "minimum": b[0], "maximum": b[1] + 1}, _bounds),
    st.builds(_string, st.integers(0, 2), st.integers(0, 3)),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["x", 2, None, [1]]},
            {"const": {"k": "v"}},
            {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]$"},
            {"type": "string", "format": "uuid"},
            {"$ref": "#/$defs/pair"},
            {"$ref": "#/$defs/list"},
        ]
    ),
)
_inner = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        _object(inner),
        st.builds(_array, inner, st.integers(0, 2), st.integers(0, 2)),
        st.lists(inner, min_size=1, max_size=2).map(_tuple),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)
_DEFS: Schema = {
    "pair": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False, "minItems": 2},
    "list": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/list"}, "maxItems": 1}]},
}


def schemas() -> st.SearchStrategy[Schema]:
    """Schemas with nesting, unions, bounds and references."""
    return _inner.map(lambda schema: {"$defs": _DEFS, **schema})
