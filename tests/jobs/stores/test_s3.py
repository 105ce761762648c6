"""Object storage as a job sees it: names that are taken once, a whole job, status and cancel, stores that will not do."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from shoal import jobs
from shoal.cli.main import main
from shoal.errors import JobError
from shoal.jobs.durable.lease import LEASE, Lease, holder
from shoal.jobs.durable.numbered import TakenOverError
from shoal.jobs.durable.parts import PartLedger
from shoal.jobs.durable.store import AlreadyThereError, ObjectStore, check_creates, open_store
from tests.jobs.stores.s3 import S3

pytestmark = pytest.mark.usefixtures("_at_s3")

ENGINE: dict[str, Any] = {"device": "reference", "max_num_seqs": 4, "show_progress": False}


@pytest.fixture
def url(s3: S3) -> str:
    s3.gate.disarm()
    return s3.new_folder()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"prompt": f"row {i}", "max_tokens": 1 + i % 5, "ignore_eos": True} for i in range(12)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"prompt": "x" * 500}]))
    return path


def test_a_name_is_taken_once(url: str) -> None:
    store = open_store(url)
    store.create("journal/1", b"one")
    store.create("journal/1", b"one")
    with pytest.raises(AlreadyThereError):
        store.create("journal/1", b"two")
    assert store.list("journal") == {"journal/1": 3}
    assert store.list("nowhere") == {}
    store.copy("journal/1", "copy")
    store.delete("journal/1")
    store.delete("journal/1")
    assert not store.exists("journal/1")
    assert store.read("copy") == b"one"
    for ask in (store.read, store.modified, lambda name: store.copy(name, "copy")):
        with pytest.raises(FileNotFoundError):
            ask("absent")


def test_of_two_that_take_a_name_at_once_one_gets_it(url: str) -> None:
    taken: list[bytes] = []

    def take(data: bytes) -> None:
        try:
            open_store(url).create("journal/1", data)
            taken.append(data)
        except AlreadyThereError:
            pass

    threads = [threading.Thread(target=take, args=(b"%d" % number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [open_store(url).read("journal/1")] == taken


def test_a_store_that_overwrites_is_refused_by_name(s3: S3, url: str, model: Path, source: Path) -> None:
    s3.gate.overwrites = True
    try:
        with pytest.raises(
            JobError, match=rf"^{url[:-1]}: cannot hold a job: it lets two processes take the same name"
        ):
            jobs.run(model, source, url, **ENGINE)
    finally:
        s3.gate.overwrites = False
    assert check_creates(open_store(url)) > 0


def test_a_commit_is_five_requests(s3: S3, url: str) -> None:
    with PartLedger.open(open_store(url), "job") as ledger:
        ledger.add(1, b"one", failed=False)
        s3.gate.disarm()
        ledger.commit()
    methods = [method for method, _ in s3.gate.requests]
    assert methods == ["PUT", "PUT", "HEAD", "PUT", "DELETE"]


def test_the_loser_of_a_journal_object_stops(url: str) -> None:
    first = PartLedger.open(open_store(url), "job")
    first.add(1, b"of the first", failed=False)
    with PartLedger.open(open_store(url), "job") as second:
        with pytest.raises(TakenOverError):
            first.commit()
        second.add(1, b"one", failed=False)
        second.commit()
    store = open_store(url)
    assert [store.read(name) for name in store.list("results")] == [b"one\n"]
    assert store.list("_shoal/staged") == {}


def test_a_lease_tells_by_the_clock_of_the_store(url: str) -> None:
    store = open_store(url)
    with Lease(store):
        assert holder(store) is not None
        with pytest.raises(JobError, match="is working on this job"), Lease(open_store(url)):
            pass
    assert not store.exists(LEASE)


def test_a_job_runs_is_looked_at_and_retried(model: Path, source: Path, url: str) -> None:
    summary = jobs.run(model, source, url, **ENGINE)
    assert (summary.state, summary.done, summary.failed) == ("finished", 12, 1)
    store = open_store(url)
    found = json.loads(store.read("manifest.json"))
    lines = [line for part in found["results"] for line in store.read(part["name"]).splitlines()]
    assert {json.loads(line)["custom_id"] for line in lines} == {f"row-{number}" for number in range(1, 13)}
    status = jobs.status(url)
    assert (status.state, status.done, status.failed, status.pid) == ("finished", 12, 1, None)
    assert jobs.run(model, source, url, **ENGINE) == summary
    with pytest.raises(JobError, match="this job is finished already"):
        jobs.cancel(url)
    with pytest.raises(JobError, match="belongs to another job"):
        jobs.run(model, source, url, seed=1, **ENGINE)
    assert jobs.run(model, source, url, retry_errors=True, **ENGINE).retried == 1


def test_the_command_line_takes_urls(model: Path, source: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "reference", "--max-num-seqs", "4"]
    assert main(["run-batch", str(model), "-i", str(source), "-o", url, *flags]) == 0
    assert f"failures are in {url}errors/" in capsys.readouterr().err
    assert main(["job", "status", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    assert main(["job", "cancel", url]) == 2
    assert "this job is finished already" in capsys.readouterr().err


def test_a_bucket_that_is_not_there_is_said(model: Path, source: Path) -> None:
    with pytest.raises(JobError, match=r"^s3://nosuchbucket/out/: .*bucket does not exist"):
        jobs.run(model, source, "s3://nosuchbucket/out/", **ENGINE)
    with pytest.raises(JobError, match="there is no job"):
        jobs.status("s3://nosuchbucket/out/")


def test_a_server_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, model: Path, source: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("shoal.jobs.durable.store._PAUSES", ())
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with pytest.raises(JobError, match=r"^s3://jobs/out/: EndpointConnectionError: Could not connect to"):
        jobs.run(model, source, "s3://jobs/out/", **ENGINE)
    assert isinstance(open_store("s3://jobs/out"), ObjectStore)
