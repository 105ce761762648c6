"""Batch files whose rows have tools, thoughts and messages of all roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal import jobs
from shoal.errors import JobError
from tests.chat.templates import OPENED
from tests.support.tiny_model import write_tiny_model

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {**CITY, "additionalProperties": False}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLED = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
]


def run(model: Path, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """The answer or the error of each row, in their order."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps({"max_tokens": 60, "seed": 1, **row}) + "\n" for row in rows))
    jobs.run(model, source, output, device="reference", show_progress=False, **settings)
    files = [path for path in (output, folder / "out.jsonl.errors.jsonl") if path.exists()]
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return {line["custom_id"]: line["response"]["body"] for line in lines}


def test_rows_with_tools(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", context=2048)
    answers = run(
        model,
        tmp_path,
        [
            {"messages": [USER], "tools": [TOOL], "tool_choice": NAMED, "return_token_ids": True},
            {"messages": CALLED, "tools": [TOOL], "max_tokens": 3, "ignore_eos": True},
            {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            {"messages": [USER], "thinking_token_budget": 3},
        ],
    )
    choice = answers["row-1"]["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert (choice["message"]["content"], call["type"], call["function"]["name"]) == (None, "function", "weather")
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    assert len(choice["token_ids"]) <= answers["row-1"]["usage"]["completion_tokens"]
    assert "tool_calls" not in answers["row-2"]["choices"][0]["message"]
    assert answers["row-2"]["usage"]["completion_tokens"] == 3
    assert answers["row-3"]["error"]["param"] == "tool_choice"
    assert answers["row-4"]["error"]["param"] == "thinking_token_budget"


def test_rows_with_thoughts(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", template=OPENED)
    rows: list[dict[str, Any]] = [
        {"messages": [USER], "thinking_token_budget": 4, "response_format": {"type": "json_object"}},
        {"messages": [USER], "max_tokens": 5},
        {"messages": [USER], "max_tokens": 5, "include_reasoning": False},
    ]
    answers = run(model, tmp_path, rows)
    first, second, third = (answers[f"row-{number}"]["choices"][0]["message"] for number in (1, 2, 3))
    assert first["content"].startswith("{")
    assert first["reasoning"] == first["reasoning_content"]
    assert second["content"] is None
    assert second["reasoning"]
    assert third["content"] is None
    assert "reasoning" not in third


@pytest.mark.parametrize("changed", [{"reasoning_parser": "none"}, {"chat_template_kwargs": {"x": 1}}])
def test_a_job_goes_on_only_with_the_same_reading(tmp_path: Path, changed: dict[str, Any]) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", template=OPENED)
    run(model, tmp_path, [{"messages": [USER], "max_tokens": 2}])
    with pytest.raises(JobError, match=next(iter(changed))):
        run(model, tmp_path, [{"messages": [USER], "max_tokens": 2}], **changed)
