"""Rows of a batch file that ask for a form: answers have it, and what cannot be enforced is that row's error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal import jobs
from tests.constrain.walks import validate
from tests.support.tiny_model import write_tiny_model

SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["id", "ok"],
    "additionalProperties": False,
}
BAD = {"type": "array", "uniqueItems": True}


def row(name: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": name}], "max_completion_tokens": 100, **fields}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_rows_ask_for_forms_of_their_own(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf", context=256)
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}
    rows = [
        row("schema", response_format=wanted),
        row("vllm", structured_outputs={"choice": ["red", "green"]}),
        row("llama.cpp", grammar='root ::= [0-9] ":" [0-9]'),
        row("free", max_completion_tokens=5),
        row("bad", response_format={"type": "json_schema", "json_schema": {"schema": BAD}}),
        row("old", guided_choice=["a"]),
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps(item)}\n" for item in rows))
    jobs.run(model, source, output, show_progress=False, device="reference", max_num_seqs=4)
    records = {item["custom_id"]: item["response"]["body"] for item in map(json.loads, output.read_text().splitlines())}
    choices = {name: body["choices"][0] for name, body in records.items()}
    assert {name: choice["finish_reason"] for name, choice in choices.items() if name != "free"} == dict.fromkeys(
        ("schema", "vllm", "llama.cpp"), "stop"
    )
    validate(choices["schema"]["message"]["content"], SCHEMA)
    assert choices["vllm"]["message"]["content"] in ("red", "green")
    assert choices["llama.cpp"]["message"]["content"][1] == ":"
    failures = {
        item["custom_id"]: item["response"]
        for item in map(json.loads, (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines())
    }
    assert {name: response["status_code"] for name, response in failures.items()} == {"bad": 400, "old": 400}
    assert failures["bad"]["body"]["error"]["param"] == "response_format"
    assert "uniqueItems at #" in failures["bad"]["body"]["error"]["message"]
    assert "structured_outputs.choice" in failures["old"]["body"]["error"]["message"]
