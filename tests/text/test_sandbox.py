from __future__ import annotations

import re
from typing import Any

import jinja2
import pytest

from shoal.text.sandbox import render


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
    assert render(source, variables) == expected


def test_the_date_is_at_hand() -> None:
    assert re.fullmatch(r"\d{2} \w{3} \d{4}", render("{{ strftime_now('%d %b %Y') }}", {}))


def test_output_is_bounded() -> None:
    with pytest.raises(jinja2.TemplateError, match="characters of output"):
        render("{% for i in range(20000) %}{{ x }}{% endfor %}", {"x": "a" * 1000})


def test_values_cannot_be_changed() -> None:
    with pytest.raises(jinja2.TemplateError, match="unsafe"):
        render("{{ x.append(1) }}", {"x": []})
