"""Which formats are found in which templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.chat.formats import REASONING_FORMATS, TOOL_FORMATS, reasoning_format_of, tool_format_of
from shoal.params import REASONING_PARSERS, TOOL_CALL_PARSERS
from tests.chat import templates


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        (templates.CHATML, "hermes", None),
        (templates.QWEN, "hermes", "think"),
        (templates.LLAMA, "llama3_json", None),
        (templates.MISTRAL, "mistral", None),
        (templates.OPENED, "hermes", "think"),
        (templates.TURNS, "pythonic", None),
        ("{{ messages }}", "generic", None),
        ("{% if tools %}{{ tools }}{% endif %}<|im_start|>", "generic", None),
        ("{% if tools %}<|tool_call|>{% endif %}", "generic", None),
        ("{% if tools %}<tool_call><function=x><parameter=y>{% endif %}", "qwen3_coder", None),
        ("{% if tools %}<tool_call><function=x>{% endif %}", "generic", None),
        ("[TOOL_CALLS] [THINK] [/THINK]", "mistral", "mistral"),
        ("<|python_tag|>", "llama3_json", None),
        ("[func_name1(params_name1=params_value1)] <|start_header_id|>", "pythonic", None),
        ("<|python_start|>", "pythonic", None),
        ("<|start|><|channel|>analysis<|message|> commentary", "harmony", "harmony"),
        ("<|START_THINKING|><|END_THINKING|>", "generic", "cohere"),
        ("<seed:think></seed:think>", "generic", "seed_oss"),
        ("Here is my thought process: Here is my response:", "generic", "granite"),
    ],
)
def test_what_a_template_shows(template: str, calls: str, reasoning: str | None) -> None:
    assert tool_format_of(template).name == calls
    found = reasoning_format_of(template)
    assert (found.name if found else None) == reasoning


@pytest.mark.parametrize(("model", "calls"), [("smollm2", "hermes"), ("gemma3", "pythonic")])
def test_what_real_templates_show(golden: Path, model: str, calls: str) -> None:
    template = (golden / "models" / f"{model}.chat_template.jinja").read_text(encoding="utf-8")
    assert tool_format_of(template).name == calls
    assert reasoning_format_of(template) is None


def test_the_names_are_those_of_the_parameters() -> None:
    assert {*TOOL_FORMATS, "none"} == set(TOOL_CALL_PARSERS)
    assert {*REASONING_FORMATS, "none"} == set(REASONING_PARSERS)
