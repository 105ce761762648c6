"""/v1/files, as OpenAI's client uses it, and as nobody should."""

from __future__ import annotations

import asyncio
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Message

from shoal.server.routes.upload import _MOST_FIELDS
from shoal.server.store.store import Store
from tests.server.routes.conftest import LIMIT

Clients = Callable[[], openai.OpenAI]
BOUNDARY = "multipart/form-data; boundary=b"


def part(name: str, content: bytes, extra: str = "") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (
        name.encode(),
        extra.encode(),
        content,
    )


PURPOSE = part("purpose", b"batch")
FILE = part("file", b"content", '; filename="in.jsonl"')
END = b"--b--\r\n"


def contents(folder: Path) -> list[Path]:
    return list((folder / "data" / "files").iterdir())


def test_the_clients_way(client: Clients) -> None:
    mine, other = client(), client()
    data = b'{"a": 1}\n' * 300_000
    file = mine.files.create(file=("ähm.jsonl", io.BytesIO(data)), purpose="batch")
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(data), "ähm.jsonl", "batch", "processed")
    assert mine.files.retrieve(file.id) == file
    assert mine.files.content(file.id).read() == data
    assert [found.id for found in mine.files.list()] == [file.id]
    assert list(other.files.list()) == []
    for call in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            call(file.id)
    assert mine.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        mine.files.retrieve(file.id)


def test_lists_come_in_pages(client: Clients) -> None:
    mine = client()
    made = [mine.files.create(file=(f"{i}.jsonl", b"x"), purpose="batch").id for i in range(5)]
    assert [file.id for file in mine.files.list(limit=2)] == made[::-1]  # the client asks for all pages
    assert [file.id for file in mine.files.list(limit=2, order="asc", after=made[1])] == made[2:]
    page = mine.files.list(limit=2, order="asc")
    assert ([file.id for file in page.data], page.has_more) == (made[:2], True)
    assert list(mine.files.list(purpose="batch_output")) == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=x", "limit"),
        ("limit=%C2%B2", "limit"),
        ("order=up", "order"),
        ("after=../x", "after"),
        ("lmit=3", "lmit"),
    ],
)
def test_wrong_queries(web: TestClient, query: str, param: str) -> None:
    answer = web.get(f"/v1/files?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("kind", "body", "status", "says"),
    [
        ("application/json", b"{}", 415, "multipart/form-data"),
        ("multipart/form-data", b"", 400, "boundary"),
        (f"multipart/form-data; boundary={'x' * 71}", b"", 400, "boundary"),
        (BOUNDARY, b"", 400, "ends before"),
        (BOUNDARY, PURPOSE + FILE, 400, "ends before"),
        (BOUNDARY, PURPOSE + FILE[:-5], 400, "ends before"),
        (BOUNDARY, b"hello", 400, "not a well-formed multipart body"),
        (BOUNDARY, FILE + END, 400, "purpose: this field is required"),
        (BOUNDARY, PURPOSE + END, 400, "file: this field is required"),
        (BOUNDARY, PURPOSE + FILE + FILE + END, 400, "more than one"),
        (BOUNDARY, part("purpose", b"vision") + FILE + END, 400, "must be 'batch'"),
        (BOUNDARY, PURPOSE + part("expires_after[seconds]", b"3600") + FILE + END, 400, "expires_after: not supported"),
        (BOUNDARY, PURPOSE + part("colour", b"red") + FILE + END, 400, "colour: no such field"),
        (BOUNDARY, b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n" + END, 400, "has no name"),
        (BOUNDARY, part("purpose", b"x" * (_MOST_FIELDS + 1)) + END, 413, "fields of the form"),
        (BOUNDARY, PURPOSE * 65 + END, 400, "more than 64 parts"),
        (BOUNDARY, PURPOSE + part("file", b"x" * (LIMIT + 1)) + END, 413, f"larger than {LIMIT} bytes"),
    ],
)
def test_wrong_uploads_leave_nothing(
    web: TestClient, tmp_path: Path, kind: str, body: bytes, status: int, says: str
) -> None:
    answer = web.post("/v1/files", content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]
    assert contents(tmp_path) == []


def test_parts_may_come_in_any_order_and_in_any_pieces(web: TestClient, store: Store) -> None:
    for body in (PURPOSE + FILE + END, FILE + PURPOSE + END):
        for size in (1, 7, 1000):
            pieces = (body[i : i + size] for i in range(0, len(body), size))
            answer = web.post("/v1/files", content=pieces, headers={"content-type": BOUNDARY})
            assert answer.status_code == 200, answer.text
            file = answer.json()
            assert (file["filename"], file["bytes"]) == ("in.jsonl", 7)
            assert store.files.path("", file["id"]).read_bytes() == b"content"


def test_an_upload_that_says_how_long_it_is_may_be_refused_at_once(web: TestClient) -> None:
    headers = {"content-type": BOUNDARY, "content-length": str(LIMIT * 10)}
    assert web.post("/v1/files", content=iter([b""]), headers=headers).status_code == 413


def test_one_that_does_not_say_so_is_refused_on_the_way(web: TestClient, tmp_path: Path) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield PURPOSE + part("file", b"")[:-2]
        while sent < 10 * LIMIT:
            sent += 1 << 16
            yield b"x" * (1 << 16)

    assert web.post("/v1/files", content=endless(), headers={"content-type": BOUNDARY}).status_code == 413
    assert contents(tmp_path) == []


def ask(app: Starlette, messages: list[Message]) -> dict[str, Any]:
    """Post what is in ``messages`` and then nothing; the answer."""
    got: list[Message] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("it waits for ever")

    async def send(message: Message) -> None:
        got.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/files",
        "query_string": b"",
        "headers": [(b"content-type", BOUNDARY.encode())],
    }
    asyncio.run(app(scope, receive, send))
    return {**json.loads(got[1]["body"]), "status": got[0]["status"]}


def chunk(data: bytes) -> Message:
    return {"type": "http.request", "body": data, "more_body": True}


def test_one_of_which_nothing_comes_is_given_up(app: Starlette, tmp_path: Path) -> None:
    answer = ask(app, [chunk(PURPOSE + FILE)])
    assert (answer["status"], answer["error"]["message"]) == (408, "no more of the upload came for 0.2 s")
    assert contents(tmp_path) == []


def test_a_client_that_goes_away_leaves_nothing(app: Starlette, tmp_path: Path) -> None:
    assert ask(app, [chunk(PURPOSE + FILE), {"type": "http.disconnect"}])["status"] == 400
    assert contents(tmp_path) == []


def test_a_file_is_never_whole_in_memory(app: Starlette, store: Store) -> None:
    store.files.max_file_size = size = 48 << 20
    pieces = [chunk(b"x" * (1 << 16)) for _ in range(size >> 16)]  # in memory before it is looked at
    head, tail = chunk(PURPOSE + part("file", b"")[:-2]), chunk(b"\r\n" + END)
    tail["more_body"] = False
    tracemalloc.start()
    try:
        answer = ask(app, [head, *pieces, tail])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (answer["status"], answer["bytes"]) == (200, size)
    assert peak < 16 << 20
