"""/v1/batches, as OpenAI's client uses it, and as nobody should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from shoal.llm import LLM
from shoal.server.store.runner import BatchRunner
from tests.server.store.served import rows, served
from tests.support.tiny_model import write_tiny_model

Clients = Callable[[], openai.OpenAI]
ENDPOINT = "/v1/completions"


def upload(client: openai.OpenAI, data: bytes) -> str:
    return client.files.create(file=("in.jsonl", data), purpose="batch").id


def create(client: openai.OpenAI, file_id: str, **fields: Any) -> Any:
    return client.batches.create(
        **{"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h", **fields}
    )


def wait(client: openai.OpenAI, batch_id: str) -> Any:
    while (batch := client.batches.retrieve(batch_id)).status in ("validating", "in_progress", "finalizing"):
        pass
    return batch


def test_the_clients_way(client: Clients, runner: BatchRunner, tmp_path: Path) -> None:
    mine, other = client(), client()
    batch = create(
        mine, upload(mine, rows(5) + rows(1, no_such_field=1).replace(b"row-0", b"odd")), metadata={"for": "tests"}
    )
    assert (batch.status, batch.object, batch.endpoint, batch.metadata) == (
        "validating",
        "batch",
        ENDPOINT,
        {"for": "tests"},
    )
    with LLM(write_tiny_model(tmp_path / "tiny.gguf", context=128), device="reference") as llm:
        runner.start(served(llm))
        done = wait(mine, batch.id)
        runner.stop()
    assert (done.status, done.errors) == ("completed", None)
    assert done.request_counts.to_dict() == {"total": 6, "completed": 5, "failed": 1}
    answers = [json.loads(line) for line in mine.files.content(done.output_file_id).text.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {f"row-{i}" for i in range(5)}
    assert {answer["response"]["status_code"] for answer in answers} == {200}
    error = json.loads(mine.files.content(done.error_file_id).text)
    assert (error["custom_id"], error["response"]["body"]["error"]["param"]) == ("odd", "no_such_field")
    assert {file.id for file in mine.files.list(purpose="batch_output")} == {done.output_file_id, done.error_file_id}
    with pytest.raises(openai.NotFoundError, match="No batch found"):
        other.batches.retrieve(batch.id)
    with pytest.raises(openai.NotFoundError):
        other.files.content(done.output_file_id)
    with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"):
        mine.batches.cancel(batch.id)


def test_batches_are_listed_and_cancelled(client: Clients) -> None:
    mine, other = client(), client()
    file = upload(mine, rows(1))
    made = [create(mine, file).id for _ in range(5)]
    assert [batch.id for batch in mine.batches.list(limit=2)] == made[::-1]
    assert [batch.id for batch in mine.batches.list(after=made[1])] == made[:1]
    assert list(other.batches.list()) == []
    assert mine.batches.cancel(made[0]).status == "cancelling"
    with pytest.raises(openai.NotFoundError):
        other.batches.cancel(made[1])
    with pytest.raises(openai.BadRequestError, match="there is no file"):
        create(other, file)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-../../x"}, "input_file_id"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": [1]}, "metadata"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
        ({"endpont": "x"}, "endpont"),
    ],
)
def test_wrong_fields_are_named(web: TestClient, change: dict[str, Any], param: str) -> None:
    body = {"input_file_id": "file-x", "endpoint": ENDPOINT, "completion_window": "24h", **change}
    answer = web.post("/v1/batches", content=json.dumps(body), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_object(web: TestClient, body: bytes) -> None:
    answer = web.post("/v1/batches", content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert answer.status_code == 400


@pytest.mark.parametrize("kind", ["text/plain", "", "multipart/form-data; boundary=application/json"])
def test_only_json_makes_a_batch(web: TestClient, kind: str) -> None:
    assert web.post("/v1/batches", content=b"{}", headers={"content-type": kind}).status_code == 415


@pytest.mark.parametrize("query", ["limit=101", "after=file-x", "order=x", "purpose=batch"])
def test_wrong_queries(web: TestClient, query: str) -> None:
    assert web.get(f"/v1/batches?{query}").status_code == 400
