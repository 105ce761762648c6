"""Batches worked off on a small random model: to every end there is, and on from wherever a process was stopped."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from shoal.errors import EngineError
from shoal.llm import LLM, RequestOutput
from shoal.openai.schema import APIError
from shoal.params import SamplingParams
from shoal.server.store.batches import Batch, BatchStore, RequestCounts
from shoal.server.store.files import FileStore
from shoal.server.store.runner import BatchRunner, Served
from shoal.server.store.store import Store
from tests.server.store.served import leftovers, records, row, rows, served, submit, wait
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=128)
    with LLM(path, device="reference", max_num_seqs=4) as llm:
        yield llm


@pytest.fixture(autouse=True)
def all_rows_are_committed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.jobs.durable.ledger._SHORTEST_INTERVAL", 0.0)
    monkeypatch.setattr("shoal.jobs.durable.ledger._INTERVAL_PER_COST", 0)


@contextmanager
def working(folder: Path, on: Served | None = None) -> Iterator[tuple[Store, BatchRunner]]:
    """A process that serves from ``folder``; its batches do not move without an engine to be ``on``."""
    store = Store(folder)
    runner = BatchRunner(store, pause=0.0)
    if on is not None:
        runner.start(on)
    try:
        yield store, runner
    finally:
        runner.stop()
        store.close()


class Watched:
    """A session that calls ``each`` before every step."""

    def __init__(self, llm: LLM, each: Callable[[], None]) -> None:
        self._llm, self._each = llm, each

    def __getattr__(self, name: str) -> object:
        return getattr(self._llm, name)

    def step(self) -> list[RequestOutput]:
        self._each()
        return self._llm.step()


def watched(llm: LLM, each: Callable[[], None]) -> Served:
    return Served(llm, Watched(llm, each), ("tiny",))  # type: ignore[arg-type]


def assert_true(value: bool) -> None:
    assert value


def never() -> None:
    raise AssertionError("nothing is to be computed")


BAD = row("long", {"prompt": "x" * 500}) + row("odd", {"prompt": "x", "no_such_field": 1})


def test_a_batch_is_completed(llm: LLM, tmp_path: Path) -> None:
    with working(tmp_path, served(llm)) as (store, runner):
        batch = submit(store, runner, rows(9) + BAD)
        store.files.delete("me", batch.input_file_id)  # it has its own
        done = wait(store, batch)
        found = records(store, done)
        assert store.files.get("me", str(done.output_file_id)).filename == f"{batch.id}_output.jsonl"
        with pytest.raises(APIError, match="No such File"):
            store.files.get("you", str(done.output_file_id))
    assert (done.status, done.errors) == ("completed", None)
    assert done.request_counts == RequestCounts(11, 9, 2)
    assert found.pop("long") == "prompt"
    assert found.pop("odd") == "no_such_field"
    assert found.keys() == {f"row-{i}" for i in range(9)}
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    assert leftovers(tmp_path) == {"batch.json"}
    assert (llm.stats().running, llm.stats().waiting) == (0, 0)


def test_answers_are_those_of_the_model_alone(llm: LLM, tmp_path: Path) -> None:
    with working(tmp_path, served(llm)) as (store, runner):
        found = records(store, wait(store, submit(store, runner, rows(5, temperature=0))))
    prompts = [f"text {i}" for i in range(5)]
    alone = llm.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True, temperature=0), use_tqdm=False)
    assert found == {f"row-{i}": output.outputs[0].text for i, output in enumerate(alone)}


def test_one_whose_rows_all_fail_is_completed(llm: LLM, tmp_path: Path) -> None:
    with working(tmp_path, served(llm)) as (store, runner):
        done = wait(store, submit(store, runner, BAD))
        assert (done.status, done.output_file_id) == ("completed", None)
        assert records(store, done) == {"long": "prompt", "odd": "no_such_field"}
    assert done.request_counts == RequestCounts(2, 0, 2)


def test_what_is_no_batch_file_fails(llm: LLM, tmp_path: Path) -> None:
    with working(tmp_path, served(llm)) as (store, runner):
        done = wait(store, submit(store, runner, rows(2) + b"nonsense\n" + rows(1)))
    assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert done.errors is not None
    assert [(error.code, error.line) for error in done.errors.data] == [
        ("invalid_json_line", 3),
        ("duplicate_custom_id", 4),
    ]
    assert leftovers(tmp_path) == {"batch.json"}


def test_batches_run_in_the_order_in_which_they_came_and_are_checked_at_once(llm: LLM, tmp_path: Path) -> None:
    go_on = threading.Event()
    with working(tmp_path, watched(llm, lambda: assert_true(go_on.wait(60)))) as (store, runner):
        first, second, bad = (submit(store, runner, data) for data in (rows(3), rows(2), b"nonsense\n"))
        assert wait(store, bad).status == "failed"
        assert wait(store, second, lambda batch: batch.status != "validating").status == "in_progress"
        assert [batch.id for batch in runner.unfinished()] == [first.id, second.id]
        cancelled = runner.cancel("me", second.id)
        assert cancelled.status == "cancelling"
        done = wait(store, second)
        assert set(records(store, done).values()) == {"batch_cancelled"}
        assert (done.status, done.request_counts) == ("cancelled", RequestCounts(2, 0, 2))
        go_on.set()
        assert wait(store, first).status == "completed"


def test_one_that_runs_is_cancelled_and_keeps_what_is_finished(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.jobs.running.job._SECONDS_BETWEEN_LOOKS", 0.0)
    batches: list[Batch] = []

    def cancel_in_the_middle() -> None:
        counts = store.batches.stored(batches[0].id).batch.request_counts
        if counts.completed >= 4:
            runner.cancel("me", batches[0].id)

    ready = threading.Event()

    def each() -> None:
        ready.wait()
        cancel_in_the_middle()

    with working(tmp_path, watched(llm, each)) as (store, runner):
        batches.append(submit(store, runner, rows(40)))
        ready.set()
        done = wait(store, batches[0])
        found = records(store, done)
        with pytest.raises(APIError, match="Cannot cancel a batch with status 'cancelled'") as caught:
            runner.cancel("me", done.id)
    assert caught.value.status == 409
    assert done.status == "cancelled"
    assert len(found) == 40
    codes = [answer for answer in found.values() if answer == "batch_cancelled"]
    assert done.request_counts == RequestCounts(40, 40 - len(codes), len(codes))
    assert 4 <= 40 - len(codes) < 40
    assert (llm.stats().running, llm.stats().waiting) == (0, 0)


def test_one_that_is_cancelled_before_it_was_checked_has_no_records(llm: LLM, tmp_path: Path) -> None:
    with working(tmp_path) as (store, runner):
        batch = submit(store, runner, rows(3))
        assert runner.cancel("me", batch.id).status == runner.cancel("me", batch.id).status == "cancelling"
    with working(tmp_path, watched(llm, never)) as (store, _):
        done = wait(store, batch)
    assert (done.status, done.output_file_id, done.error_file_id) == ("cancelled", None, None)


def test_one_whose_time_is_up_expires(llm: LLM, tmp_path: Path) -> None:
    with working(tmp_path) as (store, runner):
        batch = submit(store, runner, rows(3))
        stored = store.batches.stored(batch.id)
        early = msgspec.structs.replace(batch, created_at=0, expires_at=86400)
        path = store.batches.folder(batch.id) / "batch.json"
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(stored, batch=early)))
    with working(tmp_path, watched(llm, never)) as (store, _):
        done = wait(store, batch)
        assert records(store, done) == {f"row-{i}": "batch_expired" for i in range(3)}
    assert (done.status, done.output_file_id) == ("expired", None)
    assert done.expired_at is not None


def test_a_server_that_stops_goes_on_at_its_next_start(llm: LLM, tmp_path: Path) -> None:
    with working(tmp_path / "whole", served(llm)) as (store, runner):
        whole = records(store, wait(store, submit(store, runner, rows(30, temperature=0.8) + BAD)))
    with working(tmp_path / "parts") as (store, runner):
        batch = submit(store, runner, rows(30, temperature=0.8) + BAD)
    seen = []
    for most in itertools.count(5, 8):
        with working(tmp_path / "parts", served(llm)) as (store, _):
            wait(store, batch, lambda found, most=most: found.request_counts.completed >= most or found.output_file_id)  # type: ignore[misc]
        done = store.batches.stored(batch.id).batch
        assert (llm.stats().running, llm.stats().waiting) == (0, 0)
        seen.append(done.request_counts.completed)
        if done.status == "completed":
            break
        assert done.status == "in_progress"
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert records(store, done) == whole


@pytest.mark.parametrize("at", ["conclude", "adopt", "move", "tidy"])
def test_an_end_that_is_cut_short_is_brought_about_again(
    llm: LLM, tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before or after each thing that is done when all rows are through."""
    kind = FileStore if at == "adopt" else BatchStore
    real, died = getattr(kind, at), threading.Event()

    def die(self: object, *arguments: object, **keywords: object) -> object:
        if at == "move" and arguments[1] != "completed":
            return real(self, *arguments, **keywords)
        if died.is_set():
            raise EngineError("the process is dead")
        died.set()
        real(self, *arguments, **keywords)
        raise EngineError("the process is dead")

    with monkeypatch.context() as patch:
        patch.setattr(kind, at, die)
        with working(tmp_path, served(llm)) as (store, runner):
            batch = submit(store, runner, rows(4) + BAD)
            died.wait()
    with working(tmp_path, served(llm)) as (store, _):
        done = wait(store, batch)
        assert len(records(store, done)) == 6
        assert len(store.files._files) == 3
    assert done.request_counts == RequestCounts(6, 4, 2)
    with working(tmp_path):
        assert leftovers(tmp_path) == {"batch.json"}


