"""A job on an LLM that only echoes: one record a row, bounded memory, interruption, failures kept apart."""

from __future__ import annotations

import io
import json
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from shoal.errors import RequestError
from shoal.jobs.job import Job, check_strictly, derived_seed
from shoal.jobs.progress import JobCounts
from shoal.jobs.records import RecordWriter
from shoal.jobs.rows import LineReader
from shoal.jobs.source import Source
from tests.jobs.fake import FakeLLM


def row(custom_id: str, prompt: str, **fields: Any) -> bytes:
    body = {"prompt": prompt, **fields}
    record = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(record).encode() + b"\n"


class Done:
    """What a job left behind."""

    def __init__(self, counts: JobCounts, folder: Path) -> None:
        self.counts = counts
        self.results = records(folder / "results")
        self.errors = records(folder / "errors")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_bytes().splitlines()] if path.exists() else []


def run(
    llm: FakeLLM, data: bytes | BinaryIO, folder: Path, report: Callable[[JobCounts], None] = lambda counts: None
) -> Done:
    source = source_of(io.BytesIO(data) if isinstance(data, bytes) else data)
    with RecordWriter(folder / "results") as results, RecordWriter(folder / "errors") as errors:
        counts = Job(llm.as_llm, ["tiny"], results, errors).run(source, report)
    return Done(counts, folder)


def source_of(stream: BinaryIO) -> Source:
    return Source(None, LineReader(stream), lambda: 0)


def test_each_row_becomes_one_record(tmp_path: Path) -> None:
    data = b"".join(
        (
            row("one", "abc", max_tokens=3),
            row("two", "de", max_tokens=1),
            row("three", "long"),
            b"not json\n",
            row("one", "again"),
            row("four", "broken"),
        )
    )
    done = run(FakeLLM(), data, tmp_path)
    assert {record["custom_id"]: record["response"]["body"]["choices"][0]["text"] for record in done.results} == {
        "one": "ABC",
        "two": "DE",
    }
    assert [record["error"] for record in done.results] == [None, None]
    assert [(record["custom_id"], _status(record)) for record in done.errors] == [
        ("three", 400),
        (None, 400),
        ("one", 400),
        ("four", "server_error"),
    ]
    counts = done.counts
    assert (counts.rows_read, counts.done, counts.failed) == (6, 2, 4)
    assert (counts.prompt_tokens, counts.generated_tokens) == (6, 5)
    assert not counts.interrupted


def _status(record: dict[str, Any]) -> Any:
    response, error = record["response"], record["error"]
    return response["status_code"] if error is None else error["code"]


def test_records_have_the_shape_of_a_batch(tmp_path: Path) -> None:
    done = run(FakeLLM(), row("a", "x") + row("b", "long") + row("c", "broken"), tmp_path)
    good, (refused, broken) = done.results[0], done.errors
    for record in (good, refused, broken):
        assert record.keys() == {"id", "custom_id", "response", "error"}
        assert record["id"].startswith("batch_req_")
    assert good["response"].keys() == {"status_code", "request_id", "body"}
    assert good["response"]["body"]["object"] == "text_completion"
    assert refused["response"]["body"]["error"] == {
        "message": "the prompt has 9 tokens; max_model_len is 8",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": 400,
        "line": 2,
    }
    assert broken["response"] is None
    assert broken["error"] == {"code": "server_error", "message": "NaN logits"}
    assert len({record["id"] for record in (good, refused, broken)}) == 3


def test_no_row_fails_no_error_file(tmp_path: Path) -> None:
    run(FakeLLM(), row("a", "x"), tmp_path)
    assert not (tmp_path / "errors").exists()


def test_rows_are_held_up_to_one_and_a_half_times_the_engine(tmp_path: Path) -> None:
    llm = FakeLLM(max_num_seqs=4)
    done = run(llm, b"".join(row(str(i), "x", max_tokens=1 + i % 5) for i in range(100)), tmp_path)
    assert llm.most_running == 6
    assert done.counts.done == 100


def test_a_row_is_read_only_when_there_is_room(tmp_path: Path) -> None:
    stream = io.BytesIO(b"".join(row(f"{i:02}", "x", max_tokens=5) for i in range(50)))
    places: list[int] = []
    run(FakeLLM(max_num_seqs=2, on_step=lambda: places.append(stream.tell())), stream, tmp_path)
    size = len(row("00", "x", max_tokens=5))
    assert places[0] == 3 * size
    assert all(place % size == 0 for place in places)


