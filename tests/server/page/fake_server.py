"""The page over an invented engine: `python -m tests.server.page.fake_server [PORT]`, and what its tests in a browser talk to.

A chat's prompt says what becomes of it: "refuse" is answered 400, "break" fails in the middle, "think" thinks first.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from shoal.server.routes.page import ASSETS, HOME, page_folder, routes
from tests.server.page.fake_engine import STEP_SECONDS, FakeEngine, FakeSequence

KEY = "fish"
ANSWER = (
    "A shoal moves as one because each fish watches only its nearest neighbours. No one leads; a turn begins anywhere and"
    " passes through all of them within a heartbeat. Seen from below they are a single dark shape, seen from the side a curtain of"
    " silver, and when something large swims in, the curtain opens and closes behind it. What looks like a plan is a rule so short that"
    " a herring can keep it: stay close, do not touch, go where the others go."
)
WORDS = ANSWER.split(" ")


class FakeServer:
    """``key``: what everything but the page's files needs, if not None. ``moves``: the engine makes steps by itself."""

    def __init__(self, engine: FakeEngine, key: str | None = None, moves: bool = True) -> None:
        self.engine = engine
        self.key = key
        self.moves = moves
        self.bodies: list[dict[str, Any]] = []  # of the chats that came
        page = routes(page_folder(), engine.state)
        chat = Route("/v1/chat/completions", self._chat, methods=["POST"])
        self.app = Starlette(routes=[*page, chat], lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        stepping = asyncio.create_task(self._keep_stepping())
        yield
        stepping.cancel()

    async def _keep_stepping(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            if self.moves:
                self.engine.step()

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        """The app behind its key."""
        if scope["type"] == "http" and self.key is not None and not _is_public(scope["path"]):
            request = Request(scope)
            if request.headers.get("authorization") != f"Bearer {self.key}":
                await _error(401, "Incorrect API key provided")(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        prompt = body["messages"][-1]["content"]
        if "refuse" in prompt:
            return _error(400, "messages[0].content: is refused, as it asks to be")
        sequence = self.engine.add("you", 40 + 4 * len(prompt), body["max_tokens"])
        headers = {"X-Request-Id": sequence.id}
        return StreamingResponse(self._stream(sequence, prompt), media_type="text/event-stream", headers=headers)

    async def _stream(self, sequence: FakeSequence, prompt: str) -> AsyncIterator[str]:
        sent = 0
        try:
            while sent < sequence.max_tokens:
                await asyncio.sleep(STEP_SECONDS)
                if sequence.output == sent:
                    yield ": keep-alive\n\n"
                for _ in range(sequence.output - sent):
                    yield _data(
                        sequence.id, choices=[{"index": 0, "delta": _delta(sent, prompt), "finish_reason": None}]
                    )
                    sent += 1
                if "break" in prompt and sent > 5:
                    yield f"data: {_json(_error_body('a step failed', 'server_error'))}\n\n"
                    return
            yield _data(sequence.id, choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
            yield _data(
                sequence.id, choices=[], usage={"prompt_tokens": sequence.prompt_tokens, "completion_tokens": sent}
            )
            yield "data: [DONE]\n\n"
        finally:
            self.engine.remove(sequence, "abort")


def _is_public(path: str) -> bool:
    return path == HOME or path.startswith(ASSETS)


def _delta(index: int, prompt: str) -> dict[str, str]:
    word = WORDS[index % len(WORDS)] + " "
    return {"reasoning": word, "reasoning_content": word} if "think" in prompt and index < 12 else {"content": word}


def _data(number: str, **fields: Any) -> str:
    return f"data: {_json({'id': number, 'object': 'chat.completion.chunk', **fields})}\n\n"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(_error_body(message, "invalid_request_error"), status)


def _error_body(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


@contextlib.contextmanager
def serving(server: FakeServer, port: int = 0) -> Iterator[str]:
    """Serves in a thread of this process; gives the address."""
    config = uvicorn.Config(
        server.asgi, host="127.0.0.1", port=port, interface="asgi3", log_level="error", timeout_graceful_shutdown=1
    )
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        while not runner.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        runner.should_exit = True
        thread.join()


def main() -> None:
    engine = FakeEngine()
    engine.now -= 120
    engine.run(120)
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    with serving(FakeServer(engine), port) as address:
        print(f"the page is at {address}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
