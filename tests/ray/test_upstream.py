"""Connections to a server on a socket."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import pytest

from shoal.ray.upstream import Connection, Pool
from tests.server.live import echo, live

Ask = Callable[[Pool, asyncio.Event], Awaitable[None]]
Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n"


async def with_server(pieces: Sequence[bytes], ask: Ask) -> None:
    """``ask`` of a server that reads a head, says these pieces one after the other, and closes the connection: then it
    has ended."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)

    await with_handler(handle, ask)


async def with_handler(handle: Handle, ask: Ask) -> None:
    """``ask`` of a server whose connections are closed behind ``handle``."""
    ended = asyncio.Event()

    async def handle_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        finally:
            writer.close()
            await writer.wait_closed()
            ended.set()

    async with await asyncio.start_server(handle_and_close, "127.0.0.1", 0) as server:
        pool = Pool(*server.sockets[0].getsockname())
        await ask(pool, ended)
        await ended.wait()
        pool.close()
        await asyncio.sleep(0)  # for the sockets to be closed


async def asked_and_read(connection: Connection) -> bytes:
    await connection.ask("GET", b"/", [], b"")
    return await whole(connection)


async def whole(connection: Connection) -> bytes:
    return b"".join([piece async for piece in connection.pieces()])


def test_connections_are_kept() -> None:
    async def ask(port: int) -> None:
        pool = Pool("127.0.0.1", port)
        first = await pool.take()
        for size in (0, 1 << 20):
            await first.ask("POST", b"/a?b=c", [(b"host", b"here"), (b"x", b"y")], b"x" * size)
            assert first.status == 200
            assert b'"size": %d' % size in await whole(first)
        pool.give_back(first)
        again, other = await pool.take(), await pool.take()
        assert again is first
        assert other is not first
        for connection in (again, other):
            connection.close()
        await asyncio.sleep(0)

    with live(echo) as port:
        asyncio.run(ask(port))


def test_an_answer_comes_piece_by_piece() -> None:
    async def ask(pool: Pool, ended: asyncio.Event) -> None:
        connection = await pool.take()
        await connection.ask("GET", b"/", [], b"")
        assert connection.headers[0] == (b"content-type", b"text/plain")
        assert [piece async for piece in connection.pieces()] == [b"net", b"boat"]
        pool.give_back(connection)

    asyncio.run(with_server([_HEAD, b"3\r\nnet\r\n", b"4\r\nboat\r\n", b"0\r\n\r\n"], ask))


@pytest.mark.parametrize("pieces", [(), (b"HTTP/1.1 200",), (_HEAD,), (_HEAD, b"3\r\nne"), (b"no HTTP\r\n\r\n",)])
def test_a_replica_that_ends_in_the_middle_is_an_error(pieces: tuple[bytes, ...]) -> None:
    async def ask(pool: Pool, ended: asyncio.Event) -> None:
        connection = await pool.take()
        with pytest.raises(OSError, match="the replica"):
            await asked_and_read(connection)
        assert not connection.can_be_kept
        pool.give_back(connection)

    asyncio.run(with_server(pieces, ask))


def test_what_comes_before_the_answer_is_not_the_answer() -> None:
    interim = b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\n"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(3):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(interim * number)
            await asyncio.sleep(0.01)
            writer.write(interim + b"HTTP/1.1 20%d OK\r\ncontent-length: 1\r\n\r\n%d" % (number, number))
        await reader.read()

    async def ask(pool: Pool, ended: asyncio.Event) -> None:
        first = await pool.take()
        for number in range(3):
            assert await asked_and_read(first) == b"%d" % number
            assert (first.status, first.headers) == (200 + number, [(b"content-length", b"1")])
            pool.give_back(first)
            assert await pool.take() is first
        first.close()

    asyncio.run(with_handler(handle, ask))


def test_an_answer_that_nobody_asked_for_is_an_error() -> None:
    answers = b"".join(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n%s" % body for body in (b"net", b"cod"))

    async def ask(pool: Pool, ended: asyncio.Event) -> None:
        connection = await pool.take()
        with pytest.raises(OSError, match="the replica"):
            await asked_and_read(connection)
        assert not connection.can_be_kept
        pool.give_back(connection)

    asyncio.run(with_server([answers], ask))


def test_nobody_listens() -> None:
    async def ask() -> None:
        with pytest.raises(OSError, match=r".+"):
            await Pool("127.0.0.1", 1).take()

    asyncio.run(ask())


def test_a_connection_that_was_reset_meanwhile_is_not_used() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await reader.readexactly(1)
        linger = struct.pack("ii", 1, 0)  # closed with a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async def ask(pool: Pool, ended: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection(pool.host, pool.port)
        connection = Connection(reader, writer)
        await asked_and_read(connection)
        assert connection.can_be_kept
        writer.write(b"x")
        while reader.exception() is None:
            await asyncio.sleep(0.01)
        assert not connection.can_be_kept
        connection.close()

    asyncio.run(with_handler(handle, ask))


def test_a_connection_that_was_closed_meanwhile_is_not_used() -> None:
    async def ask(pool: Pool, ended: asyncio.Event) -> None:
        first = await pool.take()
        await asked_and_read(first)
        assert first.can_be_kept
        pool.give_back(first)
        while first.can_be_kept:
            await asyncio.sleep(0.01)
        second = await pool.take()
        assert second is not first
        ended.clear()
        second.close()

    asyncio.run(with_server([b"HTTP/1.1 204 No Content\r\n\r\n", b""], ask))
