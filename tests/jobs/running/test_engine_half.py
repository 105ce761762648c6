"""The half of a job that computes, by itself: lines in, records out, and nothing kept of what is dropped."""

from __future__ import annotations

import json

from shoal.jobs.input.rows import Line, RowReader
from shoal.jobs.running.engine_half import Finished, LocalHalf, Steps
from tests.jobs.fake import FakeLLM


def half_of(llm: FakeLLM) -> LocalHalf:
    return LocalHalf(llm.as_llm, RowReader(["tiny"]), ["tiny"])


def line(number: int, prompt: str = "x", max_tokens: int = 2) -> Line:
    return Line(number, json.dumps({"prompt": prompt, "max_tokens": max_tokens}).encode())


def test_has_room_for_half_as_many_rows_again_as_can_run() -> None:
    half = half_of(FakeLLM(max_num_seqs=4))
    number = 0
    while half.has_room:
        number += 1
        assert half.submit(line(number)) is None
    assert number == 6


def test_a_row_that_is_wrong_comes_back_at_once() -> None:
    half = half_of(FakeLLM())
    bad = [half.submit(line(1, "long")), half.submit(Line(2, b"no json"))]
    assert [(found.row, found.failed, tuple(found.usage)) for found in bad if found] == [
        (1, True, (0, 0, 0)),
        (2, True, (0, 0, 0)),
    ]
    assert half.has_room


def test_rows_end_with_records_and_steps_are_counted_once() -> None:
    half = half_of(FakeLLM(max_num_seqs=2))
    for number in (1, 2, 3):
        half.submit(line(number, f"text {number}", max_tokens=number))
    assert ended(half.step()) == {1: "TEXT 1"}
    assert half.steps() == Steps(run=1, full=1, rows=2)
    assert ended(half.step()) == {2: "TEXT 2"}
    assert half.steps()[:1] == (1,)
    assert half.steps() == Steps()


def ended(rows: list[Finished]) -> dict[int, str]:
    assert not any(row.failed for row in rows)
    return {row.row: json.loads(row.line)["response"]["body"]["choices"][0]["text"] for row in rows}


def test_what_is_dropped_leaves_the_engine() -> None:
    llm = FakeLLM()
    half = half_of(llm)
    half.submit(line(1))
    half.submit(line(2))
    half.abort()
    assert llm.aborted == ["1", "2"]
    assert half.step() == []


def test_steps_add_up() -> None:
    assert Steps.total([Steps(1, 2, 3, 4, 5), Steps(10, 20, 30, 40, 50)]) == Steps(11, 22, 33, 44, 55)
