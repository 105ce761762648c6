"""Connections that ask for too much, too slowly, or do not read: through real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import ExitStack

import pytest
from starlette.types import Receive, Scope, Send

from shoal.server.protocol import Bounds
from tests.server.live import PATIENCE, Client, answer, echo, get, live, post

# Heads -----------------------------------------------------------------------------------------------------------------


def test_a_head_of_the_allowed_size_passes() -> None:
    with live(echo) as port, Client(port) as client:
        assert client.ask(get("/", "X-Long: " + "a" * 16_000)).status == 200


@pytest.mark.parametrize(
    "head",
    [
        get("/", "X-Long: " + "a" * 17_000),
        get("/" + "a" * 17_000),
        get("/", *(f"X-{i}: {'a' * 1000}" for i in range(17))),
        get("/", "X-Very-Long: " + "a" * 1_000_000),
        b"GET / HTTP/1.1\r\nX-Unfinished: " + b"a" * 1_000_000,
        b"GET /" + b"a" * 1_000_000,
        b"\r\n" * 20_000,
    ],
    ids=["one header", "target", "many headers", "a megabyte", "no end", "target without end", "empty lines"],
)
def test_a_head_over_16_kb_is_431_and_the_connection_closed(head: bytes) -> None:
    with live(echo) as port, Client(port) as client:
        reply = client.ask(head)
        assert (reply.status, reply.headers["connection"]) == (431, "close")
        assert "16384 bytes" in reply.error["message"]
        assert reply.headers["x-request-id"]
        assert client.rest() == b""


def test_a_head_that_grows_slowly_is_431_too() -> None:
    with live(echo) as port, Client(port) as client:
        client.send(b"GET / HTTP/1.1\r\n")
        for _ in range(17):
            client.send(b"X-Long: " + b"a" * 1000 + b"\r\n")
        assert client.reply().status == 431


def test_too_many_headers_are_431() -> None:
    with live(echo, Bounds(headers=20)) as port:
        with Client(port) as client:
            assert client.ask(get("/", *(f"X-{i}: a" for i in range(19)))).status == 200
            assert client.ask(get("/", *(f"X-{i}: a" for i in range(19)))).status == 200  # counted for each request
        with Client(port) as client:
            assert "20 headers" in client.ask(get("/", *(f"X-{i}: a" for i in range(20)))).error["message"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nNo colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        b"POST / HTTP/1.1\r\nContent-Length: -4\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    ],
)
def test_what_is_not_http_is_400(garbage: bytes) -> None:
    with live(echo) as port, Client(port) as client:
        reply = client.ask(garbage)
        assert reply.status == 400
        assert reply.error["type"] == "invalid_request_error"
        assert client.rest() == b""


def test_an_offer_of_http2_is_answered_in_http1() -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    with live(echo) as port, Client(port) as client:
        assert client.ask(get("/a", *offer)).status == 200
        seen = json.loads(client.ask(post(b"12345", *offer, path="/b")).body)
        assert (seen["path"], seen["size"], "upgrade" in seen["headers"]) == ("/b", 5, False)
        assert client.ask(get("/c", "Connection: close, Upgrade", "Upgrade: h2c")).headers["connection"] == "close"


def test_a_body_after_an_offer_of_http2_may_come_in_pieces() -> None:
    request = post(b"a" * 100_000, "Connection: Upgrade", "Upgrade: h2c")
    with live(echo) as port, Client(port) as client:
        for start in range(0, len(request), 7000):
            client.send(request[start : start + 7000])
        assert json.loads(client.reply().body)["size"] == 100_000


def test_connect_is_refused() -> None:
    with live(echo) as port, Client(port) as client:
        assert client.ask(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n").status == 400


# Time -----------------------------------------------------------------------------------------------------------------


def test_a_head_that_is_not_whole_in_time_is_408() -> None:
    with live(echo, Bounds(head_seconds=0.2)) as port, Client(port) as client:
        reply = client.ask(b"GET / HTTP/1.1\r\nHost: loc")
        assert (reply.status, client.rest()) == (408, b"")


def test_bytes_now_and_then_do_not_extend_the_time_of_a_head() -> None:
    with live(echo, Bounds(head_seconds=0.5)) as port, Client(port) as client:
        client.send(b"GET / HTTP/1.1\r\n")
        client.socket.settimeout(0.05)
        for number in range(1000):
            try:
                assert client.socket.recv(12) == b"HTTP/1.1 408"
                return
            except TimeoutError:
                client.send(b"X-%d: a\r\n" % number)
    pytest.fail("the connection was still open")


def test_a_connection_that_asks_nothing_is_closed_without_a_word() -> None:
    with live(echo, Bounds(head_seconds=0.2)) as port, Client(port) as client:
        assert client.rest() == b""


def test_empty_lines_do_not_keep_an_idle_connection_open() -> None:
    with live(echo, Bounds(head_seconds=1, keep_alive_seconds=PATIENCE)) as port, Client(port) as client:
        assert client.ask(get()).status == 200
        client.send(b"\r\n")
        assert client.reply().status == 408


def test_an_idle_connection_is_closed_after_a_while() -> None:
    with live(echo, Bounds(head_seconds=PATIENCE, keep_alive_seconds=0.2)) as port, Client(port) as client:
        assert client.ask(get()).status == 200
        assert client.rest() == b""


def test_many_requests_on_one_connection_each_have_their_time() -> None:
    bounds = Bounds(head_seconds=5, body_idle_seconds=5)
    with live(echo, bounds) as port, Client(port) as client:
        for size in range(50):
            assert json.loads(client.ask(post(b"a" * size)).body)["size"] == size


def test_a_body_that_pauses_is_408() -> None:
    with live(echo, Bounds(body_idle_seconds=0.2)) as port, Client(port) as client:
        reply = client.ask(post(b"a" * 100)[:-1])
        assert (reply.status, client.rest()) == (408, b"")


def test_a_body_that_trickles_is_408() -> None:
    with live(echo, Bounds(body_idle_seconds=PATIENCE, body_seconds=0.5)) as port, Client(port) as client:
        client.send(post(b"a" * 10_000)[:-10_000])
        client.socket.settimeout(0.05)
        for _ in range(1000):
            try:
                assert client.socket.recv(12) == b"HTTP/1.1 408"
                return
            except TimeoutError:
                client.send(b"a")
    pytest.fail("the connection was still open")


def test_what_stands_beside_the_chunks_of_a_body_has_no_more_time_or_room_than_they() -> None:
    start = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with live(echo, Bounds(body_idle_seconds=0.2)) as port, Client(port) as client:
        assert client.ask(start + b"1;extension=").status == 408
    with live(echo) as port:
        with Client(port) as client:
            assert client.ask(start + b"1;extension=" + b"a" * 1_000_000).status == 431
        with Client(port) as client:
            assert client.ask(start + b"0\r\nX-Trailer: " + b"a" * 1_000_000).status == 431


def test_a_trailer_is_no_header_of_this_request_or_the_next() -> None:
    chunked = (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Trailer: a\r\n\r\n"
    )
    with live(echo) as port, Client(port) as client:
        for request in (chunked, get()):
            reply = client.ask(request)
            assert (reply.status, "x-trailer" in json.loads(reply.body)["headers"]) == (200, False)


def test_the_app_of_a_body_that_never_ends_is_told() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while scope["type"] == "http":
            seen.append((await receive())["type"])
            if seen[-1] == "http.disconnect":
                return

    with live(app, Bounds(body_idle_seconds=0.2)) as port, Client(port) as client:
        assert client.ask(post(b"a" * 100)[:-1]).status == 408
    assert seen == ["http.request", "http.disconnect"]


def test_200_stalled_connections_leave_the_server_live() -> None:
    bounds = Bounds(head_seconds=PATIENCE, body_idle_seconds=PATIENCE)
    with live(echo, bounds) as port, ExitStack() as stack:
        for number in range(200):
            client = stack.enter_context(Client(port))
            client.send(b"GET / HTTP/1.1\r\nHost:" if number % 2 else post(b"a" * 100)[:-1])
        for _ in range(20):
            with Client(port) as client:
                assert client.ask(get()).status == 200


def test_stalled_connections_are_all_closed() -> None:
    with live(echo, Bounds(head_seconds=1)) as port, ExitStack() as stack:
        clients = [stack.enter_context(Client(port)) for _ in range(50)]
        for client in clients:
            client.send(b"GET / HTTP/1.1\r\nHost:")
        for client in clients:
            assert client.reply().status == 408


# Answers that come before the request is whole ------------------------------------------------------------------------


async def _refuse_early(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await answer(send, b"{}", 413)


def test_an_early_answer_reaches_a_client_that_is_still_sending() -> None:
    with live(_refuse_early) as port, Client(port) as client:
        client.send(post(b"a" * 3_000_000)[:-1])
        reply = client.reply()
        assert (reply.status, reply.headers["connection"]) == (413, "close")


def test_a_client_that_sends_on_and_on_is_cut() -> None:
    with live(_refuse_early, Bounds(closing_seconds=0.2)) as port, Client(port) as client:
        client.send(post(b"a" * 1000)[:-500])
        assert client.reply().status == 413
        with pytest.raises(OSError, match=r"reset|[Pp]ipe"):
            _send_for_ever(client)


def _send_for_ever(client: Client) -> None:
    while True:
        client.send(b"a" * 100_000)


def test_an_answer_to_a_whole_request_keeps_the_connection() -> None:
    with live(_refuse_early) as port, Client(port) as client:
        for _ in range(3):
            reply = client.ask(get())
            assert (reply.status, "connection" in reply.headers) == (413, False)


def test_expect_100_continue() -> None:
    with live(echo) as port, Client(port) as client:
        client.send(post(b"12345", "Expect: 100-continue")[:-5])
        assert client.reply().status == 100
        assert json.loads(client.ask(b"12345").body)["size"] == 5


# Several requests at once ---------------------------------------------------------------------------------------------


class _Held:
    """An app whose answers wait until they are let go; counts the requests whose clients went away before."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.gone = threading.Semaphore(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.started.release()
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.release()