def test_another_model_does_not_go_on_with_it(llm: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with working(folder) as (store, runner):
        batch = submit(store, runner, rows(30))
    with working(folder, served(llm)) as (store, _):
        wait(store, batch, lambda found: found.request_counts.completed >= 3)
    output = next(folder.glob("batches/*/output.jsonl"))
    with output.open("ab") as file:
        file.write(b'{"half a li')
    path = write_tiny_model(tmp_path / "other.gguf", seed=1, context=128)
    with LLM(path, device="reference", max_num_seqs=4) as other, working(folder, served(other)) as (store, _):
        done = wait(store, batch)
        found = records(store, done)
    assert done.status == "failed"
    assert done.errors is not None
    message = done.errors.data[0].message
    assert message.startswith("the server is not what it was when the batch was begun: model.blake2b: was")
    assert str(tmp_path) not in message
    assert 3 <= len(found) == done.request_counts.completed < 30


def test_an_engine_that_fails_is_waited_for(llm: LLM, tmp_path: Path) -> None:
    failures = iter([True, True])

    def each() -> None:
        if next(failures, False):
            raise EngineError("out of order")

    with working(tmp_path, watched(llm, each)) as (store, runner):
        done = wait(store, submit(store, runner, rows(6)))
    assert (done.status, done.request_counts) == ("completed", RequestCounts(6, 6, 0))


def test_rows_run_beneath_other_requests(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = llm.submit

    def submitting(*arguments: object, priority: int, **keywords: object) -> str:
        asked.append(priority)
        return real(*arguments, priority=priority, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(llm, "submit", submitting)
    data = b"".join(row(f"p{n}", {"prompt": "x", "max_tokens": 1, "priority": n}) for n in (0, 5, -5, -(10**9), 10**9))
    with working(tmp_path, served(llm)) as (store, runner):
        assert wait(store, submit(store, runner, data)).request_counts.completed == 5
    assert asked == [1000, 1005, 995, 1, 1999]


def test_only_batch_files_are_inputs_of_ones_own(llm: LLM, tmp_path: Path) -> None:
    with working(tmp_path, served(llm)) as (store, runner):
        done = wait(store, submit(store, runner, rows(1)))
        output = str(done.output_file_id)
        with pytest.raises(APIError, match="has the purpose 'batch_output'"):
            runner.create("me", output, "/v1/completions", None)
        for owner, file_id in (("you", done.input_file_id), ("me", "file-x")):
            with pytest.raises(APIError, match="there is no file") as caught:
                runner.create(owner, file_id, "/v1/completions", None)
            assert (caught.value.status, caught.value.param) == (400, "input_file_id")


def test_embeddings_are_rows_too(llm: LLM, tmp_path: Path) -> None:
    data = b"".join(
        row(f"e{i}", {"input": ["a", "b"]}).replace(b"/v1/completions", b"/v1/embeddings") for i in range(3)
    )
    with working(tmp_path, served(llm)) as (store, runner):
        upload = store.files.upload("me")
        upload.write(data)
        file = upload.finish("in.jsonl", "batch")
        upload.close()
        done = wait(store, runner.create("me", file.id, "/v1/embeddings", None))
        assert done.request_counts == RequestCounts(3, 3, 0)
        lines = store.files.path("me", str(done.output_file_id)).read_bytes().splitlines()
    assert len(msgspec.json.decode(lines[0])["response"]["body"]["data"]) == 2
