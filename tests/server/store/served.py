"""Batches on a small random model, for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.llm import LLM
from shoal.server.store.batches import OVER, Batch
from shoal.server.store.runner import BatchRunner, Served
from shoal.server.store.store import Store

ENDPOINT = "/v1/completions"


def served(llm: LLM) -> Served:
    """The runner's thread computes the steps itself."""
    return Served(llm, llm, ("tiny",))


def rows(count: int, **body: Any) -> bytes:
    """Completions called row-0 and so on."""
    bodies = [{"prompt": f"text {i}", "max_tokens": 3, "ignore_eos": True, **body} for i in range(count)]
    return b"".join(row(f"row-{i}", body) for i, body in enumerate(bodies))


def row(name: str, body: dict[str, Any]) -> bytes:
    """A line of a batch file."""
    return json.dumps({"custom_id": name, "method": "POST", "url": ENDPOINT, "body": body}).encode() + b"\n"


def submit(store: Store, runner: BatchRunner, data: bytes, owner: str = "me") -> Batch:
    """A batch of the rows in ``data``."""
    upload = store.files.upload(owner)
    try:
        upload.write(data)
        file = upload.finish("in.jsonl", "batch")
    finally:
        upload.close()
    return runner.create(owner, file.id, ENDPOINT, None)


def wait(store: Store, batch: Batch, until: Callable[[Batch], bool] = lambda batch: batch.status in OVER) -> Batch:
    """The batch once it is over, or what ``until`` says."""
    pause = threading.Event()
    while not until(found := store.batches.stored(batch.id).batch):
        pause.wait(0.01)
    return found


def records(store: Store, batch: Batch, owner: str = "me") -> dict[str, Any]:
    """What became of each row, ids and times aside; each has one record."""
    found: dict[str, Any] = {}
    for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
        for line in store.files.path(owner, file_id).read_bytes().splitlines():
            record = json.loads(line)
            assert record["custom_id"] not in found
            found[record["custom_id"]] = told(record)
    return found


def told(record: dict[str, Any]) -> Any:
    """What a record says."""
    if record["response"] is None:
        return record["error"]["code"]
    body = record["response"]["body"]
    return body["error"]["param"] if "error" in body else body["choices"][0]["text"]


def leftovers(folder: Path) -> set[str]:
    """What the folders of batches hold."""
    return {path.name for path in folder.glob("batches/*/*")}
