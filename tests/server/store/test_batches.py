"""Batches on the disk: what they may become, and that a restart finds them as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.openai.schema import APIError
from shoal.server.store.batches import Batch, BatchStore, Outcome, RequestCounts
from shoal.server.store.paging import PageQuery


def make(store: BatchStore, owner: str = "me") -> Batch:
    return store.create(owner, "file-1", "/v1/completions", {"a": "b"}, lambda folder: (folder / "x").touch())


def outcome(status: str) -> Outcome:
    return Outcome(status=status, output_file_id="file-2", error_file_id="file-3")  # type: ignore[arg-type]


def test_a_batch_is_found_again(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    batch = make(store)
    assert store.get("me", batch.id) == BatchStore(tmp_path).get("me", batch.id) == batch
    assert batch.expires_at - batch.created_at == 86400
    assert (batch.status, batch.metadata) == ("validating", {"a": "b"})
    assert make(BatchStore(tmp_path)).id > batch.id


def test_nobody_else_has_it(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    batch = make(store)
    with pytest.raises(APIError, match="No batch found") as caught:
        store.get("you", batch.id)
    assert caught.value.status == 404
    assert store.page("you", PageQuery(9)).data == []
    assert store.page("me", PageQuery(9)).data == [batch]
    with pytest.raises(APIError, match="not the id of a batch"):
        store.page("me", PageQuery(9, "../x"))


def test_a_batch_goes_its_way(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    name = make(store).id
    assert not store.move(name, "completed")
    assert store.move(name, "in_progress", request_counts=RequestCounts(3))
    assert not store.move(name, "in_progress")
    store.count(name, RequestCounts(3, 2, 1), durably=True)
    store.conclude(name, outcome("completed"))
    assert not store.move(name, "cancelling")
    store = BatchStore(tmp_path)
    assert store.get("me", name).status == "finalizing"
    assert store.unfinished()[0].outcome == outcome("completed")
    assert store.move(name, "completed", output_file_id="file-2")
    done = BatchStore(tmp_path).get("me", name)
    assert (done.status, done.output_file_id, done.request_counts) == ("completed", "file-2", RequestCounts(3, 2, 1))
    assert None not in (done.in_progress_at, done.finalizing_at, done.completed_at)
    assert (done.cancelling_at, done.failed_at) == (None, None)
    assert store.unfinished() == []


def test_one_that_is_to_be_cancelled_ends_as_that(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    name = make(store).id
    store.move(name, "in_progress")
    assert store.move(name, "cancelling")
    assert store.conclude(name, outcome("completed")).outcome == outcome("cancelled")
    assert not store.move(name, "completed")
    assert store.move(name, "cancelled")
    assert not store.move(name, "cancelling")


def test_one_whose_end_is_settled_is_not_cancelled(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    name = make(store).id
    store.move(name, "in_progress")
    store.conclude(name, outcome("expired"))
    assert not store.move(name, "cancelling")
    assert store.move(name, "expired")


def test_one_that_could_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no")

    store = BatchStore(tmp_path)
    with pytest.raises(OSError, match="no"):
        store.create("me", "file-1", "/v1/completions", None, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_leaves_is_removed(tmp_path: Path) -> None:
    store = BatchStore(tmp_path)
    over, running = make(store), make(store)
    store.move(over.id, "cancelling")
    store.move(over.id, "cancelled")
    half = tmp_path / ("batch_" + "0" * 28)
    half.mkdir()
    store = BatchStore(tmp_path)
    assert not half.exists()
    assert [path.name for path in store.folder(over.id).iterdir()] == ["batch.json"]
    assert (store.folder(running.id) / "x").exists()