def test_requests_sent_ahead_are_answered_in_order() -> None:
    with live(echo) as port, Client(port) as client:
        client.send(b"".join(get(f"/{number}") for number in range(8)))
        assert [json.loads(client.reply().body)["path"] for _ in range(8)] == [f"/{number}" for number in range(8)]


def test_not_too_many_requests_are_sent_ahead() -> None:
    app = _Held()
    with live(app) as port, Client(port) as client:
        client.send(get() * 9)
        assert client.rest() == b""
        assert app.gone.acquire(timeout=PATIENCE)


def test_a_client_that_goes_is_noticed_though_it_has_sent_more() -> None:
    app = _Held()
    with live(app, Bounds(stall_seconds=PATIENCE)) as port:
        with Client(port) as client:
            client.send(get() + b"GET / HTTP/1.1\r\nHo")
            assert app.started.acquire(timeout=PATIENCE)
        assert app.gone.acquire(timeout=PATIENCE)


def test_garbage_after_a_request_is_not_taken_for_its_answer() -> None:
    app = _Held()
    with live(app) as port, Client(port) as client:
        client.send(get() + b"hello\r\n\r\n")
        assert client.rest() == b""
        assert app.gone.acquire(timeout=PATIENCE)


# Clients that do not read ---------------------------------------------------------------------------------------------


class _Endless:
    """An app that streams until its client is gone; ``sent`` bytes."""

    def __init__(self) -> None:
        self.sent = 0
        self.gone = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await receive()
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"a" * 10_000, "more_body": True})
            self.sent += 10_000
            await asyncio.sleep(0)
        self.gone.set()


def test_a_client_that_stops_reading_is_cut_and_the_app_told() -> None:
    app = _Endless()
    with live(app, Bounds(stall_seconds=0.3)) as port, Client(port, receive_buffer=10_000) as client:
        client.send(get())
        assert app.gone.wait(PATIENCE)
        assert app.sent < 2_000_000  # what the kernel's buffers hold, and ours


def test_a_client_that_reads_slowly_is_served() -> None:
    body = b"a" * 8_000_000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await answer(send, body)

    pause = threading.Event()
    with live(app, Bounds(stall_seconds=1)) as port, Client(port, receive_buffer=10_000) as client:
        client.send(get("/", "Connection: close"))
        read = 0
        for _ in range(30):  # together longer than the client may read nothing at all
            read += len(client.socket.recv(200_000, 0))
            pause.wait(0.05)
        read += len(client.rest())
        assert read > len(body)
