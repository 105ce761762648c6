"""What the prefix cache gains: it is used on one side alone, and a difference in what is answered is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal import jobs
from shoal.bench.jobs.batch_files import RandomTexts, write_batch
from shoal.bench.jobs.prefix import PrefixGain, PrefixRound, contents, measure_prefix
from shoal.errors import EngineError


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    return write_batch(tmp_path / "in.jsonl", RandomTexts(tiny).chats(4, 60, question_len=8, output_len=2))


def measure(model: Path, source: Path, rounds: int = 1) -> PrefixGain:
    return measure_prefix(model, source, source.parent, rounds, lambda line: None, device="reference", max_num_seqs=2)


def test_one_side_uses_the_cache_from_empty(tiny: Path, source: Path) -> None:
    found = measure(tiny, source, rounds=2)
    assert (found.rows, found.generated_tokens) == (4, 8)
    for turn in found.rounds:
        assert min(turn.cache, turn.without) > 0
        assert 0 < turn.cached_tokens < found.prompt_tokens * 3 / 4  # the first row found nothing
    used = {
        cache: [
            json.loads(line)["response"]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"]
            for line in (source.parent / f"{number}-{cache}.jsonl").read_text().splitlines()
        ]
        for number, cache in ((1, True), (2, False))
    }
    assert any(used[True])
    assert not any(used[False])


def record(custom_id: str, text: str, *, created: int = 1, cached: int = 0) -> dict[str, Any]:
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": cached}}
    body = {"id": f"chatcmpl-{created}", "created": created, "choices": [{"index": 0, "text": text}], "usage": usage}
    response = {"status_code": 200, "request_id": f"req_{created}", "body": body}
    return {"id": f"batch_req_{created}", "custom_id": custom_id, "response": response, "error": None}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(f"{json.dumps(item)}\n" for item in records))
    return path


def test_contents_are_what_does_not_change_from_run_to_run(tmp_path: Path) -> None:
    one = write(tmp_path / "one", record("a", "x"), record("b", "y"))
    same = write(tmp_path / "same", record("b", "y", created=2, cached=8), record("a", "x", created=2))
    other = write(tmp_path / "other", record("a", "x"), record("b", "z"))
    assert contents(one) == contents(same) != contents(other)
    assert contents(one)["a"]["response"]["body"]["usage"]["prompt_tokens"] == 9


def test_another_answer_is_an_error(tiny: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = jobs.run

    def other_without_cache(model: Path, source: Path, output: Path, **keywords: Any) -> jobs.Summary:
        return run(model, source, output, **keywords, seed=1 if keywords.get("enable_prefix_caching") is False else 0)

    monkeypatch.setattr(jobs, "run", other_without_cache)
    with pytest.raises(EngineError, match=r"row '\d': the prefix cache changes its answer"):
        measure(tiny, source)


def test_a_row_that_fails_is_no_measurement(tiny: Path, source: Path) -> None:
    write_batch(source, [{"prompt": "x", "no_such_field": 1}])
    with pytest.raises(EngineError, match="the job ended finished, and 1 of its rows failed"):
        measure(tiny, source)


def test_the_report() -> None:
    rounds = [PrefixRound(5.0, 20.0, 90_000), PrefixRound(4.0, 24.0, 91_000), PrefixRound(6.0, 21.0, 90_000)]
    gain = PrefixGain(200, 106_000, 3_200, rounds)
    lines = gain.as_markdown().splitlines()
    assert lines[0] == "**Shared prefix**: 200 rows, 106000 prompt and 3200 generated tokens"
    assert lines[4:6] == ["| with the prefix cache | 5.00 (4.00-6.00) |", "| without | 21.00 (20.00-24.00) |"]
    assert lines[-1] == (
        "4.20 (3.50-6.00) times as fast; 90000 (90000-91000) cached tokens; equal contents in all rounds."
    )
    found = json.loads(json.dumps(gain.as_json()))
    assert found["ratio"] == pytest.approx(4.2)
    assert found["rounds"][1]["cached_tokens"] == 91_000
