"""Answers on their way out: whole ones that are given up when their client goes, and streams of server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from starlette.types import Receive, Scope, Send

from shoal.openai.convert import failure
from shoal.openai.schema import APIError
from shoal.requests.outputs import RequestOutput
from shoal.server.service import Service, Tickets
from shoal.server.worker import AnyOutput

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
COMMENT = b": keep-alive\n\n"
_T = TypeVar("_T")


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


class Writer(Protocol):
    """Turns outputs into the bytes of one kind of stream."""

    def start(self) -> bytes:
        """What comes before all else; may be nothing."""

    def push(self, output: AnyOutput, number: int) -> bytes:
        """What the newest output of ticket ``number`` adds; with the end, if it is the last."""

    def fail(self, error: APIError) -> bytes:
        """The end of a stream that cannot go on."""


async def unless_gone(receive: Receive, work: Awaitable[_T]) -> _T:
    """The result of ``work``, which is cancelled when the client goes. Raises ClientGoneError then. The body must have been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An ASGI response: what ``writer`` makes of the outputs of ``tickets``, until the last of them, or until the client goes or stops
    reading: then they are given up. A comment goes out when there was nothing for ``keep_alive`` seconds."""

    def __init__(
        self, service: Service, tickets: Tickets, writer: Writer, log: Callable[[RequestOutput], None]
    ) -> None:
        self._service, self._tickets, self._writer, self._log = service, tickets, writer, log
        self._gone = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all."""
        watch = asyncio.ensure_future(_gone(receive))
        watch.add_done_callback(lambda done: None if done.cancelled() else self._give_up())
        try:
            await self._send(send)
        except (ClientGoneError, OSError):
            pass  # nobody is left to tell
        finally:
            watch.cancel()
            self._tickets.close()

    def _give_up(self) -> None:
        self._gone = True
        self._tickets.close()
        self._tickets.news.set()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        timer = _Nudge(self._tickets.news, self._service.settings.keep_alive)
        data, left = self._writer.start(), len(self._tickets.all)
        try:
            while left:
                if data:
                    await self._write(send, data)
                    timer.restart()
                try:
                    told = await self._tickets.next()
                except APIError as error:
                    data = self._writer.fail(error)
                    break
                if self._gone:
                    raise ClientGoneError
                data = b"".join(self._writer.push(output, number) for number, output in told)
                left = 0 if any(map(_failed, told)) else left - self._note_ends(told)
                if timer.due and not data:
                    data = COMMENT
            await send({"type": "http.response.body", "body": data})
        finally:
            timer.stop()

    def _note_ends(self, told: list[tuple[int, AnyOutput]]) -> int:
        ended = [output for _, output in told if output.finished]
        for output in ended:
            if isinstance(output, RequestOutput):
                self._log(output)
        return len(ended)

    async def _write(self, send: Send, data: bytes) -> None:
        """A reader that reads nothing for a while is given up; the engine does not wait for it, as outputs are not kept."""
        try:
            async with asyncio.timeout(self._service.settings.stall_timeout):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise ClientGoneError from None


def _failed(told: tuple[int, AnyOutput]) -> bool:
    """Whether this ends the stream, whatever else is under way: the writer has told why."""
    _, output = told
    return isinstance(output, RequestOutput) and failure(output) is not None


class _Nudge:
    """Sets ``news`` when nothing was sent for so long."""

    def __init__(self, news: asyncio.Event, seconds: float) -> None:
        self._news, self._seconds = news, seconds
        self._loop = asyncio.get_running_loop()
        self._sent = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._look)

    @property
    def due(self) -> bool:
        return self._loop.time() - self._sent >= self._seconds

    def restart(self) -> None:
        self._sent = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left = self._sent + self._seconds - self._loop.time()
        if left <= 0:
            self._news.set()
            left = self._seconds
        self._timer = self._loop.call_later(left, self._look)
