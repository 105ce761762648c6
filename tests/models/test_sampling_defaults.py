"""What a model's file recommends for chats, and who gets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import GGUFError
from shoal.gguf.reader import GGUFFile
from shoal.jobs.input.rows import Line, Row, RowReader
from shoal.llm import LLM
from shoal.models.sampling_defaults import missing, sampling_defaults
from shoal.params import SamplingParams
from tests.support.tiny_model import write_tiny_model

KEYS = {
    "temp": 0.7,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.05,
    "penalty_repeat": 1.05,
    "penalty_last_n": 64,
    "mirostat_tau": 4.0,
    "sequence": "top_k;temperature",
}
FOUND = {
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
    "repeat_last_n": 64,
    "mirostat_tau": 4.0,
    "samplers": ("top_k", "temperature"),
}


def write(folder: Path, **keys: Any) -> Path:
    return write_tiny_model(
        folder / "tiny.gguf", keys={f"general.sampling.{key}": value for key, value in keys.items()}
    )


def found(path: Path) -> dict[str, Any]:
    with GGUFFile.open(path) as file:
        return sampling_defaults(file)


def test_keys_of_the_file(tmp_path: Path) -> None:
    assert found(write(tmp_path, **KEYS)) == FOUND
    assert found(write(tmp_path)) == {}
    assert found(write(tmp_path, temp=1)) == {"temperature": 1.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", "hot"), ("top_p", 1.5), ("top_k", 0.5), ("top_k", True), ("sequence", "top_k;infill"), ("temp", -1.0)],
)
def test_values_that_are_wrong(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(GGUFError, match=rf"general\.sampling\.{key}"):
        found(write(tmp_path, **{key: value}))


def test_what_a_request_gives_counts() -> None:
    assert missing(FOUND, ["top_k"]) == {name: value for name, value in FOUND.items() if name != "top_k"}
    assert "repetition_penalty" not in missing(FOUND, ["repeat_penalty"])


def test_chats_that_say_nothing_get_them(tmp_path: Path) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    with LLM(write(tmp_path, temp=0.0), device="reference") as llm:
        assert llm.chat_defaults == {"temperature": 0.0}
        prompt = llm.encode({"messages": conversation})
        greedy = llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0), use_tqdm=False)[0]

        def submitted(prompt: Any, params: SamplingParams | None) -> list[int]:
            llm.submit(prompt, params)
            outputs = []
            while llm.has_work:
                outputs += llm.step()
            return outputs[-1].outputs[0].token_ids

        expected = greedy.outputs[0].token_ids
        assert llm.chat(conversation, use_tqdm=False)[0].outputs[0].token_ids == expected
        assert submitted({"messages": conversation}, None) == expected
        other = SamplingParams(seed=1)
        assert llm.chat(conversation, other, use_tqdm=False)[0].outputs[0].token_ids != expected
        assert submitted({"messages": conversation}, other) != expected
        assert submitted({"prompt_token_ids": prompt}, None) != expected


def test_rows_of_a_job() -> None:
    reader = RowReader([], {"top_k": 5}, chat_defaults={"temperature": 0.5, "top_k": 40, "repetition_penalty": 1.1})

    def params(url: str, **body: Any) -> SamplingParams:
        line = {"custom_id": "a", "method": "POST", "url": url, "body": body}
        row = reader.read(Line(1, json.dumps(line).encode()))
        assert isinstance(row, Row)
        return row.call.params

    chat: dict[str, Any] = {"url": "/v1/chat/completions", "messages": [{"role": "user", "content": "Hi"}]}
    assert params(**chat) == SamplingParams(max_tokens=None, temperature=0.5, top_k=5, repetition_penalty=1.1)
    given = params(**chat, temperature=0.9, repeat_penalty=1.5)
    assert given == SamplingParams(max_tokens=None, temperature=0.9, top_k=5, repetition_penalty=1.5)
    assert params("/v1/completions", prompt="Hi") == SamplingParams(top_k=5)
