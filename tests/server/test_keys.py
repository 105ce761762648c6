"""API keys: where they come from, whom they let in, and that none is ever shown."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from shoal.errors import ParameterError
from shoal.openai.schema import APIError
from shoal.server.front import Front, behind
from shoal.server.keys import Keys, read_keys


async def _owner(request: Request) -> Response:
    return JSONResponse(request.state.owner)


def _client(keys: tuple[str, ...], **front: Any) -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", _owner, methods=["GET", "POST"])])
    return TestClient(behind(Front(keys=Keys(keys), **front), app))


def test_without_keys_everybody_may_ask() -> None:
    assert _client(()).get("/v1/models", headers={"Authorization": "Bearer whatever"}).json() == ""


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer key-1"}, {"Authorization": "bearer  key-1"}, {"x-api-key": "key-1"}],
)
def test_a_key_lets_in_and_names_its_owner(headers: dict[str, str]) -> None:
    client = _client(("key-0", "key-1"))
    owner = client.get("/v1/models", headers=headers).json()
    assert len(owner) == 16
    assert "key" not in owner
    assert owner == client.post("/v1/files", headers={"x-api-key": "key-1"}).json()
    assert owner == _client(("key-1", "another")).get("/v1/batches", headers={"x-api-key": "key-1"}).json()
    assert owner != client.get("/v1/models", headers={"x-api-key": "key-0"}).json()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer key-2"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic key-1"},
        {"Authorization": "key-1"},
        {"Authorization": "Bearer KEY-1"},
        {"Authorization": "Bearer key-10"},
        {"Authorization": "Bearer key-"},
        {"x-api-key": ""},
        {"x-api-key": b"\xff\xfe"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/slots", "/pages", "/healthy", "/live/x", "/openapi.json"])
def test_without_a_valid_key_401(headers: dict[str, str], path: str) -> None:
    response = _client(("key-0", "key-1")).get(path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]
    assert "key-" not in response.text


def test_a_valid_key_counts_beside_a_wrong_one() -> None:
    headers = {"Authorization": "Bearer none", "x-api-key": "key-1"}
    assert _client(("key-1",)).get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/live", "/health", "/page/assets/app.js", "/page/assets/deep/er.css"])
def test_what_is_open_to_all(path: str) -> None:
    assert _client(("key-1",)).get(path).json() == ""


def test_the_error_body_is_that_of_the_path() -> None:
    def body(path: str, error: APIError) -> bytes:
        return json.dumps({"path": path, "kind": error.kind}).encode()

    response = _client(("key-1",), error_body=body).post("/v1/messages")
    assert response.json() == {"path": "/v1/messages", "kind": "authentication_error"}


def test_a_refused_body_is_not_read() -> None:
    response = _client(("key-1",), body_bytes=10).post("/v1/chat/completions", json={"a": "a" * 100})
    assert response.status_code == 401


def test_no_key_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="shoal")
    client = _client(("key-1",))
    for key in ("key-1", "key-2"):
        client.get("/v1/models?key=key-3", headers={"Authorization": f"Bearer {key}", "x-api-key": key})
    lines = [f"{record.getMessage()} {record.__dict__.get('fields')}" for record in caplog.records]
    assert len(lines) == 2
    assert "key-" not in "".join(lines)


# Where they come from ---------------------------------------------------------------------------------------------------


def test_keys_of_options_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfile-1\n\n  file-2  \r\n#file-3\n")
    assert read_keys(["a", "b", "a"], file, "c, d,,a") == ("a", "b", "file-1", "file-2", "c", "d")
    assert read_keys((), None, None) == read_keys((), None, "") == ()


@pytest.mark.parametrize("key", ["", "with space", "tab\t", "ümlaut", "a" * 513, "line\n"])
def test_what_is_no_key_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ParameterError, match="api_key") as caught:
        read_keys([key], None, None)
    assert key == "" or key not in str(caught.value)


def test_a_file_without_keys_would_leave_the_server_open(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    for path in (file, tmp_path / "absent", tmp_path):
        with pytest.raises(ParameterError, match="api_key_file"):
            read_keys((), path, None)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ParameterError, match="UTF-8"):
        read_keys((), file, None)