def test_seeds_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [row("a", "x"), row("b", "y"), row("c", "z", seed=5)]
    seeds = []
    for order in (rows, rows[::-1]):
        llm = FakeLLM(seed=7)
        run(llm, b"".join(order), tmp_path)
        seeds.append({text: params.seed for text, params in llm.submitted.items()})
    assert seeds[0] == seeds[1] == {"x": derived_seed(7, "a"), "y": derived_seed(7, "b"), "z": 5}
    assert len({derived_seed(seed, name) for seed in range(50) for name in "abcd"}) == 200


def test_the_model_in_an_answer_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    done = run(FakeLLM(), row("a", "x", model="tiny") + row("b", "y"), tmp_path)
    assert {record["response"]["body"]["model"] for record in done.results} == {"tiny"}


def test_results_are_in_the_file_as_soon_as_they_are_finished(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def look(counts: JobCounts) -> None:
        data = (tmp_path / "results").read_bytes() if (tmp_path / "results").exists() else b""
        assert data == b"" or data.endswith(b"\n")
        seen.append((data.count(b"\n"), counts.done))

    run(FakeLLM(max_num_seqs=1), b"".join(row(str(i), "x") for i in range(5)), tmp_path, look)
    assert all(written == done for written, done in seen)
    assert seen[-1] == (5, 5)


def test_ctrl_c_ends_the_job_after_the_step_and_keeps_what_is_finished(tmp_path: Path) -> None:
    steps: list[int] = []

    def interrupt_third() -> None:
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    llm = FakeLLM(max_num_seqs=2, on_step=interrupt_third)
    done = run(llm, b"".join(row(str(i), "x", max_tokens=1 if i < 8 else 99) for i in range(20)), tmp_path)
    assert done.counts.interrupted
    assert len(steps) == 3
    assert [record["custom_id"] for record in done.results] == [str(i) for i in range(8)]
    assert llm.aborted == ["9"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path: Path) -> None:
    reached: list[str] = []

    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append("between")
        signal.raise_signal(signal.SIGINT)
        reached.append("after")

    done = run(FakeLLM(on_step=interrupt_twice), row("a", "x"), tmp_path)
    assert done.counts.interrupted
    assert reached == ["between"]


def test_ctrl_c_is_heard_while_input_is_awaited(tmp_path: Path) -> None:
    class Waiting(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the wait went on")

    assert run(FakeLLM(), Waiting(), tmp_path).counts.interrupted


def test_an_error_of_the_engine_ends_the_job_and_leaves_nothing_running(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    llm = FakeLLM(on_step=fail)
    with pytest.raises(RuntimeError, match="boom"):
        run(llm, row("a", "x"), tmp_path)
    assert llm.aborted == ["1"]


class Endless(io.RawIOBase):
    """A file of ``count`` lines that are made when they are read."""

    def __init__(self, count: int, make: Callable[[int], bytes]) -> None:
        self._lines = (make(i) for i in range(count))

    def readline(self, size: int | None = -1, /) -> bytes:
        return next(self._lines, b"")


@pytest.mark.parametrize("prompt", ["long", "x"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, prompt: str) -> None:
    """30 MB pass through, of rows that are refused and of rows that are answered; a custom_id costs about 100 bytes."""
    count, padding = 6000, "x" * 5000
    llm = FakeLLM(remember=False)
    stream = Endless(count, lambda i: row(str(i), prompt + padding, max_tokens=1))
    tracemalloc.start()
    try:
        with RecordWriter(tmp_path / "results") as results, RecordWriter(tmp_path / "errors") as errors:
            job = Job(llm.as_llm, ["tiny"], results, errors)
            counts = job.run(source_of(cast(BinaryIO, stream)), lambda counts: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts.rows_read == counts.done + counts.failed == count
    assert peak < 3e6


def test_a_strict_check_counts_the_bad_lines_and_quotes_the_first() -> None:
    check_strictly(source_of(io.BytesIO(row("a", "x") + row("b", "y"))), ["tiny"])
    data = row("a", "x") + b"\n{}\n" + row("a", "y") + row("c", "z", n=2)
    with pytest.raises(RequestError, match=r"3 bad lines, nothing was run; line 3: custom_id: must be a text"):
        check_strictly(source_of(io.BytesIO(data)), ["tiny"])
