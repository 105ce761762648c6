"""A job on an LLM that only echoes: one record a row, bounded memory, interruption, failures kept apart."""

from __future__ import annotations

import io
import itertools
import json
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from shoal.errors import EngineError, JobError
from shoal.jobs.durable.ledger import Ledger, RowSet, StreamLedger, Totals
from shoal.jobs.input.rows import LineReader, RowReader
from shoal.jobs.running.engine_half import LocalHalf, derived_seed
from shoal.jobs.running.job import AnyLedger, Job, JobLimits, Report, Rows
from shoal.jobs.running.progress import JobProgress
from tests.jobs.fake import FakeLLM


def row(custom_id: str, prompt: str, **fields: Any) -> bytes:
    body = {"prompt": prompt, **fields}
    record = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(record).encode() + b"\n"


class Done:
    """What a job left behind."""

    def __init__(self, state: str, totals: Totals, folder: Path) -> None:
        self.state = state
        self.totals = totals
        self.results = records(folder / "results")
        self.errors = records(folder / "errors")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_bytes().splitlines()] if path.exists() else []


def rows_of(data: bytes | BinaryIO, finished: RowSet) -> Rows:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    return (line for line in LineReader(stream) if line.number not in finished)


def job_of(llm: FakeLLM, ledger: AnyLedger, limits: JobLimits | None = None, timeout: float | None = None) -> Job:
    reader = RowReader(["tiny"])
    return Job(LocalHalf(llm.as_llm, reader, ["tiny"], timeout), reader, ledger, limits)


def run(
    llm: FakeLLM,
    data: bytes | BinaryIO,
    folder: Path,
    report: Report = lambda progress: None,
    limits: JobLimits | None = None,
    timeout: float | None = None,
) -> Done:
    """Run a job, or go on with it."""
    with Ledger.open(folder / "journal", folder / "results", folder / "errors") as ledger:
        state = job_of(llm, ledger, limits, timeout).run(rows_of(data, ledger.finished), None, report)
        return Done(state, ledger.totals, folder)


