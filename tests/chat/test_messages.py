"""Messages with calls and results: what is refused, and how each kind of template gets them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.chat.formats import TOOL_FORMATS
from shoal.chat.messages import TemplateStyle, checked_messages, plain_messages, told_of_tools
from shoal.chat.reply import ReplyFormat
from shoal.errors import RequestError
from shoal.text.chat import ChatTemplate
from tests.chat import templates


def call(arguments: Any = '{"city": "Paris"}', name: str = "get_weather", call_id: str = "call_1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call()]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_arguments_become_objects_and_results_get_names(arguments: Any) -> None:
    user, assistant, result = checked_messages(
        [CONVERSATION[0], {"role": "assistant", "tool_calls": [call(arguments)]}, CONVERSATION[2]]
    )
    assert user == CONVERSATION[0]
    assert assistant == {"role": "assistant", "content": None, "tool_calls": [call({"city": "Paris"})]}
    assert result == {**CONVERSATION[2], "name": "get_weather"}


@pytest.mark.parametrize("arguments", ["", " ", None, "{}"])
def test_no_arguments(arguments: Any) -> None:
    (message,) = checked_messages([{"role": "assistant", "content": "", "tool_calls": [call(arguments)]}])
    assert message["tool_calls"] == [call({})]


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_thoughts_have_both_of_their_names(key: str) -> None:
    (message,) = checked_messages([{"role": "assistant", "content": "x", key: "hm"}])
    assert message == {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_content": "hm"}
    assert checked_messages([{"role": "assistant", "content": "x", key: None}]) == [
        {"role": "assistant", "content": "x"}
    ]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "user", "content": "x", "tool_calls": [call()]}, "tool_calls"),
        ({"role": "assistant", "tool_calls": "x"}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [None]}, "tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [call(), call(name="")]}, "tool_calls[1].function.name"),
        ({"role": "assistant", "tool_calls": [{**call(), "id": 3}]}, "tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [call("{")]}, "tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [call("[" * 100_000)]}, "tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [call("[1]")]}, "tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [call(3)]}, "tool_calls[0].function.arguments"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "tool_call_id"),
        ({"role": "assistant", "content": "x", "reasoning": 5}, "reasoning_content"),
    ],
)
def test_bad_calls_are_refused_by_place(message: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        checked_messages([CONVERSATION[0], message])
    assert caught.value.field == f"messages[1].{field}"


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (templates.CHATML, TemplateStyle(system=True)),
        (templates.QWEN, TemplateStyle(tools=True, calls=True, system=True)),
        (templates.LLAMA, TemplateStyle(tools=True, calls=True, system=True)),
        (
            templates.MISTRAL,
            TemplateStyle(True, True, True, arguments_as_text=True, content=None, short_ids=True),
        ),
        (templates.TURNS, TemplateStyle()),
    ],
)
def test_the_style_of_a_template_is_found_by_rendering(template: str, style: TemplateStyle) -> None:
    assert TemplateStyle.of(ChatTemplate(template)) == style


@pytest.mark.parametrize("template", [templates.QWEN, templates.LLAMA, templates.MISTRAL])
def test_calls_are_written_as_json(template: str) -> None:
    """Neither as Python nor as a string of JSON, whatever the template does with arguments."""
    fitted = TemplateStyle.of(ChatTemplate(template)).fitted(checked_messages(CONVERSATION))
    rendered = ChatTemplate(template).render(fitted)
    assert '{"city": "Paris"}' in rendered
    assert "rain" in rendered
    assert "None" not in rendered


def test_ids_that_a_template_refuses_are_made_short_and_still_fit_together() -> None:
    style = TemplateStyle.of(ChatTemplate(templates.MISTRAL))
    _, assistant, result = style.fitted(checked_messages(CONVERSATION))
    assert assistant["tool_calls"][0]["id"] == result["tool_call_id"]
    assert len(result["tool_call_id"]) == 9


@pytest.mark.parametrize("form", ["hermes", "pythonic", "llama3_json", "mistral"])
def test_a_template_without_words_for_calls_gets_them_as_text(form: str) -> None:
    messages = checked_messages(
        [
            *CONVERSATION,
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "wind"}]},
            {"role": "user", "content": "Thanks"},
            {"role": "user", "content": "Bye"},
        ]
    )
    plain = plain_messages(messages, TOOL_FORMATS[form])
    assert [message["role"] for message in plain] == ["user", "assistant", "user", "user"]
    read = ReplyFormat(tool_format=TOOL_FORMATS[form], tools={"get_weather": {"city": {}}}).parse(plain[1]["content"])
    assert [(tool.name, tool.arguments) for tool in read.tool_calls] == [("get_weather", '{"city": "Paris"}')]
    assert plain[2]["content"] == (
        "<tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response>\nThanks"
    )
    assert plain[3] == {"role": "user", "content": "Bye"}


def test_strict_turns_stay_turns() -> None:
    plain = plain_messages(checked_messages(CONVERSATION), TOOL_FORMATS["pythonic"])
    rendered = ChatTemplate(templates.TURNS).render(plain)
    assert "[get_weather(city='Paris')]" in rendered


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("messages", "system", "expected"),
    [
        ([("user", "hi")], True, [("system", None), ("user", "hi")]),
        ([("system", "be"), ("user", "hi")], True, [("system", "be\n\n{}"), ("user", "hi")]),
        ([("user", "hi")], False, [("user", "{}\n\nhi")]),
        ([("assistant", "x"), ("user", "hi")], False, [("assistant", "x"), ("user", "{}\n\nhi")]),
    ],
)
def test_a_template_without_words_for_tools_gets_them_as_text(
    messages: list[tuple[str, str]], system: bool, expected: list[tuple[str, str | None]]
) -> None:
    form = TOOL_FORMATS["hermes"]
    told = told_of_tools([{"role": role, "content": text} for role, text in messages], TOOLS, form, system=system)
    text = next(message["content"] for message in told if "<tool_call>" in message["content"])
    assert json.dumps(TOOLS[0]["function"]) in text
    for message, (role, content) in zip(told, expected, strict=True):
        assert message["role"] == role
        before, _, after = (content or "{}").partition("{}")
        assert message["content"].startswith(before)
        assert message["content"].endswith(after)


def test_a_template_that_hangs_on_calls_is_not_tried_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Any] = []

    def nothing(*args: Any, **variables: Any) -> str:
        rendered.append(args)
        return ""

    monkeypatch.setattr("shoal.chat.messages._PROBE_SECONDS", 0.0)
    monkeypatch.setattr("shoal.chat.messages._rendered", nothing)
    assert TemplateStyle.of(ChatTemplate(templates.QWEN)) == TemplateStyle()
    assert len(rendered) == 2
