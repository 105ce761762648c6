"""What a journal costs: both sides run all rows, and what the commits take is seen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shoal.bench.jobs.batch_files import write_batch
from shoal.bench.jobs.journal import JournalCost, JournalRound, measure_journal
from shoal.errors import EngineError
from shoal.jobs.durable.ledger import Ledger
from shoal.llm import LLM


def bodies(*prompts: str) -> list[dict[str, object]]:
    return [{"prompt": prompt, "max_tokens": 3, "ignore_eos": True} for prompt in prompts]


def test_each_round_runs_all_rows_with_a_journal_and_without(llm: LLM, tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", bodies("one", "two", "three"))
    said: list[str] = []
    found = measure_journal(llm, source, tmp_path, 2, said.append)
    assert (found.rows, found.prompt_tokens, found.generated_tokens) == (3, 11, 9)
    for number, turn in enumerate(found.rounds, 1):
        ids = [json.loads(line)["custom_id"] for line in (tmp_path / f"{number}.jsonl").read_text().splitlines()]
        assert sorted(ids) == ["0", "1", "2"]
        with Ledger.open(*(tmp_path / f"{number}{suffix}" for suffix in (".shoal", ".jsonl", ".errors"))) as ledger:
            assert ledger.totals.done == 3
        assert 0 < turn.commit_seconds < turn.journal
        assert turn.without > 0
        assert turn.fsyncs >= 2 * turn.commits > 0
    assert [line.partition(":")[0] for line in said] == ["journal 1/2", "journal 2/2"]


def test_what_is_watched_is_let_go(llm: LLM, tmp_path: Path) -> None:
    fsync, commit = os.fsync, Ledger.commit
    measure_journal(llm, write_batch(tmp_path / "in.jsonl", bodies("one")), tmp_path, 1, lambda line: None)
    assert (os.fsync, Ledger.commit) == (fsync, commit)


def test_a_row_that_fails_is_no_measurement(llm: LLM, tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", bodies("one", "x" * 600))
    with pytest.raises(EngineError, match=r"the job ended finished, and 1 of its rows failed"):
        measure_journal(llm, source, tmp_path, 1, lambda line: None)


@pytest.fixture
def cost() -> JournalCost:
    rounds = [
        JournalRound(journal=10.1, without=10.0, commits=9, commit_seconds=0.101, fsyncs=28),
        JournalRound(journal=9.9, without=10.0, commits=9, commit_seconds=0.099, fsyncs=28),
        JournalRound(journal=10.2, without=10.0, commits=10, commit_seconds=0.204, fsyncs=30),
    ]
    return JournalCost(400, 12800, 6400, rounds)


def test_markdown_compares_both_sides(cost: JournalCost) -> None:
    lines = cost.as_markdown().splitlines()
    assert lines[0] == "**Journal**: 400 rows, 12800 prompt and 6400 generated tokens"
    assert lines[4:6] == [
        "| with a journal | 10.10 (9.90-10.20) | 634 (627-646) |",
        "| without | 10.00 (10.00-10.00) | 640 (640-640) |",
    ]
    assert lines[-1] == (
        "Overhead 1.00 (-1.00 to 2.00) %; commits 9 (9-10), fsyncs 28 (28-30); 0.101 (0.099-0.204) s in commits,"
        " 1.00 (1.00-2.00) %."
    )


def test_json_has_the_medians_that_matter(cost: JournalCost) -> None:
    found = json.loads(json.dumps(cost.as_json()))
    assert (found["overhead_percent"], found["commit_percent"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found["rounds"][2]["fsyncs"] == 30
