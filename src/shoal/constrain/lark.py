"""JSON schemas within Lark grammars: prepared as those that stand alone, so that they are held to the same rules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from shoal.constrain.schema import parse_schema, prepare_schema

_START = "%json"
# What may hold the word and mean nothing by it (comments, texts, regular expressions), or the word itself.
_PARTS = re.compile(r'//[^\n]*|#[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|%json\s*(?=\{)')


def schema_expression(schema: dict[str, Any] | bool, options: Mapping[str, Any], closed: bool) -> str:
    """A schema as a part of a rule. ``options`` are llguidance's for JSON; ``closed``: see ``prepare_schema``.

    Raises ParameterError as ``parse_schema`` and ``prepare_schema``.
    """
    prepared = prepare_schema(parse_schema(schema), close_objects=closed)
    return f"{_START} {json.dumps({'x-guidance': dict(options), **prepared})}"


def with_prepared_schemas(grammar: str, options: Mapping[str, Any], closed: bool) -> str:
    """A Lark grammar whose inline schemas (``%json {...}``) have been prepared. What is no JSON is left for llguidance to refuse."""
    parts: list[str] = []
    copied = searched = 0
    while match := _PARTS.search(grammar, searched):
        searched = match.end()
        if match[0].startswith(_START):
            try:
                schema, searched = json.JSONDecoder().raw_decode(grammar, match.end())
            except (ValueError, RecursionError):
                continue
            parts += [grammar[copied : match.start()], schema_expression(schema, options, closed)]
            copied = searched
    return "".join([*parts, grammar[copied:]])
