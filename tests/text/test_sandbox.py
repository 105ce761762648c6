from __future__ import annotations

from datetime import datetime
from typing import Any

import jinja2
import pytest

from shoal.text.sandbox import render

NOW = datetime(2024, 2, 29, 23, 59, 58, 7)


@pytest.mark.parametrize(
    ("source", "variables", "expected"),
    [
        ("  {% if true %}\nx\n  {% endif %}\ny", {}, "x\ny"),  # trim_blocks, lstrip_blocks
        ("{{ x | tojson }}", {"x": {"b": "<\u00e9'>", "a": None}}, '{"b": "<\u00e9\'>", "a": null}'),
        ("{{ x | tojson(indent=2) }}", {"x": [1]}, "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}, "01"),
        ("{% generation %}{{ x }}{% endgeneration %}!", {"x": "a"}, "a!"),
        ("{{ x }}", {"x": "<b>"}, "<b>"),  # no autoescape
        ("{{ x | trim }}|", {"x": "\u00a0\u3000a\u200b "}, "a\u200b|"),
    ],
)
def test_renders_as_transformers_does(source: str, variables: dict[str, Any], expected: str) -> None:
    assert render(source, variables, NOW) == expected


def test_the_date_is_the_one_that_was_given() -> None:
    source = "{% macro date(f) %}{{ strftime_now(f) if strftime_now is defined }}{% endmacro %}{{ date('%d %b %Y %X %f%z%Z') }}"
    assert render(source, {}, NOW) == "29 Feb 2024 23:59:58 000007"
    assert render("{{ strftime_now }}", {"strftime_now": "mine"}, NOW) == "mine"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ x | map('upper') }}", "<generator object sync_do_map>"),
        ("{{ x | select }}{{ raise_exception }}", "<generator object select_or_reject><function _raise_exception>"),
        ("{{ x }}{{ none }}{{ nothing }}{{ 1.5 }}", "['a at 0x1>']None1.5"),
    ],
)
def test_where_things_lie_in_memory_is_not_told(source: str, expected: str) -> None:
    assert render(source, {"x": ["a at 0x1>"]}, NOW) == expected


def test_output_is_bounded() -> None:
    with pytest.raises(jinja2.TemplateError, match="characters of output"):
        render("{% for i in range(20000) %}{{ x }}{% endfor %}", {"x": "a" * 1000}, NOW)


def test_values_cannot_be_changed() -> None:
    with pytest.raises(jinja2.TemplateError, match="unsafe"):
        render("{{ x.append(1) }}", {"x": []}, NOW)
