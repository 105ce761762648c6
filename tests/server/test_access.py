"""Request ids, and what the log says of a request."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.server.access import Access, JSONLines, configure_logging


async def _answer(request: Request) -> Response:
    request.state.tokens = {"prompt": 3, "completion": 4}
    request.state.owner = "somebody"
    return JSONResponse(request.state.request_id)


def _client(app: ASGIApp | None = None) -> TestClient:
    return TestClient(Access(app or Starlette(routes=[Route("/a", _answer, methods=["GET", "POST"])])))


@pytest.mark.parametrize("given", ["abc", "550e8400-e29b-41d4-a716-446655440000", "a.b_c:1", "x" * 64])
def test_an_id_that_is_short_and_plain_is_kept(given: str) -> None:
    response = _client().get("/a", headers={"X-Request-Id": given})
    assert response.headers["x-request-id"] == response.json() == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", '"a"', "<script>", "\u00fc".encode()])
def test_another_id_is_replaced(given: str) -> None:
    response = _client().get("/a", headers={"X-Request-Id": given})
    assert response.headers["x-request-id"] == response.json() != given
    assert len(response.json()) == 32


def test_two_requests_have_two_ids() -> None:
    client = _client()
    assert client.get("/a").json() != client.get("/a").json()
    assert client.get("/nowhere").headers["x-request-id"]


def _logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == "shoal.access"]


def test_a_line_for_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shoal.access")
    client = _client()
    client.post("/a?token=secret", headers={"X-Request-Id": "1"}, content=b"my prompt")
    client.get("/" + "a" * 1000, headers={"X-Request-Id": "2"})
    first, second = _logged(caplog)
    assert 0 <= first.pop("seconds") < 60
    expected = {"id": "1", "method": "POST", "path": "/a", "status": 200, "owner": "somebody"}
    assert first == expected | {"tokens": {"prompt": 3, "completion": 4}}
    assert (second["id"], second["status"], len(second["path"])) == ("2", 404, 200)


@pytest.mark.parametrize("problem", [ClientDisconnect(), ConnectionResetError()])
def test_a_client_that_left_is_no_fault(problem: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise problem

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        pytest.fail("nothing is to be sent")

    caplog.set_level(logging.INFO)
    scope = {"type": "http", "path": "/a", "method": "GET", "headers": []}
    asyncio.run(Access(app)(scope, receive, send))
    assert [line["status"] for line in _logged(caplog)] == [499]
    assert all(record.name != "shoal.server" for record in caplog.records)


def test_a_fault_without_an_answer_is_500(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raise KeyError("a secret")

    response = _client(app).get("/a", headers={"X-Request-Id": "1"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "1")
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "a request failed" in caplog.text


def test_lines_are_json_whatever_is_in_them() -> None:
    record = logging.LogRecord("shoal.server", logging.ERROR, "", 0, "two\nlines %s", ('"quoted"',), None)
    record.fields = {"id": "1\n2"}
    line = JSONLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found == {"level": "error", "logger": "shoal.server", "message": 'two\nlines "quoted"', "id": "1\n2"}
    try:
        raise KeyError("why")
    except KeyError:
        record.exc_info = sys.exc_info()
    assert "KeyError: 'why'" in json.loads(JSONLines().format(record))["exception"]


@pytest.mark.parametrize("access_log", [True, False])
def test_the_log_goes_to_stderr(
    access_log: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    loggers = [logging.getLogger(name) for name in ("root", "shoal.access", "uvicorn.error")]
    levels = [logger.level for logger in loggers]
    try:
        configure_logging(access_log=access_log)
        logging.getLogger("shoal.access").info("request", extra={"fields": {"id": "1"}})
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        logging.getLogger("shoal.server").warning("beware")
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [json.loads(line)["message"] for line in printed.err.splitlines()]
    assert lines == ["request", "beware"] if access_log else ["beware"]
