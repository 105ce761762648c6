"""An app of the routes for files and batches alone, whose clients say who they are in a header."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import openai
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.openai.schema import APIError
from shoal.server.routes import batches, files
from shoal.server.store.runner import BatchRunner
from shoal.server.store.store import Store

LIMIT = 3 << 20


class Owners:
    """In the place of the layer that looks at API keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = Request(scope).headers.get("authorization", "")
            scope.setdefault("state", {})["owner"] = key.removeprefix("Bearer ")
        await self._app(scope, receive, send)


async def tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return Response(msgspec.json.encode(error.body()), error.status, media_type="application/json")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "data", max_file_size=LIMIT)
    yield store
    store.close()


@pytest.fixture
def runner(store: Store) -> Iterator[BatchRunner]:
    runner = BatchRunner(store, pause=0.0)
    yield runner
    runner.stop()


@pytest.fixture
def app(store: Store, runner: BatchRunner) -> Starlette:
    return Starlette(
        routes=[*files.routes(store.files, idle=0.2), *batches.routes(store, runner)],
        middleware=[Middleware(Owners)],
        exception_handlers={APIError: tell},
    )


@pytest.fixture
def web(app: Starlette) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture
def client(app: Starlette) -> Iterator[Callable[[], openai.OpenAI]]:
    """Makes OpenAI clients, each with a key of its own."""
    keys = itertools.count()
    with TestClient(app) as http:
        yield lambda: openai.OpenAI(
            api_key=f"key-{next(keys)}", base_url="http://testserver/v1", http_client=http, max_retries=0
        )