def test_each_row_becomes_one_record(tmp_path: Path) -> None:
    data = b"".join(
        (
            row("one", "abc", max_tokens=3),
            row("two", "de", max_tokens=1),
            row("three", "long"),
            b"not json\n",
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
        ("four", "server_error"),
    ]
    totals = done.totals
    assert (done.state, totals.done, totals.failed) == ("finished", 2, 3)
    assert (totals.prompt_tokens, totals.generated_tokens) == (6, 5)


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
        "code": None,
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
    assert done.totals.done == 100


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
    for name, order in {"one": rows, "other": rows[::-1]}.items():
        llm = FakeLLM(seed=7)
        run(llm, b"".join(order), _folder(tmp_path, name))
        seeds.append({text: params.seed for text, params in llm.submitted.items()})
    assert seeds[0] == seeds[1] == {"x": derived_seed(7, "a"), "y": derived_seed(7, "b"), "z": 5}
    assert len({derived_seed(seed, name) for seed in range(50) for name in "abcd"}) == 200


def test_the_model_in_an_answer_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    done = run(FakeLLM(), row("a", "x", model="tiny") + row("b", "y"), tmp_path)
    assert {record["response"]["body"]["model"] for record in done.results} == {"tiny"}


def test_what_is_reported_as_done_is_in_the_file(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def look(progress: JobProgress) -> None:
        data = (tmp_path / "results").read_bytes()
        assert data == b"" or data.endswith(b"\n")
        seen.append((data.count(b"\n"), progress.totals.done))

    clock = itertools.count(step=0.4).__next__  # a commit is due after every few rows
    with Ledger.open(tmp_path / "journal", tmp_path / "results", tmp_path / "errors", clock=clock) as ledger:
        rows = rows_of(b"".join(row(str(i), "x") for i in range(50)), ledger.finished)
        assert job_of(FakeLLM(max_num_seqs=1), ledger).run(rows, None, look) == "finished"
    assert all(written == done for written, done in seen)
    assert len({done for _, done in seen}) > 3
    assert len(records(tmp_path / "results")) == 50


def test_ctrl_c_ends_the_job_after_the_step_and_keeps_what_is_finished(tmp_path: Path) -> None:
    steps: list[int] = []

    def interrupt_third() -> None:
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    llm = FakeLLM(max_num_seqs=2, on_step=interrupt_third)
    done = run(llm, b"".join(row(str(i), "x", max_tokens=1 if i < 8 else 99) for i in range(20)), tmp_path)
    assert done.state == "interrupted"
    assert len(steps) == 3
    assert [record["custom_id"] for record in done.results] == [str(i) for i in range(6)]
    assert llm.aborted == ["7"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path: Path) -> None:
    reached: list[str] = []

    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append("between")
        signal.raise_signal(signal.SIGINT)
        reached.append("after")

    done = run(FakeLLM(on_step=interrupt_twice), row("a", "x"), tmp_path)
    assert done.state == "interrupted"
    assert reached == ["between"]


def test_ctrl_c_is_heard_while_input_is_awaited(tmp_path: Path) -> None:
    class Waiting(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the wait went on")

    assert run(FakeLLM(), Waiting(), tmp_path).state == "interrupted"


def test_sigterm_is_heard_as_ctrl_c_is(tmp_path: Path) -> None:
    llm = FakeLLM(on_step=lambda: signal.raise_signal(signal.SIGTERM))
    done = run(llm, row("a", "x", max_tokens=1) + row("b", "y", max_tokens=9), tmp_path)
    assert done.state == "interrupted"
    assert [record["custom_id"] for record in done.results] == ["a"]


def test_a_job_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    data = b"".join(row(str(i), "broken" if i % 7 == 3 else f"prompt {i}", max_tokens=1 + i % 4) for i in range(40))
    whole = run(FakeLLM(), data, _folder(tmp_path, "whole"))
    steps = iter(range(100))

    def interrupt() -> None:
        if next(steps) % 5 == 4:
            signal.raise_signal(signal.SIGINT)

    folder, states, asked = _folder(tmp_path, "parts"), [], []
    while "finished" not in states:
        llm = FakeLLM(on_step=interrupt)
        states.append((done := run(llm, data, folder)).state)
        asked.append(set(llm.submitted) - {"broken"})
    assert len(states) > 3
    assert _contents(done) == _contents(whole)
    finished_before: set[str] = set()
    for prompts in asked:  # a row is asked again only if it was not finished
        assert not prompts & finished_before
        finished_before |= {p for p in prompts if p not in set().union(*asked[asked.index(prompts) + 1 :])}
    assert (done.totals.done, done.totals.failed) == (whole.totals.done, whole.totals.failed)
    assert done.totals.generated_tokens == whole.totals.generated_tokens


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def _contents(done: Done) -> list[Any]:
    """Records without ids and times, by custom_id."""
    found = []
    for record in done.results + done.errors:
        body = record["response"]["body"] if record["response"] else record["error"]
        found.append((record["custom_id"], {k: v for k, v in body.items() if k not in ("id", "created")}))
    return sorted(found, key=lambda item: item[0])


def test_all_samples_of_a_row_are_in_its_record(tmp_path: Path) -> None:
    done = run(FakeLLM(), row("a", "xy", n=3), tmp_path)
    assert [choice["index"] for choice in done.results[0]["response"]["body"]["choices"]] == [0, 1, 2]
    assert done.totals.generated_tokens == 6


@pytest.mark.parametrize("n", [1, 3])
def test_a_row_that_takes_too_long_fails_as_that(tmp_path: Path, n: int) -> None:
    """Also where only one of its samples does."""
    data = row("a", "slow", max_tokens=50, n=n) + row("b", "x", max_tokens=50)
    done = run(FakeLLM(), data, tmp_path, timeout=2.5)
    assert [record["custom_id"] for record in done.results] == ["b"]
    (late,) = done.errors
    assert late["error"] == {"code": "request_timeout", "message": "the row was not finished within 2.5 s"}
    assert late["response"] is None


def test_too_many_failures_stop_the_job(tmp_path: Path) -> None:
    data = b"".join(row(str(i), "long" if i % 2 else "x") for i in range(60))
    done = run(FakeLLM(max_num_seqs=1), data, tmp_path, limits=JobLimits(max_errors=3))
    assert (done.state, done.totals.failed) == ("stopped", 4)
    again = run(FakeLLM(max_num_seqs=1), data, tmp_path, limits=JobLimits(max_errors=3))
    assert (again.state, again.totals.failed) == ("stopped", 4)
    assert run(FakeLLM(), data, tmp_path).state == "finished"
    assert run(FakeLLM(), data, _folder(tmp_path, "all"), limits=JobLimits(max_errors=30)).state == "finished"


@pytest.mark.parametrize(
    ("limits", "state", "code"),
    [
        (JobLimits(deadline=0.0), "expired", "batch_expired"),
        (JobLimits(cancelled=lambda: True), "cancelled", "batch_cancelled"),
    ],
)
def test_what_is_not_finished_when_the_job_ends_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: JobLimits, state: str, code: str
) -> None:
    data = b"".join(row(str(i), "x", max_tokens=1 if i < 4 else 99) for i in range(20)) + b"not json\n"
    now = [0.0]
    monkeypatch.setattr("shoal.jobs.running.job._SECONDS_BETWEEN_LOOKS", 5.0)
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def wait() -> None:
        now[0] += 1.0

    llm = FakeLLM(max_num_seqs=4, on_step=wait)
    with Ledger.open(tmp_path / "journal", tmp_path / "results", tmp_path / "errors") as ledger:
        job = job_of(llm, ledger, limits)
        job._next_look = 5.0  # a few steps are done before the first look
        assert job.run(rows_of(data, ledger.finished), None, lambda progress: None) == state
        assert (ledger.totals.done, ledger.totals.failed) == (4, 17)
    codes = [_status(record) for record in records(tmp_path / "errors")]
    assert sorted(map(str, codes)) == sorted(["400"] + [code] * 16)
    assert set(llm.aborted) == {str(number) for number in range(5, 11)}


def test_a_broken_engine_ends_the_job_and_fails_no_row(tmp_path: Path) -> None:
    llm = FakeLLM()
    data = b"".join(row(str(i), "broken" if i > 1 else "x") for i in range(6))

    def break_down() -> None:
        llm.broken = "RuntimeError: out of order" if llm.submitted.keys() >= {"broken"} else None

    llm._on_step = break_down
    with pytest.raises(EngineError, match="out of order"):
        run(llm, data, tmp_path)
    assert not (tmp_path / "errors").exists()
    assert run(FakeLLM(), data, tmp_path).totals.failed == 4


def test_what_is_finished_outlives_an_input_that_breaks(tmp_path: Path) -> None:
    def rows() -> Rows:
        yield from LineReader(io.BytesIO(b"".join(row(str(i), "x", max_tokens=1) for i in range(20))))
        raise JobError("s3://in/b.jsonl: is gone")

    with Ledger.open(tmp_path / "journal", tmp_path / "results", tmp_path / "errors") as ledger:
        with pytest.raises(JobError, match="is gone"):
            job_of(FakeLLM(max_num_seqs=2), ledger).run(rows(), None, lambda progress: None)
        assert ledger.totals.done > 10
    assert len(records(tmp_path / "results")) == ledger.totals.done


def test_an_exception_leaves_nothing_running(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    llm = FakeLLM(on_step=fail)
    with pytest.raises(RuntimeError, match="boom"):
        run(llm, row("a", "x"), tmp_path)
    assert llm.aborted == ["1"]


def test_steps_are_counted_as_full_while_there_are_rows_enough(tmp_path: Path) -> None:
    totals = run(FakeLLM(max_num_seqs=4), b"".join(row(str(i), "x", max_tokens=5) for i in range(8)), tmp_path).totals
    assert (totals.steps, totals.full_steps, totals.row_steps) == (10, 10, 40)
    lonely = run(FakeLLM(max_num_seqs=4), row("a", "x", max_tokens=5), _folder(tmp_path, "lonely")).totals
    assert (lonely.steps, lonely.full_steps, lonely.row_steps) == (5, 0, 5)


def test_guesses_of_other_work_before_are_not_the_jobs(tmp_path: Path) -> None:
    llm = FakeLLM()

    def guess() -> None:
        llm.drafts = (llm.drafts[0] + 3, llm.drafts[1] + 2)

    llm._on_step = guess
    totals = run(llm, row("a", "x", max_tokens=5), tmp_path).totals
    assert (totals.draft_tokens, totals.accepted_tokens) == (15, 10)


class Endless(io.RawIOBase):
    """A file of ``count`` lines that are made when they are read."""

    def __init__(self, count: int, make: Callable[[int], bytes]) -> None:
        self._lines = (make(i) for i in range(count))

    def readline(self, size: int | None = -1, /) -> bytes:
        return next(self._lines, b"")


@pytest.mark.parametrize("prompt", ["long", "x"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, prompt: str) -> None:
    """10 MB pass through, of rows that are refused and of rows that are answered."""
    count, padding = 2000, "x" * 5000
    llm = FakeLLM(remember=False)
    stream = cast(BinaryIO, Endless(count, lambda i: row(str(i), prompt + padding, max_tokens=1)))
    tracemalloc.start()
    try:
        with StreamLedger.open(tmp_path / "results", tmp_path / "errors") as ledger:
            job_of(llm, ledger).run(rows_of(stream, ledger.finished), None, lambda progress: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ledger.totals.done + ledger.totals.failed == count
    assert peak < 1e6


def test_a_job_that_is_interrupted_from_outside_keeps_what_is_finished(tmp_path: Path) -> None:
    llm = FakeLLM(max_num_seqs=2)
    data = b"".join(row(f"r{i}", f"text {i}", max_tokens=1) for i in range(9))
    limits = JobLimits(interrupted=lambda: len(llm.submitted) == 5)
    done = run(llm, data, tmp_path, limits=limits)
    assert (done.state, done.totals.failed) == ("interrupted", 0)
    assert 0 < done.totals.done < 5
    assert {*llm.aborted} == {str(line) for line in range(done.totals.done + 1, 6)}
    done = run(FakeLLM(), data, tmp_path)
    assert (done.state, done.totals.done) == ("finished", 9)
