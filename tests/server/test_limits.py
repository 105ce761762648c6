"""Hosts, origins, types, sizes and JSON that are refused, and those that pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from shoal.errors import ParameterError
from shoal.openai.schema import APIError
from shoal.server.errors import error_response, openai_body
from shoal.server.front import Front, behind
from shoal.server.limits import JSON_DEPTH, allowed_hosts, decode_json
from tests.server.live import Client, echo, get, live, post


async def _seen(request: Request) -> Response:
    body = await request.body()
    return JSONResponse({"size": len(body)})


async def _upload(request: Request) -> Response:
    size = 0
    async for piece in request.stream():
        size += len(piece)
    return JSONResponse({"size": size})


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(error, openai_body("", error))


def _client(front: Front | None = None) -> TestClient:
    routes = [
        Route("/", _seen, methods=["GET", "POST"]),
        Route("/v1/files", _upload, methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={APIError: _refused})
    front = front or Front(hosts=allowed_hosts("127.0.0.1", ()), uploads={"/v1/files": 1000}, body_bytes=100)
    return TestClient(behind(front, app), base_url="http://localhost:8000")


def _error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return dict(error)


# Hosts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_a_server_on_loopback_answers_to_its_names(host: str) -> None:
    assert _client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "127.0.0.1.nip.io"]
)
def test_another_host_is_421_by_name(host: str) -> None:
    error = _error(_client().get("/", headers={"Host": host}), 421)
    assert host.removesuffix(":8000") in error["message"]
    assert "--allowed-host" in error["message"]


@pytest.mark.parametrize("host", ["", "a b", "localhost:port", "user@localhost", "localhost/", "[::1", "::1"])
def test_a_host_that_is_none_is_400(host: str) -> None:
    assert "Host" in _error(_client().get("/", headers={"Host": host}), 400)["message"]


def test_no_host_or_two_are_400() -> None:
    with live(behind(Front(hosts=allowed_hosts("127.0.0.1", ())), echo)) as port, Client(port) as client:
        assert client.ask(b"GET / HTTP/1.1\r\n\r\n").status == 400
        assert client.ask(get("/", "Host: evil.example")).status == 400
        assert client.ask(get("/")).status == 200
        assert client.ask(b"GET / HTTP/1.0\r\n\r\n").status == 200  # from before there was a Host


def test_which_hosts_are_allowed() -> None:
    loopback = frozenset({"localhost", "127.0.0.1", "[::1]"})
    assert allowed_hosts("127.0.0.1", ()) == allowed_hosts("localhost", ()) == allowed_hosts("::1", ()) == loopback
    assert allowed_hosts("127.0.0.2", ["Shoal.example"]) == loopback | {"127.0.0.2", "shoal.example"}
    assert allowed_hosts("0.0.0.0", ()) is None
    assert allowed_hosts(None, ()) is None
    assert allowed_hosts("0.0.0.0", ["shoal.example"]) == loopback | {"0.0.0.0", "shoal.example"}
    assert allowed_hosts("127.0.0.1", ["*"]) is None
    with pytest.raises(ParameterError, match="allowed_host"):
        allowed_hosts("127.0.0.1", ["http://shoal.example"])
    with pytest.raises(ParameterError, match="allowed_host"):
        allowed_hosts("127.0.0.1", ["shoal.example:80"])


# Origins ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://localhost:9000", "null", "", "file://localhost:8000", "localhost:8000"]
)
def test_a_page_of_another_origin_is_403(method: str, origin: str) -> None:
    response = _client().request(method, "/", headers={"Origin": origin})
    assert "--cors-origin" in _error(response, 403)["message"]
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:8000", "localhost:8000"),
        ("http://localhost", "localhost"),
        ("http://localhost", "localhost:80"),
        ("https://localhost", "localhost"),  # behind a proxy that speaks TLS
        ("https://LOCALHOST:443", "localhost"),
    ],
)
def test_the_servers_own_page_may_ask(origin: str, host: str) -> None:
    response = _client().get("/", headers={"Origin": origin, "Host": host})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_cors_where_it_was_asked_for() -> None:
    client = _client(Front(cors_origins=("https://app.example",)))
    preflight = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    allowed = client.options("/", headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://app.example")
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    answer = client.get("/", headers={"Origin": "https://app.example"})
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    _error(client.options("/", headers=preflight | {"Origin": "https://evil.example"}), 403)
    everybody = _client(Front(cors_origins=("*",)))
    assert everybody.get("/", headers={"Origin": "https://any.example"}).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://app.example/path", "ftp://a"])
def test_an_origin_that_is_none_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ParameterError, match="cors_origin"):
        _client(Front(cors_origins=(origin,)))


# Types ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_passes(media_type: str) -> None:
    assert _client().post("/", content=b"{}", headers={"Content-Type": media_type}).json() == {"size": 2}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=a"},
        {"Content-Type": "application/json-seq"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_another_type_is_415(headers: dict[str, str]) -> None:
    _error(_client().post("/", content=b"{}", headers=headers), 415)


def test_a_post_without_a_body_needs_no_type() -> None:
    assert _client().post("/").json() == {"size": 0}


def test_a_body_in_chunks_needs_a_type() -> None:
    _error(_client().post("/", content=iter([b"{}"])), 415)


def test_uploads_are_multipart() -> None:
    client = _client()
    assert client.post("/v1/files", files={"file": b"a" * 200}).status_code == 200
    assert "multipart" in _error(client.post("/v1/files", json={}), 415)["message"]


# Sizes ------------------------------------------------------------------------------------------------------------------

_JSON = {"Content-Type": "application/json"}


def test_a_body_over_the_limit_is_413() -> None:
    client = _client()
    assert client.post("/", content=b"a" * 100, headers=_JSON).json() == {"size": 100}
    assert "100 bytes" in _error(client.post("/", content=b"a" * 101, headers=_JSON), 413)["message"]


def test_a_chunked_body_over_the_limit_is_413() -> None:
    client = _client()
    assert client.post("/", content=iter([b"a" * 50, b"a" * 50]), headers=_JSON).json() == {"size": 100}
    _error(client.post("/", content=iter([b"a" * 50, b"a" * 51]), headers=_JSON), 413)


def test_an_upload_over_its_limit_is_413() -> None:
    client = _client()
    multipart = {"Content-Type": "multipart/form-data; boundary=a"}
    assert client.post("/v1/files", content=b"a" * 1000, headers=multipart).json() == {"size": 1000}
    _error(client.post("/v1/files", content=b"a" * 1001, headers=multipart), 413)
    _error(client.post("/v1/files", content=iter([b"a" * 1001]), headers=multipart), 413)


def test_sizes_through_sockets_whatever_the_headers_say() -> None:
    app = behind(Front(body_bytes=1000), echo)
    with live(app) as port:
        with Client(port) as client:
            assert json.loads(client.ask(post(b"a" * 1000)).body)["size"] == 1000
            assert client.ask(post(b"a" * 1001)).status == 413
        with Client(port) as client:  # refused by its length alone
            assert client.ask(post(b"").replace(b"Content-Length: 0", b"Content-Length: 99999999999999")).status == 413
        with Client(port) as client:  # longer than it says: the rest would be another request, and is none
            client.send(post(b"").replace(b"Content-Length: 0", b"Content-Length: 10") + b"a" * 20)
            assert client.rest() == b""
        with Client(port) as client:
            client.send(post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            client.send(b"200\r\n" + b"a" * 0x200 + b"\r\n")
            client.send(b"200\r\n" + b"a" * 0x200 + b"\r\n")
            assert client.reply().status == 413


# JSON -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        12345678901234567890123456789,
        {"messages": [{"role": "user", "content": 'a "quoted" [bracket] \\ {brace} \U0001f41f'}], "n": 1.5},
        {"code": "[" * 1000 + '"' + "{" * 1000, "more": '\\"[' * 500},
        [[1, 2, 3]] * 1000,
    ],
)
def test_json_is_decoded(value: Any) -> None:
    assert decode_json(json.dumps(value).encode()) == value
    assert decode_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_nesting_up_to_the_limit() -> None:
    deepest = b"[" * JSON_DEPTH + b"]" * JSON_DEPTH
    assert decode_json(deepest) is not None
    for data in (b"[" + deepest + b"]", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 100_000, b"[{" * 1_000_000):
        with pytest.raises(APIError, match="nested too deeply"):
            decode_json(data)


def test_strings_without_end_take_no_longer_than_others() -> None:
    for data in (
        b'"' + b'\\"' * 500_000 + b"[" * 200,
        b'"' * 500_001 + b"[" * 200,
        b'"' + b"\\" * 500_001 + b"[" * 200,
    ):
        with pytest.raises(APIError):
            decode_json(data)


@pytest.mark.parametrize(
    ("data", "param", "message"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"{'a': 1}", None, "not valid JSON"),
        (b'{"a": 1}}', None, "not valid JSON"),
        (b"\xef\xbb\xbf{}", None, "not valid JSON"),
        (b'{"a": "\xff"}', None, "UTF-8"),
        (b'"\xed\xa0\x80"', None, "UTF-8"),
        (b"1" * 5000, None, "digits"),
        (b'{"temperature": NaN}', "temperature", "finite"),
        (b'{"a": [{"b": -Infinity}]}', "a[0].b", "finite"),
        (b'{"a": 1e999}', "a", "finite"),
        (b'{"messages": [{"content": "\\ud83d"}]}', "messages[0].content", "surrogate"),
        (b'{"a": {"\\udc1f": 1}}', "a", "surrogate"),
        (b'"\\ud83d\\u0061"', None, "surrogate"),
    ],
)
def test_what_is_no_json_of_ours_is_400(data: bytes, param: str | None, message: str) -> None:
    with pytest.raises(APIError, match=message) as caught:
        decode_json(data)
    assert (caught.value.status, caught.value.param) == (400, param)
