"""Prompts of the benchmarks: random ids, and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.bench.workload import answers, fixed_length, random_ids, random_prompts, read_prompts
from shoal.errors import ParameterError, RequestError
from shoal.llm import LLM


def test_random_ids_fill_the_vocabulary_and_repeat() -> None:
    ids = random_ids(50, 40, 7, seed=3)
    assert [len(prompt) for prompt in ids] == [40] * 50
    assert {token for prompt in ids for token in prompt} == set(range(7))
    assert ids == random_ids(50, 40, 7, seed=3) != random_ids(50, 40, 7, seed=4)


def test_random_prompts_are_answered_to_the_full_length(llm: LLM) -> None:
    outputs = answers(llm, random_prompts(llm, 3, 5), fixed_length(6))
    assert [len(output.prompt_token_ids) for output in outputs] == [5, 5, 5]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [6, 6, 6]


def test_a_failed_request_is_no_measurement(llm: LLM) -> None:
    with pytest.raises(RequestError, match="request 1 of the benchmark failed"):
        answers(llm, ["good", {"prompt_token_ids": []}], fixed_length(2))


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two", "more": 1}\n{"prompt": "three"}\n')
    assert read_prompts(path, 2) == ["one", "two"]
    assert read_prompts(path, 9) == ["one", "two", "three"]


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', "[1]", '{"prompt": 3}', ""])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n' + line + "\n")
    with pytest.raises(ParameterError, match=r"prompts\.jsonl:2"):
        read_prompts(path, 9)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.touch()
    with pytest.raises(ParameterError, match="at least one prompt"):
        read_prompts(path, 9)
