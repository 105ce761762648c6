"""A server as a process: its address, its signals, its exit codes."""

from __future__ import annotations

import errno
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from starlette.types import Receive, Scope, Send

from shoal.errors import EngineError, ParameterError
from shoal.server.run import Server, Serving, listen, serve
from tests.server.live import PATIENCE, Client, Reply, answer, echo, get

# /hold answers when the file that its query names is there, /endless never; others say whether the server drains.
PROGRAM = """
import asyncio, os, sys
from shoal.server.protocol import Bounds
from shoal.server.run import Serving, serve

draining = []

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                print("shut down", file=sys.stderr, flush=True)
                return
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 503 if draining else 200, "headers": headers})
    if scope["path"] in ("/hold", "/endless"):
        await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
        while scope["path"] == "/endless" or not os.path.exists(scope["query_string"].decode()):
            await asyncio.sleep(0.01)
    await send({"type": "http.response.body", "body": b"done"})

def on_drain():
    draining.append(True)
    print("draining", file=sys.stderr, flush=True)

serving = Serving(port=0, drain_seconds=float(sys.argv[1]), bounds=Bounds(closing_seconds=0.1))
sys.exit(serve(app, serving, on_drain=on_drain))
"""


class Process:
    """A server in a process; ``port`` it listens on, ``lines`` of its stderr."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: queue.Queue[str] = queue.Queue()
        assert process.stderr is not None
        self.reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self.reader.start()
        self.port = 0

    def wait_until_ready(self) -> None:
        first = self.line()
        assert first.startswith("shoal: listening on http://127.0.0.1:")
        self.port = int(first.rpartition(":")[2])

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.put(line.rstrip())

    def line(self) -> str:
        return self.lines.get(timeout=PATIENCE)

    def kill(self, number: int) -> None:
        self.process.send_signal(number)

    def code(self) -> int:
        return self.process.wait(PATIENCE)


@contextmanager
def _process(drain_seconds: float = PATIENCE) -> Iterator[Process]:
    command = [sys.executable, "-c", PROGRAM, str(drain_seconds)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        server = Process(process)
        try:
            server.wait_until_ready()
            yield server
        finally:
            process.kill()
            server.reader.join(PATIENCE)


def _begin(client: Client, path: str) -> None:
    """Ask, and wait until the answer has begun."""
    client.send(get(path))
    seen = b""
    while b"begun" not in seen:
        piece = client.socket.recv(1000)
        assert piece
        seen += piece


def _ask(port: int, path: str = "/") -> Reply:
    with Client(port) as client:
        return client.ask(get(path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_with_0(number: int) -> None:
    with _process() as server, Client(server.port) as idle:
        assert idle.ask(get()).status == 200
        server.kill(number)
        assert idle.rest() == b""
        assert (server.line(), server.line()) == ("draining", "shut down")
        assert server.code() == 0


def test_requests_under_way_are_answered_and_new_ones_refused(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with _process() as server, Client(server.port) as client:
        _begin(client, f"/hold?{done}")
        server.kill(signal.SIGTERM)
        assert server.line() == "draining"
        refused = _ask(server.port)
        assert (refused.status, refused.headers["connection"]) == (503, "close")
        done.touch()
        assert b"done" in client.rest()
        assert server.code() == 0


def test_what_does_not_end_in_time_is_cut() -> None:
    with _process(drain_seconds=0.2) as server, Client(server.port) as client:
        _begin(client, "/endless")
        server.kill(signal.SIGTERM)
        assert b"done" not in client.rest()
        assert server.code() == 0
        assert server.line() == "draining"


def test_a_connection_without_a_request_holds_nothing_up() -> None:
    with _process() as server, Client(server.port) as silent, Client(server.port) as half:
        half.send(b"GET / HTTP/1.1\r\nHost:")
        assert _ask(server.port).status == 200
        server.kill(signal.SIGTERM)
        assert server.code() == 0
        assert silent.rest() == b""


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGINT, 130)],
)
def test_a_second_signal_ends_at_once(first: int, second: int, code: int) -> None:
    with _process() as server, Client(server.port) as client:
        _begin(client, "/endless")
        server.kill(first)
        assert server.line() == "draining"
        server.kill(second)
        assert server.code() == code


# Without a process ------------------------------------------------------------------------------------------------------


def test_stop_from_another_thread_sets_the_code() -> None:
    addresses: queue.Queue[str] = queue.Queue()
    codes: queue.Queue[int] = queue.Queue()
    server = Server(echo, Serving(port=0))
    thread = threading.Thread(target=lambda: codes.put(server.main(addresses.put)))
    thread.start()
    port = int(addresses.get(timeout=PATIENCE).rpartition(":")[2])
    assert _ask(port).status == 200
    server.stop(3)
    server.stop(4)
    thread.join(PATIENCE)
    assert codes.get(timeout=PATIENCE) == 3
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_an_app_that_does_not_start_is_an_error() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "lifespan"
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with pytest.raises(EngineError, match="did not start"):
        serve(app, Serving(port=0))


def test_a_port_in_use_is_one_line() -> None:
    with listen(Serving(port=0))[0] as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ParameterError, match=rf"^port: got {port}, must be free .*127\.0\.0\.1: .*in use$"):
            serve(echo, Serving(port=port))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "", "a" * 100, "127.0.0.1.1"])
def test_a_host_that_is_not_ours_is_one_line(host: str) -> None:
    with pytest.raises(ParameterError, match="host"):
        listen(Serving(host=host, port=0))


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_one_line(port: int) -> None:
    with pytest.raises(ParameterError, match="65535"):
        listen(Serving(port=port))


def test_a_name_is_listened_on_at_all_its_addresses() -> None:
    listeners = listen(Serving(host="localhost", port=0))
    ports = {listener.getsockname()[1] for listener in listeners}
    for listener in listeners:
        listener.close()
    assert len(ports) == 1
    assert len({listener.family for listener in listeners}) == len(listeners)


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()  # left by a server that was killed
    addresses: queue.Queue[str] = queue.Queue()
    server = Server(echo, Serving(uds=str(path)))
    thread = threading.Thread(target=server.main, args=(addresses.put,))
    thread.start()
    try:
        assert addresses.get(timeout=PATIENCE) == f"unix:{path}"
        with pytest.raises(ParameterError, match=r"uds: .*in use"):
            listen(Serving(uds=str(path)))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))
            client.sendall(get("/", "Connection: close"))
            assert client.recv(12) == b"HTTP/1.1 200"
    finally:
        server.stop()
        thread.join(PATIENCE)
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ParameterError, match="uds"):
        listen(Serving(uds=str(path)))
    assert path.read_text() == "mine"


def test_a_large_answer_is_whole_though_the_server_stops_meanwhile() -> None:
    body = b"a" * 3_000_000
    asked = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await answer(send, body)
            asked.set()

    addresses: queue.Queue[str] = queue.Queue()
    server = Server(app, Serving(port=0))
    thread = threading.Thread(target=server.main, args=(addresses.put,))
    thread.start()
    with Client(int(addresses.get(timeout=PATIENCE).rpartition(":")[2]), receive_buffer=10_000) as client:
        client.send(get())
        assert asked.wait(PATIENCE)
        server.stop()
        assert client.reply().body == body
    thread.join(PATIENCE)
    assert not thread.is_alive()
