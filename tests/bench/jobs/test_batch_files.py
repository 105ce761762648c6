"""Batch files for benchmarks: as long as they should be, and rows that a job takes."""

from __future__ import annotations

from pathlib import Path

from shoal.bench.jobs.batch_files import RandomTexts, write_batch
from shoal.jobs.input.rows import Row, RowReader
from shoal.jobs.input.source import open_source


def rows(path: Path) -> list[Row]:
    reader = RowReader(())
    with open_source(path) as lines:
        found = [reader.read(line) for line in lines]
    assert all(isinstance(row, Row) for row in found)
    return [row for row in found if isinstance(row, Row)]


def test_texts_have_so_many_tokens_and_depend_on_the_seed(tiny: Path) -> None:
    texts, again, other = (RandomTexts(tiny, seed) for seed in (1, 1, 2))
    found = [texts.text(tokens) for tokens in (1, 30, 30)]
    assert [len(text) for text in found] == [1, 30, 30]  # a token a byte
    assert found[1] != found[2]
    assert [again.text(tokens) for tokens in (1, 30, 30)] == found
    assert other.text(30) != found[1]


def test_completions_have_prompts_of_their_own(tiny: Path, tmp_path: Path) -> None:
    found = rows(write_batch(tmp_path / "in.jsonl", RandomTexts(tiny).completions(5, prompt_len=20, output_len=7)))
    assert [row.custom_id for row in found] == list("01234")
    assert len({str(row.call.prompt) for row in found}) == 5
    assert {(row.call.kind, row.call.params.max_tokens, row.call.params.ignore_eos) for row in found} == {
        ("completion", 7, True)
    }


def test_chats_share_a_system_prompt_alone(tiny: Path, tmp_path: Path) -> None:
    found = rows(write_batch(tmp_path / "in.jsonl", RandomTexts(tiny).chats(4, 60, question_len=20, output_len=3)))
    conversations = [row.call.prompt["messages"] for row in found if isinstance(row.call.prompt, dict)]
    systems, questions = ([turn[i]["content"] for turn in conversations] for i in (0, 1))
    assert [turn["role"] for turn in conversations[0]] == ["system", "user"]
    assert (len(conversations), len(set(systems)), len(set(questions))) == (4, 1, 4)
    assert (len(systems[0]), len(questions[0])) == (60, 20)
